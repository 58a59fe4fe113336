"""`tutelage doctor`."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import typer

from tutelage.cli.output import AsJson, kept_for_json, print_json, print_table

OLDEST_PYTHON = (3, 11)
LITTLE_SPACE = 2.0
"""Gigabytes; less is pointed out."""


@dataclass(frozen=True)
class Finding:
    """``ok``; ``note``: worth knowing; ``bad``: something will not work."""

    what: str
    state: Literal["ok", "note", "bad"]
    detail: str


def doctor(as_json: AsJson = False) -> None:
    """Look at this machine and this installation: what is there, what is missing, what would not work.

    Exit code 1 where something will not work.
    """
    with kept_for_json(as_json):
        found = [finding for check in CHECKS for finding in check()]
    healthy = all(finding.state != "bad" for finding in found)
    if as_json:
        print_json({"healthy": healthy, "findings": [asdict(finding) for finding in found]})
    else:
        print_table(["", "", ""], [[finding.what, finding.state, finding.detail] for finding in found])
    if not healthy:
        raise typer.Exit(1)


def _python() -> list[Finding]:
    is_old = sys.version_info < OLDEST_PYTHON
    wanted = ".".join(map(str, OLDEST_PYTHON))
    return [
        Finding("tutelage", "ok", f"{metadata.version('tutelage')} at {Path(__file__).parent.parent}"),
        Finding(
            "python",
            "bad" if is_old else "ok",
            f"{platform.python_version()} on {platform.platform()}"
            + (f"; {wanted} or newer is needed" if is_old else ""),
        ),
    ]


def _packages() -> list[Finding]:
    """Required packages that are missing, and each extra."""
    groups: dict[str, list[str]] = {}
    for line in metadata.requires("tutelage") or ():
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        marker = re.search(r"""extra == ["']([\w-]+)["']""", line)
        groups.setdefault(marker[1] if marker else "", []).append(name)
    found = []
    for extra, names in groups.items():
        missing = [name for name in names if not _is_installed(name)]
        if not extra:
            detail = (
                f"missing: {', '.join(missing)}; install tutelage again"
                if missing
                else f"all {len(names)} there"
            )
            found.append(Finding("packages", "bad" if missing else "ok", detail))
        elif extra != "dev":
            detail = (
                f"missing: {', '.join(missing)}; pip install 'tutelage[{extra}]'"
                if missing
                else ", ".join(names)
            )
            found.append(Finding(f"extra {extra}", "note" if missing else "ok", detail))
    return found


def _torch() -> list[Finding]:
    try:
        import torch
    except ImportError as error:
        return [Finding("torch", "bad", f"cannot be imported: {error}")]
    found = [
        Finding(
            "torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
        )
    ]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        detail = ", ".join(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in names)
        return [*found, Finding("devices", "ok", f"cpu, cuda: {detail}")]
    untested = [
        name
        for name, there in (("mps", torch.backends.mps.is_available()), ("xpu", torch.xpu.is_available()))
        if there
    ]
    detail = f"cpu, {', '.join(untested)} (untested)" if untested else "cpu; no accelerator is seen"
    return [*found, Finding("devices", "ok" if untested else "note", detail)]


def _disk() -> list[Finding]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free / 1e9
    found = [Finding("disk", "ok" if free > LITTLE_SPACE else "note", f"{free:.1f} GB free in {here}")]
    if not os.access(here, os.W_OK):
        found.append(Finding("this folder", "note", f"no permission to write in {here}; give --dir"))
    return found


def _data() -> list[Finding]:
    folder = os.environ.get("TUTELAGE_DATA")
    if folder is None:
        return [Finding("TUTELAGE_DATA", "note", "not set; the tests look for real data in ../shared/data")]
    there = Path(folder).is_dir()
    return [
        Finding(
            "TUTELAGE_DATA", "ok" if there else "note", folder if there else f"{folder}, which is no folder"
        )
    ]


def _catalogue() -> list[Finding]:
    """Every method loads, every shipped recipe is valid."""
    from tutelage import catalogue
    from tutelage.recipe import RecipeError, load_recipe, shipped

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", catalogue.CatalogueWarning)
        catalogue.refresh()
        names = catalogue.names()
    found = [
        Finding("methods elsewhere", "bad", str(warning.message))
        for warning in caught
        if issubclass(warning.category, catalogue.CatalogueWarning)
    ]
    for name in names:
        try:
            catalogue.describe(name)
        except Exception as error:  # whatever a broken method raises is the finding
            found.append(Finding(f"method {name}", "bad", f"{type(error).__name__}: {error}"))
    for name, file in shipped().items():
        try:
            load_recipe(file)
        except RecipeError as error:
            found.append(Finding(f"recipe {name}", "bad", str(error)))
    counted = f"{len(names)} methods, {len(shipped())} recipes"
    return [*found, Finding("catalogue", "bad" if found else "ok", counted)]


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


CHECKS: tuple[Callable[[], list[Finding]], ...] = (_python, _packages, _torch, _disk, _data, _catalogue)
