"""What hooks keep of one forward: tapped tensors as they were when their modules returned them."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from tutelage.engine.calling import TapError, first_tensor_in


class Stop(Exception):
    """Ends a forward whose taps have all fired."""


class Capture:
    """The tensors of one forward.

    A later in-place operation (``ReLU(inplace=True)``) would overwrite what was captured, so a copy is kept: of every
    tap in the first call of a kind, afterwards of those only that the first call saw overwritten. The tensor that is
    handed out is the same in both: the copy where it was overwritten, else the module's own.
    """

    def __init__(self, taps: tuple[str, ...], *, stop: bool, overwritten: frozenset[str] | None) -> None:
        self.wanted = len(set(taps)) if stop else -1
        self.overwritten = overwritten
        self.stop = Stop()
        self.fed = False
        self.own: dict[str, tuple[Tensor, int]] = {}
        self.copies: dict[str, Tensor] = {}

    def output(self, tap: str) -> Any:
        return partial(self._take_output, tap)

    def input(self, tap: str) -> Any:
        return partial(self._take_input, tap)

    def feed(self, path: str, tensor: Tensor) -> Any:
        return partial(self._replace, path, tensor)

    def _take_output(self, tap: str, module: nn.Module, args: Any, output: Any) -> None:
        self._take(tap, output)

    def _take_input(
        self, tap: str, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        self._take(tap, (*args, *keywords.values()))

    def _take(self, tap: str, value: Any) -> None:
        if tap in self.own:
            return
        tensor = value if isinstance(value, Tensor) else first_tensor_in(value)
        if tensor is None:
            raise TapError(f"tap {tap!r} fired, but there is no tensor in the {type(value).__name__} it saw")
        if tensor.is_inference():  # it counts no versions, so that nothing would show an in-place change
            tensor = tensor.clone()
        self.own[tap] = (tensor, _version(tensor))
        if self.overwritten is None or tap in self.overwritten:
            self.copies[tap] = tensor.clone()
        if len(self.own) == self.wanted:
            raise self.stop

    def _replace(self, path: str, tensor: Tensor, module: nn.Module, args: Any, output: Any) -> Any:
        if self.fed:
            return output
        self.fed = True
        tensor = tensor.clone()  # the caller's own stays as it is, whatever runs in place next
        if isinstance(output, Tensor):
            return tensor
        if (
            isinstance(output, tuple)
            and output
            and isinstance(output[0], Tensor)
            and not hasattr(output, "_fields")
        ):
            return (tensor, *output[1:])
        raise TapError(
            f"{path!r} cannot be fed: it gives a {type(output).__name__}, not a tensor or a tuple of one"
        )

    def finish(self) -> tuple[dict[str, Tensor], frozenset[str]]:
        """What each tap gave, as it was when the module returned it; and which taps were overwritten."""
        changed = frozenset(tap for tap, (tensor, version) in self.own.items() if _version(tensor) != version)
        if self.overwritten is not None and not changed <= self.overwritten:
            raise TapError(
                f"tap {min(changed - self.overwritten)!r} was changed in place by a later operation, which it was "
                "not in the first call; tap the module that changes it instead"
            )
        hidden = changed if self.overwritten is None else self.overwritten
        return {tap: self.copies[tap] if tap in hidden else own for tap, (own, _) in self.own.items()}, hidden


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
