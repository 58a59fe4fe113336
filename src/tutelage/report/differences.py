"""What distinguishes several runs: the options that their recipes have different."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tutelage.report.blocks import Cell, Column, Table
from tutelage.report.facts import value_text
from tutelage.report.format import ABSENT
from tutelage.report.records import Run

ASIDE = {"compare", "output"}
"""Parts of a recipe that a run's results do not depend on."""


def differing_options(runs: Sequence[Run], names: Sequence[str]) -> Table | None:
    """A row an option that not all recipes have alike, a column a run; none where there is none.

    Runs without a recipe are left out.
    """
    known = [(name, dict(_flat(run.recipe))) for run, name in zip(runs, names, strict=True) if run.recipe]
    keys = dict.fromkeys(key for _, options in known for key in options)
    rows = []
    for key in keys:
        told = [value_text(options[key]) if key in options else ABSENT for _, options in known]
        if len(set(told)) > 1:
            rows.append([Cell(key, key), *(Cell(text, text) for text in told)])
    if not rows:
        return None
    columns = [Column("Option", numeric=False), *(Column(name, numeric=False) for name, _ in known)]
    return Table("Options that differ", columns, rows, sortable=True)


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every option by its dotted key (``train.optimizer.lr``); methods by their number where there are several."""
    for key, value in content.items():
        if not prefix and key in ASIDE:
            continue
        if key == "method" and not prefix and isinstance(value, list):
            value = value[0] if len(value) == 1 else {str(i): item for i, item in enumerate(value)}
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
