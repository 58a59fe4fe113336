"""dml against labels alone, on digits. Fixed before the first run; the card gives mutual learning no margin, so 0."""

from tutelage.studies.study import Arm, Comparison, Results, Study

EPOCHS = 80
TEACHER = "digits:mlp-256-256"


def _falsified(results: Results) -> bool:
    high = results.difference("dml", "none", "accuracy").high
    return high is not None and high < 0


STUDIES = {
    "dml": Study(
        claim="A student that is trained together with an untrained teacher, each from the other's probabilities, "
        "reaches a higher mean test accuracy than one trained with labels alone.",
        primary=("dml", "none"),
        metric="accuracy",
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
            # The teacher is part of the arm: it starts untrained in every trial.
            "dml": Arm(
                "dml",
                grid=tuple(
                    {"teacher.model": TEACHER, "method.student_weight": weight} for weight in (1.0, 0.25, 4.0)
                ),
            ),
            "none": Arm("none", grid=tuple({"train.optimizer.lr": rate} for rate in (0.05, 0.0125, 0.2))),
        },
        secondary=(
            Comparison(
                "dml",
                "none",
                "Calibration error beside labels alone: reported, not claimed.",
                metric="calibration_error",
                higher_is_better=False,
            ),
        ),
        falsified_if="the 95 % interval of dml - none lies below 0",
        falsified=_falsified,
    ),
}
