"""A Trainer's state as a `Snapshot`, and back. Random numbers need no place in it: they are functions of the step."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tutelage.engine.checkpoint import CheckpointError, Snapshot
from tutelage.engine.distributed import whole

if TYPE_CHECKING:
    from tutelage.engine.loop import Trainer


def snapshot(trainer: Trainer) -> Snapshot:
    """Everything that the next step depends on."""
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
    }
    return Snapshot(trainer.step, tensors, state)


def restore(trainer: Trainer, saved: Snapshot) -> None:
    """Put a snapshot back.

    Raises:
        CheckpointError: the snapshot belongs to other models, another method or other optimisers.
    """
    from tutelage.engine.loop import Progress

    state = saved.state
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
        optim.load(saved.tensors[f"optimizer.{name}"], state["optimizers"][name])
    trainer.progress = Progress(**state["progress"])
    trainer.sampler.load_state_dict(state["sampler"])
    for name, drawn in state["streams"].items():
        trainer.setup.streams[name].seek(drawn)
    if trainer.scaler and state["scaler"]:
        trainer.scaler.load_state_dict(state["scaler"])


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
    tensors = {name: whole(value.detach()) for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in state.items() if not isinstance(value, Tensor)}


def load_state(module: nn.Module, tensors: dict[str, Tensor], extra: dict[str, Any], name: str) -> None:
    """Load strictly.

    Raises:
        CheckpointError: names or shapes differ.
    """
    try:
        module.load_state_dict(tensors | extra, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"the checkpoint's {name} does not fit: {error}; it belongs to another recipe"
        ) from error
