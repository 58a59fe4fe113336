"""Statistics of rows by their class."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Integer
from torch import Tensor

__all__: list[str] = []


class ClassSums(NamedTuple):
    """Sums of the rows of each class, ``[classes, features]``, and how many there are, ``[classes]``. Those of parts
    of the data add up to those of the whole."""

    sums: Float[Tensor, "classes features"]
    counts: Float[Tensor, " classes"]

    def plus(self, other: ClassSums) -> ClassSums:
        return ClassSums(self.sums + other.sums, self.counts + other.counts)

    @property
    def means(self) -> Float[Tensor, "classes features"]:
        """``[classes, features]``; zeros where a class has no rows."""
        return self.sums / self.counts.clamp(min=1)[:, None]


def class_ids(
    target: Integer[Tensor, " batch"] | Float[Tensor, "batch classes"],
) -> Integer[Tensor, " batch"]:
    """Class ids as they are, int64; of distributions the largest entry."""
    return target.argmax(1) if target.dim() == 2 else target.long()


def class_sums(
    values: Float[Tensor, "batch features"], labels: Integer[Tensor, " batch"], classes: int
) -> ClassSums:
    """Sums by class, without a loop over rows or classes; labels in ``[0, classes)``."""
    sums = values.new_zeros(classes, values.shape[1]).index_add(0, labels, values)
    ones = values.new_ones(len(labels))
    return ClassSums(sums, values.new_zeros(classes).index_add(0, labels, ones))
