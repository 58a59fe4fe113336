"""What a store's form loses, measured against the live teacher while the first rows are written."""

from __future__ import annotations

import torch
from torch import Tensor

from tutelage.engine.types import Outputs, Sampled, TopK
from tutelage.teachers.forms import Columns, Layout

OF_PROBABILITIES = ("classification", "token-classification", "language-model")
"""Tasks whose logits are those of a distribution over classes, or tokens."""
_ENTRIES = 2**24
"""Logits of a batch that are looked at."""


class ErrorMeter:
    """Collects differences between what a teacher gave and what comes back from the store, batch by batch.

    Where logits are made from hidden states, those of the first tokens of each row alone are looked at. Of dense
    logits: ``logits.max`` and ``logits.mean``, the largest and the mean absolute difference (of log-probabilities,
    where these are kept), and for a task of classes or tokens ``kl``, the mean divergence of the stored distribution
    from the teacher's. Of the largest k: the same two of what is kept, and ``tail``, the mean mass of the rest. Of
    draws: ``mass``, the mean sum of a row's weights, 1 where none is lost. Of each tap: ``<tap>.max`` and
    ``<tap>.mean``.
    """

    def __init__(self, layout: Layout, task: str) -> None:
        self.layout, self.probabilities = layout, task in OF_PROBABILITIES
        self._largest: dict[str, float] = {}
        self._sums: dict[str, tuple[float, int]] = {}

    @torch.no_grad()
    def update(self, outputs: Outputs, columns: Columns) -> None:
        stored = self.layout.decode(columns, tuple(self.layout.taps))
        for tap in self.layout.taps:
            self._compare(tap, outputs.features[tap].float(), stored.features[tap])
        found = stored.stored_logits
        if found is None:
            return
        logits = outputs.logits.float() if outputs.hidden is None else _first_logits(outputs)
        if outputs.hidden is not None:
            found = _first(found, logits.shape[1])
        log_probs = logits.log_softmax(-1)
        if isinstance(found, TopK):
            self._compare("logits", log_probs.gather(-1, found.ids), found.log_probs)
            self._add("tail", found.tail)
        elif isinstance(found, Sampled):
            self._add("mass", found.weights.sum(-1))
        else:
            self._compare("logits", logits if self.layout.form.scale == "raw" else log_probs, found)
            if self.probabilities:
                # In double precision: in single, rounding alone may make a divergence negative.
                wide, theirs = logits.double().log_softmax(-1), found.double().log_softmax(-1)
                self._add("kl", (wide.exp() * (wide - theirs)).sum(-1))

    def result(self) -> dict[str, float]:
        """Figures by name."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        return self._largest | means

    def _compare(self, name: str, given: Tensor, stored: Tensor) -> None:
        apart = (given - stored).abs()
        self._largest[f"{name}.max"] = max(self._largest.get(f"{name}.max", 0.0), float(apart.max()))
        self._add(f"{name}.mean", apart)

    def _add(self, name: str, values: Tensor) -> None:
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + float(values.double().sum()), count + values.numel())


def _first_logits(outputs: Outputs) -> Tensor:
    """Of the first tokens of each row, as many as are looked at."""
    assert outputs.hidden is not None
    assert outputs.head is not None
    tokens = max(1, _ENTRIES // (len(outputs.hidden) * len(outputs.head.weight)))
    return outputs.head(outputs.hidden[:, :tokens]).float()


def _first(found: Tensor | TopK | Sampled, tokens: int) -> Tensor | TopK | Sampled:
    if isinstance(found, TopK):
        return TopK(found.ids[:, :tokens], found.log_probs[:, :tokens], found.tail[:, :tokens])
    if isinstance(found, Sampled):
        return Sampled(found.ids[:, :tokens], found.weights[:, :tokens])
    return found[:, :tokens]
