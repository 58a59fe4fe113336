"""Weight aligning on digits in five steps of two classes. Fixed before the first run; the margin is the card's "to be
confirmed", so 0."""

from typing import Any

from tutelage.studies.study import Arm, Comparison, Results, Study

ACCURACY = "average_incremental_accuracy"
OLD_TO_NEW = "old_to_new_rate"
"""At the last step."""

MEMORY = 50
EVERY_ROW = 1800
"""More than digits has rows: every old row stays."""


def _arm(*, distill: bool, align: bool, memory_size: int = MEMORY, **options: Any) -> Arm:
    return Arm(
        {"name": "wa", "steps": 5, "distill": distill, "align": align, "memory_size": memory_size, **options}
    )


def _falsified(results: Results) -> bool:
    accuracy = results.difference("kd+wa", "kd", ACCURACY)
    old_to_new = results.difference("kd+wa", "kd", OLD_TO_NEW)
    return accuracy.mean <= 0 or any(value > 0 for value in old_to_new.values)


STUDIES = {
    "wa": Study(
        claim="With the same memory and schedule, distillation + weight aligning has a higher average incremental "
        "accuracy than distillation alone, and sends fewer old test samples to the new classes.",
        primary=("kd+wa", "kd"),
        metric=ACCURACY,
        recipe={
            "data": {"path": "digits", "test": 0.3, "validation": None},
            "student": {"model": "digits:mlp-128-64"},
            "train": {
                "epochs": 40,
                "batch_size": 32,
                "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
                "schedule": {"name": "multistep", "milestones": [0.6, 0.85], "gamma": 0.1},
            },
            "evaluation": {"every": 40},
        },
        seeded=("data.seed", "train.seed", "method.class_order_seed"),
        arms={
            "kd+wa": _arm(distill=True, align=True),
            "kd": _arm(distill=True, align=False),
            "ce+wa": _arm(distill=False, align=True),
            "ce": _arm(distill=False, align=False),
            "ce-no-memory": _arm(distill=False, align=False, memory_size=0),
            "joint": _arm(distill=False, align=False, memory_size=EVERY_ROW),
            "kd+wa-unclipped": _arm(distill=True, align=True, clip_weights=False),
            "kd+wa-norm-2": _arm(distill=True, align=True, norm=2),
            "kd+wa-random-memory": _arm(distill=True, align=True, herding=False),
        },
        secondary=(
            Comparison(
                "kd+wa",
                "kd",
                "The claim's second part: fewer old test samples are sent to the new classes at the last step.",
                metric=OLD_TO_NEW,
                higher_is_better=False,
            ),
            Comparison("ce+wa", "ce", "Aligning without distillation."),
            Comparison("kd", "ce", "Distillation without aligning."),
            Comparison("kd+wa", "ce-no-memory", "Against the lower line: no memory."),
            Comparison(
                "joint",
                "kd+wa",
                "What the upper line is above it: all classes seen so far, with all their rows.",
            ),
            Comparison("kd+wa-unclipped", "kd+wa", "Ablation: weights are not clipped."),
            Comparison("kd+wa-norm-2", "kd+wa", "Ablation: rows are measured by their 2-norm."),
            Comparison("kd+wa-random-memory", "kd+wa", "Ablation: random rows in the memory."),
        ),
        falsified_if="kd+wa - kd is at most 0 in mean, or aligning raises the old-to-new rate of any seed at the last "
        "step",
        falsified=_falsified,
    ),
}
