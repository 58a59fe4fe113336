"""Optimisers by name, from torch and timm, and the options each takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tutelage.recipe.schema import OptimizerConfig

OptimizerFactory = Callable[..., torch.optim.Optimizer]

_REFUSED = {
    "lbfgs": "it evaluates the loss several times a step, which the trainer does not offer",
    "sparseadam": "it takes sparse gradients only, and models here give dense ones",
    "adahessian": "it needs second derivatives, which the trainer does not compute",
    "kron": "it keeps a random generator outside its state, so that a stopped run could not be resumed exactly",
}
_REFUSED |= dict.fromkeys(("kronw", "kronc"), _REFUSED["kron"])
_FIELDS = ("lr", "weight_decay", "momentum")
_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


class OptimError(ValueError):
    """An optimiser or a schedule that cannot be built as asked."""


def unknown(kind: str, name: str, allowed: Iterable[str]) -> str:
    """The text of an error about a name that is not known: the near ones first, else all."""
    names = {entry.lower(): entry for entry in sorted(allowed)}
    near = [names[entry] for entry in get_close_matches(name.lower(), names, n=4, cutoff=0.5)]
    hint = f"did you mean {', '.join(near)}?" if near else f"allowed: {', '.join(names.values())}"
    return f"unknown {kind} {name!r}; {hint}"


@cache
def optimizer_names() -> tuple[str, ...]:
    """Every name that ``train.optimizer.name`` may have, in lower case."""
    from timm.optim import list_optimizers

    # bnb… and fused… of timm belong to packages with state formats of their own (bitsandbytes, apex).
    others = {name for name in list_optimizers() if not name.startswith(("bnb", "fused"))}
    return tuple(sorted((others | set(_torch_optimizers())) - set(_REFUSED)))


def optimizer_factory(
    config: OptimizerConfig, parameters: list[nn.Parameter]
) -> tuple[OptimizerFactory, bool]:
    """The optimiser's class with all its options bound, and whether its groups take a ``weight_decay``.

    torch's classes go by their name in any case (``sgd``, ``AdamW``); other names are timm's. ``muon`` is timm's, which
    hands what is no matrix to AdamW. The fused implementation is taken where device and parameters allow it.

    Raises:
        OptimError: unknown or refused name, an option it does not have, a field it has no use for.
    """
    name = config.name.lower()
    if name in _REFUSED:
        raise OptimError(f"optimizer {config.name!r} is not offered: {_REFUSED[name]}")
    factory = _torch_optimizers().get(name) or _timm_optimizer(name)
    if factory is None:
        raise OptimError(unknown("optimizer", config.name, optimizer_names()))
    signature = inspect.signature(factory)
    known = {key: entry for key, entry in signature.parameters.items() if key != "params"}
    options = _options(config, known)
    if "fused" in known and not {"fused", "foreach"} & options.keys() and _can_fuse(factory, parameters):
        options["fused"] = True
    return partial(factory, lr=config.lr, **options), "weight_decay" in known


def _options(config: OptimizerConfig, known: dict[str, inspect.Parameter]) -> dict[str, Any]:
    allowed = sorted(
        key
        for key, entry in known.items()
        if key not in _FIELDS and entry.kind not in (entry.VAR_KEYWORD, entry.VAR_POSITIONAL)
    )
    for option in config.options:
        if option in _FIELDS:
            raise OptimError(
                f"optimizer option {option!r} has a field of its own; give it as train.optimizer.{option}"
            )
        if option not in allowed:
            raise OptimError(unknown(f"option of optimizer {config.name!r}:", option, allowed))
    options: dict[str, Any] = dict(config.options)
    if config.weight_decay and "weight_decay" not in known:
        raise OptimError(f"optimizer {config.name!r} has no weight decay; leave weight_decay out")
    if config.momentum is not None and "momentum" not in known:
        instead = "set options.betas instead" if "betas" in known else "leave momentum out"
        raise OptimError(f"optimizer {config.name!r} has no momentum; {instead}")
    if config.momentum is not None:
        options["momentum"] = config.momentum
    elif "momentum" in known and _is_sgd(config.name.lower()):
        options["momentum"] = 0.9
    return options


def _is_sgd(name: str) -> bool:
    # timm's relatives of SGD; their own default is no momentum, with which the Nesterov ones refuse to start.
    return any(part in name for part in ("sgd", "nesterov", "momentum", "lars", "larc"))


@cache
def _torch_optimizers() -> dict[str, OptimizerFactory]:
    found: dict[str, OptimizerFactory] = {
        name.lower(): entry
        for name, entry in vars(torch.optim).items()
        if isinstance(entry, type) and issubclass(entry, torch.optim.Optimizer)
    }
    for name in ("optimizer", "muon", *_REFUSED):
        found.pop(name, None)
    return found


def _timm_optimizer(name: str) -> OptimizerFactory | None:
    from timm.optim import get_optimizer_class

    if name not in optimizer_names():
        return None
    factory: OptimizerFactory = get_optimizer_class(name, bind_defaults=True)
    return factory


def _can_fuse(factory: OptimizerFactory, parameters: list[nn.Parameter]) -> bool:
    sharded = {isinstance(parameter, DTensor) for parameter in parameters}
    if True in sharded and (False in sharded or factory is torch.optim.SGD):
        return False  # torch has no sharding rule for fused SGD, and its fused kernels take no mixture
    return factory in _FUSED and all(_fusable(parameter) for parameter in parameters)


def _fusable(parameter: Tensor) -> bool:
    return parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()
