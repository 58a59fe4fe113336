"""How much of a teacher's gain a store of its 50 likeliest tokens keeps, on tiny_shakespeare with a vocabulary of 8192.

Students without a teacher, with the live one and with the store, from the same seeds; lower held-out loss is better.
``python tools/store_gain.py FOLDER [DATA]`` runs what is not there yet in FOLDER and prints JSON: the gains, paired
over the seeds with 95 % intervals, and whether 90 % of the live teacher's gain is kept (the interval of
``store's gain - 0.9 · live gain`` lies above 0), not kept (below), or not shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tutelage.recipe import load_recipe
from tutelage.recipe.schema import Recipe
from tutelage.runs.cache import cache
from tutelage.runs.execute import distill
from tutelage.runs.folder import environment
from tutelage.runs.statistics import Difference, paired_difference

SEEDS = (0, 1, 2, 3, 4)
KEPT = 0.9
TEACHER_EPOCHS = 4
SHARED = [
    "data.tokenizer={train: 8192}",
    "train.epochs=2",
    "train.device=cpu",
    "output.report=false",
    "evaluation.samples=0",
]
CACHE = ["cache.form=topk", "cache.k=50", "cache.batch_size=32"]


def main() -> None:
    """See the module."""
    folder = Path(sys.argv[1])
    data = [f"data.path={sys.argv[2]}"] if len(sys.argv) > 2 else []
    common = [*data, *SHARED]
    longer = load_recipe("tiny-shakespeare-teacher", [*common, f"train.epochs={TEACHER_EPOCHS}"])
    teacher = distill(longer, folder=folder / "teacher", resume=True)
    live = [f"teacher={{run: {teacher.folder}}}"]
    student = load_recipe("tiny-shakespeare", [*common, *live, *CACHE])
    store = cache(student, folder / "answers")
    arms = {
        "none": [*live, "method=none"],
        "live": live,
        "store": [f"teacher={{store: {folder / 'answers'}}}"],
    }
    losses = {
        arm: [_loss(_recipe([*common, *own], seed), folder / arm / str(seed)) for seed in SEEDS]
        for arm, own in arms.items()
    }
    print(json.dumps(_verdict(losses) | _about(teacher.result, store.bytes, store.manifest.plan), indent=1))


def _recipe(overrides: list[str], seed: int) -> Recipe:
    return load_recipe("tiny-shakespeare", [*overrides, f"train.seed={seed}"])


def _loss(recipe: Recipe, folder: Path) -> float:
    return float(distill(recipe, folder=folder, resume=True).result["test"]["loss"])


def _verdict(losses: dict[str, list[float]]) -> dict[str, Any]:
    gains = {arm: paired_difference(losses["none"], losses[arm]) for arm in ("live", "store")}
    pairs = zip(gains["store"].values, gains["live"].values, strict=True)
    beyond = paired_difference([store - KEPT * live for store, live in pairs], [0.0] * len(SEEDS))
    shares = [store / live for store, live in zip(gains["store"].values, gains["live"].values, strict=True)]
    low, high = beyond.low, beyond.high
    verdict = (
        "kept"
        if low is not None and low > 0
        else "not kept"
        if high is not None and high < 0
        else "not shown"
    )
    return {
        "claim": f"at least {KEPT:.0%} of the live teacher's gain in held-out loss is kept",
        "verdict": verdict,
        "share_of_gain": gains["store"].mean / gains["live"].mean,
        "share_by_seed": shares,
        "gain": {arm: _figures(gain) for arm, gain in gains.items()},
        f"store - {KEPT} live": _figures(beyond),
        "losses": losses,
        "seeds": SEEDS,
    }


def _figures(found: Difference) -> dict[str, Any]:
    return {"mean": found.mean, "interval": [found.low, found.high], "p": found.p}


def _about(teacher: dict[str, Any], size: int, plan: Any) -> dict[str, Any]:
    import torch

    tokens = plan.data.rows * plan.spec.logits[0]
    return {
        "teacher_loss": teacher["test"]["loss"],
        "teacher_parameters": teacher["student"]["parameters"],
        "store": {"bytes": size, "bytes_a_token": size / tokens, "tokens": tokens},
        "environment": environment(torch.device("cpu")),
    }


if __name__ == "__main__":
    main()
