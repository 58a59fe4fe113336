"""An exponential moving average of the student's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Ema:
    """Average of a model's parameters over the steps: w̄ ← decay · w̄ + (1 − decay) · w, begun with the first update's w.

    Buffers (BatchNorm's running statistics, counters) are copied as they are: they average over batches already, and
    an average of counters means nothing.

    Args:
        student: copied, frozen and set to eval; without hooks or wrappers of its own.
        decay: between 0 and 1, both excluded.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema decay {decay} is not between 0 and 1; common are 0.99 to 0.9999")
        self.averaged = AveragedModel(student)
        self.averaged.requires_grad_(False).eval()
        self._average = get_ema_multi_avg_fn(decay)

    @property
    def module(self) -> nn.Module:
        """The averaged model; that of the start before the first update."""
        module: nn.Module = self.averaged.module
        return module

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Take in the student as it is now. Not ``AveragedModel.update_parameters``: that sends its counter to the
        device each time, and the host waits for it."""
        # Where both are sharded, alike: each rank averages its own shards.
        averaged = [_mine(parameter) for parameter in self.module.parameters()]
        current = [_mine(parameter) for parameter in student.parameters()]
        if averaged and self.averaged.n_averaged.item() == 0:
            torch._foreach_copy_(averaged, current)
        elif averaged:
            self._average(averaged, current, 0)
        for mine, live in zip(self.module.buffers(), student.buffers(), strict=True):
            mine.copy_(live)
        self.averaged.n_averaged += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under ``module.…``, and ``n_averaged``, the number of updates."""
        state: dict[str, Any] = self.averaged.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a saved state; strict."""
        self.averaged.load_state_dict(state)


def _mine(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
