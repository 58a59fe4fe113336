"""One export: every format is written and checked beside its place, and moved there when all of them hold."""

from __future__ import annotations

import difflib
import importlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tutelage.export.card import card
from tutelage.export.errors import ExportError, need
from tutelage.export.subject import Subject, open_subject
from tutelage.models.weights import FILE
from tutelage.untrusted import read_object

RECORD = "export.json"
CARD = "README.md"


@dataclass(frozen=True)
class Format:
    """A format: the module that writes it, the packages that it needs, and what it is."""

    module: str
    needs: tuple[str, ...]
    is_what: str


FORMATS = {
    "safetensors": Format("plain", (), "weights and configuration, as the model's own library saves them"),
    "torch": Format("program", (), "a graph that torch alone runs (torch.export)"),
    "onnx": Format("onnx_model", ("onnx", "onnxscript", "onnxruntime"), "a graph for onnxruntime and others"),
    "int8": Format("int8", ("torchao",), "a graph of int8 weights and activations, for torch.compile on x86"),
    "int4": Format("int4", ("torchao",), "a graph with int4 weights, two to a byte: small, not faster"),
    "onnx-int8": Format(
        "onnx_int8", ("onnx", "onnxscript", "onnxruntime"), "int8 weights and activations for onnxruntime"
    ),
}
OTHER_NAMES = {"save_pretrained": "safetensors", "pt2": "torch"}


def export_run(
    folder: Path | str,
    formats: Sequence[str],
    *,
    out: Path | str | None = None,
    student: nn.Module | None = None,
) -> dict[str, Any]:
    """Write the student of a finished run in some formats, with a model card.

    Args:
        folder: of the run.
        formats: names from `FORMATS`.
        out: where files go; left out: ``export`` in the run's folder. What an earlier export left there stays.
        student: the architecture, where it came from Python.

    Returns:
        ``folder``, ``student_bytes`` (of the float weights), ``float_metrics`` (where something was quantised) and
        ``formats``: by name its files, bytes and checks, as ``export.json`` there keeps them.

    Raises:
        ExportError: an unknown format, or one that this student cannot be written in.
        CheckFailedError: a file does not answer as the student does. Nothing is written then.
        FileNotFoundError: the folder holds no finished run.
        ImportError: a library is missing.
    """
    chosen = [_format(name) for name in formats]
    for name in chosen:
        need(*FORMATS[name].needs)
    folder = Path(folder)
    place = Path(out) if out is not None else folder / "export"
    kept = _earlier(place)
    subject = open_subject(folder, student)
    if subject.reads_text and set(chosen) != {"safetensors"}:
        others = ", ".join(name for name in chosen if name != "safetensors")
        raise ExportError(
            f"the student of {folder} reads tokens, and graphs ({others}) of such are not built yet; take safetensors, "
            "from which other tools make graphs"
        )
    draft = place.with_name(f".tmp-{place.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        made = {name: _write(name, subject, draft) for name in dict.fromkeys(chosen)}
        record = _record(subject, kept | made)
        (draft / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (draft / CARD).write_text(card(subject, record), encoding="utf-8")
        place.mkdir(parents=True, exist_ok=True)
        for file in sorted(draft.iterdir()):
            file.replace(place / file.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return {"folder": str(place), **record, "formats": {name: record["formats"][name] for name in made}}


def _format(name: str) -> str:
    name = OTHER_NAMES.get(name, name)
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ExportError(f"unknown format {name!r}; there are {', '.join(FORMATS)}{hint}")
    return name


def _earlier(place: Path) -> dict[str, Any]:
    """Records of the formats that lie in the folder already, whole."""
    if place.exists() and not place.is_dir():
        raise ExportError(f"{place} is a file; give a folder")
    if not (place / RECORD).is_file():
        if place.is_dir() and any(place.iterdir()):
            raise ExportError(f"{place} is not empty and holds no export; give another --dir")
        return {}
    found = read_object(place / RECORD).get("formats")
    entries = found.items() if isinstance(found, dict) else ()
    return {
        name: entry
        for name, entry in entries
        if name in FORMATS and all((place / str(file)).is_file() for file in entry.get("files", [None]))
    }


def _write(name: str, subject: Subject, draft: Path) -> dict[str, Any]:
    record: dict[str, Any] = importlib.import_module(f"tutelage.export.{FORMATS[name].module}").write(
        subject, draft
    )
    size = sum((draft / file).stat().st_size for file in record["files"])
    return {"is": FORMATS[name].is_what, "bytes": size, "checked_on": subject.rows_are, **record}


def _record(subject: Subject, formats: dict[str, Any]) -> dict[str, Any]:
    measured = any(entry.get("metrics") for entry in formats.values())
    return {
        "run": subject.folder.name,
        "student_bytes": (subject.folder / "student" / FILE).stat().st_size,
        "split": "test" if subject.data and subject.data.test else "validation",
        "float_metrics": subject.metrics(subject.model) if measured else {},
        "formats": formats,
    }
