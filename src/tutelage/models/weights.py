"""Weights from safetensors, on disk or on the hub, and strict loading that says what does not fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model as load_safetensors
from torch import nn

from tutelage.models.names import ModelError
from tutelage.untrusted import FileError, read_object

FILE = "model.safetensors"
CARD = "tutelage.json"
"""What a saved model is: its description and input normalisation."""


@dataclass(frozen=True)
class Weights:
    """A safetensors file and what lies beside it.

    Attributes:
        source: what messages call it.
        config: the ``config.json`` beside it, empty where there is none.
        card: the ``tutelage.json`` beside it, empty where there is none.
    """

    file: Path
    source: str
    config: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors, read from the header alone.

        Raises:
            ModelError: it is no whole safetensors file.
        """
        try:
            with safe_open(self.file, framework="pt") as opened:
                return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.source} cannot be read as safetensors: {error}") from None

    def rows(self, name: str) -> int | None:
        """Length of a tensor's first axis; none where there is no such tensor."""
        shape = self.shapes().get(name)
        return shape[0] if shape else None


def find_weights(text: str, revision: str | None) -> Weights:
    """The weights that ``hub:NAME``, a safetensors file or a folder with ``model.safetensors`` name.

    Raises:
        ModelError: there are none, or only pickled ones, which are never opened.
    """
    if text.startswith("hub:"):
        return from_hub(text.removeprefix("hub:"), revision)
    if revision is not None:
        raise ModelError(f"revision {revision!r} belongs to weights on the hub, not to {text!r}")
    path = Path(text)
    if path.is_dir():
        if not (path / FILE).is_file():
            raise ModelError(
                f"the folder {path} holds no {FILE}; give a run's student folder or a safetensors file"
            )
        return Weights(path / FILE, str(path / FILE), _json(path / "config.json"), _json(path / CARD))
    if path.suffix != ".safetensors":
        kind = "is no safetensors file (pickled weights are never opened; convert them once)"
        raise ModelError(f"weights {text!r} {kind if path.is_file() else 'do not exist'}; {_ALLOWED}")
    if not path.is_file():
        raise ModelError(f"weights {text!r} do not exist; {_ALLOWED}")
    return Weights(path, str(path))


def from_hub(name: str, revision: str | None) -> Weights:
    """``model.safetensors`` (and ``config.json``) of a hub repository.

    Raises:
        ModelError: it cannot be had.
    """
    import huggingface_hub as hub

    source = f"{name}{f'@{revision}' if revision else ''} on the hub"
    try:
        file = Path(hub.hf_hub_download(name, FILE, revision=revision))
    except hub.errors.EntryNotFoundError:
        raise ModelError(
            f"{source} cannot be loaded: no {FILE} there or in the cache, and no network"
        ) from None
    except (hub.errors.HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"{source} cannot be loaded: {str(error).splitlines()[0]}") from None
    try:
        config = _json(Path(hub.hf_hub_download(name, "config.json", revision=revision)))
    except hub.errors.EntryNotFoundError:
        config = {}
    return Weights(file, source, config)


def load_strict(module: nn.Module, weights: Weights) -> None:
    """Load every tensor, each in its place.

    Raises:
        ModelError: tensors are missing, left over or of another shape; each is named.
    """
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = weights.shapes()
    wrong = [
        f"{name} is {list(given[name])} there and {list(shape)} here"
        for name, shape in own.items()
        if name in given and given[name] != shape
    ]
    check_fit(weights.source, module, wrong)
    missing, unexpected = load_safetensors(module, weights.file, strict=False)
    check_fit(weights.source, module, [], missing, unexpected)


def check_fit(
    source: str,
    module: nn.Module,
    wrong: Iterable[str],
    missing: Iterable[str] = (),
    unexpected: Iterable[str] = (),
) -> None:
    """Refuse weights that do not fit.

    Raises:
        ModelError: there are names in any of the lists.
    """
    lists = {"": wrong, "missing ": missing, "unexpected ": unexpected}
    problems = [word + _some(sorted(names)) for word, names in lists.items() if list(names)]
    if problems:
        raise ModelError(f"{source} does not fit this {type(module).__name__}: {'; '.join(problems)}")


_ALLOWED = "give `pretrained`, `hub:NAME`, a .safetensors file or a run's student folder"


def _some(names: Iterable[str], count: int = 5) -> str:
    listed = list(names)
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + more


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path) if path.is_file() else {}
    except FileError as error:
        raise ModelError(str(error)) from None
