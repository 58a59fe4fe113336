"""An out-of-memory error, told with what needed how much and what to switch on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from tutelage.engine.combine import Combined
from tutelage.engine.memory import Situation, advice, in_words, needed
from tutelage.engine.method import Method
from tutelage.engine.optim_names import optimizer_factory
from tutelage.recipe.schema import OptimizerConfig

if TYPE_CHECKING:
    from tutelage.engine.loop import Trainer

_CPU = ("can't allocate memory", "cannot allocate memory", "not enough memory")


class OutOfMemoryError(RuntimeError):
    """A step needed more memory than there is; the weights are those before it."""


@contextmanager
def memory_explained(situation: Callable[[], Situation], where: str) -> Iterator[None]:
    """Around a step: an error of the allocator becomes one that says what needed how much.

    Raises:
        OutOfMemoryError: in its place.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"{where}: out of memory ({_first_line(error)}).\n{report(situation())}"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, of a device or the CPU, raised it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _CPU)


def report(now: Situation) -> str:
    """The estimate and the advice, a line each."""
    items = "tokens" if now.student.vocabulary else "rows"
    lines = [f"What a process needs for {now.items} {items} at once, by estimate:"]
    lines += [f"  {name}: {size}" for name, size in needed(now).items()]
    savings = [f"  {name}: {in_words(size)}" for name, size in advice(now).items()]
    return "\n".join([*lines, "What would save most:", *savings])


def situation_of(trainer: Trainer) -> Situation:
    """A step of a Trainer, as the formulas see it."""
    runtime, config = trainer.runtime, trainer.config
    sizes = dict(trainer.wiring.sizes)
    student = sizes.pop("student")
    rows = -(-config.batch_size // (config.accumulate * runtime.world))
    sharded = runtime.sharding == "fsdp"
    return Situation(
        student,
        tuple(sizes.values()),
        rows * trainer.wiring.items,
        ranks=runtime.world,
        states=optimizer_states(config.optimizer),
        half=runtime.precision != "fp32",
        fused=not student.vocabulary or _is_fused(trainer.method),
        recomputed=config.activation_checkpointing,
        average=config.ema is not None,
        sharded=sharded,
        shard_teacher=bool(trainer.wiring.teacher_plans),
        shard_head=sharded and config.shard_head,
        offload_teacher=config.offload_teacher,
        accelerator=runtime.device.type != "cpu",
    )


def _is_fused(method: Method) -> bool:
    """Whether a method's losses of tokens never make logits whole: where it has the choice, by its option; the label
    loss alone always. Of combined methods, all of them."""
    parts = method.methods if isinstance(method, Combined) else [method]
    return all(getattr(part.config, "fused", part.needs.teacher == "none") for part in parts)


def optimizer_states(config: OptimizerConfig) -> float:
    """Numbers that an optimiser keeps for each of a weight's, found by one step of a small weight."""
    weight = nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.zeros_like(weight)
    factory, _ = optimizer_factory(config, [weight])
    optimizer = factory([{"params": [weight]}])
    optimizer.step()
    kept = [value.numel() for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    return sum(number for number in kept if number > 1) / weight.numel()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
