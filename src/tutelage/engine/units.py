"""What taps need under FSDP2, whose units gather their weights in a forward and let go of them after it.

FSDP2 gathers a unit's weights for the backward by a hook on the unit's *outputs*. A tap strictly inside a unit is none
of them, and a stopped forward never reaches the end of its units: without the two functions here gradients would be
taken with weights that are no longer there, or would not be reduced over ranks. Both are silent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def may_be_sharded() -> bool:
    return dist.is_available() and dist.is_initialized()


def gather_for_backward(model: nn.Module, path: str, tensor: Tensor) -> Tensor:
    """Let the gradient that arrives at a tapped tensor gather the weights of every unit around the tap first.

    A view comes back as a copy: FSDP2 warns of views that leave its root, since in-place changes would lose the hook.
    """
    if not tensor.requires_grad:
        return tensor
    units = _units_around(model, path)
    if tensor._base is not None:
        tensor = tensor.clone()
    for unit in units:
        tensor.register_hook(unit._get_fsdp_state()._pre_backward)
    return tensor


def close_units(model: nn.Module) -> None:
    """After a stopped forward: end the forward of every unit that was entered and not left, inner ones first. Their
    weights are let go of, as after a whole forward."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    for module in reversed(list(model.modules())):
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            # A group of modules that is one unit is ended by its root, which knows what of it is still to run.
            if state._training_state is TrainingState.FORWARD and not state._modules_to_run_forward:
                state._post_forward(module, (), None)


def let_go(module: nn.Module) -> None:
    """Let go of the root's gathered weights, which it keeps for a backward: where none follows, and around a forward
    with other flags than training's (constant parameters). Else the next forward would take them with the flags of this
    one, and a parameter would silently get no gradient."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        module.reshard()


def _units_around(model: nn.Module, path: str) -> list[FSDPModule]:
    from torch.distributed.fsdp import FSDPModule

    units: list[FSDPModule] = []
    module = model
    for name in filter(None, path.split(".")):
        if isinstance(module, FSDPModule):
            units.append(module)
        module = module._modules[name]  # type: ignore[assignment]
    return units
