"""Copies to an accelerator that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device; itself where it lies there.

    A copy from memory that the system may move would wait for everything that the device has still to do: on the way to
    an accelerator it is pinned first.
    """
    device = torch.device(device)
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device, non_blocking=device.type != "cpu")
    return tensor.pin_memory().to(device, non_blocking=True)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on an accelerator; 0 where it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "xpu":
        return torch.xpu.mem_get_info(device)[0]
    return 0
