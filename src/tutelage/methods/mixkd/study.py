"""The study's table of strategies on digits: which of teacher and student see mixed rows, how many rows are mixed, and
what smooths the outputs. Fixed before the first run; the margin is the card's "to be confirmed", so 0.

Every arm has three trials: the weight of the divergence for those with a teacher, the learning rate for those without.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tutelage.studies.study import Arm, Comparison, Results, Study

TRAIN = {"epochs": 60, "batch_size": 64, "optimizer": {"name": "adamw", "lr": 0.003}}
ONCE_AT_THE_END = {"every": 60}
PLAIN_KD = {"name": "mixkd", "smoothing": "temperature", "temperature": 4.0}
MIXED_TEACHER = {"method": {"name": "mixup", "beta": 1.0}}

RECIPE = {
    "data": {"path": "digits", "test": 800, "validation": 200, "limit": 600},
    "student": {"model": "digits:mlp-16"},
    "train": TRAIN,
    "evaluation": ONCE_AT_THE_END,
}
WEIGHTS = tuple({"method.loss_weight": weight} for weight in (0.9, 0.225, 3.6))
RATES = tuple({"train.optimizer.lr": rate} for rate in (0.003, 0.001, 0.01))

STRATEGIES = {
    "kd": PLAIN_KD | {"unmixed": 1.0},
    "kd-full": PLAIN_KD | {"unmixed": 0.0},
    "kd-partial": PLAIN_KD | {"unmixed": 0.9},
    "std": {"name": "mixkd", "unmixed": 1.0},
    "std-full": {"name": "mixkd", "unmixed": 0.0},
    "std-partial": {"name": "mixkd", "unmixed": 0.9},
}
"""Student: no rows mixed, all, a tenth; outputs smoothed by a temperature or by their own deviation."""


def _below_zero(arm: str, baseline: str) -> Callable[[Results], bool]:
    def falsified(results: Results) -> bool:
        high = results.difference(arm, baseline, "accuracy").high
        return high is not None and high < 0

    return falsified


def _teacher_entropy(result: Mapping[str, Any]) -> Mapping[str, float]:
    """Entropy of the teacher's softened outputs for the last step's rows, where the method measures it."""
    table = result["tables"].get("smoothness")
    if table is None:
        return {}
    entropies = {
        (side, inputs): entropy
        for _, side, inputs, entropy, *_ in table["rows"]  # in the order of steps: the last one stays
    }
    return {f"teacher_entropy_{inputs}": entropies["teacher", inputs] for inputs in ("clean", "mixed")}


STUDIES = {
    "mixkd": Study(
        claim="With a plainly trained teacher, a student trained with partial mixup (a tenth mixed) and logits over "
        "their deviation reaches a higher mean test accuracy than one trained by kd at temperature 4 under full mixup.",
        primary=("std-partial", "kd-full"),
        recipe=RECIPE,
        teacher={
            "data": {"path": "digits", "test": 800, "validation": None},
            "student": {"model": "digits:mlp-256-256"},
            "method": "none",
            "train": TRAIN,
            "evaluation": ONCE_AT_THE_END,
        },
        arms={name: Arm(method, grid=WEIGHTS) for name, method in STRATEGIES.items()}
        | {
            f"{name}-mixed-teacher": Arm(method, grid=WEIGHTS, teacher=MIXED_TEACHER)
            for name, method in STRATEGIES.items()
        }
        | {"none": Arm("none", grid=RATES), "mixup": Arm("mixup", grid=RATES)},
        secondary=(
            Comparison(
                "kd",
                "kd-mixed-teacher",
                "A plainly trained teacher teaches better than one trained with mixup.",
            ),
            Comparison(
                "kd-full",
                "kd-full-mixed-teacher",
                "The same, where the student sees mixed rows.",
            ),
            Comparison(
                "kd-full-mixed-teacher",
                "kd-full",
                "A teacher trained with mixup gives smoother outputs: a higher mean entropy on mixed rows.",
                metric="teacher_entropy_mixed",
            ),
            Comparison("std-partial", "kd", "The improved strategy against plain kd without mixup."),
            Comparison("kd-full", "kd", "Full mixup of the student's rows; reported, not claimed."),
            Comparison("std-partial", "std-full", "A tenth of the rows mixed against all."),
            Comparison("kd", "none", "kd against labels alone."),
            Comparison("mixup", "none", "Mixup without a teacher against labels alone."),
        ),
        falsified_if="the 95 % interval of std-partial - kd-full lies below 0",
        falsified=_below_zero("std-partial", "kd-full"),
        measure=_teacher_entropy,
    ),
    "mixup": Study(
        claim="Training on mixed rows and labels reaches a higher mean test accuracy than plain training, under an "
        "equal tuning budget.",
        primary=("mixup", "none"),
        recipe=RECIPE,
        arms={"none": Arm("none", grid=RATES), "mixup": Arm("mixup", grid=RATES)},
        secondary=(
            Comparison(
                "mixup",
                "none",
                "Mixup is the better calibrated; reported, not claimed.",
                metric="calibration_error",
                higher_is_better=False,
            ),
        ),
        falsified_if="the 95 % interval of mixup - none lies below 0",
        falsified=_below_zero("mixup", "none"),
    ),
}
