"""The ledger's page of one claim, made from its JSON entry alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]

IN_WORDS = {
    "holds": "**The claim holds at this scale.** The whole interval of the paired difference is above the margin.",
    "contradicted": "**The claim is contradicted at this scale.** The paired difference's whole interval is below 0.",
    "not shown at this scale": "**Not shown at this scale.** The paired difference's interval reaches the margin.",
    "incomplete": "**Incomplete.** No verdict is computed, because trials are missing.",
}


def page(entry: Json) -> str:
    """A Markdown page of a ledger entry as `tutelage.studies.ledger.reproduce` writes it."""
    parts = [
        f"# {entry['method']}: {entry['verdict']}",
        f"> {entry['claim']}",
        IN_WORDS[entry["verdict"]] + (f" Reason: {entry['reason']}." if entry["reason"] else ""),
        _primary(entry),
        "## By arm",
        _arms(entry),
        _secondary(entry),
        "## How it was tested",
        _conditions(entry),
        "## Run it again",
        f"```\ntutelage reproduce {entry['method']}\n```",
        f"Made from `{entry['method']}.json`, which holds every figure; the arms are in the method's `study.py`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _primary(entry: Json) -> str:
    if entry["mean"] is None:
        return ""
    better = "" if entry["higher_is_better"] else " (turned, so that above 0 is better)"
    differences = ", ".join(_signed(value) for value in entry["paired_differences"])
    falsified = "yes" if entry["falsified"] else "no"
    return "\n".join(
        [
            f"- `{entry['arm']}` against `{entry['baseline']}`{_beyond(entry)}, test {entry['metric']}{better}: "
            f"{_signed(entry['mean'])}, 95 % interval {_range(entry['interval'], signed=True)}, "
            f"margin {entry['margin']:g}, p = {entry['p']:.2g} (paired t-test).",
            f"- Differences by seed: {differences}.",
            f"- The card calls it falsified if {entry['falsified_if']}: {falsified}.",
        ]
    )


def _beyond(entry: Json) -> str:
    """Entries of claims about one pair have no second one."""
    if not entry.get("beyond"):
        return ""
    arm, baseline = entry["beyond"]
    return f", beyond what `{arm}` gains on `{baseline}`"


def _arms(entry: Json) -> str:
    metric = entry["metric"]
    header = [
        "arm",
        f"mean {metric}",
        "95 % interval",
        *(f"seed {seed}" for seed in entry["seeds"]),
        "seconds",
    ]
    rows = []
    arms = {**entry["arms"], **({"teacher": entry["teacher"]} if entry["teacher"] else {})}
    for name, arm in arms.items():
        values = arm["values"].get(metric, [None] * len(entry["seeds"]))
        seconds = entry["cost"]["seconds_by_arm"].get(name, 0.0)
        rows.append(
            [
                f"`{name}`",
                _plain(arm["mean"]),
                _range(arm["interval"]),
                *map(_plain, values),
                f"{seconds:.1f}",
            ]
        )
    return _table(header, rows)


def _secondary(entry: Json) -> str:
    if not entry["secondary"]:
        return ""
    header = ["compared", "metric", "mean difference", "95 % interval", "p", "verdict", "what it says"]
    rows = [
        [
            f"`{pair['arm']}` − `{pair['baseline']}`" + ("" if pair["higher_is_better"] else ", turned"),
            pair["metric"],
            _plain(pair["mean"], signed=True),
            _range(pair["interval"], signed=True),
            "–" if pair["p"] is None else f"{pair['p']:.2g}",
            pair["verdict"],
            pair["claim"],
        ]
        for pair in entry["secondary"]
    ]
    note = "Reported beside the verdict, not part of it. A turned difference is above 0 where lower values are better."
    return f"## Further comparisons\n\n{_table(header, rows)}\n\n{note}"


def _conditions(entry: Json) -> str:
    tuning, cost, machine = entry["tuning"], entry["cost"], entry["machine"]
    chosen = "; ".join(
        f"`{arm}` {', '.join('–' if trial is None else str(trial) for trial in trials)}"
        for arm, trials in tuning["chosen"].items()
    )
    lines = [
        f"- {len(entry['seeds'])} paired seeds: {', '.join(map(str, entry['seeds']))}. "
        "Figures are those of the test data after the last epoch.",
        f"- Cost: {cost['runs']} runs, {cost['seconds']:.0f} s of training and evaluation in all.",
        f"- Machine: {machine['cpu']}, {machine['cores']} cores, {machine['threads']} thread a run.",
        "- Versions: " + ", ".join(f"{name} {version}" for name, version in entry["versions"].items()) + ".",
        f"- Commit: {_commit(entry)}. Study file: sha256 `{entry['study_hash']}`. Date: {entry['date']}.",
    ]
    if tuning["trials"] > 1:
        lines.insert(
            1,
            f"- Tuning: {tuning['trials']} trials for every arm and seed, chosen by {tuning['selection']}. "
            f"Chosen trial by seed, counted from 0: {chosen}.",
        )
        grids = [
            [f"`{arm}`", *(_overrides(trial) for trial in grid)] for arm, grid in tuning["grids"].items()
        ]
        header = ["arm", *(f"trial {number}" for number in range(tuning["trials"]))]
        lines.append(f"\n{_table(header, grids)}")
    return "\n".join(lines)


def _commit(entry: Json) -> str:
    if entry["commit"] is None:
        return "none (not run from a checkout with commits)"
    return f"`{entry['commit']}`" + (" with uncommitted changes" if entry["uncommitted_changes"] else "")


def _overrides(trial: Json) -> str:
    return "<br>".join(f"`{key}={value}`" for key, value in trial.items()) or "as it is"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return "–"
    return _signed(value) if signed else f"{value:.4f}"


def _signed(value: float) -> str:
    text = f"{value:+.4f}"
    return text if float(text) else text.lstrip("+-")


def _range(interval: Sequence[float] | None, *, signed: bool = False) -> str:
    if interval is None:
        return "–"
    return f"{_plain(interval[0], signed=signed)} to {_plain(interval[1], signed=signed)}"
