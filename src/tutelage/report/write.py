"""`write_report`: from run and comparison folders to one HTML file that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tutelage.report.blocks import Part
from tutelage.report.comparison_page import comparison_part
from tutelage.report.errors import ReportError
from tutelage.report.load import load
from tutelage.report.overview import overview_part, run_names
from tutelage.report.records import Comparison, Run
from tutelage.report.render import render
from tutelage.report.run_page import PICTURE_BYTES, run_part

FILE = "report.html"
DETAILED = 20
"""Runs of one report that get their own part; further ones stand in the overview only, and the page says so."""
LARGEST = 6_000_000
"""Bytes of a page; runs are told in full only as far as they fit."""


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of run folders and comparison folders as one self-contained HTML file.

    Args:
        paths: run folders (``result.json``, ``metrics.jsonl``, …, each of which may be missing) and comparison folders
            (``comparison.json``). Several become one page, with the runs side by side first.
        out: the file to write; left out: ``report.html`` in the folder given, or in the nearest folder that holds all
            of several.

    Returns:
        the file written: beside its place first, then renamed, so that it is never half there.

    Raises:
        ReportError: no path, or one that is neither a run nor a comparison; nothing is written.
        OSError: the file cannot be written.
    """
    if not paths:
        raise ReportError("no folder given; give run folders or a comparison folder")
    folders = [Path(path) for path in paths]
    page = _page([load(folder) for folder in folders])
    target = out or _nearest(folders) / FILE
    _replace(target, page)
    return target


def _page(records: Sequence[Run | Comparison]) -> str:
    detailed = DETAILED
    page = render(_parts(records, detailed))
    while detailed and len(page.encode(errors="replace")) > LARGEST:
        detailed //= 2
        page = render(_parts(records, detailed))
    return page


def _parts(records: Sequence[Run | Comparison], detailed: int) -> list[Part]:
    runs = [record for record in records if isinstance(record, Run)]
    parts = [comparison_part(record) for record in records if isinstance(record, Comparison)]
    if len(records) == 1:
        return parts or [run_part(runs[0])]
    if len(runs) > 1:
        parts.append(overview_part(runs, detailed=detailed))
    room = PICTURE_BYTES // max(min(detailed, len(runs)), 1)
    named = zip(runs[:detailed], run_names(runs), strict=False)
    return [*parts, *(run_part(run, name, room=room) for run, name in named)]


def _nearest(folders: Sequence[Path]) -> Path:
    if len(folders) == 1:
        return folders[0]
    return Path(os.path.commonpath([folder.resolve() for folder in folders]))


def _replace(target: Path, page: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(page, encoding="utf-8", errors="replace", newline="\n")
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
