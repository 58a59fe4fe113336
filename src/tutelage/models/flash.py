"""FlashAttention in models of transformers: kernels are told where documents end, and stay out of probes on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tutelage.engine.calling import first_tensor_in

_ON_CPU = "sdpa"
"""Models are probed before they are on a GPU, and the kernels run nowhere else."""


def prepare_flash(module: Any) -> None:
    """Hooks for a model that computes by FlashAttention: `documents_apart`; and on a CPU, where a run with such a model
    is only probed, the same attention by other means. Other models stay as they are."""
    wanted = module.config._attn_implementation
    if not str(wanted).startswith("flash"):
        return

    def fitting(model: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        first = first_tensor_in((args, given))  # weights may lie elsewhere until their layer runs
        here = wanted if first is not None and first.device.type != "cpu" else _ON_CPU
        if model.config._attn_implementation != here:
            model.set_attn_implementation(here)

    module.register_forward_pre_hook(fitting, with_kwargs=True)
    module.register_forward_pre_hook(documents_apart, with_kwargs=True)


def documents_apart(
    model: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A pre-hook: positions of packed rows become the bounds of their documents.

    By itself transformers finds documents by their positions in a batch of a single row alone, and lets those of other
    batches reach one another. Calls with a mask or a cache, as in writing text, have no packed rows.
    """
    positions = given.get("position_ids")
    if positions is None or given.get("attention_mask") is not None or given.get("use_cache"):
        return None
    bounds = document_bounds(positions)
    # An upper bound of the longest document serves, and its own length would have to be waited for.
    longest = positions.shape[1]
    return args, given | {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def document_bounds(positions: Tensor) -> Tensor:
    """Where documents begin in rows that are joined, and where the last one ends.

    Args:
        positions: ``[rows, length]``, 0 at the first token of each document.

    Returns:
        ``[documents + 1]`` int32. To find them the device is waited for.
    """
    begins = positions.flatten().eq(0)
    begins[:: positions.shape[1]] = True  # no document goes on in another row
    return torch.nn.functional.pad(begins.nonzero().flatten(), (0, 1), value=positions.numel()).int()
