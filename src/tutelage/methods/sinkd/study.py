"""sinkd beside KL, reverse KL and JS divergence, each added to cross-entropy, on digits; the teacher learned from
labels of which a tenth is wrong, and its logits are multiplied by five. Fixed before the first run; the margin is the
card's "to be confirmed", so 0.

The claim is on the best of the three divergences, so one arm chooses among them on validation data: it has nine trials,
the card's three weights for each. All other arms have as many: the same three weights, at three temperatures.
"""

from typing import Any

from tutelage.studies.study import Arm, Comparison, Overrides, Results, Study

SPLITS = {"path": "digits", "test": 719, "validation": 200}
TRAIN = {"epochs": 40, "batch_size": 64, "optimizer": {"name": "adam", "lr": 2e-3}}
ONCE_AT_THE_END = {"every": 40}
WEIGHTS = (0.001, 0.01, 0.1)
DIVERGENCES = ("fkl", "rkl", "jsd")


def _grid(weight: str, temperature: str, temperatures: tuple[float, ...]) -> tuple[Overrides, ...]:
    return tuple(
        {f"method.{weight}": value, f"method.{temperature}": degree}
        for degree in temperatures
        for value in WEIGHTS
    )


def _divergence(name: str) -> dict[str, Any]:
    return {"name": name, "label_weight": 1.0}


def _sinkd(**options: Any) -> Arm:
    grid = _grid("scale", "temperature", (2.0, 1.0, 4.0))
    return Arm({"name": "sinkd", "beta": 1.0, **options}, grid=grid)


def _beaten(results: Results) -> bool:
    """Whether the best of the three, by its mean over the seeds, is as good."""
    gains = [results.difference("sinkd", name, "accuracy").values for name in DIVERGENCES]
    return min(sum(values) for values in gains) <= 0


STUDIES = {
    "sinkd": Study(
        claim="With a teacher that is very sure and partly wrong, the Sinkhorn distance added to cross-entropy gives "
        "the student a higher mean test accuracy than the best of KL, reverse KL and JS divergence at equal tuning.",
        primary=("sinkd", "divergence"),
        metric="accuracy",
        recipe={
            "data": SPLITS,
            "student": {"model": "digits:mlp-12"},
            "train": TRAIN,
            "evaluation": ONCE_AT_THE_END,
        },
        teacher={
            "data": SPLITS | {"label_noise": 0.1},
            "student": {"model": "digits:mlp-256", "options": {"confidence": 5.0}},
            "method": "none",
            "train": TRAIN,
            "evaluation": ONCE_AT_THE_END,
        },
        arms={
            "sinkd": _sinkd(alpha=0.0),
            "divergence": Arm(
                _divergence("fkl"),
                grid=tuple(
                    {"method": _divergence(name), "method.loss_weight": weight, "method.temperature": 1.0}
                    for name in DIVERGENCES
                    for weight in WEIGHTS
                ),
            ),
            **{
                name: Arm(_divergence(name), grid=_grid("loss_weight", "temperature", (1.0, 2.0, 4.0)))
                for name in DIVERGENCES
            },
            "sinkd-kd": _sinkd(),
            "none": Arm(
                "none",
                grid=tuple(
                    {"train.optimizer.lr": rate, "train.optimizer.weight_decay": decay}
                    for rate in (2e-3, 1e-3, 5e-3)
                    for decay in (0.0, 1e-3, 1e-2)
                ),
            ),
        },
        secondary=(
            *(Comparison("sinkd", name, f"Against {name} alone.") for name in DIVERGENCES),
            Comparison("sinkd", "none", "Against labels alone."),
            Comparison(
                "sinkd-kd", "divergence", "With the teacher's softened output beside it, as published."
            ),
            Comparison("sinkd-kd", "none", "That against labels alone."),
        ),
        falsified_if="the mean paired difference to the best of KL, reverse KL and JS is 0 or below",
        falsified=_beaten,
    ),
}
