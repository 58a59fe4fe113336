"""What was read of a run or a comparison. Values are the JSON's own: readers take what has the right type."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tutelage.report.format import lower_is_better, number


@dataclass
class Run:
    """One run folder. Parts that are missing are empty."""

    folder: Path
    result: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    train: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    stages: dict[str, Run] = field(default_factory=dict)
    """What each stage of a procedure logged, by name, in order; empty for a method of one training loop."""
    analysis: dict[str, Any] = field(default_factory=dict)
    explained: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """``done``, ``failed`` or ``stopped`` as the run wrote it; ``unfinished`` where it has no result."""
        return str(self.result.get("status") or "unfinished")


@dataclass
class Entry:
    """One run as ``comparison.json`` lists it; ``run`` is what its folder holds, where that is there."""

    data: dict[str, Any]
    run: Run | None = None

    @property
    def seed(self) -> str:
        return str(self.data.get("seed"))

    @property
    def status(self) -> str:
        return str(self.data.get("status") or "not run")

    @property
    def value(self) -> float | None:
        return number(self.data.get("value"))

    @property
    def error(self) -> str:
        return str(self.data.get("error") or "no reason recorded")


@dataclass
class Arm:
    """One method of a comparison."""

    data: dict[str, Any]
    entries: list[Entry]

    @property
    def name(self) -> str:
        return str(self.data.get("name"))

    @property
    def options(self) -> dict[str, Any]:
        return mapping(self.data.get("options"))

    @property
    def mean(self) -> float | None:
        return number(self.data.get("mean"))

    @property
    def low(self) -> float | None:
        return number(self.data.get("low"))

    @property
    def high(self) -> float | None:
        return number(self.data.get("high"))

    @property
    def seconds(self) -> float | None:
        return number(self.data.get("seconds"))

    @property
    def tuning(self) -> dict[str, Any]:
        """How its options were searched; empty where they were not."""
        return mapping(self.data.get("tuning"))

    @property
    def tuning_seconds(self) -> float | None:
        return number(self.tuning.get("seconds"))

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe of its first run that has one."""
        return next((entry.run.recipe for entry in self.entries if entry.run and entry.run.recipe), {})

    @property
    def done(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.status == "done"]

    @property
    def failed(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.status == "failed"]


@dataclass
class Comparison:
    """One comparison folder: ``comparison.json`` and, where they are there, the folders of its runs."""

    folder: Path
    data: dict[str, Any]
    arms: list[Arm]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, data: dict[str, Any]) -> Comparison:
        arms = [
            Arm(method, [Entry(run) for run in mappings(method.get("runs"))])
            for method in mappings(data.get("methods"))
        ]
        return cls(folder, data, arms)

    @property
    def entries(self) -> list[Entry]:
        return [entry for arm in self.arms for entry in arm.entries]

    @property
    def ranked(self) -> list[Arm]:
        """Best mean first; methods without a mean last."""
        turn = -1.0 if self.higher_is_better else 1.0
        return sorted(self.arms, key=lambda arm: (arm.mean is None, turn * (arm.mean or 0.0)))

    @property
    def leader(self) -> Arm | None:
        return next((arm for arm in self.ranked if arm.mean is not None), None)

    @property
    def metric(self) -> str:
        return str(self.data.get("metric") or "accuracy")

    @property
    def higher_is_better(self) -> bool:
        told = self.data.get("higher_is_better")
        return told if isinstance(told, bool) else not lower_is_better(self.metric)

    @property
    def split(self) -> str:
        """The rows that the values are from: ``test`` or ``validation``."""
        return str(self.data.get("split") or "test")

    @property
    def baseline(self) -> str | None:
        return str(self.data["baseline"]) if self.data.get("baseline") else None

    @property
    def seeds(self) -> list[str]:
        """Every seed that was asked for or run."""
        asked = map(str, listed(self.data.get("seeds")))
        return list(dict.fromkeys([*asked, *(entry.seed for entry in self.entries)]))

    @property
    def trials(self) -> int:
        """Tuning runs of each method; 0: nothing was tuned."""
        return max(int(number(self.data.get("trials")) or 0), 0)

    @property
    def corrected(self) -> int:
        """For how many tests their p values are corrected; 0 where they are not."""
        found = [mapping(arm.data.get("difference")).get("p_adjusted") for arm in self.arms]
        return sum(number(p) is not None for p in found)

    @property
    def planned(self) -> int:
        return max(len(self.entries), len(self.seeds) * len(self.arms))

    @property
    def recipe(self) -> dict[str, Any]:
        return mapping(self.data.get("recipe"))

    @property
    def student(self) -> dict[str, Any]:
        return mapping(self.data.get("student"))

    @property
    def teacher(self) -> dict[str, Any]:
        return mapping(self.data.get("teacher"))

    @property
    def teacher_value(self) -> float | None:
        """The teacher's metric on the rows that the students' is from; none where it was measured on others."""
        return number(mapping(self.teacher.get(self.split)).get(self.metric))


def mapping(value: object) -> dict[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def listed(value: object) -> list[Any]:
    """The value where it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def mappings(value: object) -> list[dict[str, Any]]:
    """The mappings of a list, in order."""
    return [mapping(item) for item in listed(value) if isinstance(item, dict)]
