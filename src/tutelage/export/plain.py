"""The student as its own library saves it: safetensors."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from tutelage.export.check import check
from tutelage.export.deployed import deployed
from tutelage.export.errors import CheckFailedError
from tutelage.export.subject import Subject
from tutelage.models.weights import FILE, find_weights, load_strict

_COPIED = (".safetensors", ".json", ".jinja", ".py", ".txt", ".model")
"""Of a student's folder: weights, configuration, a tokeniser and its chat template, code."""


def write(subject: Subject, folder: Path) -> dict[str, Any]:
    """Copy the run's student folder, and check that its weights are the architecture's and nothing else.

    Raises:
        CheckFailedError: there are tensors that are not the student's, or the library's own call gives other logits.
    """
    student = subject.folder / "student"
    files = sorted(path.name for path in student.iterdir() if path.suffix in _COPIED)
    for name in files:
        shutil.copyfile(student / name, folder / name)
    again = _by_its_library(subject, folder)
    return {"files": files, "check": check(FILE, subject, deployed(subject.built, again))}


def _by_its_library(subject: Subject, folder: Path) -> nn.Module:
    """The model as somebody without tutelage loads it, where its library has a call for that."""
    family = subject.built.description["model"].partition(":")[0]
    if family in ("hf", "config"):
        # Names on disk may be older than those of the modules, so transformers says what it had no place for.
        from tutelage.models.hf_config import hushed

        kind: Any = type(subject.built.module)
        with hushed():
            module, found = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
        _refuse(found["unexpected_keys"])
        return module.eval()  # type: ignore[no-any-return]
    with safe_open(folder / FILE, framework="pt") as opened:
        _refuse(set(opened.keys()) - set(subject.built.module.state_dict()))
    if family == "timm":
        import timm

        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()  # type: ignore[no-any-return]
    load_strict(subject.built.module, find_weights(str(folder), None))
    return subject.built.module


def _refuse(extra: Iterable[str]) -> None:
    names = sorted(extra)
    if names:
        raise CheckFailedError(
            f"{FILE} holds {len(names)} tensors that are not the student's: {', '.join(names[:5])}; nothing was written"
        )
