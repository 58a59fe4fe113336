"""The page of a comparison."""

from __future__ import annotations

from typing import Any

import yaml

from tutelage.report.again import comparison_commands
from tutelage.report.blocks import Block, Notice, Part, Section, Tile, Tone
from tutelage.report.comparison_figures import figures_section
from tutelage.report.facts import data_name, data_section, environment_section, recipe_section, scale
from tutelage.report.format import (
    duration,
    is_share,
    metric_difference,
    metric_value,
    number,
    p_value,
    si,
    times,
)
from tutelage.report.leaderboard import leaderboard
from tutelage.report.records import Arm, Comparison, mapping
from tutelage.report.run_tables import by_seed, failures, further_metrics
from tutelage.report.styles import styles_for
from tutelage.report.verdict import comparison_verdict, cost_ratio, interval


def comparison_part(comparison: Comparison) -> Part:
    """Everything that is known of a comparison, as one part of a page."""
    recipe, environment = comparison.recipe, _environment(comparison)
    runs = [entry.run for entry in comparison.entries if entry.run is not None]
    data = next((found for run in runs if (found := mapping(run.result.get("data")))), {})
    styles = styles_for([arm.name for arm in comparison.arms], comparison.baseline)
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else ""
    return Part(
        eyebrow="Comparison",
        title=_title(comparison),
        verdict=comparison_verdict(comparison),
        chips=_chips(comparison, scale(recipe, data, environment)),
        tiles=_tiles(comparison),
        notices=_notices(comparison),
        sections=[
            _section("Leaderboard", leaderboard(comparison, styles), further_metrics(comparison, styles)),
            figures_section(comparison, styles),
            _section("Every run", by_seed(comparison, styles), failures(comparison)),
            recipe_section(_as_compared(comparison), text, comparison_commands(comparison)),
            data_section(data),
            environment_section(environment, {}),
        ],
    )


def _section(title: str, *blocks: Block | None) -> Section:
    return Section(title, [block for block in blocks if block is not None])


def _title(comparison: Comparison) -> str:
    names = [arm.name for arm in comparison.arms]
    title = ", ".join(names) if 0 < len(names) <= 5 else f"{len(names)} methods"
    data = data_name(comparison.recipe)
    return f"{title} on {data}" if data else title


def _environment(comparison: Comparison) -> dict[str, Any]:
    own = mapping(comparison.data.get("environment"))
    found = [entry.run.environment for entry in comparison.entries if entry.run and entry.run.environment]
    return own or next(iter(found), {})


def _as_compared(comparison: Comparison) -> dict[str, Any]:
    """The recipe as the comparison used it: its methods and seeds in place of the recipe's own."""
    recipe = comparison.recipe
    if not recipe:
        return {}
    methods = [{"name": arm.name, **arm.options} for arm in comparison.arms]
    return recipe | {
        "method": methods,
        "train": mapping(recipe.get("train")) | {"seed": ", ".join(comparison.seeds)},
    }


def _chips(comparison: Comparison, told: list[str]) -> list[tuple[str, Tone]]:
    done = sum(entry.status == "done" for entry in comparison.entries)
    failed = sum(entry.status == "failed" for entry in comparison.entries)
    state = f"{done} of {comparison.planned} runs finished" + (f", {failed} failed" if failed else "")
    chips: list[tuple[str, Tone]] = [(state, "good" if done and done == comparison.planned else "bad")]
    chips += [(text, "") for text in told]
    seeds = len(comparison.seeds)
    if seeds:
        chips.append((f"{seeds} seed{'' if seeds == 1 else 's'}", ""))
    if number(comparison.data.get("seconds")) is not None:
        chips.append((f"{duration(comparison.data.get('seconds'))} in all", ""))
    return chips


def _tiles(comparison: Comparison) -> list[Tile]:
    leader, metric = comparison.leader, comparison.metric
    if leader is None:
        return []
    between = "no interval"
    if leader.low is not None and leader.high is not None:
        between = f"95% interval {interval(metric, leader.low, leader.high)}"
    tiles = [Tile(f"Best: {leader.name}", metric_value(metric, leader.mean, 1), between)]
    tiles += _gain_tile(comparison, leader)
    student, teacher = comparison.student, comparison.teacher
    if comparison.teacher_value is not None:
        value = metric_value(metric, comparison.teacher_value, 1)
        tiles.append(Tile("Teacher", value, str(teacher.get("model") or "")))
    if student.get("parameters") is not None:
        ratio = cost_ratio(student, teacher, "parameters")
        detail = f"teacher: {si(teacher.get('parameters'))} ({times(ratio)})" if ratio else ""
        tiles.append(Tile("Student's parameters", si(student["parameters"]), detail))
    return tiles


def _gain_tile(comparison: Comparison, leader: Arm) -> list[Tile]:
    difference = mapping(leader.data.get("difference"))
    mean, p = number(difference.get("mean")), number(difference.get("p"))
    if mean is None:
        return []
    told = metric_difference(comparison.metric, mean, 1) + (" points" if is_share(comparison.metric) else "")
    detail = "one seed" if p is None else f"p {p_value(p)}" if p < 0.001 else f"p = {p_value(p)}"
    return [Tile(f"Against {comparison.baseline}", told, detail)]


def _notices(comparison: Comparison) -> list[Notice]:
    notices = []
    if comparison.notes:
        notices.append(Notice(f"Not everything could be read. {' '.join(comparison.notes)}", "bad"))
    if not comparison.arms:
        notices.append(Notice("This comparison names no method yet.", "bad"))
    done = [entry for entry in comparison.entries if entry.status == "done"]
    away = sum(entry.run is None for entry in done)
    if away:
        text = (
            f"The folders of {away} of {len(done)} finished runs are not here, so their curves are missing."
        )
        notices.append(Notice(text))
    return notices
