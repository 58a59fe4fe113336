"""Whole runs that spare memory: blocks computed again, adapters instead of weights. What ships is a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from killing import KillAt, Killed
from tutelage.engine.needs import PairingError
from tutelage.engine.rng import derive_seed
from tutelage.models import build_model, load_model
from tutelage.recipe import validate
from tutelage.recipe.schema import ModelConfig, Recipe
from tutelage.runs import distill
from tutelage.runs.assemble import assemble

pytest.importorskip("transformers")
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 4,
}


def recipe(student: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    return {
        "data": {"path": "digits", "limit": 64, "validation": 32, "test": 41},
        "teacher": {"model": "digits:mlp-8"},
        "student": {"model": "config:vit", "options": VIT, **(student or {})},
        "method": "kd",
        "train": {
            "steps": 4,
            "batch_size": 16,
            "device": "cpu",
            "threads": 1,
            "checkpoint": {"every": 1},
            **train,
        },
        "output": {"report": False},
    }


def run(values: dict[str, Any], folder: str, kill_at: int | None = None) -> Any:
    callbacks = [KillAt(kill_at)] if kill_at else []
    try:
        done = distill(values, folder=folder, progress=False, resume=kill_at is None, callbacks=callbacks)
    except Killed:
        return None
    assert not any("forward" in module.__dict__ for module in done.student.modules())
    return {name: value.clone() for name, value in done.student.state_dict().items()}


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("ema", [None, 0.5])
def test_blocks_computed_again_change_nothing(ema: float | None, tmp_path: Path) -> None:
    plain = run(recipe(ema=ema), str(tmp_path / "plain"))
    assert_close(run(recipe(ema=ema, activation_checkpointing=True), str(tmp_path / "again")), plain)


@pytest.mark.slow
def test_nor_where_they_are_sharded(pair: Any, tmp_path: Path) -> None:
    plain, _ = pair.run(run, recipe(sharding="fsdp"), str(tmp_path / "plain"))
    again, _ = pair.run(run, recipe(sharding="fsdp", activation_checkpointing=True), str(tmp_path / "again"))
    assert_close(again, plain)


@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_student_with_adapters_ships_plain(ema: float | None, tmp_path: Path) -> None:
    """It is the start with changes of low rank in what the recipe names, and a new head; a resumed run ends alike."""
    pytest.importorskip("peft")
    values = recipe({"lora": {"rank": 2, "targets": ["q_proj", "fc1"]}}, ema=ema, optimizer={"lr": 0.5})
    whole = run(values, str(tmp_path / "whole"))
    assert run(values, str(tmp_path / "run"), kill_at=2) is None
    resumed = run(values, str(tmp_path / "run"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    saved = load_model(tmp_path / "run" / "student").module.state_dict()
    assert saved.keys() == whole.keys()
    assert all(torch.equal(value, saved[name]) for name, value in whole.items())
    seed = derive_seed(0, "student")
    start = build_model(
        ModelConfig(model="config:vit", options=VIT), outputs=10, input_shape=(1, 8, 8), seed=seed
    ).module.state_dict()
    moved = {name for name, value in whole.items() if not torch.equal(value, start[name])}
    layers = {f"vit.layers.{n}.{part}.weight" for n in (0, 1) for part in ("attention.q_proj", "mlp.fc1")}
    assert moved == layers | {"classifier.weight", "classifier.bias"}
    for name in layers:
        sizes = torch.linalg.svdvals((whole[name] - start[name]).double())
        assert sizes[0] > 1e-5
        assert sizes[2] < 1e-7


LLAMA = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}


def text_recipe(folder: Path, teacher: dict[str, Any], **fields: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randint(1, 200, (20,), generator=generator).tolist() for _ in range(60))
    texts = (" ".join(f"{word * 2654435761 % 2**32:x}" for word in row) for row in rows)
    lines = (f"{text},{number % 2}" for number, text in enumerate(texts))
    (folder / "rows.csv").write_text("\n".join(("text,label", *lines)) + "\n")
    model = {"model": "config:llama", "options": LLAMA | {"intermediate_size": 24}}
    return recipe(activation_checkpointing=True) | {
        "data": {
            "path": str(folder / "rows.csv"),
            "text": "text",
            "tokenizer": {"train": 320},
            "max_length": 32,
        }
        | ({"target": "label"} if fields["task"] == "classification" else {}),
        "teacher": model | teacher,
        "student": model | fields.pop("student", {}),
        **fields,
    }


def test_half_precision_beside_adapters(tmp_path: Path) -> None:
    values = text_recipe(
        tmp_path,
        {"dtype": "bfloat16", "attention": "eager"},
        task="language-model",
        method="fkl",
        student={"lora": {"rank": 2}, "dtype": "bfloat16"},
    )
    shipped = run(values, str(tmp_path / "run"))
    assert not [name for name in shipped if "lora" in name or "base_layer" in name]
    assert {value.dtype for value in shipped.values()} == {torch.bfloat16}
    as_teacher = values | {
        "teacher": {"run": str(tmp_path / "run")},
        "student": {"model": values["student"]["model"]},
    }
    as_teacher["student"]["options"] = values["student"]["options"]
    found = assemble(validate(Recipe, as_teacher)).teacher_models["teacher"].live.module
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}


def test_a_teacher_that_is_trained_has_no_weights_in_half_precision(tmp_path: Path) -> None:
    values = text_recipe(tmp_path, {"dtype": "float16"}, task="classification", method="dml")
    with pytest.raises(
        PairingError, match="`dml` trains its teachers, and teacher `teacher` has weights in half"
    ):
        run(values, str(tmp_path / "run"))
