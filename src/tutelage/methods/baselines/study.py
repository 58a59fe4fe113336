"""Every baseline against labels alone, and dkd against kd, on digits. Fixed before the first run; the margin is the
card's "to be confirmed", so 0.

All studies share their recipe, teacher and grids, so that one run of an arm serves all of them. That of kd has every
arm, which puts the methods in an order.
"""

from collections.abc import Callable, Iterable

from tutelage.studies.study import Arm, Comparison, Results, Study

NOISY_DIGITS = {"path": "digits", "test": 1000, "noise": 0.25}
TRAIN = {"epochs": 40, "batch_size": 64, "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}}
ONCE_AT_THE_END = {"every": 40}
RECIPE = {
    "data": NOISY_DIGITS | {"validation": 300, "limit": 300},
    "student": {"model": "digits:cnn-4-8-16"},
    "train": TRAIN,
    "evaluation": ONCE_AT_THE_END,
}
# All rows that are no test rows: 797.
TEACHER = {
    "data": NOISY_DIGITS | {"validation": None},
    "student": {"model": "digits:cnn-16-32-64"},
    "method": "none",
    "train": TRAIN,
    "evaluation": ONCE_AT_THE_END,
}
WEIGHTS = {
    "kd": 0.9,
    "dkd": 1.0,
    "dist": 1.0,
    "fitnet": 100.0,
    "at": 1000.0,
    "rkd": 1.0,
    "pkt": 30000.0,
    "sp": 3000.0,
    "vid": 1.0,
    "crd": 0.8,
    "reviewkd": 1.0,
}
"""Each method's default weight of its own loss."""


def _grid(key: str, default: float) -> tuple[dict[str, float], ...]:
    """The default first, then a quarter of it and four times it."""
    return ({key: default}, {key: default / 4}, {key: default * 4})


def _arms(names: Iterable[str]) -> dict[str, Arm]:
    """Labels alone, tuned by their learning rate, and the named methods, each tuned by its weight."""
    return {"none": Arm("none", grid=_grid("train.optimizer.lr", 0.05))} | {
        name: Arm(name, grid=_grid("method.loss_weight", WEIGHTS[name])) for name in names
    }


def _below_zero(arm: str, baseline: str) -> Callable[[Results], bool]:
    def falsified(results: Results) -> bool:
        high = results.difference(arm, baseline, "accuracy").high
        return high is not None and high < 0

    return falsified


def _study(
    name: str, baseline: str, claim: str, names: Iterable[str], secondary: Iterable[Comparison] = ()
) -> Study:
    return Study(
        claim=claim,
        primary=(name, baseline),
        recipe=RECIPE,
        teacher=TEACHER,
        arms=_arms(names),
        secondary=tuple(secondary),
        falsified_if=f"the 95 % interval of {name} - {baseline} lies below 0",
        falsified=_below_zero(name, baseline),
    )


STUDIES = {
    "kd": _study(
        "kd",
        "none",
        "With a better teacher, kd reaches a higher mean test accuracy than none, under an equal tuning budget.",
        WEIGHTS,
        (
            Comparison(name, "none", "The order of the methods is reported, not claimed.")
            for name in WEIGHTS
            if name != "kd"
        ),
    ),
    # The claim is "not below": the verdict asks for more, and only `falsified` contradicts it.
    "dkd": _study(
        "dkd",
        "kd",
        "With a better teacher, dkd's mean test accuracy is not below kd's, under an equal tuning budget.",
        ("kd", "dkd"),
        (Comparison("dkd", "none", "dkd against labels alone."),),
    ),
} | {
    name: _study(
        name,
        "none",
        f"With a better teacher, {name} reaches a higher mean test accuracy than none, under an equal tuning budget.",
        (name,),
    )
    for name in WEIGHTS
    if name not in ("kd", "dkd")
}
