"""Which rows or tokens of a micro-batch the transport compares, and their logits, from all ranks together."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tutelage.engine.distributed import gather_rows, sum_over_ranks
from tutelage.engine.types import Batch, Outputs
from tutelage.functional.tokens import counted_tokens

if TYPE_CHECKING:
    from tutelage.engine.step import Step


class Compared(NamedTuple):
    """Attributes:
    own: positions of this rank's among all its rows (tokens), laid flat.
    places: theirs among all ranks' that are compared.
    number: how many those are.
    """

    own: Tensor
    places: Tensor
    number: int

    @classmethod
    def of(cls, batch: Batch, ctx: Step, most: int) -> Compared:
        """All rows that count; of tokens ``most`` at most, drawn alike on all ranks."""
        tokens = ctx.items == "tokens"
        counted = batch.mask
        if tokens and batch.target is not None:
            counted = counted_tokens(batch.target.shape, batch.mask, batch.target)
        world, rank = ctx.setup.runtime.world, ctx.setup.runtime.rank
        if counted is None:
            own = torch.arange(len(batch), device=batch.device)
            counts = [len(own)] * world
        else:
            own = counted.flatten().nonzero()[:, 0]
            counts = gather_rows(own.new_full((1,), len(own))).tolist()
        before, total = sum(counts[:rank]), sum(counts)
        if not tokens or total <= most:
            return cls(own, torch.arange(before, before + len(own), device=own.device), total)
        # By their places among those that count, in order of rank, so that one process draws the same.
        drawn = torch.randperm(total, generator=ctx.shared_generator, device=own.device)[:most]
        places = ((drawn >= before) & (drawn < before + len(own))).nonzero()[:, 0]
        return cls(own[drawn[places] - before], places, most)

    def logits(self, outputs: Outputs) -> Tensor:
        """``[number, classes]``, of all ranks; from hidden states and head where there are, and then no others."""
        if outputs.hidden is not None and outputs.head is not None:
            return outputs.head(self._together(outputs.hidden))
        return self._together(outputs.logits)

    def _together(self, values: Tensor) -> Tensor:
        flat = values.flatten(0, -2)
        spread = flat.new_zeros(self.number, flat.shape[-1]).index_copy(0, self.places, flat[self.own])
        return sum_over_ranks(spread)
