"""Which studies there are: every catalogue entry whose folder has a `study.py` that lists its name."""

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
    return [name for name, entry in catalogue.entries().items() if name in _studies(_module(entry.package))]


def find_study(name: str) -> FoundStudy:
    """The study of a method. Raises ValueError, with the nearest names, where there is none."""
    entry = catalogue.entries().get(name)
    module = _module(entry.package) if entry else None
    studies = _studies(module)
    if module is None or name not in studies:
        known = study_names()
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        why = "has no study" if entry else "is no method"
        raise ValueError(f"{name!r} {why}; studies are {', '.join(known)}{hint}")
    return FoundStudy(name, str(catalogue.describe(name)["card"]), studies[name], Path(str(module.__file__)))


def _module(package: str) -> ModuleType | None:
    name = f"{package}.study"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def _studies(module: ModuleType | None) -> dict[str, Study]:
    return dict(module.STUDIES) if module else {}
