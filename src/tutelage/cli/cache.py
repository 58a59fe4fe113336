"""`tutelage cache`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tutelage.cli import figures
from tutelage.cli.arguments import Overrides, Quiet
from tutelage.cli.complete import recipe_names
from tutelage.cli.output import AsJson, complain, kept_for_json, print_json, print_table, say
from tutelage.cli.processes import is_first_process

if TYPE_CHECKING:
    from tutelage.runs.cache import CacheResult, Estimate


def cache(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A YAML file, or the name of a shipped recipe.",
            autocompletion=recipe_names,
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    folder: Annotated[Path | None, typer.Option("--dir", help="The store's folder.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Which teacher, where the recipe has several.")] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Say size and time, and write nothing.")
    ] = False,
    verify: Annotated[
        Path | None, typer.Option(metavar="STORE", help="Hold every file of a store against its checksum.")
    ] = None,
    no_progress: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Store a teacher's outputs, so that runs learn from it without running it.

    The store holds the answer to every view of every training row that a run of the recipe shows its student. A run
    takes it by teacher={store: FOLDER}, as long as data and views are the same. The same command again goes on with a
    store that is half-written, and mends one that is damaged. `cache.` fields say what is kept.

    \b
    Examples
      tutelage cache digits --dir stores/digits --estimate       size and time, nothing written
      tutelage cache digits data.view_seed=0 data.distinct_views=10 --dir stores/digits
      tutelage run digits data.view_seed=0 data.distinct_views=10 'teacher={store: stores/digits}'
      tutelage cache digits cache.dtype=float16 --dir stores/half
      tutelage cache --verify stores/digits                      every checksum
      torchrun --nproc-per-node 2 -m tutelage cache digits --dir stores/digits
    """
    if (recipe is None) == (verify is None):
        raise typer.BadParameter("give a recipe, or --verify STORE")
    if verify is not None:
        raise typer.Exit(1 if _verify(verify, as_json) else 0)
    if folder is None:
        raise typer.BadParameter("give the store's folder by --dir")
    with kept_for_json(as_json):
        from tutelage.recipe import load_recipe

        loaded = load_recipe(recipe or "", overrides or ())
        from tutelage.runs import (
            cache as runs,  # after the recipe's own errors, which need not wait for torch
        )

        if estimate:
            found = runs.estimate(loaded, folder, teacher=teacher)
        else:
            made = runs.cache(loaded, folder, teacher=teacher, progress=False if no_progress else None)
    if not is_first_process():
        return
    if estimate:
        _print_estimate(found, as_json)
    else:
        _print_result(made, as_json)


def _print_result(made: CacheResult, as_json: bool) -> None:
    manifest, plan = made.manifest, made.manifest.plan
    rate = made.made_rows / made.seconds if made.made else None
    if as_json:
        print_json(
            {
                "folder": str(made.folder),
                "rows": plan.data.rows,
                "views": plan.views.number,
                "files": plan.shards,
                "bytes": made.bytes,
                "made": len(made.made),
                "seconds": made.seconds,
                "rows_per_second": rate,
                "error": manifest.error,
                "metrics": {split: found.values for split, found in manifest.metrics.items()},
            }
        )
        return
    kept = [f"{plan.cache.form} logits" if plan.cache.form != "none" else "no logits", *plan.taps]
    rows = [
        ["teacher", plan.teacher.model],
        ["rows", f"{plan.data.rows} × {plan.views.number} views"],
        ["kept", f"{', '.join(kept)}, {plan.cache.dtype}"],
        ["size", f"{figures.amount(made.bytes)}B in {plan.shards} files"],
        [
            "made now",
            f"{len(made.made)} files, {figures.amount(rate)} rows/s" if made.made else "none: all whole",
        ],
    ]
    rows += _errors(manifest.error)
    print_table(["", ""], rows, title="Errors against the live teacher, on the rows of the first file")
    say(f"store  {made.folder}")


def _print_estimate(found: Estimate, as_json: bool) -> None:
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    rows = [
        ["rows", f"{found.rows} × {found.views} views"],
        ["size", f"{figures.amount(found.bytes)}B in {found.files} files"],
        ["free on the disk", f"{figures.amount(found.free)}B"],
        ["time", f"{figures.duration(found.seconds)} at {figures.amount(found.rows_per_second)} rows/s"],
    ]
    rows += _errors(found.error)
    print_table(["", ""], rows, title="Nothing was written; errors against the live teacher on a few batches")


def _errors(found: dict[str, float]) -> list[list[str]]:
    return [[f"error {name}", f"{value:.3g}"] for name, value in found.items()]


def _verify(folder: Path, as_json: bool) -> bool:
    """Print what is damaged; whether anything is."""
    from tutelage.teachers.store import verify

    found = dict(verify(folder))
    damaged = {name: reason for name, reason in found.items() if reason is not None}
    if as_json:
        print_json({"folder": str(folder), "files": len(found), "damaged": damaged})
        return bool(damaged)
    for name, reason in damaged.items():
        complain("damaged", f"{name}: {reason}")
    again = "; `tutelage cache` into the same folder makes them anew" if damaged else ""
    say(f"{len(found)} files, {len(damaged)} damaged{again}")
    return bool(damaged)
