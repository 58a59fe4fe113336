"""Low-rank adapters beside linear layers, through peft: put in before training, merged into the weights after."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

from torch import nn

from tutelage.models.names import ModelError, nearest
from tutelage.recipe.models import LoraConfig


def add_lora(module: nn.Module, config: LoraConfig, task: str) -> None:
    """Put adapters beside a transformers model's linear layers (LoRA, arXiv 2106.09685) and freeze the rest.

    Paths of modules stay as they are; an adapted layer holds its own as ``base_layer``. Adapters are float32 whatever
    the weights are, and add nothing until they are trained. A language model's head is never adapted, since losses read
    its weights alone; a classifier's head is new, and is trained whole.

    Raises:
        ModelError: peft is missing, a target names no linear layer of the model's body, or a new head would be in half
            precision.
    """
    peft = _peft()
    body = _body(module)
    inner = {id(parameter) for parameter in body.parameters()}
    new = {id(p) for p in module.parameters() if id(p) not in inner and task != "language-model"}
    if new and any(parameter.dtype.itemsize < 4 for parameter in module.parameters()):
        raise ModelError(
            f"the head of this {type(module).__name__} is new and trained whole, which half precision is too coarse "
            "for; leave the student's dtype out, and set train.precision"
        )
    layers = _layers(peft, module, body, config)
    from transformers.pytorch_utils import Conv1D

    transposed = any(isinstance(module.get_submodule(path), Conv1D) for path in layers)
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=layers,
            fan_in_fan_out=transposed,
        ),
        module,
    )
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        elif id(parameter) in new:
            parameter.requires_grad_(True)


def merge_lora(module: nn.Module) -> None:
    """Add trained adapters to the weights beside them and take them out: the plain model again, with the same logits up
    to rounding, and all of its parameters trainable. A model without adapters stays as it is.

    Raises:
        ModelError: a merged weight is not finite.
    """
    adapted = {path: layer for path, layer in module.named_modules() if _is_adapted(layer)}
    for path, layer in adapted.items():
        held: Any = layer
        try:
            held.merge(safe_merge=True)
        except ValueError as error:
            raise ModelError(f"the adapter of {path} cannot be merged: {error}") from None
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, held.get_base_layer())
    if adapted:
        module.__dict__.pop("peft_config", None)
        module.requires_grad_(True)


def has_lora(module: nn.Module) -> bool:
    """Whether there are adapters that are not merged."""
    return any(map(_is_adapted, module.modules()))


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def _body(module: nn.Module) -> nn.Module:
    """The model without its head."""
    base: nn.Module = getattr(module, "base_model", module)
    return base


def _layers(peft: ModuleType, module: Any, body: nn.Module, config: LoraConfig) -> list[str]:
    """Paths of the layers that get an adapter."""
    from transformers.pytorch_utils import Conv1D

    inner = {id(each) for each in body.modules()}
    linear = [
        path
        for path, each in module.named_modules()
        if isinstance(each, (nn.Linear, Conv1D)) and id(each) in inner and path
    ]
    targets: Any = config.targets
    if targets is None:
        known = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        targets = known.get(module.config.model_type)
    if targets is None:
        return linear
    if isinstance(targets, str):  # peft writes some of its own as an expression
        return [path for path in linear if re.fullmatch(targets, path)]
    for target in targets:
        if not any(_ends(path, target) for path in linear):
            names = sorted({path.rpartition(".")[2] for path in linear})
            raise ModelError(
                f"lora.targets: {target!r} names no linear layer in the body of this {type(module).__name__}; near: "
                f"{', '.join(nearest(target, names)) or 'none'}; it has {', '.join(names)}"
            )
    return [path for path in linear if any(_ends(path, target) for target in targets)]


def _ends(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError:
        raise ModelError("`lora` needs peft: pip install 'tutelage[llm]'") from None
    return peft  # type: ignore[no-any-return]
