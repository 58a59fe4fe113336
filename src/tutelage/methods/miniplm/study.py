"""miniplm on an easy source, a hard one and noise. Fixed before the first run; the card's margins are to be confirmed,
so 0.

Every student takes as many steps, whatever it sees. The random half is a limit on the training rows. The other two
selections are what the difference is made of.
"""

from collections.abc import Mapping
from typing import Any

from tutelage.studies.study import Arm, Comparison, Results, Study

ROWS = 6000
"""Training rows."""
DATA = {
    "path": "markov",
    "markov": {
        "symbols": 16,
        "rows": ROWS + 1800,
        "sources": [
            {"name": "easy", "order": 1, "share": 40, "concentration": 0.02},
            {"name": "hard", "order": 2, "share": 40, "concentration": 0.02},
            {"name": "noise", "order": 0, "share": 20, "concentration": 1000.0},
        ],
    },
    "columns": ["source"],
    "max_length": 32,
    "validation": 600,
    "test": 1200,
}
HARD = "loss[source=hard]"


def _llama(width: int, layers: int) -> dict[str, Any]:
    options = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
    }
    return {"model": "config:llama", "options": options}


def _train(steps: int) -> dict[str, Any]:
    return {"steps": steps, "batch_size": 64, "optimizer": {"name": "adamw", "lr": 0.003}, "clip": 1.0}


def _miniplm(score: str) -> Arm:
    return Arm({"name": "miniplm", "score": score, "reference": _llama(16, 1), "reference_steps": 100})


def _clean(result: Mapping[str, Any]) -> dict[str, float]:
    """The mean loss over the sources that are no noise, and the share of noise among the rows that were kept."""
    found = {"clean_loss": (result["test"]["loss[source=easy]"] + result["test"][HARD]) / 2}
    if table := result["tables"].get("kept by column"):
        kept = {value: count for _, value, _, count, *_ in table["rows"]}
        found["kept_noise"] = kept["noise"] / sum(kept.values())
    return found


def _falsified(results: Results) -> bool:
    pairs = zip(results.values("miniplm", HARD), results.values("random", HARD), strict=True)
    better = [refined < random for refined, random in pairs]
    return sum(better) * 3 < len(better) * 2


STUDIES = {
    "miniplm": Study(
        claim="With as many training tokens, a student of the difference-sampled half of a mixed corpus has a lower "
        "loss on the held-out hard source than one of a random half, and no worse one over the clean sources.",
        primary=("miniplm", "random"),
        metric=HARD,
        selection="loss",
        higher_is_better=False,
        recipe={
            "task": "language-model",
            "data": DATA,
            "student": _llama(32, 2),
            "train": _train(400),
            "evaluation": {"every": 1000, "group_by": "source"},
        },
        teacher={
            "task": "language-model",
            "data": DATA,
            "student": _llama(64, 2),
            "method": "none",
            "train": _train(800),
            "evaluation": {"every": 1000, "group_by": "source"},
        },
        measure=_clean,
        arms={
            "miniplm": _miniplm("difference"),
            "random": Arm("none", grid=({"data.limit": ROWS // 2},)),
            "hard-for-reference": _miniplm("reference"),
            "easy-for-teacher": _miniplm("teacher"),
            "kd": Arm({"name": "fkl", "label_weight": 0.5, "loss_weight": 0.5}),
        },
        secondary=(
            Comparison("miniplm", "random", "The clean sources together.", "clean_loss", False),
            Comparison("miniplm", "hard-for-reference", "Against the reference's loss alone.", HARD, False),
            Comparison("miniplm", "easy-for-teacher", "Against the teacher's loss alone.", HARD, False),
            Comparison(
                "miniplm", "hard-for-reference", "Noise among the rows that are kept.", "kept_noise", False
            ),
            Comparison("miniplm", "kd", "Against the teacher beside every step, on all rows.", HARD, False),
        ),
        falsified_if="the loss on the hard source is below a random half's in fewer than two of three seeds",
        falsified=_falsified,
    ),
}
