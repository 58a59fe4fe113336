"""SIGTERM and Ctrl-C: the step that runs is finished, a checkpoint is written, then the run ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch

from tutelage.engine.runtime import Runtime

_ASK_RANKS_EVERY = 10


class Interrupted(RuntimeError):
    """The run was asked to stop and has written its checkpoint. ``signal`` is the signal's number."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step}; `tutelage resume` goes on from here"
        )
        self.signal = number


class StopRequest:
    """Holds the handlers while a run is under way. A second signal ends the process at once."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def requested(self, step: int) -> bool:
        """Whether to stop after this step. Ranks agree on it, so that all write the same checkpoint."""
        if self.runtime.world == 1:
            return self.signal != 0
        if step % _ASK_RANKS_EVERY:
            return False
        asked = torch.tensor(float(self.signal), device=self.runtime.device)
        self.signal = max(self.signal, int(self.runtime.sum(asked).item() > 0) * signal.SIGTERM)
        return self.signal != 0
