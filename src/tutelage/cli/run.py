"""`tutelage run`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tutelage.cli import figures
from tutelage.cli.arguments import Overrides, Quiet, RecipeName, given_folder
from tutelage.cli.output import AsJson, kept_for_json, print_json, print_table, say
from tutelage.cli.processes import is_first_process


def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="Run folder; left out: the recipe's, else runs/RECIPE-METHOD-SEED."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, train and write nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the folder holds.")] = False,
    no_progress: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Distil a student, as a recipe says.

    Nothing is written before recipe, models, data and one dry batch are found valid. The folder then holds the
    student, the metrics, checkpoints to resume from, and report.html.

    \b
    Examples
      tutelage run digits                             a shipped recipe
      tutelage run my.yaml --dry-run                  check it, train nothing
      tutelage run digits method=nkd method.gamma=2   a method and its option
      tutelage run cifar10 data.path=/data/cifar10    images on this machine
      torchrun --nproc-per-node 2 -m tutelage run digits

    \b
    Exit codes
      0 done   1 failed   2 wrong usage, recipe or data
      3 method, teacher and data do not fit together
      130, 143 stopped by Ctrl-C, SIGTERM; `tutelage resume` goes on
    """
    from tutelage.recipe import load_recipe

    with kept_for_json(as_json):
        loaded = load_recipe(recipe, overrides or ())
        from tutelage import runs  # after the recipe's own errors, which need not wait for torch

        if dry_run:
            plan = runs.check(loaded)
        else:
            methods = "+".join(method.name for method in loaded.method)
            place = given_folder(
                folder, loaded.output.dir, f"{Path(recipe).stem}-{methods}-{loaded.train.seed}"
            )
            result = runs.distill(
                loaded, folder=place, resume=resume, progress=False if no_progress else None
            )
    if not is_first_process():
        return
    if dry_run:
        print_json(plan) if as_json else _print_plan(plan)
    else:
        print_json({"folder": str(result.folder), **result.result}) if as_json else print_result(
            result.folder, result.result
        )


def print_result(folder: Path, result: dict[str, Any]) -> None:
    """Student beside teachers, then where everything is; the report's path comes last."""
    models = {"student": result.get("student") or {}, **(result.get("teachers") or {})}
    split = "test" if result.get("test") else "validation"
    metrics = list(result.get(split) or {})
    shown = [name for name in metrics if "[" not in name][:4]
    rows = []
    for name, model in models.items():
        values = (result.get(split) if name == "student" else model.get(split)) or {}
        rows.append(
            [
                name,
                str(model.get("model", "-")),
                *(figures.metric(metric, values.get(metric)) for metric in shown),
                figures.amount(model.get("parameters")),
                figures.amount(model.get("flops")),
                figures.milliseconds(model.get("latency_ms")),
            ]
        )
    columns = ["", "model", *shown, "parameters", "FLOPs", "latency"]
    title = f"{result.get('name')}: {split} metrics after {figures.duration(result.get('train_seconds'))} of training"
    print_table(columns, rows, title=title, right=columns[2:])
    for name, table in (result.get("tables") or {}).items():
        rows = [[_picture_or(_short, value) for value in row] for row in table["rows"]]
        print_table(table["columns"], rows, title=name)
    report = folder / "report.html"
    say(f"student  {folder / 'student'}")
    say(f"report   {report}" if report.exists() else f"folder   {folder}")


def _picture_or(write: Callable[[Any], str], value: Any) -> str:
    return "in the report" if isinstance(value, str) and value.startswith("data:image/") else write(value)


def _print_plan(plan: dict[str, Any]) -> None:
    rows = []
    for key, value in plan.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        rows += [[key if first else "", str(name), _short(part)] for first, (name, part) in _marked(parts)]
    print_table(["", "", ""], rows, title="Everything fits together; nothing was trained or written")


def _marked(parts: Any) -> list[tuple[bool, Any]]:
    return [(position == 0, part) for position, part in enumerate(parts)]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
