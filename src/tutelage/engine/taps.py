"""Inner tensors of a model: `Tapped` runs a model, hands out what named modules give, and stops as soon as it may."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.engine.calling import TapError, call_model, named_outputs
from tutelage.engine.capture import Capture, Stop
from tutelage.engine.heads import HeadPlan
from tutelage.engine.patterns import INPUT, near_paths, resolve_taps
from tutelage.engine.structure import find_stages, match_depth
from tutelage.engine.tracing import Shape, TapInfo, trace
from tutelage.engine.types import Head, Inputs, Outputs
from tutelage.engine.units import close_units, gather_for_backward, may_be_sharded

__all__ = [
    "TapError",
    "TapInfo",
    "Tapped",
    "list_taps",
    "match_depth",
    "outputs_of",
    "probe_shapes",
    "resolve_taps",
    "stages",
]

Feed = tuple[str, Tensor]


def list_taps(model: nn.Module, inputs: Inputs) -> list[TapInfo]:
    """Every module that gives a tensor, in firing order, from one forward in eval mode that leaves the model as it was.

    Args:
        inputs: a few rows, as the model gets them.
    """
    return trace(model, inputs).taps()


def stages(model: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """Paths of the model's stages, in firing order; see `find_stages`."""
    return find_stages(trace(model, inputs))


def probe_shapes(model: nn.Module, inputs: Inputs, paths: Sequence[str]) -> dict[str, Shape]:
    """Shapes of tapped tensors, the row axis left out, from one forward that leaves the model as it was.

    Raises:
        TapError: a path is unknown, does not fire, or gives a tensor whose first axis is not the row.
    """
    seen = trace(model, inputs)
    shapes = tap_shapes(model, seen.calls)
    found: dict[str, Shape] = {}
    for path in paths:
        if path not in shapes:
            raise TapError(_unknown(model, path))
        shape = seen.shape(shapes[path])
        if shape is None:
            raise TapError(
                f"tap {path!r} gives a tensor of shape {shapes[path]}, whose first axis is not the {seen.rows} rows"
            )
        found[path] = shape
    return found


def tap_shapes(model: nn.Module, calls: Sequence[Any]) -> dict[str, Shape]:
    """Whole shapes of all outputs (``path``) and inputs (``path:in``) in a trace, under every path of a module."""
    by_module = {call.module: call for call in calls}
    shapes: dict[str, Shape] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        call = by_module.get(module)
        if path and call is not None:
            shapes |= {path: call.given} if call.given is not None else {}
            shapes |= {path + INPUT: call.taken} if call.taken is not None else {}
    return shapes


class Tapped(nn.Module):
    """Holds a model; normalises its inputs, captures inner tensors, and stops a forward at its deepest tap.

    The model keeps its own parameters under ``model.``; hooks live for one call only, so that deep copies, parameter
    swaps and models shared by several holders work. Under FSDP2 this is the root.

    Where a module runs several times in one forward, its first run is the one that is tapped: so a stopped and a whole
    forward give the same tensor.

    Args:
        model: any module that returns a tensor, a tuple, a dict or a ModelOutput.
        mean, std: input normalisation by channel (axis 1; ``pixel_values`` where inputs are a dict), or one value
            for all; none: as they are.
        head: where its logits are made; given, a forward stops before, and logits are made only where they are read.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Sequence[float] | Tensor | None = None,
        std: Sequence[float] | Tensor | None = None,
        head: HeadPlan | None = None,
    ) -> None:
        super().__init__()
        self.model, self.head = model, head
        if (mean is None) != (std is None):
            raise ValueError(f"give mean and std together; got mean={mean} and std={std}")
        self.register_buffer("mean", _channel_buffer(mean), persistent=False)
        self.register_buffer("std", _channel_buffer(std), persistent=False)
        if self.std is not None and not bool((self.std > 0).all()):
            raise ValueError(f"std must be above 0 for every channel; got {self.std.tolist()}")
        self._overwritten: dict[Any, frozenset[str]] = {}
        self._shards: dict[str, Tensor] = {}
        self._spread = False

    def keep_shards(self, *, spread: bool) -> None:
        """To be called once parameters are sharded: the head is from now on made from this rank's own rows of it, also
        where FSDP2 has gathered them for a while and may let go of them before a loss has read them.

        Args:
            spread: leave the rows on their ranks.
        """
        if self.head is not None:
            own = self.head.parameters(self.model)
            self._shards = {f"{self.head.path}.{name}": value for name, value in own.items()}
            self._spread = spread

    @property
    def normalisation(self) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        """Mean and std by channel (or one value for all), to hold another model in the same way."""
        mean, std = (
            None if part is None else tuple(part.flatten().tolist()) for part in (self.mean, self.std)
        )
        return mean, std

    def normalise(self, inputs: Inputs) -> Inputs:
        """``(inputs - mean) / std`` by channel.

        Raises:
            ValueError: the inputs have another number of channels than ``mean``.
        """
        if self.mean is None or self.std is None:
            return inputs
        if not isinstance(inputs, Tensor):
            if "pixel_values" not in inputs:
                raise ValueError(
                    f"mean and std are given, but the inputs hold no pixel_values: {', '.join(inputs)}"
                )
            return {**inputs, "pixel_values": self._normal(inputs["pixel_values"], self.mean, self.std)}
        return self._normal(inputs, self.mean, self.std)

    def _normal(self, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        if images.shape[1] != len(mean) and len(mean) > 1:
            raise ValueError(f"inputs have {images.shape[1]} channels, mean and std have {len(mean)}")
        shape = (-1, *[1] * (images.dim() - 2))
        return (images - mean.view(shape)) / std.view(shape)

    def forward(
        self, inputs: Inputs, taps: tuple[str, ...] = (), logits: bool = True, feed: Feed | None = None
    ) -> dict[str, Tensor]:
        """Run the model.

        Args:
            inputs: before normalisation.
            taps: resolved paths: a module's output, or with ``:in`` its input (the first tensor of either).
            logits: False: the forward stops once all taps have fired.
            feed: (path, tensor): the tensor takes the place of that module's output (of its first tensor), to run
                onward from a given state.

        Returns:
            ``tap:<path>`` for each tap; where ``logits``, also ``logits`` and the rest of what `named_outputs` finds,
            or ``hidden``, what the head would get.

        Raises:
            TapError: a tap names no module or did not fire; the model gave no logits; nothing was asked for.
        """
        if not taps and not logits:
            raise TapError("nothing was asked for: no taps, and logits=False")
        hidden = self.head.path + INPUT if self.head is not None and logits else None
        wanted = tuple(dict.fromkeys((*taps, *((hidden,) if hidden else ()))))
        whole = logits and hidden is None
        situation = (wanted, whole, feed and feed[0], self.training, torch.is_grad_enabled())
        capture = Capture(wanted, stop=not whole, overwritten=self._overwritten.get(situation))
        handles: list[Any] = []
        stopped, output = False, None
        try:
            if feed is not None:
                handles.append(self._module(feed[0]).register_forward_hook(capture.feed(*feed)))
            for tap in wanted:
                handles.append(self._watch(tap, capture))
            output = call_model(self.model, self.normalise(inputs))
        except Stop as stop:
            if stop is not capture.stop:
                raise
            stopped = True
        finally:
            for handle in handles:
                handle.remove()
        result = self._named(output) if whole and not stopped else {}
        captured, self._overwritten[situation] = capture.finish()
        if feed is not None and not capture.fed:
            raise TapError(_silent(self.model, feed[0]))
        for tap in wanted:
            if tap not in captured:
                raise TapError(_silent(self.model, tap))
        result |= {f"tap:{tap}": captured[tap] for tap in taps}
        if hidden is not None:
            result["hidden"] = captured[hidden]
        if may_be_sharded():
            self._gather(result)
            if stopped:
                close_units(self.model)
        return result

    def outputs(self, result: dict[str, Tensor], params: Mapping[str, Tensor] | None = None) -> Outputs:
        """The `Outputs` of what the forward gave, with the head where that stopped at it. Asked for outside the
        forward: DDP and FSDP2 must see plain tensors, and a head's weights must not be among them.

        Args:
            params: tensors that stood for the model's parameters in the forward, by name.
        """
        head = None
        if self.head is not None and "hidden" in result:
            head = self.head.head(self.model, params or self._shards, spread=self._spread)
        return outputs_of(result, head)

    def _watch(self, tap: str, capture: Capture) -> Any:
        if tap.endswith(INPUT):
            module = self._module(tap.removesuffix(INPUT))
            # First of all hooks: what is captured is what the module was called with.
            return module.register_forward_pre_hook(capture.input(tap), prepend=True, with_kwargs=True)
        return self._module(tap).register_forward_hook(capture.output(tap))

    def _module(self, path: str) -> nn.Module:
        module: Any = self.model
        for name in _segments(path):
            module = module._modules.get(name)
            if module is None:
                raise TapError(_unknown(self.model, path))
        return module  # type: ignore[no-any-return]

    def _named(self, output: Any) -> dict[str, Tensor]:
        result = named_outputs(output)
        if "logits" not in result and "hidden" not in result:
            raise TapError(
                f"{type(self.model).__name__} returned no logits, only {', '.join(result) or 'no tensor'}; "
                "take a model with a head, or ask for taps alone (logits=False)"
            )
        return result

    def _gather(self, result: dict[str, Tensor]) -> None:
        for key, tensor in result.items():
            path = key.removeprefix("tap:").removesuffix(INPUT) if key.startswith("tap:") else ""
            if key == "hidden" and self.head is not None:
                path = self.head.path
            result[key] = gather_for_backward(self.model, path, tensor)


def outputs_of(result: dict[str, Tensor], head: Head | None = None) -> Outputs:
    """The `Outputs` of what `Tapped` gave. Made outside the forward: DDP and FSDP2 must see plain tensors."""
    parts: dict[str, dict[str, Tensor]] = {"tap": {}, "attention": {}, "extra": {}}
    for key, tensor in result.items():
        kind, separator, name = key.partition(":")
        if separator:
            parts[kind][name] = tensor
    return Outputs(
        result.get("logits"),
        hidden=result.get("hidden"),
        head=head,
        features=parts["tap"],
        attentions=parts["attention"],
        extra=parts["extra"],
    )


def _channel_buffer(values: Sequence[float] | Tensor | None) -> Tensor | None:
    return None if values is None else torch.as_tensor(values, dtype=torch.float32).detach().clone()


@lru_cache(maxsize=4096)
def _segments(path: str) -> tuple[str, ...]:
    return tuple(path.split("."))


def _unknown(model: nn.Module, path: str) -> str:
    near = ", ".join(near_paths(model, path.removesuffix(INPUT))) or "none"
    return f"tap {path!r} names no module of this {type(model).__name__} that gives a tensor; near: {near}"


def _silent(model: nn.Module, path: str) -> str:
    return (
        f"tap {path!r} did not fire: this {type(model).__name__} never ran that module in this forward "
        "(an unused branch, a compiled region around it, or a model that calls its forward directly); "
        f"see `tutelage taps` for those that do; near: {', '.join(near_paths(model, path.removesuffix(INPUT)))}"
    )
