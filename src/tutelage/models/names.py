"""Model names: `timm:`, `hf:`, `config:`, `cifar:` and `digits:` say where an architecture comes from."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

FAMILIES = {
    "timm": "timm:resnet18",
    "hf": "hf:distilbert-base-uncased",
    "config": "config:llama",
    "cifar": "cifar:resnet8x4",
    "digits": "digits:cnn-4-8-16",
}
"""Where architectures come from, each with an example."""

CIFAR = (
    *(f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)),
    *("resnet8x4", "resnet32x4"),
    *("wrn-16-1", "wrn-16-2", "wrn-40-1", "wrn-40-2"),
    *("vgg8", "vgg13", "vgg16", "vgg19"),
    *("mobilenetv2", "shufflenetv1", "shufflenetv2"),
)
"""Published names of the `cifar:` nets; other depths and widths can be written likewise."""
CIFAR_NAME = re.compile(
    r"resnet(?P<resnet>[1-9]\d{0,3})(x4)?|wrn-(?P<wrn>[1-9]\d{0,3})-(?P<factor>[1-9]\d?)|vgg(?P<vgg>8|13|16|19)"
    r"|mobilenetv2|shufflenetv[12]"
)
DIGITS = re.compile(r"(mlp|cnn)((?:-[1-9]\d{0,3})+)")


class ModelError(ValueError):
    """A model that cannot be built, loaded or saved."""


def parse_name(name: str) -> tuple[str, str]:
    """Family and the name in it.

    Raises:
        ModelError: no such family, or no such name in it; the corrected spelling is given where one is near.
    """
    family, separator, rest = name.partition(":")
    if not separator or family not in FAMILIES:
        raise ModelError(_without_family(name))
    if family == "cifar" and not CIFAR_NAME.fullmatch(rest):
        raise ModelError(
            f"unknown model {name!r}; did you mean {_spelt('cifar', nearest(rest, CIFAR) or CIFAR)}?"
        )
    if family == "digits" and not DIGITS.fullmatch(rest):
        raise ModelError(
            f"unknown model {name!r}; write digits:mlp-64-16 (hidden widths) or digits:cnn-4-8-16 (channels), "
            "widths from 1 to 9999"
        )
    if family == "timm":
        _check_timm(name, rest)
    if family == "hf" and not rest:
        raise ModelError(f"{name!r} names no model; write for example {FAMILIES['hf']}, or a local folder")
    if family == "config" and not rest:
        raise ModelError(
            f"{name!r} names no architecture; write for example {FAMILIES['config']}, with options"
        )
    return family, rest


def nearest(name: str, names: Sequence[str], count: int = 4) -> list[str]:
    return difflib.get_close_matches(name, names, n=count, cutoff=0.5)


def _check_timm(name: str, rest: str) -> None:
    import timm

    base, _, tag = rest.partition(".")
    if not timm.is_model(base):
        near = nearest(base, timm.list_models())
        hint = f"did you mean {_spelt('timm', near)}?" if near else "timm.list_models() gives all"
        raise ModelError(f"unknown model {name!r}; {hint}")
    tags = [full.partition(".")[2] for full in timm.list_models(f"{base}.*", pretrained=True)]
    if tag and tag not in tags:
        raise ModelError(f"unknown weights {tag!r} of timm:{base}; there are {', '.join(tags) or 'none'}")


def _without_family(name: str) -> str:
    import timm

    rest = name.rpartition(":")[2]
    if timm.is_model(rest.partition(".")[0]):
        hint = f"did you mean 'timm:{rest}'?"
    elif rest in CIFAR:
        hint = f"did you mean 'cifar:{rest}'?"
    elif DIGITS.fullmatch(rest):
        hint = f"did you mean 'digits:{rest}'?"
    elif "/" in rest:
        hint = f"did you mean 'hf:{rest}'?"
    else:
        near = [f"timm:{near}" for near in nearest(rest, timm.list_models(), 2)]
        near += [f"cifar:{near}" for near in nearest(rest, CIFAR, 1)]
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        hint += "A name starts with its family: " + ", ".join(FAMILIES.values())
    return f"unknown model {name!r}; {hint}"


def _spelt(family: str, names: Sequence[str]) -> str:
    return " or ".join(repr(f"{family}:{name}") for name in names)
