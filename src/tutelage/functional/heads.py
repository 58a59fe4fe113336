"""What stands for logits without being them: a head that makes them from hidden states, and sparse forms of stored
ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Head", "Sampled", "TopK"]


@dataclass(frozen=True)
class TopK:
    """The largest entries of rows of log-probabilities: ``ids`` and ``log_probs`` ``[..., k]``, ``tail`` ``[...]``,
    the probability mass that is left."""

    ids: Tensor
    log_probs: Tensor
    tail: Tensor

    def outcomes(self, dtype: torch.dtype) -> Tensor:
        """Log-probabilities ``[..., k + 1]`` of the entries and of all the rest. What is stored is rounded: they are
        made to sum to one, and a rest of 0 is read as one too small to store."""
        rest = self.tail.to(dtype).clamp(min=torch.finfo(dtype).tiny).log()
        return torch.cat([self.log_probs.to(dtype), rest[..., None]], -1).log_softmax(-1)


@dataclass(frozen=True)
class Sampled:
    """Importance-weighted samples of rows of probabilities: ``ids`` and ``weights`` ``[..., k]``."""

    ids: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Head:
    """The linear map from hidden states to logits: ``scale * softcap·tanh((hidden @ weight.T + bias)/softcap)``."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    @property
    def vocabulary(self) -> int:
        """How many logits it makes."""
        return len(self.weight)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.scale == 1.0 else logits * self.scale
