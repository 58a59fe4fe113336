"""A Trainer's state as a `Snapshot`, and back. Random numbers need no place in it: they are functions of the step."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from torch import Tensor, nn

from tutelage.engine.checkpoint import CheckpointError, Snapshot
from tutelage.engine.optim_names import OptimError
from tutelage.engine.runtime import Runtime
from tutelage.engine.sharded import placed_like

if TYPE_CHECKING:
    from tutelage.engine.loop import Trainer
    from tutelage.engine.optim import Optim


def snapshot(trainer: Trainer) -> Snapshot:
    """Everything that the next step depends on; sharded tensors as they are."""
    tensors: dict[str, dict[str, Tensor]] = {}
    extra: dict[str, Any] = {}
    for name, module in _modules(trainer).items():
        tensors[name], extra[name] = split_state(module)
    optimizers: dict[str, Any] = {}
    for name, optim in trainer.optimizers.items():
        tensors[f"optimizer.{name}"], optimizers[name] = optim.state()
    state = {
        "progress": dataclasses.asdict(trainer.progress),
        "extra": extra,
        "optimizers": optimizers,
        "sampler": trainer.sampler.state_dict(),
        "streams": {name: stream.drawn for name, stream in trainer.setup.streams.items()},
        "scaler": trainer.scaler.state_dict() if trainer.scaler else None,
        "launch": _launch(trainer.runtime),
    }
    return Snapshot(trainer.step, tensors, state)


def restore(trainer: Trainer, saved: Snapshot) -> None:
    """Put a snapshot back. One of another launch is spread over this one's ranks, and a warning says so.

    Raises:
        CheckpointError: the snapshot belongs to other models or another method, or holds what no run wrote.
        OptimError: it belongs to another optimiser.
    """
    try:
        _restore(trainer, saved)
    except (CheckpointError, OptimError):
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint of step {saved.step} holds a state that no run wrote "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); start the run anew"
        ) from error


def _restore(trainer: Trainer, saved: Snapshot) -> None:
    from tutelage.engine.loop import Progress

    state = saved.state
    _compare_launch(state.get("launch"), _launch(trainer.runtime), saved.step)
    for name, module in _modules(trainer).items():
        if name not in saved.tensors:
            raise CheckpointError(
                f"the checkpoint of step {saved.step} has no {name!r}; it belongs to another recipe"
            )
        load_state(module, saved.tensors[name], state["extra"][name], name)
    if set(state["optimizers"]) != set(trainer.optimizers):
        raise CheckpointError(
            f"the checkpoint has optimisers {sorted(state['optimizers'])}, this method {sorted(trainer.optimizers)}; "
            "it belongs to another recipe"
        )
    for name, optim in trainer.optimizers.items():
        tensors = saved.tensors[f"optimizer.{name}"]
        optim.load(_placed(tensors, optim, trainer.parameters), state["optimizers"][name])
    progress = TypeAdapter(Progress).validate_json(json.dumps(state["progress"]), strict=True)
    if progress.step != saved.step:
        raise ValueError(f"its progress is that of step {progress.step}")
    trainer.progress = progress
    trainer.sampler.load_state_dict(state["sampler"])
    for name, drawn in state["streams"].items():
        trainer.setup.streams[name].seek(drawn)
    if trainer.scaler and state["scaler"]:
        trainer.scaler.load_state_dict(state["scaler"])


def _launch(runtime: Runtime) -> dict[str, Any]:
    return {"ranks": runtime.world, "sharding": runtime.sharding}


def _compare_launch(before: dict[str, Any] | None, now: dict[str, Any], step: int) -> None:
    if before is not None and before != now:
        warnings.warn(
            f"the checkpoint of step {step} was written by {before['ranks']} ranks ({before['sharding']}), this run "
            f"has {now['ranks']} ({now['sharding']}); it goes on from the same state, but bits may differ from those "
            "of a run that was never stopped",
            stacklevel=2,
        )


def _modules(trainer: Trainer) -> dict[str, nn.Module]:
    """The teacher that is not trained stays out: it is where it came from."""
    modules: dict[str, nn.Module] = {"student": trainer.student.model, "method": trainer.method}
    modules |= {f"teacher.{name}": module for name, module in trainer.whole.teachers.items()}
    if trainer.ema is not None:
        modules["ema"] = trainer.ema.averaged
    return modules


def split_state(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A module's state: tensors, and what ``get_extra_state`` gave (plain JSON values)."""
    state = module.state_dict()
    tensors = {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in state.items() if not isinstance(value, Tensor)}


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], extra: dict[str, Any], name: str) -> None:
    """Load strictly.

    Raises:
        CheckpointError: names or shapes differ.
    """
    live = module.state_dict()
    placed = {key: placed_like(value, live.get(key)) for key, value in tensors.items()}
    try:
        module.load_state_dict(placed | extra, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"the checkpoint's {name} does not fit: {error}; it belongs to another recipe"
        ) from error


def _placed(
    tensors: Mapping[str, Tensor], optim: Optim, live: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """An optimiser's state, spread over ranks as its parameters are."""
    names = {entry: entry.rsplit("/", 1)[0] for entry in tensors}
    return {
        entry: placed_like(value, live[names[entry]]) if names[entry] in optim.names else value
        for entry, value in tensors.items()
    }
