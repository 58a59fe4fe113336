"""int8 for onnxruntime: its own static quantisation of the ONNX file, each channel of a weight with a scale of its own.

Ranges of activations are found on training rows. onnxruntime has kernels for such a file on every usual CPU.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutelage.export.check import check_quantised
from tutelage.export.coverage import shares
from tutelage.export.deployed import INPUT
from tutelage.export.int8 import BATCH
from tutelage.export.onnx_model import convert
from tutelage.export.program import capture
from tutelage.export.reading import METADATA, load_onnx
from tutelage.export.subject import Subject

FILE = "model.int8.onnx"


def write(subject: Subject, folder: Path) -> dict[str, Any]:
    """Write and check ``model.int8.onnx``.

    Raises:
        ExportError: the model cannot be written as ONNX, or there are no rows to find ranges on.
        CheckFailedError: too little is left of the student.
    """
    described = subject.described("int8 weights and activations")
    with tempfile.TemporaryDirectory() as scratch:
        floats, prepared = Path(scratch) / "float.onnx", Path(scratch) / "prepared.onnx"
        convert(capture(subject.model, subject.rows), floats, described)
        layers = _quantise(floats, prepared, folder / FILE, subject.calibration)
    _describe(folder / FILE, described)
    run = load_onnx(folder / FILE)
    return {
        "files": [FILE],
        "check": check_quantised(FILE, subject, run, "int8"),
        "quantised": shares(subject.model, subject.rows, layers),
        "metrics": subject.metrics(run),
    }


def _quantise(floats: Path, prepared: Path, file: Path, rows: Tensor) -> set[str]:
    """Write the quantised file; gives the paths of the layers whose weights are int8."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[Any] = iter([{INPUT: part.numpy()} for part in torch.split(rows, BATCH)])

        def get_next(self) -> Any:
            return next(self.batches, None)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"onnx")
        quant_pre_process(str(floats), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(file),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            # The scales of norms are vectors, which have no channels: onnxruntime complains about each.
            op_types_to_quantize=sorted({*QDQRegistry, *QLinearOpsRegistry} - {"LayerNormalization"}),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    small = onnx.load(str(file))
    return {
        entry.name.removesuffix("_quantized").removesuffix(".weight")
        for entry in small.graph.initializer
        if entry.name.endswith("_quantized") and entry.data_type == onnx.TensorProto.INT8
    }


def _describe(file: Path, described: dict[str, Any]) -> None:
    import onnx

    model = onnx.load(str(file))
    onnx.helper.set_model_props(model, {METADATA: json.dumps(described)})
    onnx.save(model, str(file))
