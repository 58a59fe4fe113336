"""Quantisation-aware training: weights are rounded in every forward, gradients pass through, and floats are kept.

A layer keeps its place, its name and its parameters; only its class changes, to one that gives the rounded weight
wherever ``weight`` is read. So taps, optimisers, checkpoints and `save_pretrained` see the plain model. The numbers are
torchao's: an exported file of the same kind rounds the weights to the same values.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

Kind = Literal["int8", "int4"]

LIMITS: dict[Kind, tuple[int, int]] = {"int8": (-128, 127), "int4": (-8, 7)}
GROUP = 32
"""int4: weights of a linear layer that share a scale, where its width divides so."""
SHORTEST = 16
"""int4: with fewer weights to a scale, the scales would eat what is saved; such layers stay as they are."""

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLVING = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


class Coverage(NamedTuple):
    """What is rounded.

    Attributes:
        layers: paths of the layers.
        left: paths of layers with weights that stay floats.
        share: of all parameters, between 0 and 1.
    """

    layers: tuple[str, ...]
    left: tuple[str, ...]
    share: float


def coverage(model: nn.Module, to: Kind) -> Coverage:
    """Which layers of a model can be rounded: linear layers and convolutions with enough inputs."""
    weighty = {
        name: module
        for name, module in model.named_modules()
        if any(parameter.dim() > 1 for parameter in module._parameters.values() if parameter is not None)
    }
    layers = {name: module for name, module in weighty.items() if block(module, to) is not None}
    total = sum(parameter.numel() for parameter in model.parameters())
    rounded = {id(weight): weight.numel() for weight in map(_weight, layers.values())}
    left = tuple(name or "(the model itself)" for name in weighty if name not in layers)
    return Coverage(tuple(layers), left, sum(rounded.values()) / max(1, total))


def block(module: nn.Module, to: Kind) -> tuple[int, ...] | None:
    """Shape of the weights that share one scale; none: the layer stays as it is.

    int8: one scale an output channel. int4: one a group of 32 inputs of a linear layer (all inputs, where they do not
    divide), one a convolution's output channel and position in the kernel.
    """
    if not isinstance(module, _LAYERS) or module._parameters.get("weight") is None:
        return None
    shape = _weight(module).shape
    if to == "int8":
        return (1, *shape[1:])
    if shape[1] < SHORTEST:
        return None
    length = GROUP if len(shape) == 2 and shape[1] % GROUP == 0 else shape[1]
    return (1, length, *[1] * (len(shape) - 2))


def prepare(model: nn.Module, to: Kind, *, compiled: bool = False) -> Coverage:
    """Round the weights of every layer that can be, in each forward from now on; int8 rounds the layers' inputs too.

    Args:
        compiled: the model is going to be compiled.

    Raises:
        ValueError: no layer of the model can be rounded, or one of them cannot be compiled too.
        ImportError: torchao is not installed.
    """
    torchao()
    release(model)
    found = coverage(model, to)
    unusual = [name for name in found.layers if not _is_usual(type(model.get_submodule(name)))]
    if compiled and unusual:
        raise ValueError(
            f"train.quantize and train.compile do not go together for {unusual[0]}, a "
            f"{type(model.get_submodule(unusual[0])).__name__} with a forward of its own; set one of them to null"
        )
    if not found.layers:
        raise ValueError(
            f"train.quantize is {to}, but no layer of this {type(model).__name__} can be rounded to it: it has no "
            f"linear layer and no convolution{' with 16 inputs or more' if to == 'int4' else ''}; set it to null"
        )
    for name in found.layers:
        module = model.get_submodule(name)
        kind: Any = type(module)
        module.__class__ = _rounding(kind, to)
    return found


def release(model: nn.Module) -> None:
    """Give every layer its own class back; the weights are the floats that were trained."""
    for module in model.modules():
        if isinstance(module, Rounding):
            held: nn.Module = module
            held.__class__ = module.plain


@contextlib.contextmanager
def floats(model: nn.Module) -> Iterator[None]:
    """Run the block with every layer of its own class; rounding goes on after it."""
    rounding = [(module, type(module)) for module in model.modules() if isinstance(module, Rounding)]
    release(model)
    try:
        yield
    finally:
        for module, kind in rounding:
            module.__class__ = kind


def quantised(weight: Tensor, block: tuple[int, ...], to: Kind) -> tuple[Tensor, Tensor]:
    """A weight as int8 numbers within the limits of ``to``, and the float32 scale of each block, symmetric around 0.

    Returns:
        Numbers in the weight's shape; scales ``[weight.shape[i] / block[i]]``.
    """
    library = torchao()
    numbers, scale, _ = _numbers(library, weight, library.MappingType.SYMMETRIC, block, LIMITS[to])
    return numbers, scale


class Rounding(nn.Module):
    """Mixed into a layer's class by `prepare`."""

    plain: ClassVar[type[nn.Module]]
    rounds_to: ClassVar[Kind]
    library: ClassVar[ModuleType]

    @property
    def weight(self) -> Tensor:
        """The weight, rounded; gradients go to the float behind it as if it were not."""
        return self._rounded_weight()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's own name)
        if self.rounds_to == "int8":
            # A range for each row: so a row's answer does not depend on the batch that it is in.
            rows = (1, *input.shape[1:])
            input = self._round(input, self.library.MappingType.ASYMMETRIC, rows)  # noqa: A001
        bias = self._parameters["bias"]
        # torch.compile would take what a property gives for a constant, so usual layers do not read it.
        if self.plain.forward is nn.Linear.forward:
            return nn.functional.linear(input, self._rounded_weight(), bias)
        if self.plain.forward in _CONVOLVING:
            return self._conv_forward(input, self._rounded_weight(), bias)  # type: ignore[operator,no-any-return]
        return super().forward(input)  # type: ignore[no-any-return]

    def _rounded_weight(self) -> Tensor:
        size = block(self, self.rounds_to)
        assert size is not None
        return self._round(_weight(self), self.library.MappingType.SYMMETRIC, size)

    def _round(self, values: Tensor, mapping: Any, size: tuple[int, ...]) -> Tensor:
        """``values`` rounded; the gradient passes straight through."""
        with torch.no_grad():
            limits = LIMITS[self.rounds_to]
            numbers, scale, zero = _numbers(self.library, values, mapping, size, limits)
            rounded = self.library.dequantize_affine(numbers, size, scale, zero, torch.int8, *limits)
            change: Tensor = (rounded - values).to(values.dtype)
        return values + change


def torchao() -> ModuleType:
    """``torchao.quantization``.

    Raises:
        ImportError: it is not installed.
    """
    # Importing torchao makes torch log a hint to torchao's own authors.
    logger = logging.getLogger("torch.utils._pytree")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import torchao.quantization
    except ImportError:
        raise ImportError(
            "quantisation needs torchao; install it with: pip install 'tutelage[export]'"
        ) from None
    finally:
        logger.setLevel(level)
    return torchao.quantization  # type: ignore[no-any-return]


def _is_usual(kind: type[nn.Module]) -> bool:
    return kind.forward is nn.Linear.forward or kind.forward in _CONVOLVING


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def _numbers(
    library: ModuleType, values: Tensor, mapping: Any, size: tuple[int, ...], limits: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, scales and zero points."""
    values = values.detach().float()
    scale, zero = library.choose_qparams_affine(
        values,
        mapping,
        size,
        torch.int8,
        *limits,
        eps=torch.finfo(torch.float32).eps,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int8,
        keepdim=True,
    )
    return library.quantize_affine(values, size, scale, zero, torch.int8, *limits), scale, zero


@functools.cache
def _rounding(kind: type[nn.Module], to: Kind) -> type[nn.Module]:
    return type(
        kind.__name__,
        (Rounding, kind),
        {"plain": kind, "rounds_to": to, "library": torchao(), "__module__": kind.__module__},
    )
