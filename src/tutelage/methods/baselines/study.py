"""kd against labels alone, on digits. Fixed before the first run; the margin is the card's "to be confirmed", so 0."""

from tutelage.studies.study import Arm, Comparison, Results, Study

NOISY_DIGITS = {"path": "digits", "test": 1000, "noise": 0.25}
TRAIN = {"epochs": 40, "batch_size": 64, "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}}
ONCE_AT_THE_END = {"every": 40}


def _grid(key: str, default: float) -> tuple[dict[str, float], ...]:
    """The default first, then a quarter of it and four times it."""
    return ({key: default}, {key: default / 4}, {key: default * 4})


def _kd_falsified(results: Results) -> bool:
    high = results.difference("kd", "none", "accuracy").high
    return high is not None and high < 0


STUDIES = {
    "kd": Study(
        claim="With a better teacher, kd reaches a higher mean test accuracy than none, under an equal tuning budget.",
        primary=("kd", "none"),
        metric="accuracy",
        recipe={
            "data": NOISY_DIGITS | {"validation": 300, "limit": 300},
            "student": {"model": "digits:cnn-4-8-16"},
            "train": TRAIN,
            "evaluation": ONCE_AT_THE_END,
        },
        # All rows that are no test rows: 797.
        teacher={
            "data": NOISY_DIGITS | {"validation": None},
            "student": {"model": "digits:cnn-16-32-64"},
            "method": "none",
            "train": TRAIN,
            "evaluation": ONCE_AT_THE_END,
        },
        arms={
            "none": Arm("none", grid=_grid("train.optimizer.lr", 0.05)),
            "kd": Arm("kd", grid=_grid("method.loss_weight", 0.9)),
            "fitnet": Arm("fitnet", grid=_grid("method.loss_weight", 100.0)),
        },
        secondary=(Comparison("fitnet", "none", "The order of feature methods is reported, not claimed."),),
        falsified_if="the 95 % interval of kd - none lies below 0",
        falsified=_kd_falsified,
    ),
}
