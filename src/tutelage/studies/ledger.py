"""`reproduce`: run a method's study and write what came of it: one JSON file a claim, and a page made from it."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tutelage.engine.checkpoint import FolderLock
from tutelage.runs.batch import usable_cores, write_json, write_text
from tutelage.studies.judgement import judge
from tutelage.studies.page import page
from tutelage.studies.provenance import provenance
from tutelage.studies.registry import find_study, study_names
from tutelage.studies.trials import THREADS, run_study

LEDGER = Path("docs/ledger")
WORK = Path("runs/studies")


def reproduce(
    name: str,
    folder: Path | str | None = None,
    progress: bool = True,
    *,
    work: Path | str | None = None,
    jobs: int | None = None,
) -> dict[str, Any]:
    """Put the claim of method ``name`` to the test and write the ledger's entry, which is returned too.

    Trials that an earlier call finished with the same study file, the same code and the same package versions are
    kept; failed ones are tried again. Where a trial of a primary arm fails, the verdict is ``incomplete``. What another
    study ran by the same recipe, code and versions (a shared teacher or baseline) is not run again.

    Args:
        name: catalogue name of a method that has a study.
        folder: where ``<name>.json`` and ``<name>.md`` are written; left out: ``docs/ledger`` in the current folder.
        progress: show progress on standard error.
        work: where trials are run and kept; left out: ``runs/studies`` in the current folder.
        jobs: trials that run side by side; left out: one a core. Figures do not depend on it.

    Raises:
        ValueError: no such study, or ``jobs`` below 1.
        PermissionError: the ledger's folder cannot be written; found out before the first trial.
    """
    found = find_study(name)
    target = Path(LEDGER if folder is None else folder)
    _check_writable(target)
    made_with = provenance(THREADS)
    place = Path(WORK if work is None else work) / _key(made_with) / f"{name}-{found.hash[:12]}"
    with FolderLock(place):
        outcomes = run_study(found, place, jobs=usable_cores() if jobs is None else jobs, progress=progress)
    entry = {
        "version": 1,
        "method": name,
        "card": found.card,
        "claim": found.study.claim,
        "seeds": list(found.study.seeds),
        **judge(found.study, outcomes),
        **made_with,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "study_hash": found.hash,
    }
    write_json(target / f"{name}.json", entry)
    write_text(target / f"{name}.md", page(entry))
    return entry


def reproduce_all(
    folder: Path | str | None = None,
    progress: bool = True,
    *,
    work: Path | str | None = None,
    jobs: int | None = None,
) -> dict[str, dict[str, Any]]:
    """`reproduce` for every method that has a study: entries by name."""
    return {name: reproduce(name, folder, progress, work=work, jobs=jobs) for name in study_names()}


def _key(made_with: dict[str, Any]) -> str:
    """Name of the folder whose runs belong together: one code, one set of package versions."""
    content = json.dumps([made_with["code_hash"], made_with["versions"]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _check_writable(folder: Path) -> None:
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise PermissionError(
            f"the ledger cannot be written to {folder}: no permission to write in {existing}"
        )
