"""Stops a run at a step, as a kill would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


class KillAt:
    """Ends a run at its n-th step, counted over all Trainers, with nothing saved."""

    def __init__(self, step: int) -> None:
        self.left = step

    def on_step_end(self, trainer: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


def stop_after(step: int, start: Callable[[KillAt], Any]) -> None:
    with pytest.raises(Killed):
        start(KillAt(step))
