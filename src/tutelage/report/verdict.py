"""The outcome in a sentence or two: what the student reaches, beside its teacher and the baseline, at what cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tutelage.report.blocks import Tone
from tutelage.report.format import (
    in_sentence,
    is_share,
    lower_is_better,
    metric_difference,
    metric_value,
    number,
    p_clause,
    percent,
    plain,
    times,
)
from tutelage.report.records import Arm, Comparison, mapping

LEVEL = 0.05
"""A difference whose p value is below is called more than chance."""
SAME = 0.01
"""Costs that differ by less than this share are called equal."""


def primary_metric(result: dict[str, Any]) -> str | None:
    """The metric that a run is judged by: the one that chose its best checkpoint (unless that is the loss), else
    accuracy, else its first."""
    best = str(mapping(result.get("best")).get("metric")).removeprefix("loss")
    for split in ("test", "validation"):
        metrics = mapping(result.get(split))
        for name in (best, "accuracy", *metrics):
            if name in metrics and "[" not in name:
                return name
    return None


def split_of(result: dict[str, Any]) -> str:
    """Where the run's figures come from: its test rows, else its validation rows."""
    return "test" if mapping(result.get("test")) else "validation"


def run_verdict(result: dict[str, Any]) -> str:
    """What became of a run, in plain words. ``result`` is ``result.json``; an empty one is a run without a result."""
    status = result.get("status")
    metric = primary_metric(result)
    if status == "failed":
        return "This run failed. What it had written until then is below."
    if not result:
        return (
            "This run has not written its result: it is under way, or was stopped half-way. "
            "What it has logged so far is below."
        )
    opening = "This run was stopped before its end. " if status == "stopped" else ""
    if metric is None:
        return opening.strip() or "No metrics were recorded for this student."
    return f"{opening}{_outcome(result, metric)} {_costs(result)}".strip()


def _outcome(result: dict[str, Any], metric: str) -> str:
    split = split_of(result)
    value = mapping(result.get(split)).get(metric)
    what = in_sentence(metric)
    told = f"The student's {what} on {split} rows is {metric_value(metric, value)}"
    if is_share(metric):
        told = f"The student reaches {metric_value(metric, value, 1)} {what} on {split} rows"
    name, teacher = main_teacher(result)
    against = number(mapping(teacher.get(split)).get(metric))
    reached = number(value)
    if reached is None or name is None:
        return f"{told}."
    if against is None:
        return f"{told}; its teacher was not measured on them."
    return f"{told}, {compared(metric, reached - against)} its teacher's {metric_value(metric, against, 1)}."


def compared(metric: str, difference: float) -> str:
    """``1.3 points below``, ``0.02 above``, ``equal to``."""
    size = f"{100 * abs(difference):.1f} points" if is_share(metric) else plain(abs(difference))
    if difference == 0 or size == "0.0 points":
        return "equal to"
    return f"{size} {'above' if difference > 0 else 'below'}"


def main_teacher(result: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The teacher to compare with: the one with the best test metric, else the first; none where there is none."""
    teachers = {name: mapping(teacher) for name, teacher in mapping(result.get("teachers")).items()}
    if not teachers:
        return None, {}
    metric = primary_metric(result)

    def merit(name: str) -> float:
        value = number(mapping(teachers[name].get("test")).get(str(metric)))
        return float("-inf") if value is None else -value if lower_is_better(str(metric)) else value

    best = max(teachers, key=merit)
    return best, teachers[best]


def _costs(result: dict[str, Any]) -> str:
    name, teacher = main_teacher(result)
    if name is None:
        return "It had no outside teacher."
    return cost_sentence("it", mapping(result.get("student")), teacher)


def cost_ratio(student: dict[str, Any], teacher: dict[str, Any], key: str) -> float | None:
    """The teacher's cost over the student's; none where either is unknown or zero."""
    small, large = number(student.get(key)), number(teacher.get(key))
    return large / small if small and large and small > 0 and large > 0 else None


def cost_sentence(subject: str, student: dict[str, Any], teacher: dict[str, Any]) -> str:
    """Sizes and speed of a student against its teacher's; empty where none is known of both."""
    clauses = [
        _clause(cost_ratio(student, teacher, key), *phrases)
        for key, phrases in {
            "parameters": ("has {} fewer parameters", "has {} as many parameters", "has as many parameters"),
            "flops": ("needs {} fewer FLOPs", "needs {} as many FLOPs", "needs as many FLOPs"),
            "latency_ms": ("answers {} faster", "takes {} as long to answer", "answers as fast"),
        }.items()
    ]
    known = [clause for clause in clauses if clause]
    if not known:
        return ""
    told = known[0] if len(known) == 1 else f"{', '.join(known[:-1])} and {known[-1]}"
    return f"Compared with its teacher {subject} {told}."


def _clause(ratio: float | None, less: str, more: str, same: str) -> str:
    if ratio is None:
        return ""
    if abs(ratio - 1) < SAME:
        return same
    return less.format(times(ratio)) if ratio > 1 else more.format(times(1 / ratio))


@dataclass(frozen=True)
class Gain:
    """A method's difference to the baseline, turned so that above 0 is better. Unknown parts are none.

    ``p`` is the one that counts: corrected for the number of methods (``corrected``) where the comparison has that.
    """

    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    corrected: bool

    @classmethod
    def of(cls, arm: Arm, *, higher_is_better: bool) -> Gain:
        difference = mapping(arm.data.get("difference"))
        mean, low, high, p = (number(difference.get(key)) for key in ("mean", "low", "high", "p"))
        adjusted = number(difference.get("p_adjusted"))
        if not higher_is_better:
            mean, low, high = (None if value is None else -value for value in (mean, high, low))
        return cls(mean, low, high, p if adjusted is None else adjusted, adjusted is not None)

    @property
    def is_real(self) -> bool:
        """Whether it is more than chance: by its p value, or where there is none by its interval."""
        if self.mean is None or self.low is None or self.high is None:
            return False
        return self.p < LEVEL if self.p is not None else self.low > 0 or self.high < 0

    @property
    def tone(self) -> Tone:
        """Good or bad where it is more than chance."""
        if not self.is_real or not self.mean:
            return ""
        return "good" if self.mean > 0 else "bad"

    @property
    def p_told(self) -> str:
        """``p = 0.043``, ``p < 0.001 corrected``; empty where there is none."""
        return "" if self.p is None else p_clause(self.p) + " corrected" * self.corrected


def comparison_verdict(comparison: Comparison) -> str:
    """Who leads a comparison, whether the lead over the baseline may be chance, and how far the teacher is."""
    leader, metric, teacher = comparison.leader, comparison.metric, comparison.teacher_value
    if leader is None or leader.mean is None:
        return "No method has finished a run yet, so there is nothing to compare."
    runs = len(leader.done)
    told = f"{leader.name} leads with {metric_value(metric, leader.mean, 1)} {in_sentence(metric)} on "
    told += f"{comparison.split} rows, " + (f"over {runs} seeds" if runs != 1 else "with one seed")
    if leader.low is not None and leader.high is not None:
        told += f" (95% interval {interval(metric, leader.low, leader.high)})"
    parts = [f"{told}."]
    if leader.name == comparison.baseline:
        parts.append("It is the baseline: no other method was better on average.")
    elif comparison.baseline is not None:
        gain = Gain.of(leader, higher_is_better=comparison.higher_is_better)
        parts.append(_lead(metric, gain, comparison.baseline))
    if teacher is not None:
        value = metric_value(metric, teacher, 1)
        parts.append(f"The teacher has {value}, {_beyond(metric, teacher - leader.mean)}.")
    parts.append(cost_sentence("the student", comparison.student, comparison.teacher))
    return " ".join(part for part in parts if part)


def _lead(metric: str, gain: Gain, baseline: str) -> str:
    if gain.mean is None:
        return ""
    size = f"{100 * abs(gain.mean):.1f} points" if is_share(metric) else plain(abs(gain.mean))
    better = "better" if gain.mean >= 0 else "worse"
    if gain.low is None or gain.high is None:
        return f"It is {size} {better} than {baseline}, seen with one seed: that gives no interval."
    p = gain.p_told and f", {gain.p_told}"
    bounds = " to ".join(metric_difference(metric, value, 1) for value in (gain.low, gain.high))
    between = f"(95% interval {bounds}{p})"
    if gain.tone == "good":
        return f"It is {size} better than {baseline} {between}."
    return f"That it is {size} {better} than {baseline} may be chance at this scale {between}."


def _beyond(metric: str, difference: float) -> str:
    """``1.7 points more``: a second value beside a first one."""
    told = compared(metric, difference)
    return told.replace(" above", " more").replace(" below", " less").replace("equal to", "the same")


def interval(metric: str, low: float | None, high: float | None, digits: int = 1) -> str:
    """``91.2 to 92.4%``: the unit once."""
    if low is None or high is None:
        return metric_value(metric, None)
    if is_share(metric):
        return f"{percent(low, digits)[:-1]} to {percent(high, digits)}"
    return f"{plain(low)} to {plain(high)}"
