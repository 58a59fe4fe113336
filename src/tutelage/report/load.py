"""Reads run folders and comparison folders, whole or half-written.

Nothing here raises for a file that is missing, torn or odd: the record says in ``notes`` what it lacks, in words for
the reader of the report.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tutelage.report.errors import ReportError
from tutelage.report.records import Comparison, Run, mapping

LARGEST = 2**28
"""Bytes of a file that is read; a run that logs for a week writes less."""
RUN_FILES = ("result.json", "metrics.jsonl", "recipe.yaml", "environment.json")
COMPARISON_FILE = "comparison.json"


class _Loader(yaml.SafeLoader):
    """Without aliases, which no run writes: a few lines of them stand for billions of values."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read here")
        return super().compose_node(parent, index)


def load(path: Path) -> Run | Comparison:
    """Read a run folder or a comparison folder.

    Raises:
        ReportError: the path is no folder, or a folder that holds neither.
    """
    if not path.is_dir():
        raise ReportError(f"{path}: no such folder; give run folders or a folder with {COMPARISON_FILE}")
    if (path / COMPARISON_FILE).is_file():
        return load_comparison(path)
    if any((path / name).is_file() for name in RUN_FILES):
        return load_run(path)
    raise ReportError(
        f"{path}: neither a run ({', '.join(RUN_FILES)}) nor a comparison ({COMPARISON_FILE}); "
        "give the folder that `tutelage run` or `tutelage compare` wrote"
    )


def load_run(folder: Path) -> Run:
    run = Run(folder)
    run.result = _read_json(folder / "result.json", run.notes)
    run.environment = _read_json(folder / "environment.json", run.notes)
    run.recipe_text, run.recipe = _read_recipe(folder / "recipe.yaml", run.notes)
    run.analysis = _read_optional(folder / "analysis.json", run.notes)
    run.explained = _read_optional(folder / "explain.json", run.notes)
    run.stages = _read_stages(folder, run.notes)
    if not run.stages or (folder / "metrics.jsonl").is_file():
        run.train, run.evaluations = _read_metrics(folder / "metrics.jsonl", run.notes)
    return run


def _read_stages(folder: Path, notes: list[str]) -> dict[str, Run]:
    """Logs of a procedure's Trainers: ``stages/<name>``, and ``clients/<number>/stages/<name>``."""
    stages = {}
    for path in sorted((*folder.glob("stages/*"), *folder.glob("clients/*/stages/*")), key=_natural):
        if (path / "metrics.jsonl").is_file():
            name = " ".join(part for part in path.relative_to(folder).parts if part != "stages")
            train, evaluations = _read_metrics(path / "metrics.jsonl", notes)
            stages[name] = Run(path, train=train, evaluations=evaluations)
    return stages


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts ``stage-10`` after ``stage-9``."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", str(path))]


def load_comparison(folder: Path) -> Comparison:
    notes: list[str] = []
    comparison = Comparison.of(folder, _read_json(folder / COMPARISON_FILE, notes))
    comparison.notes = notes
    for arm in comparison.arms:
        for entry in arm.entries:
            entry.run = _load_member(folder, entry.data)
        first = next((entry.run for entry in arm.entries if entry.run is not None), None)
        if first is not None:
            first.recipe_text, first.recipe = _read_recipe(first.folder / "recipe.yaml", first.notes)
    return comparison


def _load_member(folder: Path, entry: dict[str, Any]) -> Run | None:
    """The result and evaluations of one run inside a comparison; none where its folder is away or outside."""
    inner = (folder / str(entry.get("folder") or "?")).resolve()
    if not inner.is_relative_to(folder.resolve()) or not inner.is_dir():
        return None
    run = Run(inner)
    run.result = _read_json(inner / "result.json", run.notes)
    run.environment = _read_json(inner / "environment.json", run.notes)
    _, run.evaluations = _read_metrics(inner / "metrics.jsonl", run.notes, only="evaluation")
    return run


def _read_text(path: Path, notes: list[str]) -> str | None:
    try:
        if path.exists() and not path.is_file():
            notes.append(f"{path.name} is no file.")
        elif path.exists() and path.stat().st_size > LARGEST:
            notes.append(f"{path.name} is larger than {LARGEST // 2**20} MiB; it is left out.")
        else:
            return path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        notes.append(f"{path.name} is missing.")
    except OSError as error:
        notes.append(f"{path.name} could not be read: {error.strerror}.")
    return None


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _read_text(path, notes)
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        notes.append(f"{path.name} is not valid JSON ({error}).")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{path.name} holds no object.")
    return mapping(content)


def _read_optional(path: Path, notes: list[str]) -> dict[str, Any]:
    """A file that not every run has: that it is missing is no news."""
    return _read_json(path, notes) if path.exists() else {}


def _read_recipe(path: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    text = _read_text(path, notes)
    if text is None:
        return "", {}
    try:
        content = yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError):
        notes.append(f"{path.name} is not valid YAML; it is shown as it stands.")
        return text, {}
    if not isinstance(content, dict):
        notes.append(f"{path.name} holds no mapping; it is shown as it stands.")
    return text, mapping(content)


def _read_metrics(
    path: Path, notes: list[str], only: str = ""
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training lines and evaluation lines, by step. A step that was logged twice (a resume) counts as last logged."""
    text = _read_text(path, notes)
    train: dict[int, dict[str, Any]] = {}
    evaluations: dict[tuple[int, str], dict[str, Any]] = {}
    lines = (text or "").splitlines()
    unread = []
    for i, row in _parsed(lines, only):
        step = row.get("step")
        if not isinstance(step, int):
            unread.append(i)
        elif row.get("kind") == "train":
            train[step] = row
        elif row.get("kind") == "evaluation":
            evaluations[step, str(row.get("split"))] = row
    torn = bool(unread) and unread[-1] == len(lines) - 1
    if torn:
        notes.append(
            f"The last line of {path.name} is torn (the run was stopped while writing it); it is left out."
        )
    if len(unread) > torn:
        notes.append(f"{len(unread) - torn} lines of {path.name} could not be read; they are left out.")
    return [train[key] for key in sorted(train)], [evaluations[key] for key in sorted(evaluations)]


def _parsed(lines: list[str], only: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line that holds something, with its number; an empty mapping where it cannot be read."""
    for i, line in enumerate(lines):
        if not line.strip() or (only and only not in line):
            continue
        try:
            yield i, mapping(json.loads(line))
        except (ValueError, RecursionError):
            yield i, {}
