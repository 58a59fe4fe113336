"""How to do again what a report shows: the commands, word for word."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from tutelage.report.facts import method_options
from tutelage.report.records import Arm, Comparison, Run

Command = tuple[str, str]
"""What it does, and the command."""


def run_commands(run: Run) -> list[Command]:
    """Run the saved recipe anew; go on with a run that has not ended."""
    if not run.recipe_text:
        return []
    folder, recipe = shown(run.folder), shown(run.folder / "recipe.yaml")
    commands = [
        ("Run it again, into a new folder", _line("tutelage", "run", recipe, "--dir", f"{folder}-again"))
    ]
    if run.status != "done":
        commands.insert(0, ("Go on where it stopped", _line("tutelage", "resume", folder)))
    return commands


def comparison_commands(comparison: Comparison) -> list[Command]:
    """Compare the same methods over the same seeds anew; go on with a comparison that has runs left.

    The command line can name methods with the options that the recipe has for them; others need Python.
    """
    if not comparison.arms:
        return []
    folder = shown(comparison.folder)
    write = _command_line if _typeable(comparison) else _python
    commands = [("Compare again, into a new folder", write(comparison, f"{folder}-again"))]
    if sum(entry.status == "done" for entry in comparison.entries) < comparison.planned:
        commands.insert(0, ("Go on where it stopped, and try failed runs again", write(comparison, folder)))
    return commands


def shown(path: Path) -> str:
    """A path as one would type it from here: relative where it lies below the working folder."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _typeable(comparison: Comparison) -> bool:
    """Whether the command line can say it: options are the recipe's own, and one seed alone is seed 0."""
    own = method_options(comparison.recipe)
    seeds = comparison.data.get("seeds")
    if not isinstance(seeds, list) or (len(seeds) == 1 and seeds != [0]):
        return False
    for arm in comparison.arms:
        if arm.name not in own:
            if arm.options:
                return False
        elif _ran_with(arm, own[arm.name]) != own[arm.name]:
            return False
    return True


def _ran_with(arm: Arm, own: dict[str, Any]) -> dict[str, Any]:
    """A method's options before any tuning."""
    asked = own | arm.options
    return asked if arm.tuning else method_options(arm.recipe).get(arm.name, asked)


def _command_line(comparison: Comparison, folder: str) -> str:
    seeds = comparison.data["seeds"]
    counted = str(len(seeds)) if seeds == list(range(len(seeds))) else ",".join(map(str, seeds))
    names = ",".join(arm.name for arm in comparison.arms)
    words = [
        "tutelage",
        "compare",
        shown(comparison.folder / "recipe.yaml"),
        "--methods",
        names,
        "--seeds",
        counted,
    ]
    if comparison.baseline is not None:
        words += ["--baseline", comparison.baseline]
    if comparison.trials:
        words += ["--trials", str(comparison.trials)]
    return _line(*words, "--dir", folder)


def _python(comparison: Comparison, folder: str) -> str:
    arguments = {
        "methods": [{"name": _method_name(arm), **arm.options} for arm in comparison.arms],
        "seeds": comparison.data.get("seeds"),
        "baseline": comparison.baseline,
        **({"trials": comparison.trials} if comparison.trials else {}),
        "folder": folder,
    }
    lines = [f"    {name}={value!r}," for name, value in arguments.items()]
    recipe = shown(comparison.folder / "recipe.yaml")
    return "\n".join(
        ["from tutelage.runs.compare import compare", "", "compare(", f"    {recipe!r},", *lines, ")"]
    )


def _method_name(arm: Arm) -> str:
    """The method behind a label: where a method comes twice, its label has its options too (``kd-temperature=2``)."""
    return arm.name.partition("-")[0] if "=" in arm.name and arm.options else arm.name


def _line(*words: str) -> str:
    return shlex.join(words)
