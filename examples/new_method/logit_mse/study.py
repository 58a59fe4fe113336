"""The claim of `logit_mse`, put to the test on scikit-learn's digits."""

from __future__ import annotations

from typing import Any

from tutelage.studies.study import Arm, Results, Study

DATA: dict[str, Any] = {"path": "digits", "test": 1000, "noise": 0.25}


def train(epochs: int, lr: float) -> dict[str, Any]:
    return {"epochs": epochs, "batch_size": 64, "optimizer": {"name": "sgd", "lr": lr, "momentum": 0.9}}


def rates(*values: float) -> tuple[dict[str, float], ...]:
    return tuple({"train.optimizer.lr": value} for value in values)


def no_gain(results: Results) -> bool:
    distilled, plain = results.values("logit_mse", "accuracy"), results.values("none", "accuracy")
    return sum(distilled) <= sum(plain)


STUDIES = {
    "logit_mse": Study(
        claim="A small network trained on a bigger one's logits is more accurate than the same trained on labels.",
        primary=("logit_mse", "none"),
        arms={"logit_mse": Arm("logit_mse", rates(0.02, 0.05)), "none": Arm("none", rates(0.05, 0.02))},
        falsified_if="Mean accuracy over seeds is not above that of training on labels.",
        falsified=no_gain,
        recipe={
            "data": DATA | {"validation": 300, "limit": 300},
            "student": {"model": "digits:cnn-4-8-16"},
            "train": train(epochs=40, lr=0.05) | {"clip": 5.0},
        },
        teacher={
            "data": DATA | {"validation": None},
            "student": {"model": "digits:cnn-16-32-64"},
            "train": train(epochs=40, lr=0.05),
        },
    )
}
