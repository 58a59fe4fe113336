"""What a ledger entry was made with: versions, commit, machine, and hashes of the study and of the code."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import torch

import tutelage
from tutelage.runs.batch import usable_cores
from tutelage.runs.folder import environment

PACKAGE = Path(tutelage.__file__).parent
NO_PART_OF_A_RUN = ("cli", "report", "studies")


def provenance(threads: int) -> dict[str, Any]:
    """``versions``, ``commit`` of the checkout (None outside of one), whether files differ from it, ``machine`` and
    ``code_hash``. ``threads`` are those of one run."""
    found = environment(torch.device("cpu"))
    changes = _uncommitted_changes() if found["commit"] else None
    return {
        "versions": {name: found[name] for name in ("tutelage", "torch", "python")} | found["packages"],
        "commit": found["commit"],
        "uncommitted_changes": changes,
        "machine": {
            "cpu": found["cpu"],
            "cores": usable_cores(),
            "threads": threads,
            "platform": found["platform"],
        },
        "code_hash": code_hash(),
    }


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def code_hash() -> str:
    """sha256, in hex, over the package's Python files that a training run can depend on.

    Results of trials are reused under one code hash only. Command line, reports and studies cannot change a run.
    """
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        if name.parts[0] not in NO_PART_OF_A_RUN and not name.name.startswith("study"):
            digest.update(f"{name.as_posix()}\0{file_hash(path)}\n".encode())
    return digest.hexdigest()


def _uncommitted_changes() -> bool | None:
    command = ["git", "status", "--porcelain", "--", "."]
    try:
        done = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return bool(done.stdout.strip())
