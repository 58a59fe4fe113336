"""Writes README.md's tables between their markers: methods from the registry and the ledger, the quickstart's figures
from its last comparison. Nothing in them is typed. ``--check`` writes nothing, and fails where the methods' table is
out of date."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage import catalogue

ROOT = Path(__file__).resolve().parent.parent


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def methods_table(root: Path = ROOT) -> str:
    """Every method of the registry that ships with tutelage, with the verdict of its claim where one was reached."""
    rows = []
    for name, entry in catalogue.entries().items():
        if not entry.package.startswith("tutelage.methods."):
            continue
        about = catalogue.describe(name)
        card = Path("src", *entry.package.split("."), "README.md")
        rows.append(
            [
                f"[`{name}`]({card.as_posix()})",
                paper(about),
                about["family"],
                about["kind"],
                ", ".join(about["needs"]),
                verdict(name, root),
                "; ".join(about["missing"]) or "nothing",
            ]
        )
    return table(["method", "paper", "family", "kind", "needs", "claim", "missing"], rows)


def paper(about: Mapping[str, Any]) -> str:
    """Title, linked where it is on arXiv, and venue, where there is one."""
    title = (
        f"[{about['title']}](https://arxiv.org/abs/{about['arxiv']})" if about["arxiv"] else about["title"]
    )
    return f"{title}, {about['venue']} {about['year']}" if about["year"] else title


def verdict(name: str, root: Path) -> str:
    """The ledger's verdict on a method's claim, as a link to the record."""
    record = root / "docs" / "ledger" / f"{name}.json"
    if not record.is_file():
        return "not tested"
    return f"[{json.loads(record.read_text())['verdict']}]({record.relative_to(root).as_posix()})"


def quickstart_table(comparison: Mapping[str, Any]) -> str:
    """What `make quickstart` found, from its comparison.json."""
    metric, baseline, teacher = comparison["metric"], comparison["baseline"], comparison["teacher"]
    rows = [["teacher", share(teacher["test"][metric]), "", size(teacher), ""]]
    for method in comparison["methods"]:
        difference = method["difference"]
        against = ""
        if difference is not None:
            mean, low, high = (difference[key] * 100 for key in ("mean", "low", "high"))
            against = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
        interval = f"{share(method['mean'])} ({share(method['low'])} to {share(method['high'])})"
        rows.append(
            [
                f"`{method['name']}`",
                interval,
                against,
                size(comparison["student"]),
                f"{method['seconds']:.1f} s",
            ]
        )
    columns = [
        f"{metric} on test rows, %",
        f"against `{baseline}`, points",
        "parameters, FLOPs a row, latency",
        "training",
    ]
    seeds = len(comparison["seeds"])
    note = f"Means over {seeds} seeds with 95 % intervals; differences are paired by seed."
    return f"{table(['', *columns], rows)}\n\n{note}"


def share(value: float) -> str:
    return f"{value * 100:.2f}"


def size(model: Mapping[str, Any]) -> str:
    return f"{model['parameters']:,}, {model['flops']:,}, {model['latency_ms']:.2f} ms"


def filled(text: str, name: str, content: str) -> str:
    """``text`` with new content between the markers of ``name``. Raises ValueError where a marker is missing."""
    begin, end = f"<!-- {name}:begin -->\n", f"\n<!-- {name}:end -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"README.md lacks the markers {begin.strip()} … {end.strip()}")
    return head + begin + content + end + tail


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where the methods' table is out of date"
    )
    options = parser.parse_args(arguments)
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = filled(old, "methods", methods_table())
    if options.check:
        if new != old:
            print(
                "README.md's table of methods is not what the registry says; run `make readme`",
                file=sys.stderr,
            )
        return int(new != old)
    comparison = ROOT / "runs" / "quickstart" / "comparison.json"
    if comparison.is_file():
        new = filled(new, "quickstart", quickstart_table(json.loads(comparison.read_text())))
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
