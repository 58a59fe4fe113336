"""What taps cost: a forward that stops early, and one hook."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import Bar, Benchmark, Sides, UnequalWorkError
from benchmarks.training import BATCH, model
from tutelage.engine.taps import Tapped, list_taps

_HOOKS = 32


def third(device: torch.device) -> Sides:
    """A resnet32x4 up to the deepest tap within the first third of its forward."""
    teacher = model("resnet32x4", seed=0).to(device).eval()
    images = torch.rand(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    tap = max(
        (tap for tap in list_taps(teacher, images[:2]) if tap.depth <= 1 / 3), key=lambda tap: tap.depth
    )
    tapped = Tapped(teacher)

    @torch.no_grad()
    def stopped() -> dict[str, Tensor]:
        found: dict[str, Tensor] = tapped(images, (tap.path,), False)
        return found

    @torch.no_grad()
    def whole() -> Tensor:
        logits: Tensor = teacher(images)
        return logits

    stopped()
    return Sides(stopped, whole, note=f"{tap.path}, depth {tap.depth:.2f}")


def hooks(device: torch.device) -> Sides:
    """A chain of modules that do next to nothing, every one of them tapped."""
    chain = nn.Sequential(*(nn.Flatten() for _ in range(_HOOKS)))
    tapped, rows = Tapped(chain), torch.zeros(2, 2, device=device)
    paths = tuple(name for name, _ in chain.named_children())
    if len(tapped(rows, paths)) != _HOOKS + 1:
        raise UnequalWorkError(f"not all of {_HOOKS} taps fired")
    return Sides(partial(tapped, rows, paths), partial(tapped, rows), count=_HOOKS)


BENCHMARKS = [
    Benchmark(
        "taps.third",
        "a resnet32x4 teacher, batch 64, tapped within the first third of its depth, without logits",
        "its whole forward",
        Bar(0.45),
        third,
    ),
    Benchmark(
        "taps.hook",
        f"what a tap adds to a forward, the mean of {_HOOKS} on modules that do nothing",
        "the same forward without taps",
        Bar(20, "µs"),
        hooks,
    ),
]
