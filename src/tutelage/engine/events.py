"""Events of a training run, and the life of one step.

    fit_start
        epoch_start
            step_start
                method.transform        every micro-batch of the step, without gradients
                method.count            what each holds; summed over ranks before the first forward
                method.step             terms of one micro-batch
                backward                each term by its share of the step's items
                method.combine_gradients    where the method has it, instead of one summed gradient
                method.active           which optimisers move in this step
                finite?                 a bad term or gradient stops the run before the optimiser moves
                clip
                optimisers              those that are active
                method.after_step
            step_end
            evaluation                  on validation data, then method.after_evaluation
            checkpoint
        epoch_end
    fit_end

A callback is any object with methods named ``on_<event>``; each is handed the trainer, and ``on_evaluation`` the
metrics too. Callbacks see; methods change.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from tutelage.engine.loop import Trainer

Event = Literal[
    "fit_start", "epoch_start", "step_start", "step_end", "evaluation", "checkpoint", "epoch_end", "fit_end"
]
EVENTS: tuple[str, ...] = get_args(Event)


class Events:
    """Hands events to callbacks, in the order in which these were given.

    Raises:
        TypeError: a callback that listens to nothing, or to an event that does not exist.
    """

    def __init__(self, callbacks: Iterable[object] = ()) -> None:
        self._listeners: dict[str, list[Any]] = {event: [] for event in EVENTS}
        for callback in callbacks:
            self.add(callback)

    def add(self, callback: object) -> None:
        names = [name for name in dir(callback) if name.startswith("on_")]
        unknown = [name for name in names if name[3:] not in EVENTS]
        if unknown or not names:
            raise TypeError(
                f"callback {type(callback).__name__} has {unknown or 'no on_… method'}; "
                f"events are {', '.join('on_' + event for event in EVENTS)}"
            )
        for name in names:
            self._listeners[name[3:]].append(getattr(callback, name))

    def emit(self, event: Event, trainer: Trainer, *details: Any) -> None:
        for listener in self._listeners[event]:
            listener(trainer, *details)
