"""What a model costs: parameters, operations and time for one row."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tutelage.engine.calling import call_model
from tutelage.engine.compile import eager
from tutelage.engine.tracing import quiet
from tutelage.engine.types import Inputs, first_tensor

WARM_UP = 3
RUNS = 15
SECONDS = 1.0
"""Latency is measured until so many runs or seconds are over."""
_COUNTED = ("eager", "sdpa")


class ModelProfile(NamedTuple):
    """Cost of one row.

    Attributes:
        parameters: shared ones counted once.
        flops: of a forward; a multiplication and an addition are two.
        latency_ms: median wall time of a forward with a batch of one, eager, in milliseconds.
    """

    parameters: int
    flops: int
    latency_ms: float


def profile_model(module: nn.Module, inputs: Inputs) -> ModelProfile:
    """Measure a model on its own device, in eval mode; it is left as it was.

    Args:
        inputs: at least one row, as the model gets it; the first row is used.
    """
    row: Inputs = (
        inputs[:1] if not isinstance(inputs, dict) else {key: value[:1] for key, value in inputs.items()}
    )
    device = first_tensor(row).device
    with quiet(module), eager(module):
        with _counted_attention(module):
            flops = count_flops(lambda: call_model(module, row))
        times: list[float] = []
        started = time.perf_counter()
        while len(times) < WARM_UP + 1 or (
            len(times) < WARM_UP + RUNS and time.perf_counter() - started < SECONDS
        ):
            times.append(_timed(module, row, device))
    return ModelProfile(
        sum(parameter.numel() for parameter in module.parameters()),
        flops,
        1000 * statistics.median(times[WARM_UP:]),
    )


@contextlib.contextmanager
def _counted_attention(module: nn.Module) -> Iterator[None]:
    """Let a model of transformers that computes attention outside torch's own operations take those meanwhile: others
    cannot be counted, or run under the counter at all."""
    model: Any = module
    own = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if own in (None, *_COUNTED):
        yield
        return
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def count_flops(call: Callable[[], object]) -> int:
    """Operations of a call, forward and backward; a multiplication and an addition are two. Attention runs by its plain
    kernel meanwhile: torch does not count every device's fused one."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def _timed(module: nn.Module, row: Inputs, device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    call_model(module, row)
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
