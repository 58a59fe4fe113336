"""The numbers that a reader should take away: a student's metric and costs beside its teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tutelage.report.blocks import Tile
from tutelage.report.format import (
    COSTS,
    duration,
    is_share,
    metric_difference,
    metric_label,
    metric_value,
    number,
    times,
)
from tutelage.report.records import Arm, Comparison, mapping
from tutelage.report.verdict import (
    Gain,
    compared,
    cost_ratio,
    interval,
    main_teacher,
    primary_metric,
    split_of,
)


def run_tiles(result: dict[str, Any]) -> list[Tile]:
    """The metric that a run is judged by, what its student costs, and how long it was trained."""
    metric = primary_metric(result)
    tiles = [] if metric is None else [_metric_tile(result, metric)]
    tiles += _cost_tiles(mapping(result.get("student")), main_teacher(result)[1], tuple(COSTS))
    if tiles and number(result.get("train_seconds")) is not None:
        tiles.append(Tile("Training time", duration(result["train_seconds"]), "of the student"))
    return tiles


def _metric_tile(result: dict[str, Any], metric: str) -> Tile:
    split = split_of(result)
    value = mapping(result.get(split)).get(metric)
    reached, against = number(value), number(mapping(main_teacher(result)[1].get(split)).get(metric))
    detail = f"on {split} rows"
    if reached is not None and against is not None:
        detail = f"{compared(metric, reached - against)} the teacher"
    return Tile(metric_label(metric), metric_value(metric, value, 1), detail)


def _cost_tiles(student: dict[str, Any], teacher: dict[str, Any], keys: Sequence[str]) -> list[Tile]:
    tiles = []
    for key in keys:
        label, write = COSTS[key]
        if student.get(key) is None:
            continue
        ratio = cost_ratio(student, teacher, key)
        beside = f"teacher: {write(teacher.get(key))} ({times(ratio)})" if ratio else ""
        tiles.append(Tile(label, write(student[key]), beside))
    return tiles


def comparison_tiles(comparison: Comparison) -> list[Tile]:
    """The best method, its distance to the baseline and to the teacher, and what its student costs."""
    leader, metric = comparison.leader, comparison.metric
    if leader is None or leader.mean is None:
        return []
    between = "no interval"
    if leader.low is not None and leader.high is not None:
        between = f"95% interval {interval(metric, leader.low, leader.high)}"
    tiles = [Tile(f"Best: {leader.name}", metric_value(metric, leader.mean, 1), between)]
    tiles += _gain_tile(comparison, leader)
    if (teacher := comparison.teacher_value) is not None:
        told = _points(metric, leader.mean - teacher)
        tiles.append(Tile("Against the teacher", told, f"teacher: {metric_value(metric, teacher, 1)}"))
    tiles += _cost_tiles(comparison.student, comparison.teacher, ("parameters",))
    if leader.seconds is not None:
        tiles.append(Tile("Training time", duration(leader.seconds), _baseline_time(comparison, leader)))
    return tiles


def _gain_tile(comparison: Comparison, leader: Arm) -> list[Tile]:
    difference = mapping(leader.data.get("difference"))
    mean, low, high = (number(difference.get(key)) for key in ("mean", "low", "high"))
    if mean is None:
        return []
    detail = "one seed: no interval"
    if low is not None and high is not None:
        bounds = " to ".join(metric_difference(comparison.metric, value, 1) for value in (low, high))
        p = Gain.of(leader, higher_is_better=comparison.higher_is_better).p_told
        detail = f"{bounds}, {p}" if p else bounds
    return [Tile(f"Against {comparison.baseline}", _points(comparison.metric, mean), detail)]


def _points(metric: str, difference: float) -> str:
    return metric_difference(metric, difference, 1) + (" points" if is_share(metric) else "")


def _baseline_time(comparison: Comparison, leader: Arm) -> str:
    for arm in comparison.arms:
        if arm.name == comparison.baseline != leader.name and arm.seconds is not None:
            return f"{arm.name}: {duration(arm.seconds)}"
    return "mean of its runs"
