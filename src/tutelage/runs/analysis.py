"""What a classifier got right and wrong on held-out rows, beside its teacher: ``analysis.json`` for the report.

Everything follows from each row's most probable class and its probability, so one pass gives all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tutelage.data.pictures import png_uri
from tutelage.engine.loading import Source
from tutelage.engine.types import Batch, Outputs
from tutelage.engine.views import to_float
from tutelage.functional.calibration import BINS, confidence_bins

MOST_CLASSES = 50
"""Above, the confusion of all classes is unreadable: only its largest entries are kept."""
MOST_PAIRS = 20
MOST_EXAMPLES = 12

Json = dict[str, Any]
Predict = Callable[[Batch], Outputs]


@dataclass(frozen=True)
class Answers:
    """Of every row, on the CPU: the most probable class and its probability."""

    classes: Tensor
    confidence: Tensor


def analyse(
    student: Predict,
    teacher: Predict | None,
    source: Source,
    *,
    classes: int,
    class_names: Sequence[str] | None,
    batch_size: int,
    device: torch.device,
) -> Json:
    """Confusion, calibration, agreement by class, and rows on which student and teacher disagree.

    Args:
        student, teacher: outputs of a batch of ``source``, without gradients.
        source: labelled rows of a classification.
        classes: how many there are.
        class_names: what they are called; none: their numbers.

    Returns:
        JSON values: ``classes`` (names), ``rows``, ``student`` and ``teacher`` (``recall`` by class, ``confusion``
        counts ``[target][answer]`` or none, ``confused`` pairs, ``calibration`` bins), ``agreement`` by class (shares;
        none for a class without rows) and ``examples``.
    """
    predictors = {"student": student} | ({"teacher": teacher} if teacher else {})
    answers, target, index = _answers(predictors, source, batch_size, device)
    found: Json = {
        "classes": list(class_names) if class_names else [str(i) for i in range(classes)],
        "rows": len(target),
        "teacher": None,
        "agreement": None,
        "examples": [],
    }
    for who, given in answers.items():
        found[who] = _one(given, target, classes)
    if teacher:
        same = answers["student"].classes == answers["teacher"].classes
        found["agreement"] = _shares(same, target, classes)
        found["examples"] = _examples(answers, target, index, ~same, source)
    return found


def _answers(
    predictors: dict[str, Predict], source: Source, batch_size: int, device: torch.device
) -> tuple[dict[str, Answers], Tensor, Tensor]:
    classes: dict[str, list[Tensor]] = {who: [] for who in predictors}
    confidence: dict[str, list[Tensor]] = {who: [] for who in predictors}
    targets, rows = [], []
    for start in range(0, len(source), batch_size):
        positions = range(start, min(start + batch_size, len(source)))
        batch = to_float(source.fetch(positions).to(device))
        assert batch.target is not None
        hard = batch.target if batch.target.dim() == 1 else batch.target.argmax(1)
        kept = slice(None) if batch.mask is None else batch.mask.bool()
        targets.append(hard[kept].cpu())
        rows.append(torch.tensor(positions)[kept if isinstance(kept, slice) else kept.cpu()])
        for who, predict in predictors.items():
            best = predict(batch).logits[kept].float().softmax(1).max(1)
            classes[who].append(best.indices.cpu())
            confidence[who].append(best.values.cpu())
    answers = {who: Answers(torch.cat(classes[who]), torch.cat(confidence[who])) for who in predictors}
    return answers, torch.cat(targets), torch.cat(rows)


def _one(answers: Answers, target: Tensor, classes: int) -> Json:
    confusion = (target * classes + answers.classes).bincount(minlength=classes**2).view(classes, classes)
    return {
        "recall": _shares(answers.classes == target, target, classes),
        "confusion": confusion.tolist() if classes <= MOST_CLASSES else None,
        "confused": _largest(confusion),
        "calibration": _calibration(answers.confidence, answers.classes == target),
    }


def _largest(confusion: Tensor) -> list[list[int]]:
    """The largest ``[target, answer, count]`` of wrong answers, none that never happened."""
    wrong = confusion.clone().fill_diagonal_(0)
    counts, places = wrong.flatten().topk(min(MOST_PAIRS, wrong.numel()))
    width = len(confusion)
    return [
        [place // width, place % width, count]
        for count, place in zip(counts.tolist(), places.tolist(), strict=True)
        if count
    ]


def _calibration(confidence: Tensor, right: Tensor) -> Json:
    """By bin ``(low, high]`` of confidence: how many rows, their mean confidence and their accuracy."""
    bins = confidence_bins(confidence)
    count = bins.bincount(minlength=BINS)
    known = count.clamp_min(1)
    means = {
        "confidence": bins.bincount(confidence, minlength=BINS) / known,
        "accuracy": bins.bincount(right.float(), minlength=BINS) / known,
    }
    blank = (count == 0).tolist()
    shown = {
        name: [
            None if empty else round(value, 6) for value, empty in zip(values.tolist(), blank, strict=True)
        ]
        for name, values in means.items()
    }
    return {"count": count.tolist(), **shown}


def _shares(hit: Tensor, target: Tensor, classes: int) -> list[float | None]:
    rows = target.bincount(minlength=classes)
    hits = target.bincount(hit.double(), minlength=classes)
    return [
        round(part / whole, 6) if whole else None
        for part, whole in zip(hits.tolist(), rows.tolist(), strict=True)
    ]


def _examples(
    answers: dict[str, Answers], target: Tensor, positions: Tensor, apart: Tensor, source: Source
) -> list[Json]:
    """Rows on which the two are surest of different answers."""
    certainty = answers["student"].confidence * answers["teacher"].confidence * apart
    chosen = certainty.topk(min(MOST_EXAMPLES, int(apart.sum()))).indices.tolist()
    if not chosen:
        return []
    batch = source.fetch([int(positions[i]) for i in chosen])
    pictures = _pictures(batch)
    return [
        {
            "row": int(batch.index[k]) if batch.index is not None else int(positions[i]),
            "target": int(target[i]),
            **{
                who: {"class": int(given.classes[i]), "confidence": round(float(given.confidence[i]), 4)}
                for who, given in answers.items()
            },
            "picture": pictures[k],
        }
        for k, i in enumerate(chosen)
    ]


def _pictures(batch: Batch) -> list[str | None]:
    """Each row as a PNG in a data URI, where rows are grey or RGB images."""
    inputs = to_float(batch).inputs
    if isinstance(inputs, dict) or inputs.dim() != 4 or inputs.shape[1] not in (1, 3):
        return [None] * len(batch)
    return [png_uri(image) for image in inputs]
