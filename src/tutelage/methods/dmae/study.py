"""dmae and mae on digits: 16 patches of 2×2 pixels, which hold what 16 of 4×4 of the card's enlarged images do. Fixed
before the first run; the card leaves the margins to be confirmed, so they are 0. Fewer steps than the card's (1500 and
600), so that five seeds take minutes."""

from collections.abc import Mapping
from typing import Any

from tutelage.studies.study import Arm, Comparison, Results, Study

PRETRAINING, FINETUNING, TEACHER_STEPS = 400, 400, 800
LABELS = 300
CHEAPER, PROBE = "times_fewer_flops", "probe_accuracy"
COSTS = "cost of a step by mask ratio"
ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05, "decay_norms": False}
COSINE = {"name": "cosine", "warmup": 0.05}


def _vit(width: int, depth: int) -> dict[str, Any]:
    sizes = {"patch_size": 2, "embed_dim": width, "depth": depth, "num_heads": 4, "global_pool": "avg"}
    return {"model": "timm:vit_tiny_patch16_224", "options": sizes}


def _train(steps: int) -> dict[str, Any]:
    return {"steps": steps, "batch_size": 128, "optimizer": ADAMW, "schedule": COSINE}


FINETUNE = {
    "steps": FINETUNING,
    "batch_size": 60,
    "optimizer": {**ADAMW, "lr": 2e-3, "layer_decay": 0.75},
    "schedule": COSINE,
}
DECODER = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4}
STAGES = {**DECODER, "labels": LABELS, "probe": True, "finetune": FINETUNE}


def _arm(name: str, **options: Any) -> Arm:
    return Arm({"name": name, **STAGES, **options})


LABELLED = {
    "data.limit": LABELS,
    "train.steps": PRETRAINING + FINETUNING,
    "train.batch_size": FINETUNE["batch_size"],
    "train.optimizer.lr": 2e-3,
}
"""All steps on as many labelled rows as the other arms may use."""


def _cost(result: Mapping[str, Any]) -> dict[str, float]:
    """How many times fewer operations a step takes than whole-image feature distillation, at the ratio 0.75."""
    table = result["tables"].get(COSTS)
    if table is None:
        return {}
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    return {CHEAPER: next(row[CHEAPER] for row in rows if row["mask_ratio"] == 0.75)}


def _falsified(results: Results) -> bool:
    probe = results.difference("dmae", "mae", PROBE)
    dearer = any(value < 3 for value in results.values("dmae", CHEAPER))
    return dearer or (probe.high is not None and probe.high < 0)


RECIPE = {
    "data": {"path": "digits", "test": 597, "validation": None},
    "student": _vit(32, 4),
    "train": _train(PRETRAINING),
}
SECONDARY = (
    Comparison(
        "dmae", "mae", "The card's claim: a higher linear-probe accuracy at a ratio of 0.75.", metric=PROBE
    ),
    Comparison("dmae-0.9", "mae-0.9", "The same at a ratio of 0.9: one visible patch of 16.", metric=PROBE),
    Comparison("dmae", "mae", "Fine-tuned, against reconstruction alone."),
    Comparison("dmae-0.9", "kd", "One visible patch of 16 against distilling the fine-tuned teacher."),
    Comparison("dmae", "alignment", "Against alignment alone.", metric=PROBE),
)

STUDIES = {
    "dmae": Study(
        claim="At a mask ratio of 0.75, where a step takes at most a third of the operations of whole-image feature "
        "distillation, a student that is distilled from a masked autoencoder and then fine-tuned is more accurate than "
        "one that distils the fine-tuned teacher at equal steps.",
        primary=("dmae", "kd"),
        recipe=RECIPE,
        teacher={
            "data": RECIPE["data"],
            "student": _vit(64, 6),
            "method": {"name": "mae", **DECODER, "finetune": None},
            "train": _train(TEACHER_STEPS),
        },
        arms={
            "dmae": _arm("dmae"),
            "kd": Arm("kd", grid=(LABELLED,), teacher={"method.labels": LABELS, "method.finetune": FINETUNE}),
            "mae": _arm("mae"),
            "dmae-0.9": _arm("dmae", mask_ratio=0.9),
            "mae-0.9": _arm("mae", mask_ratio=0.9),
            "alignment": _arm("dmae", reconstruct=False),
        },
        measure=_cost,
        secondary=SECONDARY,
        falsified_if="the 95 % interval of the probe accuracy of dmae - mae at 0.75 lies below 0, or a step at 0.75 "
        "takes more than a third of the operations of whole-image feature distillation",
        falsified=_falsified,
    ),
    "mae": Study(
        claim="A vision transformer that first learns to predict the pixels of masked patches is more accurate after "
        "fine-tuning than one trained with labels alone.",
        primary=("mae", "none"),
        recipe=RECIPE,
        arms={"mae": _arm("mae"), "none": Arm("none", grid=(LABELLED,))},
        falsified_if="the 95 % interval of mae - none lies below 0",
        falsified=lambda results: (
            (high := results.difference("mae", "none", "accuracy").high) is not None and high < 0
        ),
    ),
}
