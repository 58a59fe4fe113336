"""``torch.export``: a ``.pt2`` that torch alone runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tutelage.export.check import check
from tutelage.export.errors import ExportError
from tutelage.export.reading import METADATA, load_program
from tutelage.export.subject import Subject

FILE = "model.pt2"


def write(subject: Subject, folder: Path) -> dict[str, Any]:
    """Write and check ``model.pt2``.

    Raises:
        ExportError: torch cannot capture the model.
        CheckFailedError: the file gives other logits.
    """
    program = capture(subject.model, subject.rows)
    save(program, folder / FILE, subject.described())
    return {"files": [FILE], "check": check(FILE, subject, load_program(folder / FILE))}


def capture(model: nn.Module, rows: Tensor) -> ExportedProgram:
    """The model as a graph that takes any number of rows.

    Raises:
        ExportError: it cannot be captured.
    """
    try:
        with torch.no_grad():
            return torch.export.export(model, (rows[:2],), dynamic_shapes=({0: Dim("batch", min=1)},))
    except Exception as error:  # torch raises its own internal classes here
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(
            f"torch.export cannot capture this {type(model).__name__} for any number of rows: {reason.strip()}; "
            "export it as safetensors"
        ) from error


def save(program: ExportedProgram, file: Path, described: dict[str, Any]) -> None:
    """Write a program without the rows that it was captured with: they are the user's data, and would be pickled."""
    program.example_inputs = None
    torch.export.save(program, file, extra_files={METADATA: json.dumps(described)})
