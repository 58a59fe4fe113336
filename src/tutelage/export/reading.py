"""Exported files, read again. Nothing heavy is imported: `tutelage bench` counts memory from here."""

from __future__ import annotations

import importlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tutelage.engine.quantize import torchao
from tutelage.export.archive import refuse_pickles
from tutelage.export.errors import ExportError

Run = Callable[[Tensor], Tensor]

METADATA = "tutelage.json"
"""Under this name every file holds what it is, as JSON."""


def load_program(file: Path) -> nn.Module:
    """The module in a ``.pt2``; see `read_program`."""
    return read_program(file).module()


def read_program(file: Path) -> ExportedProgram:
    """What a ``.pt2`` holds.

    Raises:
        ExportError: something in it would be unpickled, or run as a compiled library.
    """
    refuse_pickles(file)
    return torch.export.load(file)


def load_operations() -> None:
    """Make torch know the operations that an int8 ``.pt2`` consists of."""
    torchao()
    importlib.import_module("torchao.quantization.pt2e")


def load_onnx(file: Path) -> Run:
    """Rows to logits by onnxruntime, on the CPU with as many threads as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(rows: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: rows.numpy()})[0])

    return run


def read_metadata(file: Path) -> dict[str, Any]:
    """What a ``.pt2`` or ``.onnx`` says of itself; empty where it was not written here.

    Raises:
        ExportError: it is no such file.
    """
    try:
        text = _of_program(file) if file.suffix == ".pt2" else _of_onnx(file)
        return dict(json.loads(text)) if text else {}
    except (zipfile.BadZipFile, ValueError, TypeError) as error:
        raise ExportError(f"{file} is damaged, or no {file.suffix} file: {error}") from None


def _of_program(file: Path) -> str | None:
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith(f"/extra/{METADATA}")]
        return archive.read(names[0]).decode() if names else None


def _of_onnx(file: Path) -> str | None:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        found = onnx.load(str(file), load_external_data=False).metadata_props
    except DecodeError as error:
        raise ValueError(str(error)) from None
    return next((entry.value for entry in found if entry.key == METADATA), None)
