"""Long-tailed training rows: an exponential fall from the first class to the last."""

from __future__ import annotations

import torch
from torch import Tensor

from tutelage.data.source import DataError, RowSource, SubsetSource
from tutelage.data.splits import permutation
from tutelage.recipe.schema import ImbalanceConfig


def long_tailed(source: RowSource, config: ImbalanceConfig, classes: int, seed: int) -> SubsetSource:
    """The rows of ``source`` that stay: of the class at place c ``n · ratio^(-c / (classes - 1))``, with the largest n
    for which every class has as many. They are the first of a seeded order of the rows.

    Raises:
        DataError: rows without class ids, one class alone, a class without rows, or one that would keep none.
    """
    target = source.target
    if target is None or target.dim() != 1 or target.is_floating_point() or classes < 2:
        raise DataError("data.imbalance needs class ids of at least two classes; leave it out for this data")
    have = torch.bincount(target, minlength=classes).double()
    places = torch.arange(classes)
    if config.order == "random":
        places[torch.from_numpy(permutation(classes, seed, "imbalance"))] = torch.arange(classes)
    shares = config.ratio ** (-places.double() / (classes - 1))
    keep = ((have / shares).min() * shares + 1e-9).floor().long()
    if int(keep.min()) == 0:
        rarest = int(keep.argmin())
        raise DataError(
            f"data.imbalance.ratio={config.ratio:g} leaves no row of class {rarest} ({int(have[rarest])} rows); "
            "give a smaller ratio, or more rows"
        )
    return SubsetSource(source, _first(target, keep, seed))


def _first(target: Tensor, keep: Tensor, seed: int) -> Tensor:
    """Positions, ascending, of the first ``keep[c]`` rows of each class c in a seeded order of all rows."""
    order = torch.from_numpy(permutation(len(target), seed, "imbalance rows"))
    shuffled = target[order]
    by_class = shuffled.argsort(stable=True)
    starts = torch.bincount(target, minlength=len(keep)).cumsum(0).roll(1)
    starts[0] = 0
    place = torch.arange(len(target)) - starts[shuffled[by_class]]
    chosen = by_class[place < keep[shuffled[by_class]]]
    return order[chosen].sort().values
