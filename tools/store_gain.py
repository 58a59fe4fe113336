"""How much of a teacher's gain stores of 50 numbers a token keep: its likeliest tokens, and draws from it.

Students without a teacher, with the live one and with either store, from the same seeds; lower held-out loss is better.
``python tools/store_gain.py FOLDER CORPUS [DATA]`` runs what is not there yet in FOLDER and prints JSON: the gains,
paired over the seeds with 95 % intervals, and whether a store keeps 90 % of the live teacher's gain (the interval of
``store's gain - 0.9 · live gain`` lies above 0), does not (below), or whether that is not shown. DATA is a folder that
stands for the corpus' name on the hub. Vocabularies have 8192 tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tutelage.recipe import load_recipe
from tutelage.recipe.schema import Recipe
from tutelage.runs.cache import cache
from tutelage.runs.execute import distill
from tutelage.runs.folder import environment
from tutelage.runs.statistics import Difference, paired_difference

SEEDS = (0, 1, 2, 3, 4)
KEPT = 0.9
FORMS = ("topk", "sampled")
SHARED = ["train.device=cpu", "output.report=false"]
TOKENS = "tokenizer: {train: 8192}, max_length: 128"
CORPORA = {
    "tiny_shakespeare": {
        "data": f"path: karpathy/tiny_shakespeare, text: text, {TOKENS}, validation: validation, test: test",
        "teacher": ["train.epochs=4"],
        "student": ["train.epochs=2"],
    },
    "gsm8k": {
        "data": f"path: openai/gsm8k, config: main, prompt: question, completion: answer, {TOKENS}, validation: 500, "
        "test: test",
        "teacher": [
            "train.epochs=3",
            "student.options.hidden_size=192",
            "student.options.intermediate_size=512",
        ],
        "student": [
            "train.epochs=1",
            "student.options.hidden_size=64",
            "student.options.intermediate_size=172",
        ],
    },
}
"""Of each: the recipe's ``data``, and overrides of `tiny-shakespeare-teacher` and `tiny-shakespeare`."""


def main() -> None:
    """See the module."""
    folder, corpus = Path(sys.argv[1]), CORPORA[sys.argv[2]]
    data = [f"data={{{corpus['data']}}}"]
    if len(sys.argv) > 3:
        data += [f"data.path={sys.argv[3]}", "data.config=null"]
    common = [*data, *SHARED]
    teacher = distill(
        load_recipe("tiny-shakespeare-teacher", [*common, *corpus["teacher"]]),
        folder=folder / "teacher",
        resume=True,
    )
    live = f"teacher={{run: {teacher.folder}}}"
    student = [*common, *corpus["student"], "evaluation.samples=0"]
    stores = {form: _store([*student, live], form, folder / f"{form}-store") for form in FORMS}
    arms = {
        "none": [live, "method=none"],
        "live": [live],
        **{form: [f"teacher={{store: {folder / f'{form}-store'}}}"] for form in FORMS},
    }
    losses: dict[str, list[float]] = {arm: [] for arm in arms}
    for seed in SEEDS:
        for arm, own in arms.items():
            recipe = load_recipe("tiny-shakespeare", [*student, *own, f"train.seed={seed}"])
            losses[arm].append(_loss(recipe, folder / arm / str(seed)))
    gains = {arm: paired_difference(losses["none"], losses[arm]) for arm in ("live", *FORMS)}
    found = {
        "claim": f"at least {KEPT:.0%} of the live teacher's gain in held-out loss is kept",
        "corpus": sys.argv[2],
        "gains": {arm: _figures(gain) for arm, gain in gains.items()},
        "stores": {form: stores[form] | _verdict(gains["live"], gains[form]) for form in FORMS},
        "losses": losses,
        "seeds": SEEDS,
        "teacher": {
            "loss": teacher.result["test"]["loss"],
            "parameters": teacher.result["student"]["parameters"],
        },
        "environment": environment(torch.device("cpu")),
    }
    print(json.dumps(found, indent=1))


def _store(student: list[str], form: str, folder: Path) -> dict[str, Any]:
    """Make it, and tell its size and what it leaves out."""
    options = [f"cache.form={form}", "cache.k=50", "cache.batch_size=32"]
    store = cache(load_recipe("tiny-shakespeare", [*student, *options]), folder)
    plan = store.manifest.plan
    assert plan.spec.logits is not None
    tokens = plan.data.rows * plan.spec.logits[0]
    return {
        "bytes": store.bytes,
        "tokens": tokens,
        "bytes_a_token": store.bytes / tokens,
        "error": store.manifest.error,
    }


def _loss(recipe: Recipe, folder: Path) -> float:
    return float(distill(recipe, folder=folder, resume=True).result["test"]["loss"])


def _verdict(live: Difference, stored: Difference) -> dict[str, Any]:
    beyond = paired_difference(
        [store - KEPT * whole for store, whole in zip(stored.values, live.values, strict=True)],
        [0.0] * len(SEEDS),
    )
    low, high = beyond.low, beyond.high
    verdict = "not shown"
    if low is not None and low > 0:
        verdict = "kept"
    elif high is not None and high < 0:
        verdict = "not kept"
    return {
        "verdict": verdict,
        "share_of_gain": stored.mean / live.mean,
        f"gain - {KEPT} live": _figures(beyond),
    }


def _figures(found: Difference) -> dict[str, Any]:
    return {"mean": found.mean, "interval": [found.low, found.high], "p": found.p}


if __name__ == "__main__":
    main()
