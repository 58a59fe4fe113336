"""How much faster the teacher writes with a student that drafts for it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from tutelage.engine.generation import Prompt, greedy_tokens
from tutelage.engine.taps import Tapped
from tutelage.models.hf_config import hushed

REPEATS = 3


class NoDraftsError(ValueError):
    """A student that cannot draft for this teacher."""


@dataclass(frozen=True)
class Drafting:
    """Figures over all prompts and repeats.

    Attributes:
        alone, drafted: the teacher's tokens a second by itself, and with drafts.
        speedup: the median over repeats of the ratio of both.
        accepted: share of the drafted tokens that the teacher kept, in [0, 1].
    """

    alone: float
    drafted: float
    speedup: float
    accepted: float


def measure_drafting(
    teacher: Tapped, student: Tapped, prompts: Sequence[Prompt], max_new_tokens: int
) -> Drafting:
    """Wall-clock of the teacher's greedy text with and without transformers' assisted generation, prompt by prompt, in
    turns after one round that is not timed; both must give the same tokens.

    Raises:
        NoDraftsError: one of the models writes no text, their heads differ in size, or the texts differ.
    """
    _check(teacher, student)
    written, accepted, drafted = 0, 0, 0
    with hushed():  # transformers warns of its own call of the drafting model
        for prompt in prompts:
            alone = greedy_tokens(teacher, prompt.tokens, max_new_tokens)
            with _calls(teacher.model) as passes, _calls(student.model) as drafts:
                assisted = greedy_tokens(teacher, prompt.tokens, max_new_tokens, student)
            if alone != assisted:
                raise NoDraftsError(
                    f"after prompt {prompt.id} assisted generation gives another text than the teacher alone: two "
                    "of its tokens are as good as equally likely there"
                )
            written += len(alone)
            # Every pass of the teacher keeps the drafts that it agrees with and adds one token of its own.
            accepted += max(len(alone) - len(passes), 0)
            drafted += len(drafts)
        seconds = [_seconds(teacher, student, prompts, max_new_tokens) for _ in range(REPEATS)]
    return Drafting(
        alone=written * REPEATS / sum(alone for alone, _ in seconds),
        drafted=written * REPEATS / sum(assisted for _, assisted in seconds),
        speedup=median(alone / assisted for alone, assisted in seconds),
        accepted=min(accepted / drafted, 1.0) if drafted else 0.0,
    )


def _check(teacher: Tapped, student: Tapped) -> None:
    models: dict[str, Any] = {"the teacher": teacher.model, "the student": student.model}
    for name, model in models.items():
        if not hasattr(model, "generate"):
            raise NoDraftsError(f"{name} is a {type(model).__name__}, which has no `generate`")
    widths = [model.config.get_text_config(decoder=True).vocab_size for model in models.values()]
    if widths[0] != widths[1]:
        raise NoDraftsError(
            f"the teacher's head has {widths[0]} outputs and the student's {widths[1]}, and assisted generation takes "
            "equal ones"
        )


def _seconds(
    teacher: Tapped, student: Tapped, prompts: Sequence[Prompt], max_new_tokens: int
) -> tuple[float, float]:
    """Of all texts, alone and with drafts; in turns, so that other load of the machine hits both."""
    total = {None: 0.0, student: 0.0}
    for prompt in prompts:
        for drafts in total:
            _wait(teacher)
            started = time.perf_counter()
            greedy_tokens(teacher, prompt.tokens, max_new_tokens, drafts)
            _wait(teacher)
            total[drafts] += time.perf_counter() - started
    return total[None], total[student]


def _wait(held: Tapped) -> None:
    device = next(held.parameters()).device
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def _calls(model: nn.Module) -> Iterator[list[None]]:
    """A list that grows by one with every forward pass."""
    passes: list[None] = []
    handle = model.register_forward_hook(lambda *_: passes.append(None))
    try:
        yield passes
    finally:
        handle.remove()
