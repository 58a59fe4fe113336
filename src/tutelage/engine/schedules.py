"""Learning rates over a run, by step."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch.optim import lr_scheduler

from tutelage.engine.optim_names import OptimError, unknown
from tutelage.recipe.schema import ScheduleConfig

_OWN = {
    "constant": {"warmup"},
    "cosine": {"warmup", "final"},
    "linear": {"warmup", "final"},
    "multistep": {"warmup", "milestones", "gamma"},
}
_FIELDS = ("warmup", "milestones", "gamma", "final", "options")
_REFUSED = {
    "reducelronplateau": "it follows a metric, and a rate that depends on evaluations cannot be known by step; "
    "use cosine, linear or multistep",
    "lambdalr": "it needs a function, which a recipe cannot hold",
    "multiplicativelr": "it needs a function, which a recipe cannot hold",
    "sequentiallr": "it needs other schedulers, which a recipe cannot hold",
    "chainedscheduler": "it needs other schedulers, which a recipe cannot hold",
}


class Scheduler(Protocol):
    """Sets the rates of an optimiser before a step; its state is JSON."""

    def set_step(self, step: int) -> None: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: Mapping[str, Any]) -> None: ...


def rate(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """The learning rate at a step (from 0), as a share of the optimiser's ``lr``; a pure function.

    In warm-up it is ``(step + 1) / warm-up steps``. Afterwards, with p the share of the remaining steps that are done:
    ``constant`` 1; ``linear`` 1 − (1 − final)·p; ``cosine`` final + (1 − final)·(1 + cos πp)/2 (Loshchilov & Hutter,
    arXiv 1608.03983, equation 5); ``multistep`` gamma to the number of milestones (shares of the whole run) passed.
    """
    warmup = round(schedule.warmup * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    match schedule.name.lower():
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - (1.0 - schedule.final) * done
        case "cosine":
            return schedule.final + (1.0 - schedule.final) * 0.5 * (1.0 + math.cos(math.pi * done))
        case "multistep":
            passed = sum(step >= round(milestone * total_steps) for milestone in schedule.milestones)
            return schedule.gamma**passed
    raise OptimError(f"{schedule.name!r} is no function of the step")


class RateSchedule:
    """constant, cosine, linear and multistep. Has no state: the step says all."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: ScheduleConfig, total_steps: int) -> None:
        self._optimizer = optimizer
        self._schedule = schedule
        self._total_steps = total_steps
        self._base = [group["lr"] for group in optimizer.param_groups]

    def set_step(self, step: int) -> None:
        share = rate(self._schedule, step, self._total_steps)
        for group, base in zip(self._optimizer.param_groups, self._base, strict=True):
            group["lr"] = base * share

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        if state:
            raise OptimError(
                f"the saved schedule has state ({', '.join(state)}), but {self._schedule.name} keeps none"
            )


class TorchSchedule:
    """A class of ``torch.optim.lr_scheduler``, stepped once an optimiser step of the run."""

    def __init__(self, scheduler: lr_scheduler.LRScheduler) -> None:
        self._scheduler = scheduler

    def set_step(self, step: int) -> None:
        if step < self._scheduler.last_epoch:
            raise OptimError(
                f"{type(self._scheduler).__name__} is at step {self._scheduler.last_epoch} and cannot go back "
                f"to {step}; load the state that was saved there"
            )
        with warnings.catch_warnings():
            # An optimiser that is not active yet has made no step, though the run has.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            while self._scheduler.last_epoch < step:
                self._scheduler.step()

    def state(self) -> dict[str, Any]:
        """What steps change: numbers and lists of numbers. Options come from the recipe again."""
        return {key: value for key, value in self._scheduler.state_dict().items() if _is_plain(value)}

    def load(self, state: Mapping[str, Any]) -> None:
        if missing := self.state().keys() ^ state.keys():
            raise OptimError(
                f"the saved schedule is not that of {type(self._scheduler).__name__}: they differ in {sorted(missing)}"
            )
        self._scheduler.load_state_dict(dict(state))


def build_schedule(optimizer: torch.optim.Optimizer, schedule: ScheduleConfig, total_steps: int) -> Scheduler:
    """The schedule of an optimiser whose groups hold their full rates in ``lr``.

    Where left out, ``T_max`` of ``CosineAnnealingLR`` and ``total_steps`` of ``OneCycleLR`` are the run's steps,
    and the latter's ``max_lr`` the optimiser's rates.

    Raises:
        OptimError: unknown or refused name, a field or option it does not have or cannot do without.
    """
    name = schedule.name.lower()
    classes = _torch_schedules()
    if name in _REFUSED:
        raise OptimError(f"schedule {schedule.name!r} is not offered: {_REFUSED[name]}")
    if name not in _OWN and name not in classes:
        raise OptimError(unknown("schedule", schedule.name, [*_OWN, *classes]))
    _refuse_unused(schedule, _OWN.get(name, {"options"}))
    if name not in _OWN:
        return _torch_schedule(classes[name], optimizer, schedule, total_steps)
    if name == "multistep" and not schedule.milestones:
        raise OptimError("schedule multistep needs milestones, for example [0.5, 0.75]")
    return RateSchedule(optimizer, schedule, total_steps)


def _torch_schedule(
    kind: type[lr_scheduler.LRScheduler],
    optimizer: torch.optim.Optimizer,
    schedule: ScheduleConfig,
    total_steps: int,
) -> TorchSchedule:
    # The run's length is known; OneCycleLR's other way of saying it could only contradict.
    beside = {"self", "optimizer", "last_epoch", "epochs", "steps_per_epoch"}
    known = {key: entry for key, entry in inspect.signature(kind).parameters.items() if key not in beside}
    for option in schedule.options:
        if option not in known:
            raise OptimError(unknown(f"option of schedule {schedule.name!r}:", option, known))
    options: dict[str, Any] = {}
    if kind is lr_scheduler.CosineAnnealingLR:
        options["T_max"] = total_steps
    if kind is lr_scheduler.OneCycleLR:
        options |= {"total_steps": total_steps, "max_lr": [group["lr"] for group in optimizer.param_groups]}
    options |= {
        key: list(value) if isinstance(value, tuple) else value for key, value in schedule.options.items()
    }
    required = {key for key, entry in known.items() if entry.default is entry.empty}
    if missing := sorted(required - options.keys()):
        raise OptimError(
            f"schedule {schedule.name!r} needs schedule.options.{', schedule.options.'.join(missing)}"
        )
    try:
        return TorchSchedule(kind(optimizer, **options))
    except (TypeError, ValueError) as error:
        raise OptimError(f"schedule {schedule.name!r} refuses its options {options}: {error}") from error


def _refuse_unused(schedule: ScheduleConfig, used: set[str]) -> None:
    defaults = type(schedule).model_fields
    for field in _FIELDS:
        if field not in used and getattr(schedule, field) != defaults[field].default:
            takes = ", ".join(sorted(used))
            raise OptimError(f"schedule {schedule.name!r} has no use for {field}; it takes {takes}")


def _torch_schedules() -> dict[str, type[lr_scheduler.LRScheduler]]:
    base = lr_scheduler.LRScheduler
    return {
        name.lower(): entry
        for name, entry in vars(lr_scheduler).items()
        if isinstance(entry, type) and issubclass(entry, base) and name not in ("LRScheduler", "_LRScheduler")
        if name.lower() not in _REFUSED
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return isinstance(value, bool | int | float | str | None)
