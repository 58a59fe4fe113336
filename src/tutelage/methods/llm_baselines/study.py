"""Forward KL covers modes and reverse KL seeks them, on a language of two Markov sources that nothing tells apart; the
other divergences against these two, and the teacher's text against the data's. Fixed before the first run; no paper
gives a margin, so 0.

Covering is measured by the held-out loss, seeking by `sample_perplexity`: the teacher's perplexity on what the student
writes. All studies share their recipe, teacher and grid, so that one run of an arm serves all of them. The card's own
miniature is on training on the student's samples, which is no method of this folder yet.
"""

from collections.abc import Callable

from tutelage.studies.study import Arm, Comparison, Overrides, Results, Study

COVER, SEEK, CLOSE = "loss", "sample_perplexity", "acceptance"
SOURCES = [{"name": name, "order": 2, "concentration": 0.1} for name in ("one", "other")]
DATA = {
    "path": "markov",
    "markov": {"rows": 4000, "symbols": 16, "sources": SOURCES},
    "max_length": 32,
    "validation": 400,
    "test": 600,
}
ROWS = 1000
"""That students see; the teacher sees all training rows, as it would of a large corpus."""
SIZE = {"num_attention_heads": 2, "num_hidden_layers": 1}
RECIPE = {
    "task": "language-model",
    "data": DATA | {"limit": ROWS},
    "student": {"model": "config:llama", "options": SIZE | {"hidden_size": 16, "intermediate_size": 32}},
    "train": {"steps": 400, "batch_size": 64, "optimizer": {"name": "adamw", "lr": 0.01}},
    "evaluation": {"every": 1000, "samples": 300},
}
TEACHER = {
    "task": "language-model",
    "data": DATA,
    "student": {
        "model": "config:llama",
        "options": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
        },
    },
    "method": "none",
    "train": {"steps": 800, "batch_size": 64, "optimizer": {"name": "adamw", "lr": 0.003}},
    "evaluation": {"every": 1000},
}
RATES: tuple[Overrides, ...] = tuple({"train.optimizer.lr": rate} for rate in (0.01, 0.003))
SEQKD = {
    "name": "seqkd",
    "prompt_tokens": 4,
    "generation": {"beams": 5, "max_new_tokens": 28, "batch_size": 256},
}
ARMS = {
    name: Arm(name, grid=RATES) for name in ("none", "fkl", "rkl", "skl", "srkl", "jsd", "akl", "tvd")
} | {"seqkd": Arm(SEQKD, grid=RATES)}


def _contradicted(arm: str, baseline: str, metric: str, higher_is_better: bool) -> Callable[[Results], bool]:
    def falsified(results: Results) -> bool:
        found = results.difference(arm, baseline, metric)
        end = found.high if higher_is_better else found.low
        return end is not None and (end < 0 if higher_is_better else end > 0)

    return falsified


def _study(claim: str, arm: str, baseline: str, metric: str, *others: str) -> Study:
    """``arm`` against ``baseline``; all three metrics of this pair, and of ``arm`` against ``others``, stand beside."""
    higher = metric == CLOSE
    further = [(each, other) for other in (baseline, *others) for each in (COVER, SEEK, CLOSE)]
    return Study(
        claim=claim,
        primary=(arm, baseline),
        metric=metric,
        higher_is_better=higher,
        selection=metric if metric != SEEK else COVER,
        recipe=RECIPE,
        teacher=TEACHER,
        arms={name: ARMS[name] for name in (arm, baseline, *others)},
        secondary=tuple(
            Comparison(arm, other, _WORDS[each], each, each == CLOSE)
            for each, other in further
            if (each, other) != (metric, baseline)
        ),
        falsified_if=f"the 95 % interval of {arm} - {baseline} in {metric} lies on the wrong side of 0",
        falsified=_contradicted(arm, baseline, metric, higher),
    )


_WORDS = {
    COVER: "Covering: the held-out loss.",
    SEEK: "Seeking: the teacher's perplexity on the student's own text.",
    CLOSE: "Closeness: one minus the total variation distance from the teacher on held-out text.",
}

STUDIES = {
    "fkl": _study(
        "On a source of two modes a student of the forward KL has a lower held-out loss than one of the reverse KL.",
        "fkl",
        "rkl",
        COVER,
        "none",
    ),
    "rkl": _study(
        "On a source of two modes the text of a student of the reverse KL has a lower perplexity under the teacher "
        "than that of a student of the forward KL.",
        "rkl",
        "fkl",
        SEEK,
        "none",
    ),
    "skl": _study(
        "The text of a student of the skewed forward KL has a lower perplexity under the teacher than that of a "
        "student of the forward KL.",
        "skl",
        "fkl",
        SEEK,
    ),
    "srkl": _study(
        "The text of a student of the skewed reverse KL has a lower perplexity under the teacher than that of a "
        "student of the reverse KL.",
        "srkl",
        "rkl",
        SEEK,
    ),
    "jsd": _study(
        "The text of a student of the Jensen-Shannon divergence has a lower perplexity under the teacher than that of "
        "a student of the forward KL.",
        "jsd",
        "fkl",
        SEEK,
        "rkl",
    ),
    # The two gaps that akl weighs add up to twice the total variation distance, which is one minus the acceptance.
    "akl": _study(
        "In equally many steps a student of the adaptive KL comes closer to the teacher, by the head's and the tail's "
        "gaps together, than one of the forward KL.",
        "akl",
        "fkl",
        CLOSE,
        "rkl",
    ),
    "tvd": _study(
        "The text of a student of the total variation distance has a lower perplexity under the teacher than that of a "
        "student of the forward KL.",
        "tvd",
        "fkl",
        SEEK,
        "rkl",
    ),
    "seqkd": _study(
        "The text of a student of the teacher's text has a lower perplexity under the teacher than that of a student "
        "of the data.",
        "seqkd",
        "none",
        SEEK,
        "fkl",
    ),
}
