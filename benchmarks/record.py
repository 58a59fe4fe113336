"""Measured benchmarks as JSON, with all that they depend on, and as the tables of ``docs/speed.md``."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tools.readme import filled, table

from benchmarks.harness import Bar, Effort, Result

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "speed.md"


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device_name(device),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def save(results: Sequence[Result], device: torch.device, effort: Effort, name: str | None) -> Path:
    """Write ``results/<name>.json``, named after the device where no name is given, and the page's tables anew."""
    slug = re.sub(r"[^a-z0-9]+", "-", (name or device_name(device)).lower()).strip("-")
    content = {
        **environment(device),
        "rounds": effort.rounds,
        "seconds_a_round": effort.seconds,
        "benchmarks": [result.record() for result in results],
    }
    path = RESULTS / f"{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if PAGE.is_file():
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), "speed", tables()), encoding="utf-8")
    return path


def tables() -> str:
    """One Markdown table for each file of results."""
    parts = [
        _section(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(RESULTS.glob("*.json"))
    ]
    return "\n\n".join(parts) or "Nothing is measured yet: `make bench` measures, `--save` keeps it."


def _section(content: dict[str, Any]) -> str:
    commit = (content["commit"] or "no commit")[:10]
    head = (
        f"### {content['device']}\n\n{content['date'][:10]}, {commit}, torch {content['torch']}, "
        f"{content['threads']} threads on {content['processor']}; medians of up to {content['rounds']} rounds."
    )
    rows = [_row(entry) for entry in content["benchmarks"]]
    return f"{head}\n\n{table(['benchmark', 'value', 'quartiles of the rounds', 'bar', 'verdict'], rows)}"


def _row(entry: dict[str, Any]) -> list[str]:
    bar = Bar(entry["bar"], entry["unit"])
    if entry["value"] is None:
        return [f"`{entry['name']}`", "", "", f"≤ {bar.show(bar.limit)}", entry["verdict"]]
    spread = " to ".join(bar.show(value) for value in entry["quartiles"])
    return [
        f"`{entry['name']}`",
        bar.show(entry["value"]),
        spread,
        f"≤ {bar.show(bar.limit)}",
        entry["verdict"],
    ]


def _commit() -> str | None:
    """The commit, with ``+`` behind it where files differ from it."""
    try:
        commit = _git("rev-parse", "HEAD")
        return f"{commit}+" if _git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    """The processor's own name where the system tells it, else its kind."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {len(names) or '?'} cores"
