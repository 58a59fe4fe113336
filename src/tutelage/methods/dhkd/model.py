"""The auxiliary heads of DHKD."""

from __future__ import annotations

from torch import nn


class NonlinearHead(nn.Sequential):
    """A classifier with one hidden layer: linear, dropout, BatchNorm, ReLU, linear; ``[rows, in_dim]`` to
    ``[rows, classes]``. It needs two rows in training."""

    def __init__(self, in_dim: int, classes: int, hidden: int = 200, dropout: float = 0.1) -> None:
        super().__init__(
            nn.Linear(in_dim, hidden),
            nn.Dropout(dropout),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )
