"""A frozen teacher whose weights stay in CPU memory."""

from __future__ import annotations

import torch

from tutelage.engine.taps import Tapped


def offload(held: Tapped, device: torch.device) -> None:
    """Let every layer's weights come to ``device`` for its forward alone, by accelerate's hooks; a head that a forward
    stops before comes where it is read. Buffers lie on the device for good.

    Args:
        held: constant, on the CPU; it cannot be trained any more.
    """
    from accelerate import cpu_offload

    held.to("cpu")
    for name, buffer in held.named_buffers(recurse=False):
        setattr(held, name, buffer.to(device))
    cpu_offload(held.model, execution_device=device)
