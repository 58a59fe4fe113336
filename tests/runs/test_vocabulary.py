"""Teacher and student speak of the same tokens, or the run is refused before anything is trained or written."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas
import pytest

from tutelage.data import DataError, Tokenizer, train_tokenizer
from tutelage.data.tokenizer import OwnTokenizer
from tutelage.engine.needs import PairingError
from tutelage.models import Vocabulary, build_model, save_model
from tutelage.recipe.schema import ModelConfig, TeacherConfig
from tutelage.runs import distill
from tutelage.runs.vocabulary import own_tokenizer

pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TOKENS = 300


def sentences(seed: int) -> list[str]:
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmno", k=draw.randint(2, 7))) for _ in range(200)]
    return [" ".join(draw.choices(words, k=draw.randint(3, 9))) for _ in range(60)]


def tokenizer(seed: int = 0, size: int = TOKENS) -> Tokenizer:
    return train_tokenizer(sentences(seed), size)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Sentences with a label, and the tokeniser that belongs to them."""
    folder = tmp_path / "texts"
    folder.mkdir()
    table = pandas.DataFrame({"text": sentences(0), "label": [row % 2 for row in range(60)]})
    table.to_parquet(folder / "train.parquet")
    tokenizer().save(tmp_path / "tokens")
    return folder


def teacher_folder(folder: Path, task: str, tokens: Tokenizer | None, **options: Any) -> str:
    """A small model as a run keeps it; with its tokeniser, where it has one."""
    causal = task == "language-model"
    built = build_model(
        ModelConfig(model=f"config:{'llama' if causal else 'bert'}", options=SIZES | options),
        outputs=TOKENS if causal else 2,
        input_shape=(16,) if causal else (),
        task=task,
        vocabulary=Vocabulary(TOKENS, eos=0, pad=0),
    )
    save_model(built, folder, beside=None if tokens is None else tokens.save)
    return str(folder)


@pytest.mark.parametrize(
    ("model", "place"),
    [
        ({"model": "hf:someone/model"}, "someone/model"),
        ({"model": "config:llama", "weights": "hub:someone/weights"}, "someone/weights"),
    ],
)
def test_a_models_revision_and_trust_are_its_tokenisers_too(model: dict[str, Any], place: str) -> None:
    given: dict[str, Any] = {"revision": "v2"} | (
        {"trust_remote_code": True} if "hf:" in model["model"] else {}
    )
    for kind in (ModelConfig, TeacherConfig):
        found = own_tokenizer(kind(**model, **given))
        assert found == OwnTokenizer(place, **given)
    assert own_tokenizer(ModelConfig(model="config:llama", revision="v2")) is None


def recipe(texts: Path, teacher: Mapping[str, Any], task: str = "classification") -> dict[str, Any]:
    causal = task == "language-model"
    target = {} if causal else {"target": "label"}
    return {
        "task": task,
        "data": {
            "path": str(texts),
            "text": "text",
            "tokenizer": str(texts.parent / "tokens"),
            "max_length": 16,
            "validation": None,
            **target,
        },
        "teacher": dict(teacher),
        "student": {"model": f"config:{'llama' if causal else 'bert'}", "options": SIZES},
        "method": {"name": "fkl", "label_weight": 0.5},
        "train": {
            "steps": 1,
            "batch_size": 8,
            "optimizer": {"name": "adamw", "lr": 0.001},
            "device": "cpu",
            "threads": 1,
        },
        "output": {"report": False},
    }


def run(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    return distill(values, folder=folder, progress=False).result


def refused(values: dict[str, Any], folder: Path, said: str, kind: type[Exception] = PairingError) -> None:
    with pytest.raises(kind, match=said):
        run(values, folder)
    assert not folder.exists()


@pytest.mark.parametrize("task", ["classification", "language-model"])
def test_equal_ones_pass(texts: Path, tmp_path: Path, task: str) -> None:
    folder = teacher_folder(tmp_path / "teacher", task, tokenizer())
    done = run(recipe(texts, {"run": folder}, task), tmp_path / "run")
    assert done["status"] == "done"


@pytest.mark.parametrize("task", ["classification", "language-model"])
def test_a_student_with_weights_keeps_its_own_tokens(texts: Path, tmp_path: Path, task: str) -> None:
    """The rows' tokeniser is the teacher's, and what the student's weights know belongs to another."""
    folder = teacher_folder(tmp_path / "teacher", task, tokenizer())
    values = recipe(texts, {"run": folder}, task)
    for seed, theirs in ((1, "other"), (0, "same")):
        weights = teacher_folder(tmp_path / theirs, task, tokenizer(seed=seed))
        values["student"] = {**values["student"], "weights": weights}
        if theirs == "other":
            refused(
                values,
                tmp_path / "run",
                r"the student \(.*other\) has another vocabulary than data.tokenizer",
            )
    assert run(values, tmp_path / "run")["status"] == "done"


def test_rows_that_pad_a_vocabulary_are_no_tokens(texts: Path, tmp_path: Path) -> None:
    """A teacher of 512 rows, of which 300 are tokens: the student, of 320 rows, learns of 300."""
    folder = teacher_folder(tmp_path / "teacher", "language-model", tokenizer(), vocab_size=512)
    done = run(recipe(texts, {"run": folder}, "language-model"), tmp_path / "run")
    assert done["data"]["outputs"] == TOKENS
    assert done["teachers"]["teacher"]["parameters"] > done["student"]["parameters"]


@pytest.mark.parametrize("task", ["classification", "language-model"])
def test_unequal_tokens_are_refused_by_name(texts: Path, tmp_path: Path, task: str) -> None:
    theirs = tokenizer(seed=1)
    folder = teacher_folder(tmp_path / "teacher", task, theirs)
    first = next(
        i for i, pair in enumerate(zip(tokenizer().tokens, theirs.tokens, strict=True)) if len({*pair}) > 1
    )
    said = rf"teacher `teacher` \(.*teacher\) has another vocabulary.*id {first} is '.+' against '.+' and \d+ more"
    refused(recipe(texts, {"run": folder}, task), tmp_path / "run", said)


def test_another_size_is_refused_with_what_only_one_has(texts: Path, tmp_path: Path) -> None:
    folder = teacher_folder(
        tmp_path / "teacher", "language-model", tokenizer(size=TOKENS + 5), vocab_size=512
    )
    said = "300 tokens against 305; from id 300 on only theirs: '.+'.*set data.tokenizer to the teacher's"
    refused(recipe(texts, {"run": folder}, "language-model"), tmp_path / "run", said)


def test_weights_without_a_tokeniser_are_refused(texts: Path, tmp_path: Path) -> None:
    folder = teacher_folder(tmp_path / "teacher", "classification", None)
    weighed = {"model": "config:bert", "options": SIZES, "weights": folder}
    for teacher in ({"run": folder}, weighed):
        refused(recipe(texts, teacher), tmp_path / "run", "holds no tokeniser", DataError)


def test_weights_with_a_tokeniser_beside_pass(texts: Path, tmp_path: Path) -> None:
    folder = teacher_folder(tmp_path / "teacher", "classification", tokenizer())
    teacher = {"model": "config:bert", "options": SIZES, "weights": folder}
    assert run(recipe(texts, teacher), tmp_path / "run")["status"] == "done"


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (
            {"tokenizer": {"train": 310}},
            "trained by its recipe, has another vocabulary.*300 tokens against 310",
        ),
        ({"text": None, "tokenizer": None, "path": "digits"}, "would be trained on digits, which is no text"),
    ],
)
def test_a_teachers_recipe_is_looked_at_before_it_is_trained(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: dict[str, Any], said: str
) -> None:
    monkeypatch.setenv("TUTELAGE_TEACHERS", str(tmp_path / "teachers"))
    values = recipe(texts, {"recipe": write_teacher(texts, tmp_path, theirs)})
    refused(values, tmp_path / "run", said)
    assert not (tmp_path / "teachers").exists()


def test_a_teachers_recipe_of_the_same_tokens_is_trained(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other rows of the same text, and a tokeniser of the same name."""
    monkeypatch.setenv("TUTELAGE_TEACHERS", str(tmp_path / "teachers"))
    values = recipe(texts, {"recipe": write_teacher(texts, tmp_path, {"limit": 40})})
    assert run(values, tmp_path / "run")["status"] == "done"
    (kept,) = (tmp_path / "teachers").glob("*/student/tokenizer.json")
    assert kept.read_text() == (tmp_path / "run" / "student" / "tokenizer.json").read_text()


def write_teacher(texts: Path, folder: Path, data: dict[str, Any]) -> str:
    import yaml

    values = recipe(texts, {}) | {"method": "none"}
    values["data"] = {name: value for name, value in (values["data"] | data).items() if value is not None}
    if data.get("path") == "digits":
        values["data"] = {"path": "digits"}
        values["student"] = {"model": "digits:mlp-8"}
    del values["teacher"]
    file = folder / "teacher.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)
