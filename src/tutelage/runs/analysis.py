"""What a classifier got right and wrong on held-out rows, beside its teacher: ``analysis.json`` for the report.

Everything follows from each item's most probable class and its probability, so one pass gives all of it. An item is a
row, or a token of one where tokens have classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tutelage.data import Tokenizer
from tutelage.data.pictures import png_uri
from tutelage.engine.loading import Source
from tutelage.engine.types import Batch, Outputs
from tutelage.engine.views import to_float
from tutelage.functional.calibration import BINS, confidence_bins
from tutelage.functional.tokens import counted_tokens

MOST_CLASSES = 50
"""Above, the confusion of all classes is unreadable: only its largest entries are kept."""
MOST_PAIRS = 20
MOST_EXAMPLES = 12
MOST_CHARACTERS = 500
"""Of a text that is shown; of a token's, so many on either side."""

Json = dict[str, Any]
Predict = Callable[[Batch], Outputs]


@dataclass(frozen=True)
class Answers:
    """Of every item, on the CPU: the most probable class and its probability."""

    classes: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class Items:
    """What was answered, on the CPU: the class of each item, and its place ``[items, 1]`` (the row's position in the
    source) or ``[items, 2]`` (and the token's in the row)."""

    target: Tensor
    places: Tensor


def analyse(
    student: Predict,
    teacher: Predict | None,
    source: Source,
    *,
    classes: int,
    class_names: Sequence[str] | None,
    batch_size: int,
    device: torch.device,
    tokenizer: Tokenizer | None = None,
) -> Json:
    """Confusion, calibration, agreement by class, and items on which student and teacher disagree.

    Args:
        student, teacher: outputs of a batch of ``source``, without gradients.
        source: labelled rows of a classification, of rows or of tokens.
        classes: how many there are.
        class_names: what they are called; none: their numbers.
        tokenizer: that made the rows, where they are text.

    Returns:
        JSON values: ``classes`` (names), ``items`` (what they are of: ``rows`` or ``tokens``), ``rows`` (how many
        items), ``student`` and ``teacher`` (``recall`` by class, ``confusion`` counts ``[target][answer]`` or none,
        ``confused`` pairs, ``calibration`` bins), ``agreement`` by class (shares; none for a class without items) and
        ``examples``, each with its ``picture`` or its ``text`` (a token's word stands between » and «).
    """
    predictors = {"student": student} | ({"teacher": teacher} if teacher else {})
    answers, items = _answers(predictors, source, batch_size, device)
    target = items.target
    found: Json = {
        "classes": list(class_names) if class_names else [str(i) for i in range(classes)],
        "items": "rows" if items.places.shape[1] == 1 else "tokens",
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
        found["examples"] = _examples(answers, items, ~same, source, tokenizer)
    return found


def _answers(
    predictors: dict[str, Predict], source: Source, batch_size: int, device: torch.device
) -> tuple[dict[str, Answers], Items]:
    classes: dict[str, list[Tensor]] = {who: [] for who in predictors}
    confidence: dict[str, list[Tensor]] = {who: [] for who in predictors}
    targets, places = [], []
    for start in range(0, len(source), batch_size):
        batch = to_float(source.fetch(range(start, min(start + batch_size, len(source)))).to(device))
        target, counted = _target(batch)
        targets.append(target[counted].cpu())
        found = counted.nonzero().cpu()
        found[:, 0] += start
        places.append(found)
        for who, predict in predictors.items():
            best = predict(batch).logits[counted].float().softmax(1).max(1)
            classes[who].append(best.indices.cpu())
            confidence[who].append(best.values.cpu())
    answers = {who: Answers(torch.cat(classes[who]), torch.cat(confidence[who])) for who in predictors}
    return answers, Items(torch.cat(targets), torch.cat(places))


def _target(batch: Batch) -> tuple[Tensor, Tensor]:
    """Class ids ``[rows]`` or ``[rows, tokens]``, and which of them count (bool)."""
    assert batch.target is not None
    target = batch.target.argmax(1) if batch.target.is_floating_point() else batch.target
    counted = counted_tokens(target.shape, batch.mask, target)
    assert counted is not None
    return target, counted


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
    answers: dict[str, Answers], items: Items, apart: Tensor, source: Source, tokenizer: Tokenizer | None
) -> list[Json]:
    """Items on which the two are surest of different answers."""
    certainty = answers["student"].confidence * answers["teacher"].confidence * apart
    chosen = certainty.topk(min(MOST_EXAMPLES, int(apart.sum()))).indices.tolist()
    if not chosen:
        return []
    places = items.places[chosen].tolist()
    batch = source.fetch([row for row, *_ in places])
    pictures = _pictures(batch)
    return [
        {
            "row": int(batch.index[k]) if batch.index is not None else places[k][0],
            "target": int(items.target[i]),
            **{
                who: {"class": int(given.classes[i]), "confidence": round(float(given.confidence[i]), 4)}
                for who, given in answers.items()
            },
            "picture": pictures[k],
            "text": None if tokenizer is None else _text(batch, k, places[k][1:], tokenizer),
        }
        for k, i in enumerate(chosen)
    ]


def _text(batch: Batch, row: int, place: Sequence[int], tokenizer: Tokenizer) -> str:
    """A row as text, cut where it is long; the word at a token marked, where its ``place`` is given."""
    assert isinstance(batch.inputs, dict)
    ids = batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row].bool()].tolist()
    if not place:
        whole = tokenizer.decode(ids, special=False)
        return whole if len(whole) <= MOST_CHARACTERS else whole[: MOST_CHARACTERS - 1] + "…"
    whole = tokenizer.decode(ids, special=False)
    start = len(tokenizer.decode(ids[: place[0]], special=False))
    rest = whole[start:].lstrip()
    word = rest.split(maxsplit=1)[0] if rest else ""
    before = whole[: len(whole) - len(rest)]
    return f"{before[-MOST_CHARACTERS:]}»{word}«{rest[len(word) :][:MOST_CHARACTERS]}"


def _pictures(batch: Batch) -> list[str | None]:
    """Each row as a PNG in a data URI, where rows are grey or RGB images."""
    inputs = to_float(batch).inputs
    if isinstance(inputs, dict) or inputs.dim() != 4 or inputs.shape[1] not in (1, 3):
        return [None] * len(batch)
    return [png_uri(image) for image in inputs]
