"""Where a launcher such as `torchrun` started several processes: one of them prints, and one of them complains."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

_PATIENCE = timedelta(seconds=10)


def is_first_process() -> bool:
    """Whether this process is the one that prints results."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def one_complains(*, follower: bool) -> Iterator[bool]:
    """Whether this process is the first that failed, and so the one to say why, inside the block.

    The launcher ends all processes as soon as one has ended. So the others, which fail alike or because the first did,
    wait here until it has spoken.

    Args:
        follower: this process failed because another did, whatever the order in which they come here.
    """
    store = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        with suppress(RuntimeError):  # a launcher without a store: each process speaks for itself
            address = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
            store = TCPStore(*address, is_master=False, timeout=_PATIENCE)
    if store is None:
        yield True
        return
    place = f"tutelage/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    speaks = not follower and store.add(f"{place}/failed", 1) == 1
    try:
        yield speaks
    finally:
        with suppress(RuntimeError):
            store.set(f"{place}/said", "yes") if speaks else store.wait([f"{place}/said"], _PATIENCE)


def leave() -> None:
    """Leave the group of processes after a verb that ended well; torch warns about one that is left open."""
    import sys

    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
