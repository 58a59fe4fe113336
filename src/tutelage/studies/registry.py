"""Which studies there are: every catalogue entry whose folder has a `study_<name>.py`, or else a `study.py`, that lists
its name. A method that joins a folder later has a file of its own: the other's stays as its ledger entry knows it."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tutelage import catalogue
from tutelage.studies.provenance import file_hash
from tutelage.studies.study import Study


@dataclass(frozen=True)
class FoundStudy:
    """A study with the name and card of its method and the file it stands in."""

    name: str
    card: str
    study: Study
    file: Path

    @property
    def hash(self) -> str:
        """sha256 of the study's file, in hex."""
        return file_hash(self.file)


def study_names() -> list[str]:
    """Catalogue names that have a study."""
    entries = catalogue.entries().items()
    return [name for name, entry in entries if name in _studies(_module(entry.package, name))]


def find_study(name: str) -> FoundStudy:
    """The study of a method. Raises ValueError, with the nearest names, where there is none."""
    entry = catalogue.entries().get(name)
    module = _module(entry.package, name) if entry else None
    studies = _studies(module)
    if module is None or name not in studies:
        known = study_names()
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        why = "has no study" if entry else "is no method"
        raise ValueError(f"{name!r} {why}; studies are {', '.join(known)}{hint}")
    return FoundStudy(name, str(catalogue.describe(name)["card"]), studies[name], Path(str(module.__file__)))


def _module(package: str, name: str) -> ModuleType | None:
    for module in (f"{package}.study_{name}", f"{package}.study"):
        if importlib.util.find_spec(module):
            return importlib.import_module(module)
    return None


def _studies(module: ModuleType | None) -> dict[str, Study]:
    return dict(module.STUDIES) if module else {}
