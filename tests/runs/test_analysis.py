"""Confusion, calibration, agreement and examples, against values made by hand."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tutelage.data import TensorSource, Tokenizer, train_tokenizer
from tutelage.engine.types import Batch, Outputs
from tutelage.runs.analysis import BINS, analyse

TARGET = torch.tensor([0, 0, 1, 1, 2, 0])
STUDENT = torch.tensor([0, 1, 1, 1, 1, 0])
TEACHER = torch.tensor([0, 0, 1, 2, 1, 0])


class Fixed:
    """Answers ``classes`` with probability 0.8, whatever the batch size."""

    def __init__(self, classes: Tensor) -> None:
        self.classes = classes

    def __call__(self, batch: Batch) -> Outputs:
        assert batch.index is not None
        probabilities = torch.full((len(batch), 3), 0.1)
        probabilities[torch.arange(len(batch)), self.classes[batch.index]] = 0.8
        return Outputs(probabilities.log())


def found(teacher: bool = True, batch_size: int = 4, channels: int = 1) -> dict[str, Any]:
    images = torch.linspace(0, 1, 6 * channels * 16).view(6, channels, 4, 4)
    return analyse(
        Fixed(STUDENT),
        Fixed(TEACHER) if teacher else None,
        TensorSource(images, TARGET),
        classes=3,
        class_names=None,
        batch_size=batch_size,
        device=torch.device("cpu"),
    )


def test_by_hand() -> None:
    page = found()
    assert page["classes"] == ["0", "1", "2"]
    assert page["rows"] == 6
    assert page["student"]["confusion"] == [[2, 1, 0], [0, 2, 0], [0, 1, 0]]
    assert page["student"]["recall"] == [pytest.approx(2 / 3, abs=1e-6), 1.0, 0.0]
    assert sorted(page["student"]["confused"]) == [[0, 1, 1], [2, 1, 1]]
    assert page["agreement"] == [pytest.approx(2 / 3, abs=1e-6), 0.5, 1.0]
    assert sorted(example["row"] for example in page["examples"]) == [1, 3]
    assert {example["student"]["confidence"] for example in page["examples"]} == {0.8}


def test_calibration_bins() -> None:
    calibration = found()["student"]["calibration"]
    place = 12 - 1  # 0.8 lies in (11/15, 12/15]
    assert calibration["count"] == [6 if i == place else 0 for i in range(BINS)]
    assert calibration["confidence"][place] == pytest.approx(0.8)
    assert calibration["accuracy"][place] == pytest.approx(4 / 6, abs=1e-6)
    assert [i for i, value in enumerate(calibration["accuracy"]) if value is not None] == [place]


def test_the_batch_size_changes_nothing() -> None:
    assert found(batch_size=1) == found(batch_size=6)


def test_without_a_teacher() -> None:
    page = found(teacher=False)
    assert (page["teacher"], page["agreement"], page["examples"]) == (None, None, [])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (2, None)])
def test_pictures_are_the_rows_own_pixels(channels: int, mode: str | None) -> None:
    example = found(channels=channels)["examples"][0]
    if mode is None:
        assert example["picture"] is None
        return
    head, data = example["picture"].split(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (image.size, image.mode) == ((4, 4), mode)
    images = torch.linspace(0, 1, 6 * channels * 16).view(6, channels, 4, 4)
    first = image.getpixel((0, 0))
    value = first if isinstance(first, int) else first[0]  # type: ignore[index]
    assert value == round(float(images[example["row"], 0, 0, 0]) * 255)


class Texts:
    """Three rows of tokens, of which those with a class count; a batch is padded to its longest row."""

    fields, fingerprint = frozenset({"target", "mask", "index"}), "texts"
    rows = ("the old bridge", "a bridge", "of stone and iron")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.ids = [row.tolist() for row in tokenizer.encode(self.rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, positions: Any) -> Batch:
        chosen = [self.ids[position] for position in positions]
        longest = max(map(len, chosen))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in chosen])
        real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in chosen])
        target = torch.where((real == 1) & (torch.arange(longest) > 0), ids % 3, -100)
        return Batch(
            {"input_ids": ids, "attention_mask": real},
            target,
            index=10 + torch.tensor(list(positions)),
            mask=target != -100,
        )


def answering(shift: int) -> Any:
    """Right by probability 0.8, or as far from right as ``shift``."""

    def answer(batch: Batch) -> Outputs:
        assert isinstance(batch.inputs, dict)
        chosen = torch.nn.functional.one_hot((batch.inputs["input_ids"] + shift) % 3, 3)
        return Outputs((0.1 + 0.7 * chosen).log())

    return answer


@pytest.mark.parametrize("batch_size", [1, 3])
def test_tokens_are_items_of_their_own(batch_size: int) -> None:
    tokenizer = train_tokenizer([" ".join(Texts.rows)], 262)
    source = Texts(tokenizer)
    page = analyse(
        answering(1),
        answering(0),
        source,
        classes=3,
        class_names=["O", "B-X", "I-X"],
        batch_size=batch_size,
        device=torch.device("cpu"),
        tokenizer=tokenizer,
    )
    counted = sum(len(row) - 1 for row in source.ids)
    assert (page["items"], page["rows"]) == ("tokens", counted)
    assert sum(page["teacher"]["confusion"][i][i] for i in range(3)) == counted
    assert sum(page["student"]["confusion"][i][i] for i in range(3)) == 0
    for example in page["examples"]:
        before, word, after = example["text"].replace("«", "»").split("»")
        assert before + word + after == Texts.rows[example["row"] - 10]
        assert word
        assert word.split() == [word]


def test_many_classes_keep_only_the_largest_confusions() -> None:
    rows = 60
    target = torch.arange(rows)
    page = analyse(
        lambda batch: Outputs(torch.eye(rows)[(batch.target + 1) % rows]),
        None,
        TensorSource(torch.zeros(rows, 1, 2, 2), target),
        classes=rows,
        class_names=None,
        batch_size=16,
        device=torch.device("cpu"),
    )
    assert page["student"]["confusion"] is None
    assert len(page["student"]["confused"]) == 20
    assert all((answer - true) % rows == 1 for true, answer, _ in page["student"]["confused"])
