"""How a model is called, and how what it returns is named, be it a tensor, a tuple, a dict or a ModelOutput."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from tutelage.engine.types import Inputs


class TapError(ValueError):
    """A tap that cannot be found, did not fire or gives nothing that can be read."""


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """``model(inputs)`` for a tensor, ``model(**inputs)`` for keyword tensors."""
    return model(inputs) if isinstance(inputs, Tensor) else model(**inputs)


def first_tensor_in(value: Any) -> Tensor | None:
    """The first tensor of what a module took or gave, depth first; none where there is none."""
    if isinstance(value, Tensor):
        return value
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, (tuple, list)):
        parts = value
    return next((tensor for part in parts if (tensor := first_tensor_in(part)) is not None), None)


def named_outputs(output: Any) -> dict[str, Tensor]:
    """The tensors that a model returned, by name.

    A tensor, or the first of a plain tuple, is ``logits``. A mapping or a named tuple gives ``logits`` and ``hidden``
    under these names, each of its ``attentions`` as ``attention:<number>``, and every other tensor as ``extra:<name>``
    (``extra:<name>.<number>`` for those in a tuple). What is no tensor is left out.

    Raises:
        TapError: the model returned something else.
    """
    if isinstance(output, Tensor):
        return {"logits": output}
    if isinstance(output, Mapping):
        entries = dict(output)
    elif hasattr(output, "_fields"):
        entries = output._asdict()
    elif isinstance(output, (tuple, list)):
        entries = {"logits" if number == 0 else str(number): part for number, part in enumerate(output)}
    else:
        raise TapError(
            f"the model returned a {type(output).__name__}; a tensor, tuple, dict or ModelOutput is needed"
        )
    named: dict[str, Tensor] = {}
    for key, value in entries.items():
        if isinstance(value, Tensor):
            named[key if key in ("logits", "hidden") else f"extra:{key}"] = value
        elif isinstance(value, (tuple, list)):
            prefix = "attention:" if key == "attentions" else f"extra:{key}."
            named.update({f"{prefix}{i}": part for i, part in enumerate(value) if isinstance(part, Tensor)})
    return named
