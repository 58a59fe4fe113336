"""nkd against kd with one teacher, and uskd against labels alone, on digits. Fixed before the first run; the margins
are the card's "to be confirmed", so 0."""

from collections.abc import Callable

from tutelage.studies.study import Arm, Comparison, Results, Study

NOISY_DIGITS = {"path": "digits", "test": 1000, "noise": 0.25}
TRAIN = {"epochs": 60, "batch_size": 64, "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}}
ONCE_AT_THE_END = {"every": 60}
RECIPE = {
    "data": NOISY_DIGITS | {"validation": 300, "limit": 400},
    "student": {"model": "digits:mlp-16"},
    "train": TRAIN,
    "evaluation": ONCE_AT_THE_END,
}
TEMPERATURES = (1.0, 3.0)


def _weights(key: str, values: tuple[float, ...]) -> tuple[dict[str, float], ...]:
    """Every value of a loss weight at every temperature: six trials."""
    return tuple(
        {key: value, "method.temperature": temperature} for value in values for temperature in TEMPERATURES
    )


def _below_zero(arm: str, baseline: str) -> Callable[[Results], bool]:
    def falsified(results: Results) -> bool:
        high = results.difference(arm, baseline, "accuracy").high
        return high is not None and high < 0

    return falsified


STUDIES = {
    "nkd": Study(
        claim="With one teacher and equal tuning, a student trained with CE + NKD reaches a higher mean test accuracy "
        "than one trained with CE + KD.",
        primary=("nkd", "kd"),
        metric="accuracy",
        recipe=RECIPE,
        # The card's four times the student's 400 images are more than there are outside the test data: it gets all 797.
        teacher={
            "data": NOISY_DIGITS | {"validation": None},
            "student": {"model": "digits:mlp-256-256"},
            "method": "none",
            "train": TRAIN,
            "evaluation": ONCE_AT_THE_END,
        },
        arms={
            # The published gammas, the default first.
            "nkd": Arm("nkd", grid=_weights("method.gamma", (1.5, 1.0, 3.5))),
            "kd": Arm(
                {"name": "kd", "label_weight": 1.0}, grid=_weights("method.loss_weight", (1.0, 0.25, 4.0))
            ),
            "none": Arm(
                "none",
                grid=tuple(
                    {"train.optimizer.lr": rate, "train.optimizer.weight_decay": decay}
                    for rate in (0.05, 0.0125, 0.2)
                    for decay in (0.0, 5e-4)
                ),
            ),
        },
        secondary=(
            Comparison("nkd", "none", "CE + NKD against CE alone."),
            Comparison("kd", "none", "CE + KD against CE alone."),
        ),
        falsified_if="the 95 % interval of nkd - kd lies below 0",
        falsified=_below_zero("nkd", "kd"),
    ),
    "uskd": Study(
        claim="A student trained with CE + USKD, without any teacher, reaches a higher mean test accuracy than one "
        "trained with CE alone.",
        primary=("uskd", "none"),
        metric="accuracy",
        recipe=RECIPE,
        arms={
            # The published CIFAR-100 weights; the tap left out is the student's one hidden layer.
            "uskd": Arm({"name": "uskd", "alpha": 0.1, "beta": 0.1, "mu": 0.1}),
            "none": Arm("none"),
        },
        falsified_if="the 95 % interval of uskd - none lies below 0",
        falsified=_below_zero("uskd", "none"),
    ),
}
