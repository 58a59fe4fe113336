"""bdkd against each divergence alone, on digits. Fixed before the first run; the margin is the card's "to be
confirmed", so 0.

The claim has two parts, accuracy and calibration; the calibration error against the forward divergence alone, which is
plain mutual learning and the card's own pair, gives the verdict, and the others stand beside it. Trials are chosen by
validation loss, which both parts go into: the calibration error alone is lowest in students that learn little.
"""

from collections.abc import Mapping
from typing import Any

from tutelage.studies.study import Arm, Comparison, Results, Study

EPOCHS = 80
TEACHER = "digits:mlp-256-256"
PAIRS = (("bdkd", "forward"), ("bdkd", "reverse"), ("bdkd", "both"), ("bdkd", "none"))


def _online(**options: Any) -> Arm:
    """The teacher is part of the arm: it starts untrained in every trial."""
    return Arm(
        {"name": "bdkd", **options},
        grid=tuple(
            {"teacher.model": TEACHER, "method.student_weight": weight} for weight in (1.0, 0.25, 4.0)
        ),
    )


def _alone(model: str) -> Arm:
    rates = (0.05, 0.0125, 0.2)
    return Arm("none", grid=tuple({"student.model": model, "train.optimizer.lr": rate} for rate in rates))


def _measure(result: Mapping[str, Any]) -> dict[str, float]:
    """The teacher's own figures; of a network trained alone its own."""
    large = result["teachers"].get("teacher", result)["test"]
    return {f"teacher_{name}": large[name] for name in ("accuracy", "calibration_error")}


def _falsified(results: Results) -> bool:
    low = results.difference("bdkd", "forward", "calibration_error").low
    return low is not None and low > 0


STUDIES = {
    "bdkd": Study(
        claim="In online training the student of BD-KD has a lower calibration error, and a higher mean test accuracy, "
        "than with the forward or the reverse divergence alone.",
        primary=("bdkd", "forward"),
        metric="calibration_error",
        higher_is_better=False,
        selection="loss",
        recipe={
            "data": {"path": "digits", "test": 1000, "noise": 0.35, "validation": 300, "limit": 400},
            "student": {"model": "digits:mlp-12"},
            "train": {
                "epochs": EPOCHS,
                "batch_size": 64,
                "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
            },
            "evaluation": {"every": EPOCHS},
        },
        arms={
            "bdkd": _online(),
            "forward": _online(divergences="forward", delta=1.0),
            "reverse": _online(divergences="reverse", delta=1.0),
            "both": _online(delta=1.0),
            "bdkd-1.5": _online(delta=1.5),
            "bdkd-4": _online(delta=4.0),
            "none": _alone("digits:mlp-12"),
            "teacher-alone": _alone(TEACHER),
        },
        secondary=(
            *(
                Comparison(arm, baseline, f"Calibration error beside {baseline}.", higher_is_better=False)
                for arm, baseline in PAIRS
                if baseline != "forward"
            ),
            *(
                Comparison(arm, baseline, f"Accuracy beside {baseline}.", metric="accuracy")
                for arm, baseline in PAIRS
            ),
            Comparison("bdkd-1.5", "bdkd", "delta 1.5.", higher_is_better=False),
            Comparison("bdkd-4", "bdkd", "delta 4.", higher_is_better=False),
            Comparison(
                "bdkd",
                "teacher-alone",
                "The teacher beside one trained alone; the card allows it 0.5 points less.",
                metric="teacher_accuracy",
            ),
        ),
        measure=_measure,
        falsified_if="the 95 % interval of bdkd - forward in calibration error lies above 0",
        falsified=_falsified,
    ),
}
