"""`tutelage compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tutelage.cli import figures
from tutelage.cli.arguments import Overrides, Quiet, RecipeName, given_folder
from tutelage.cli.complete import method_lists, method_names
from tutelage.cli.output import AsJson, kept_for_json, print_json, print_table, say


def compare(
    recipe: RecipeName,
    overrides: Overrides = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods by name, with commas between, or all; left out: as the recipe says, else none and its own.",
            autocompletion=method_lists,
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="How many seeds (0, 1, …), or which: 3,5,7; left out: as the recipe says, else 5."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="What the others are held against; left out: none, else the first.",
            autocompletion=method_names,
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Folder; left out: the recipe's, else runs/compare-RECIPE.")
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tuning runs that each method gets first, judged on validation data; left out: as the recipe says, "
            "else 0.",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs side by side; left out: as many as there are cores, 1 on a GPU."),
    ] = None,
    no_progress: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare methods under one recipe: equal budget, paired seeds, 95 % intervals.

    A stopped comparison goes on where it stopped, and finished runs are kept: with more seeds or methods only what is
    new is run. Options that the recipe has for its own method hold here too. A run that fails is shown as failed.

    \b
    Examples
      tutelage compare digits --methods none,kd,nkd --seeds 5
      tutelage compare digits --methods none,kd,nkd --trials 10     tuned alike
      tutelage compare benchmarks/digits                            a benchmark that is shipped
      tutelage compare digits method=kd method.temperature=2 --seeds 3,5,7
    """
    from tutelage.recipe import load_recipe

    with kept_for_json(as_json):
        loaded = load_recipe(recipe, overrides or ())
        from tutelage.runs import (
            compare as comparing,
        )  # after the recipe's own errors, which need not wait for torch

        place = given_folder(folder, loaded.output.dir, f"compare-{Path(recipe).stem}")
        table = comparing.compare(
            loaded,
            methods=_names(methods),
            seeds=_numbers(seeds),
            baseline=baseline,
            folder=place,
            jobs=jobs,
            trials=trials,
            progress=False if no_progress else None,
        )
    if as_json:
        print_json(table)
    else:
        _print(table, place)


def _names(methods: str | None) -> Literal["all"] | list[str] | None:
    if methods is None or methods == "all":
        return methods  # type: ignore[return-value]  # it is "all"
    return [name.strip() for name in methods.split(",")]


def _numbers(seeds: str | None) -> int | list[int] | None:
    if seeds is None:
        return None
    try:
        numbers = [int(number) for number in seeds.split(",")]
    except ValueError:
        message = f"got {seeds!r}; give a number, or numbers with commas between"
        raise typer.BadParameter(message, param_hint="--seeds") from None
    return numbers if "," in seeds else numbers[0]


def _print(table: dict[str, Any], folder: Path) -> None:
    name, student, teacher = table["metric"], table.get("student") or {}, table.get("teacher")
    columns = ["", f"{name} [95 %]", f"to {table['baseline']}", "parameters", "FLOPs", "latency", "training"]
    rows = []
    if teacher:
        value = (teacher.get("test") or {}).get(name)
        rows.append(["teacher", figures.metric(name, value), "", *_cost(teacher), ""])
    for method in table["methods"]:
        failed = [run for run in method["runs"] if run["status"] != "done"]
        count = f" ({len(failed)} of {len(method['runs'])} failed)" if failed else ""
        rows.append(
            [
                method["name"] + count,
                figures.interval(name, method),
                figures.interval(name, method["difference"], signed=True),
                *_cost(student),
                figures.duration(method["seconds"]),
            ]
        )
    seeds = len(table["seeds"])
    title = f"{student.get('model', 'student')}, {table.get('split', 'test')} {name}, {seeds} seed{'s' * (seeds != 1)}"
    print_table(columns, rows, title=title, right=columns[1:])
    for method in table["methods"]:
        for run in method["runs"]:
            if run["status"] != "done":
                say(f"{method['name']}, seed {run['seed']}: failed: {run['error']}")
    report = folder / "report.html"
    say(report if report.exists() else folder / "comparison.json")


def _cost(model: dict[str, Any]) -> list[str]:
    return [
        figures.amount(model.get("parameters")),
        figures.amount(model.get("flops")),
        figures.milliseconds(model.get("latency_ms")),
    ]
