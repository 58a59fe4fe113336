"""int8 weights and activations of convolutions and linear layers, by torchao's PT2E flow, in a ``.pt2``.

Ranges of activations are found on training rows. To be loaded the file needs torchao, which brings its operations;
torch.compile turns them into int8 kernels on x86, while without it they are computed one by one, in floats.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from tutelage.export.check import check, check_quantised
from tutelage.export.coverage import shares
from tutelage.export.program import capture, save
from tutelage.export.reading import load_operations, load_program
from tutelage.export.subject import Subject

FILE = "model.int8.pt2"
BATCH = 64


def write(subject: Subject, folder: Path) -> dict[str, Any]:
    """Write and check ``model.int8.pt2``.

    Raises:
        ExportError: torch cannot capture the model, or there are no rows to find ranges on.
        CheckFailedError: too little is left of the student.
    """
    graph = quantise(subject.model, subject.calibration)
    save(
        capture(graph, subject.rows),
        folder / FILE,
        subject.described("int8 weights and activations"),
    )
    run = load_program(folder / FILE)
    with torch.no_grad():
        check(FILE, subject, run, expected=graph(subject.rows))
    return {
        "files": [FILE],
        "check": check_quantised(FILE, subject, run, "int8"),
        "quantised": shares(subject.model, subject.rows, set(_layers(graph))),
        "metrics": subject.metrics(run),
    }


def quantise(model: nn.Module, calibration: Tensor) -> GraphModule:
    """The model as a graph of int8 weights, with BatchNorm folded into them, and of activations rounded by ranges that
    ``calibration`` rows show."""
    load_operations()
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with warnings.catch_warnings():
        # torchao's own, about how it calls torch and itself.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|torchao)")
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torchao")
        observed = prepare_pt2e(capture(model, calibration).module(), quantizer)
        with torch.no_grad():
            for rows in torch.split(calibration, BATCH):
                observed(rows)
        graph: GraphModule = convert_pt2e(observed)
    _drop_floats(graph)
    return graph


def _drop_floats(graph: GraphModule) -> None:
    """Drop weights that no node reads any more: they would be written beside their int8 form."""
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    held = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    for name in held.keys() - read:
        owner, _, last = name.rpartition(".")
        delattr(graph.get_submodule(owner), last)


def _layers(graph: GraphModule) -> Iterator[str]:
    """Paths of the layers whose weights are int8."""
    for node in graph.graph.nodes:
        kind = str(node.target)
        if node.op == "call_function" and kind.startswith(("aten.conv", "aten.linear")):
            weight = node.args[1]
            if isinstance(weight, Node) and "dequantize" in str(weight.target):
                yield _path(node)


def _path(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed([path for path, _ in stack.values()]), "")
