"""Writes ``docs/leaderboard/<name>.md`` and ``.json`` from a benchmark's comparison: ``leaderboard.py NAME FOLDER``.

The page is made of the JSON alone; nothing in it is typed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from readme import ROOT, share, size, table

TARGET = ROOT / "docs" / "leaderboard"


def page(name: str, comparison: Mapping[str, Any]) -> str:
    """The leaderboard as Markdown, best method first."""
    sign = -1 if comparison["higher_is_better"] else 1
    ranked = sorted(
        comparison["methods"],
        key=lambda method: (method["mean"] is None, sign * (method["mean"] or 0.0)),
    )
    baseline = comparison["baseline"]
    columns = [
        "method",
        f"{comparison['metric']} on {comparison['split']} rows, %",
        f"against `{baseline}`, points",
        "p, adjusted",
        "training",
        "tuning",
        "chosen",
    ]
    parts = [
        f"# Leaderboard: {name}",
        scale(comparison),
        table(columns, [_row(method) for method in ranked]),
        _notes(comparison),
    ]
    return "\n\n".join(parts) + "\n"


def scale(comparison: Mapping[str, Any]) -> str:
    """At what scale the figures were made, in sentences."""
    recipe, student, teacher = comparison["recipe"], comparison["student"], comparison["teacher"]
    data, train, environment = recipe["data"], recipe["train"], comparison["environment"]
    length = f"{train['epochs']} epochs" if train["epochs"] else f"{train['steps']} steps"
    rows = f"{data['limit']} training rows" if data["limit"] else "all training rows"
    lines = [
        f"Data: `{data['path']}`, {rows}. Student: `{student['model']}` ({size(student)}). "
        f"Each run: {length} of batch {train['batch_size']}.",
        f"Machine: {environment['cpu']}, {environment['device']}, {environment['threads']} thread a run, "
        f"torch {environment['torch']}, tutelage {environment['tutelage']} at {str(environment['commit'])[:12]}.",
    ]
    if teacher:
        value = share(teacher["test"][comparison["metric"]])
        lines.insert(1, f"Teacher: `{teacher['model']}` ({size(teacher)}), {comparison['metric']} {value} %.")
    return "\n".join(lines)


def _row(method: Mapping[str, Any]) -> list[str]:
    tuning, difference = method["tuning"], method["difference"]
    done = [run for run in method["runs"] if run["status"] == "done"]
    failed = len(method["runs"]) - len(done)
    against = p = ""
    if difference is not None and difference["low"] is not None:
        mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
        against, p = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})", f"{difference['p_adjusted']:.2g}"
    return [
        f"`{method['name']}`" + (f" ({failed} of {len(method['runs'])} runs failed)" if failed else ""),
        f"{share(method['mean'])} ({share(method['low'])} to {share(method['high'])})"
        if len(done) > 1
        else "",
        against,
        p,
        "" if method["seconds"] is None else f"{method['seconds']:.1f} s",
        f"{tuning['seconds']:.0f} s" if tuning else "",
        _chosen(tuning),
    ]


def _chosen(tuning: Mapping[str, Any] | None) -> str:
    if not tuning or not tuning["chosen"]:
        return ""
    return ", ".join(f"{key.rpartition('.')[2]} {value:.3g}" for key, value in tuning["chosen"].items())


def _notes(comparison: Mapping[str, Any]) -> str:
    seeds, tests = len(comparison["seeds"]), len(comparison["methods"]) - 1
    return (
        f"Means over {seeds} seeds with 95 % intervals; differences are paired by seed, and p is of the paired t-test, "
        f"by Holm's correction for {tests} methods. Every method had {comparison['trials']} tuning trials, judged on "
        "validation rows with a seed that is not compared; ranges and all trials are in the JSON beside this page. "
        "Small differences at this scale say little about other data: repeat it on yours with `tutelage compare`."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="what the page is called")
    parser.add_argument("folder", type=Path, help="folder of the comparison")
    options = parser.parse_args(arguments)
    comparison = json.loads((options.folder / "comparison.json").read_text(encoding="utf-8"))
    TARGET.mkdir(parents=True, exist_ok=True)
    text = json.dumps(comparison, indent=1, ensure_ascii=False) + "\n"
    (TARGET / f"{options.name}.json").write_text(text, encoding="utf-8")
    (TARGET / f"{options.name}.md").write_text(page(options.name, comparison), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
