"""The catalogue: which methods there are. Made by a scan, never typed.

A method's folder is a package whose ``__init__`` holds ``CATALOGUE``: catalogue name → ``"module:Class"`` relative
to the package, strings only. Folders in `tutelage.methods` are found by themselves, a package of one's own through an
entry point of the group ``tutelage.methods`` whose value is that package. Nothing here imports torch before `load` or
`describe`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import tutelage.methods
from tutelage.untrusted import FileError, file_name

GROUP = "tutelage.methods"
_ATTRIBUTES = ("Config", "paper", "needs", "kind", "missing")


class CatalogueError(RuntimeError):
    """A package of methods that breaks the catalogue's rules."""


class CatalogueWarning(UserWarning):
    """A package of methods from elsewhere that cannot be read; its methods are left out."""


class UnknownMethodError(ValueError):
    """A name that no method has."""


@dataclass(frozen=True)
class Entry:
    """One method: its name, the package that holds it, and ``module:Class`` in that package."""

    name: str
    package: str
    target: str

    @property
    def folder(self) -> Path:
        """The package's folder: card, recipes and study are there."""
        return Path(next(iter(importlib.import_module(self.package).__path__)))


def names() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(_scan())


def entries() -> dict[str, Entry]:
    """All methods by name, sorted.

    Raises:
        CatalogueError: two packages carry one name, or a built-in folder has no valid ``CATALOGUE``.
    """
    return dict(sorted(_scan().items()))


def refresh() -> None:
    """Scan anew at the next call: after a package was installed, or ``sys.path`` changed, in this process."""
    importlib.invalidate_caches()
    _scan.cache_clear()


def load(name: str) -> type[Any]:
    """The class of a method: a subclass of `tutelage.engine.method.Method`, or a procedure. Imports torch.

    Raises:
        UnknownMethodError: there is no such method; the message has the nearest names.
        CatalogueError: the target is not there, or lacks what every method has.
    """
    entry = _find(name)
    module_name, _, class_name = entry.target.partition(":")
    module = importlib.import_module(f"{entry.package}.{module_name}")
    method = getattr(module, class_name, None)
    if not isinstance(method, type):
        raise CatalogueError(f"method {name!r}: {entry.package}.{module_name} has no class {class_name!r}")
    gaps = [attribute for attribute in _ATTRIBUTES if not hasattr(method, attribute)]
    if gaps:
        raise CatalogueError(
            f"method {name!r}: class {class_name} in {module.__name__} lacks {', '.join(gaps)}"
        )
    return method


def describe(name: str) -> dict[str, Any]:
    """What a method is, as plain values: name, card, title, family, kind, needs, claim, missing, venue, year, arxiv,
    defaults (option → default; null where there is none). Imports torch."""
    method = load(name)
    paper, fields = method.paper, method.Config.model_fields
    return {
        "name": name,
        "card": paper.card,
        "title": paper.title,
        "family": paper.family,
        "kind": method.kind,
        "needs": method.needs.describe(),
        "claim": paper.claim,
        "missing": list(method.missing),
        "venue": paper.venue,
        "year": paper.year,
        "arxiv": paper.arxiv,
        "defaults": {
            option: None if field.is_required() else field.get_default(call_default_factory=True)
            for option, field in fields.items()
            if option != "name"
        },
    }


def _find(name: str) -> Entry:
    known = _scan()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower(), known, n=3)
    hint = f"did you mean {' or '.join(f'`{other}`' for other in near)}? " if near else ""
    raise UnknownMethodError(f"unknown method {name!r}; {hint}`tutelage methods` lists all {len(known)}")


@functools.cache
def _scan() -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for entry in (*_built_in(), *_installed()):
        other = found.setdefault(entry.name, entry)
        if other is not entry:
            raise CatalogueError(
                f"two packages carry a method named {entry.name!r}: {other.package} and {entry.package}; rename one in "
                "its CATALOGUE, or uninstall it"
            )
    return found


def _built_in() -> Iterator[Entry]:
    for module in pkgutil.iter_modules(tutelage.methods.__path__, prefix="tutelage.methods."):
        if module.ispkg:
            yield from _read(module.name)


def _installed() -> Iterator[Entry]:
    for point in sorted(metadata.entry_points(group=GROUP)):
        try:
            yield from list(_read(point.value))
        except (
            Exception
        ) as error:  # a package of someone else's may break in any way, and must not break all methods
            owner = f" of {point.dist.name}" if point.dist else ""
            warnings.warn(
                f"methods of {point.value!r} (entry point {point.name!r}{owner}) are left out: "
                f"{type(error).__name__}: {error}",
                CatalogueWarning,
                stacklevel=2,
            )


def _read(package: str) -> Iterator[Entry]:
    listed = getattr(importlib.import_module(package), "CATALOGUE", None)
    is_text = isinstance(listed, Mapping) and all(
        isinstance(name, str) and isinstance(target, str) and ":" in target for name, target in listed.items()
    )
    if not is_text or not listed:
        raise CatalogueError(
            f'{package} needs CATALOGUE = {{"name": "module:Class"}} in its __init__, strings only'
        )
    for name, target in listed.items():
        try:
            yield Entry(file_name(name, "the method"), package, target)  # runs are put in folders of its name
        except FileError as error:
            raise CatalogueError(f"{package}: {error}") from error
