"""dhkd on two heads against the same losses on one, on digits. Fixed before the first run; the margin is the card's
"to be confirmed", so 0.

Labels alone are dhkd with a second head that has no weight, so that their classifier is measured too.
"""

from collections.abc import Mapping
from typing import Any

from tutelage.studies.study import Arm, Comparison, Overrides, Results, Study

NOISY_DIGITS = {"path": "digits", "test": 1000, "noise": 0.25}
EPOCHS = 80
TRAIN = {
    "epochs": EPOCHS,
    "batch_size": 64,
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
}
ONCE_AT_THE_END = {"every": EPOCHS}
LATE = EPOCHS // 4
"""The last epochs, over which the gradients' cosines are averaged."""


def _arm(**options: Any) -> Arm:
    return Arm({"name": "dhkd", **options}, grid=_grid("method.loss_weight", (1.0, 0.1, 0.3, 3.0)))


def _grid(key: str, values: tuple[float, ...]) -> tuple[Overrides, ...]:
    return tuple({key: value} for value in values)


def _measure(result: Mapping[str, Any]) -> dict[str, float]:
    """What is not defined, such as the cosine of a gradient that is 0, is left out."""
    figures: dict[str, float | None] = {}
    if (table := result["tables"].get("neural_collapse")) is not None:
        (own,) = (row[1:] for row in table["rows"] if row[0] == "own")
        figures |= dict(zip(table["columns"][1:], own, strict=True))
    if (table := result["tables"].get("gradient_cosines")) is not None:
        late = [row[1:] for row in table["rows"][-LATE:]]
        names = ("classifier_cosine", "trunk_cosine")
        known = [[value for value in values if value is not None] for values in zip(*late, strict=True)]
        means = [sum(values) / len(values) if values else None for values in known]
        figures |= dict(zip(names, means, strict=True))
    return {name: value for name, value in figures.items() if value is not None}


def _falsified(results: Results) -> bool:
    high = results.difference("two-heads", "one-head", "accuracy").high
    cosines = (results.values("one-head", f"{part}_cosine") for part in ("classifier", "trunk"))
    reversed_ = any(classifier >= trunk for classifier, trunk in zip(*cosines, strict=True))
    return (high is not None and high < 0) or reversed_


STUDIES = {
    "dhkd": Study(
        claim="Labels and a loss of the teacher's logits on two heads give a higher mean test accuracy than both on "
        "one linear head, whose classifier they pull apart.",
        primary=("two-heads", "one-head"),
        metric="accuracy",
        recipe={
            "data": NOISY_DIGITS | {"validation": 300, "limit": 300},
            "student": {"model": "digits:mlp-32-32"},
            "train": TRAIN,
            "evaluation": ONCE_AT_THE_END,
        },
        # All images that are no test images: 797.
        teacher={
            "data": NOISY_DIGITS | {"validation": None},
            "student": {"model": "digits:mlp-256-128"},
            "method": "none",
            "train": TRAIN,
            "evaluation": ONCE_AT_THE_END,
        },
        arms={
            "two-heads": _arm(),
            "one-head": _arm(head="own", watch_gradients=True),
            "two-heads-nonlinear": _arm(head="nonlinear"),
            "two-heads-aligned": _arm(head="nonlinear", align_gradients=True),
            "logits": _arm(head="own", label_weight=0.0),
            "labels": Arm(
                {"name": "dhkd", "loss_weight": 0.0},
                grid=_grid("train.optimizer.lr", (0.05, 0.0125, 0.1, 0.2)),
            ),
            "kd": Arm(
                {"name": "kd", "label_weight": 1.0}, grid=_grid("method.loss_weight", (1.0, 0.1, 0.3, 3.0))
            ),
        },
        secondary=(
            Comparison("two-heads", "labels", "Two heads gain from the teacher's logits."),
            Comparison("two-heads", "logits", "Two heads gain from the labels."),
            Comparison("two-heads", "kd", "Two heads against softened logits."),
            Comparison("two-heads-nonlinear", "two-heads", "A second head with a hidden layer."),
            Comparison("two-heads-aligned", "two-heads-nonlinear", "Gradients aligned."),
            Comparison(
                "two-heads",
                "one-head",
                "With two heads, the classifier's rows are nearer to the class means (NC3).",
                metric="NC3",
                higher_is_better=False,
            ),
            Comparison(
                "two-heads",
                "one-head",
                "With two heads, the classifier's rows are nearer to a simplex (NC2, angles).",
                metric="NC2_weight_angles",
                higher_is_better=False,
            ),
        ),
        measure=_measure,
        falsified_if="the 95 % interval of two-heads - one-head lies below 0, or in a seed the two gradients agree no "
        "less in the classifier than in the trunk",
        falsified=_falsified,
    ),
}
