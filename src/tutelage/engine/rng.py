"""Random numbers. Before every micro-batch the global generators are seeded from (seed, its place among those of all
ranks, step): an interrupted run goes on bit for bit with no generator state on disk, Trainers side by side do not
disturb one another, and ranks draw what one process with more micro-batches draws."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed in [0, 2**63) that depends on ``seed`` and on every name."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


_accelerated = functools.cache(torch.accelerator.is_available)


def seed_all(seed: int) -> None:
    """Seed python's, numpy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if _accelerated():
        torch.manual_seed(seed)
    else:  # torch.manual_seed would note a call, with a stack trace, for every device that might come
        torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Leave the global generators as they were found."""
    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run the block from freshly seeded global generators, and leave them as they were found."""
    with preserved():
        seed_all(seed)
        yield
