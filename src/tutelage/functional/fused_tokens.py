"""The rows of a fused loss, and the run over them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tutelage.functional.checks import check_class_ids
from tutelage.functional.fused_pass import Chunks, run_pass
from tutelage.functional.fused_products import Gradients, Side
from tutelage.functional.fused_rows import DenseRows, Found, Rows
from tutelage.functional.fused_vocabulary import Vocabulary
from tutelage.functional.heads import Head
from tutelage.functional.reductions import without_autocast
from tutelage.functional.tokens import counted_tokens

__all__: list[str] = []


class Tokens:
    """The student's side of a loss: its rows laid flat, and which of them count."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        target: Tensor | None,
        ignore_index: int,
        mask: Tensor | None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.leading = hidden.shape[:-1]
        check_side("student", hidden, head)
        counted = counted_tokens(self.leading, mask, target, ignore_index)
        self.side = Side(hidden.flatten(0, -2), head)
        self.vocabulary = Vocabulary(len(head.weight), group, hidden.device)
        self.counted = None if counted is None else counted.reshape(-1).nonzero()[:, 0]
        self.count = len(self.side.hidden) if self.counted is None else len(self.counted)
        self.target = None
        if target is not None:
            ids = target.reshape(-1)
            check_class_ids(
                ids if self.counted is None else ids[self.counted], self.count, self.vocabulary.total
            )
            self.target = ids.long()

    def weights(self, token_weight: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """The weight of each counted row, up to 1, and what all are multiplied by; without weights the mean's."""
        wide = torch.tensor(1 / max(self.count, 1), dtype=self.side.wide, device=self.side.hidden.device)
        if token_weight is None:
            return None, wide
        if token_weight.shape != self.leading:
            raise ValueError(
                f"token_weight must hold one number a token, {list(self.leading)}; got {list(token_weight.shape)}"
            )
        flat = token_weight.detach().reshape(-1).to(wide)
        row_weight = flat if self.counted is None else flat[self.counted]
        if not self.count:
            return row_weight, wide
        # Small weights would be lost in half precision, and where the gradient of the rows is multiplied by them.
        largest = row_weight.abs().max()
        largest = torch.where(largest == 0, 1.0, largest)
        return row_weight / largest, largest

    @torch.no_grad()
    def run(
        self,
        work: Rows,
        chunk_size: int | None = None,
        gradients: Gradients | None = None,
        row_weight: Tensor | None = None,
    ) -> Found:
        """What is found of the counted rows, in their order; adds to ``gradients``, weighed by ``row_weight``.

        Raises:
            ValueError: ``chunk_size`` is below 1.
        """
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1; got {chunk_size}")
        chunks = Chunks(
            self.count if self.counted is None else self.counted,
            line=self.vocabulary.size * self.side.wide.itemsize,
            models=1 + isinstance(work, DenseRows),
            size=chunk_size,
            device=self.side.hidden.device,
            parted=self.vocabulary.group is None,
        )
        with without_autocast(self.side.hidden):
            return run_pass(self.side, self.vocabulary, chunks, work, gradients or Gradients(), row_weight)

    def spread(self, values: Tensor) -> Tensor:
        """Values of the counted rows among zeros, in the input's shape."""
        if self.counted is None:
            return values.reshape(self.leading)
        return (
            values.new_zeros(len(self.side.hidden)).index_copy_(0, self.counted, values).reshape(self.leading)
        )


def check_side(name: str, hidden: Tensor, head: Head) -> None:
    """Raise ValueError unless a model's head fits its hidden states."""
    if hidden.dim() < 2 or head.weight.dim() != 2 or hidden.shape[-1] != head.weight.shape[1]:
        raise ValueError(
            f"the {name}'s hidden states [..., width] and its head's weight [vocabulary, width] must agree; "
            f"got {list(hidden.shape)} and {list(head.weight.shape)}"
        )
    if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
        raise ValueError(
            f"the {name}'s bias must be [{len(head.weight)}], one a row of its head; got {list(head.bias.shape)}"
        )
    if hidden.dtype != head.weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(
            f"the {name}'s hidden states and head must have one type outside autocast; "
            f"got {hidden.dtype} and {head.weight.dtype}"
        )
