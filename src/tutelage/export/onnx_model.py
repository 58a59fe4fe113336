"""ONNX, checked in onnxruntime."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from tutelage.export.check import check
from tutelage.export.deployed import INPUT, OUTPUT
from tutelage.export.errors import ExportError
from tutelage.export.program import capture
from tutelage.export.reading import METADATA, load_onnx
from tutelage.export.subject import Subject

FILE = "model.onnx"


def write(subject: Subject, folder: Path) -> dict[str, Any]:
    """Write and check ``model.onnx``.

    Raises:
        ExportError: the model has operations that ONNX lacks.
        CheckFailedError: onnxruntime gives other logits.
    """
    convert(
        capture(subject.model, subject.rows),
        folder / FILE,
        subject.described(),
    )
    return {"files": [FILE], "check": check(FILE, subject, load_onnx(folder / FILE))}


def convert(program: ExportedProgram, file: Path, described: dict[str, Any]) -> None:
    """Write a captured program as ONNX with any number of rows."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch's own, about how torch calls itself.
            warnings.filterwarnings(
                "ignore", category=DeprecationWarning, module=r"(torch|onnxscript|copyreg)"
            )
            made = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT]
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(
            f"this model cannot be written as ONNX: {str(error).splitlines()[0]}; export it as torch"
        ) from error
    finally:
        logger.setLevel(level)
    assert made is not None
    made.model.metadata_props[METADATA] = json.dumps(described)
    made.save(file)
