"""How a teacher's outputs lie in a store: which columns a row has, and the way there and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tutelage.data.source import salt
from tutelage.engine.philox import Counter, Ids
from tutelage.engine.tracing import Shape
from tutelage.engine.types import Outputs, Sampled, TopK
from tutelage.teachers.manifest import FormPart, StoreError

Columns = dict[str, Tensor]
"""By name, ``[rows, ...]``."""

_SALT = salt("store")
_PART_BYTES = 2**26
"""Of logits that are made at once."""
_SMALL_IDS = 2**16
"""Classes up to which an id takes two bytes."""
_TOPS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float16: 1.0}
"""The number that the largest of a row becomes, where a row has a scale."""
_LOG_LIMIT = torch.finfo(torch.float16).min


@dataclass(frozen=True)
class Column:
    """One tensor of a shard: its type, and the shape of a row."""

    dtype: torch.dtype
    shape: Shape


@dataclass(frozen=True)
class Layout:
    """What a row of a store holds.

    Attributes:
        form: how logits are kept.
        logits: shape of a row's logits ``[..., classes]``; none where none are kept.
        taps: shapes of the features that are kept, by tap.
    """

    form: FormPart
    logits: Shape | None
    taps: Mapping[str, Shape]

    @cached_property
    def columns(self) -> dict[str, Column]:
        """Every column by name."""
        found = self._logit_columns()
        for tap, shape in self.taps.items():
            found |= _scaled(f"tap:{tap}", getattr(torch, self.form.dtype), shape)
        return found

    def _logit_columns(self) -> dict[str, Column]:
        if self.logits is None:
            return {}
        if self.form.form == "dense":
            return _scaled("logits", getattr(torch, self.form.dtype), self.logits)
        assert self.form.k is not None
        entries = (*self.logits[:-1], self.form.k)
        ids = {"logits.ids": Column(self._id_dtype, entries)}
        if self.form.form == "topk":
            return ids | {
                "logits.log_probs": Column(torch.float16, entries),
                "logits.tail": Column(torch.float32, entries[:-1]),
            }
        return ids | {
            "logits.weights": Column(torch.float16, entries),
            "scale:logits.weights": Column(torch.float32, ()),
        }

    @property
    def _id_dtype(self) -> torch.dtype:
        assert self.logits is not None
        return torch.uint16 if self.logits[-1] <= _SMALL_IDS else torch.int32

    @property
    def row_bytes(self) -> int:
        return sum(
            column.dtype.itemsize * torch.Size(column.shape).numel() for column in self.columns.values()
        )

    def encode(self, outputs: Outputs, index: Tensor, view: Tensor) -> Columns:
        """Columns of a batch.

        Args:
            outputs: of the live teacher, logits ``[rows, ..., classes]``, or hidden states and head that make them:
                then those of a few tokens at a time are made, where the form does not keep all.
            index, view: of each row, ``[rows]`` int64: what its draws depend on.

        Raises:
            StoreError: an output that is not finite, or too large for the type; it names the row.
        """
        found = {} if self.logits is None else self._encode_logits(outputs, index, view)
        for tap in self.taps:
            found |= self._encode_values(f"tap:{tap}", outputs.features[tap].float(), index, view)
        return found

    def _encode_logits(self, outputs: Outputs, index: Tensor, view: Tensor) -> Columns:
        form = self.form
        if form.form == "dense":
            logits = _finite_logits(outputs.logits.float(), index, view)
            values = logits.log_softmax(-1) if form.scale == "log_probs" else logits
            return self._encode_values("logits", values, index, view)
        assert form.k is not None
        if form.form == "topk":
            tops = [top_k(_finite_logits(part, index, view), form.k) for part, _ in _parts(outputs)]
            return {
                "logits.ids": _joined([top.ids for top in tops]).to(self._id_dtype),
                "logits.log_probs": _joined([top.log_probs for top in tops]).clamp(min=_LOG_LIMIT).half(),
                "logits.tail": _joined([top.tail for top in tops]),
            }
        counter = Counter(_cpu(index), _cpu(view), form.seed, _SALT)
        assert self.logits is not None
        uniform = _uniform(counter, (*self.logits[:-1], form.k), index)
        drawn = [
            draw(_finite_logits(part, index, view), uniform[:, tokens], form.draw_temperature)
            for part, tokens in _parts(outputs)
        ]
        weights, scale = _to_scale(_joined([part.weights for part in drawn]), torch.float16)
        return {
            "logits.ids": _joined([part.ids for part in drawn]).to(self._id_dtype),
            "logits.weights": weights,
            "scale:logits.weights": scale,
        }

    def _encode_values(self, name: str, values: Tensor, index: Tensor, view: Tensor) -> Columns:
        what = f"the teacher's {name.removeprefix('tap:')}"
        _check_finite(what, values, index, view, "look at the teacher, or at train.precision")
        dtype: torch.dtype = getattr(torch, self.form.dtype)
        if has_scale(dtype):
            stored, scale = _to_scale(values, dtype)
            return {name: stored, f"scale:{name}": scale}
        stored = values.to(dtype)
        largest = (
            f"cache.dtype {self.form.dtype} ends at {torch.finfo(dtype).max:g}; take bfloat16 or float32"
        )
        _check_finite(what, stored, index, view, largest)
        return {name: stored}

    def decode(self, columns: Columns, taps: tuple[str, ...], logits: bool = True) -> Outputs:
        """Outputs in float32 from columns; features of ``taps`` alone, logits if these are asked for and kept."""
        features = {tap: _values(columns, f"tap:{tap}") for tap in taps}
        if self.logits is None or not logits:
            return Outputs(features=features)
        if self.form.form == "dense":
            return Outputs(_values(columns, "logits"), features=features)
        ids = columns["logits.ids"].to(torch.int64)
        if self.form.form == "topk":
            top = TopK(ids, columns["logits.log_probs"].float(), columns["logits.tail"])
            return Outputs(top, features=features)
        return Outputs(Sampled(ids, _values(columns, "logits.weights")), features=features)

    def needed(self, taps: tuple[str, ...], logits: bool = True) -> list[str]:
        """Names of the columns that `decode` reads."""
        wanted = {f"tap:{tap}" for tap in taps}
        own = self._logit_columns() if logits else {}
        return [name for name in self.columns if name in own or name.removeprefix("scale:") in wanted]


def top_k(logits: Tensor, k: int) -> TopK:
    """The ``k`` largest log-probabilities of logits ``[..., classes]``, descending, and the mass of all others."""
    log_probs = logits.log_softmax(-1)
    kept = log_probs.topk(k, dim=-1)
    # Summed over what is left, not taken from 1: a small tail keeps its digits.
    tail = log_probs.exp().scatter(-1, kept.indices, 0.0).sum(-1)
    return TopK(kept.indices, kept.values, tail)


def sample(logits: Tensor, k: int, temperature: float, counter: Counter) -> Sampled:
    """``k`` classes of each distribution, drawn with replacement from ``q ∝ p^(1/temperature)``, each with the weight
    ``p / q / k``: the weighted sum of any function of the class has the expectation under ``p`` as its mean.

    Args:
        logits: ``[rows, ..., classes]``.
        counter: the rows' random numbers; nothing else decides on the draws.
    """
    return draw(logits, _uniform(counter, (*logits.shape[1:-1], k), logits), temperature)


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> Sampled:
    """As `sample`, by numbers ``[rows, ..., k]`` in [0, 1), of logits ``[rows, ..., classes]``."""
    k = uniform.shape[-1]
    log_probs = logits.log_softmax(-1)
    proposal = log_probs if temperature == 1 else (log_probs / temperature).log_softmax(-1)
    heights = proposal.exp().cumsum(-1, dtype=torch.float64)
    total = heights[..., -1:]
    below = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    ids = torch.searchsorted(heights, below, right=True)
    weights = (log_probs.gather(-1, ids) - proposal.gather(-1, ids)).exp() / k
    return Sampled(ids, weights.float())


def _uniform(counter: Counter, shape: Shape, like: Tensor) -> Tensor:
    """A row's numbers ``[rows, *shape]`` in [0, 1), on the device of ``like``."""
    numbers = torch.from_numpy(counter.uniform(torch.Size(shape).numel()))
    return numbers.to(like.device).view(-1, *shape)


def _parts(outputs: Outputs) -> Iterator[tuple[Tensor, slice]]:
    """Logits in float32, all of them, or where they are made from hidden states ``[rows, tokens, width]`` those of so
    many tokens as take little memory; and which tokens these are."""
    if outputs.hidden is None or outputs.head is None or outputs.hidden.dim() != 3:
        yield outputs.logits.float(), slice(None)
        return
    rows, tokens = outputs.hidden.shape[:2]
    step = max(1, _PART_BYTES // (4 * rows * len(outputs.head.weight)))
    for start in range(0, tokens, step):
        chosen = slice(start, start + step)
        yield outputs.head(outputs.hidden[:, chosen]).float(), chosen


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _finite_logits(logits: Tensor, index: Tensor, view: Tensor) -> Tensor:
    advice = "look at the teacher, or at train.precision"
    _check_finite("the teacher's logits", logits, index, view, advice)
    return logits


def has_scale(dtype: torch.dtype) -> bool:
    return dtype in (torch.int8, torch.float8_e4m3fn)


def _scaled(name: str, dtype: torch.dtype, shape: Shape) -> dict[str, Column]:
    found = {name: Column(dtype, shape)}
    return found | {f"scale:{name}": Column(torch.float32, ())} if has_scale(dtype) else found


def _to_scale(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values in a narrow type, and what each row's are to be multiplied with."""
    top = _TOPS[dtype]
    # Not below the smallest normal number: a row of zeros, or next to it, must not be divided by zero.
    scale = (values.flatten(1).abs().amax(1) / top).clamp(min=torch.finfo(torch.float32).tiny)
    narrow = values / _along(scale, values)
    narrow = narrow.round() if dtype == torch.int8 else narrow
    return narrow.clamp(-top, top).to(dtype), scale


def _values(columns: Columns, name: str) -> Tensor:
    values = columns[name].float()
    scale = columns.get(f"scale:{name}")
    return values if scale is None else values * _along(scale, values)


def _along(scale: Tensor, values: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (values.dim() - 1))


def _check_finite(what: str, values: Tensor, index: Tensor, view: Tensor, advice: str) -> None:
    rows = values.isfinite().flatten(1).all(1)
    if not bool(rows.all()):
        first = int((~rows).nonzero()[0])
        raise StoreError(
            f"{what} of row {int(index[first])}, view {int(view[first])}, cannot be stored: not finite, or too large; "
            f"{advice}"
        )


def _cpu(ids: Tensor) -> Ids:
    numbers: Ids = ids.cpu().numpy()
    return numbers
