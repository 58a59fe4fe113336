"""nd against the same loss without its feature term, on digits. Fixed before the first run; the margin is the card's
"to be confirmed", so 0.

The baseline is CE + KD with the same warm-up: nd at `loss_weight` 0, so that its features are measured as nd's are. The
card tunes one weight after the other; here both arms have nine trials, nd over both weights, the baseline over its
weight and the temperature. "Norm" is the mean length of the student's features over that of the teacher's.
"""

from collections.abc import Mapping
from typing import Any

from tutelage.studies.study import Arm, Comparison, Overrides, Results, Study

NOISY_DIGITS = {"path": "digits", "test": 1000, "noise": 0.25}
TRAIN = {
    "epochs": 60,
    "batch_size": 64,
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "options": {"nesterov": True}},
}
ONCE_AT_THE_END = {"every": 60}
NARROW = {"student.model": "digits:mlp-24-32"}
"""Features half as wide as the teacher's, so that they are projected."""


def _grid(key: str, values: tuple[float, ...], student: Overrides) -> tuple[Overrides, ...]:
    return tuple(
        {"method.kd_weight": weight, key: value, **student} for weight in (1.0, 2.0, 4.0) for value in values
    )


def _nd(student: Overrides) -> Arm:
    return Arm("nd", grid=_grid("method.loss_weight", (1.0, 0.5, 2.0), student))


def _kd(student: Overrides) -> Arm:
    return Arm({"name": "nd", "loss_weight": 0.0}, grid=_grid("method.temperature", (4.0, 2.0, 8.0), student))


def _measure(result: Mapping[str, Any]) -> dict[str, float]:
    rows = {row[0]: row[1:] for row in result["tables"]["feature_norm_and_direction"]["rows"]}
    (norm, cosine), (teacher_norm, _) = rows["student"], rows["teacher"]
    return {"norm_ratio": norm / teacher_norm, "cosine": cosine}


def _falsified(results: Results) -> bool:
    high = results.difference("nd", "kd", "accuracy").high
    moved = [results.difference("nd", "kd", figure).values for figure in ("norm_ratio", "cosine")]
    return (high is not None and high < 0) or any(value <= 0 for values in moved for value in values)


STUDIES = {
    "nd": Study(
        claim="Adding ND, which makes the student's features longer and turns them to the teacher's class means, to "
        "CE + KD raises the mean test accuracy at an equal tuning budget.",
        primary=("nd", "kd"),
        metric="accuracy",
        recipe={
            "data": NOISY_DIGITS | {"validation": 300, "limit": 300},
            "student": {"model": "digits:mlp-24-64"},
            "train": TRAIN,
            "evaluation": ONCE_AT_THE_END,
        },
        # All images that are no test images: 797.
        teacher={
            "data": NOISY_DIGITS | {"validation": None},
            "student": {"model": "digits:mlp-128-64"},
            "method": "none",
            "train": TRAIN,
            "evaluation": ONCE_AT_THE_END,
        },
        arms={"nd": _nd({}), "kd": _kd({}), "nd-projected": _nd(NARROW), "kd-narrow": _kd(NARROW)},
        secondary=(
            Comparison("nd-projected", "kd-narrow", "The same with features that have to be projected."),
            Comparison("nd", "kd", "Features are longer than without ND.", metric="norm_ratio"),
            Comparison("nd", "kd", "Features point more along the class means.", metric="cosine"),
        ),
        measure=_measure,
        falsified_if="the 95 % interval of nd - kd lies below 0, or norm or cosine is not higher with ND in a seed",
        falsified=_falsified,
    ),
}
