"""Rows by domain, and the order in which an interval reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tutelage.data import column
from tutelage.engine.loading import Source
from tutelage.engine.rng import derive_seed
from tutelage.methods.ddk.functional import ddk_draw_domains


def rows_by_domain(source: Source, name: str) -> dict[str, Tensor]:
    """Positions of every domain's rows ``[rows]``, by what the column ``name`` calls it.

    Raises:
        ValueError: a row without a domain.
    """
    values = column(source, name)
    if values.dim() != 1 or not bool(torch.isfinite(values.double()).all()):
        raise ValueError(
            f"the column {name!r} must name one domain a row; it holds {list(values.shape)} values, or some are missing"
        )
    titles = getattr(source, "names", {}).get(name)
    return {
        titles[int(value)] if titles is not None else f"{value:g}": (values == value).nonzero().flatten()
        for value in torch.unique(values).tolist()
    }


class Mixture:
    """A `Sampler` whose epoch is an interval: the domain of each row is drawn by the domains' shares, then the next row
    of that domain is taken; a domain that is used up starts again from its beginning. The rows of an interval are
    shuffled.

    Args:
        domains: positions of each domain's rows; they are read in an order drawn once.
        length: rows of an interval.
        seed: of all draws.

    Attributes:
        factor: share of each domain in this interval, ``[domains]`` float64; at first that of its rows.
        interval: how many are done.
        read: rows of each domain that earlier intervals took, ``[domains]``.
    """

    def __init__(self, domains: Mapping[str, Tensor], length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(derive_seed(seed, "domains"))
        self.rows = [rows[torch.randperm(len(rows), generator=generator)] for rows in domains.values()]
        self.length, self.seed = length, seed
        self.sizes = torch.tensor([len(rows) for rows in self.rows])
        self.factor = self.sizes.double() / self.sizes.sum()
        self.interval = 0
        self.read = torch.zeros_like(self.sizes)

    def __len__(self) -> int:
        return self.length

    def order(self, epoch: int) -> Tensor:
        """Positions of this interval's rows.

        Raises:
            ValueError: another interval is asked for: what it holds is not known before it begins.
        """
        if epoch != self.interval:
            raise ValueError(f"the mixture stands at interval {self.interval}; {epoch} was asked for")
        domains, shuffled = self._draw()
        order = torch.empty_like(domains)
        for number, rows in enumerate(self.rows):
            places = (domains == number).nonzero().flatten()
            order[places] = rows[(self.read[number] + torch.arange(len(places))) % len(rows)]
        return order[shuffled]

    def read_after(self, rows: int) -> Tensor:
        """Rows of each domain that were read once so many of this interval's were, ``[domains]``."""
        domains, shuffled = self._draw()
        return self.read + domains[shuffled][:rows].bincount(minlength=len(self.rows))

    def advance(self, factor: Tensor) -> None:
        """End this interval; the next one is drawn by ``factor``."""
        self.read = self.read_after(self.length)
        self.factor = factor
        self.interval += 1

    def _draw(self) -> tuple[Tensor, Tensor]:
        """The domain of each row of this interval, before they are shuffled, and the order of the shuffled ones."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "interval", self.interval))
        domains = ddk_draw_domains(self.factor, self.length, generator=generator)
        return domains, torch.randperm(self.length, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor.tolist(), "interval": self.interval, "read": self.read.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor = torch.tensor(state["factor"], dtype=torch.float64)
        self.read = torch.tensor(state["read"], dtype=torch.int64)
        self.interval = int(state["interval"])
