"""A store of a language model's answers: small, made without whole logits, as good as the model where all is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.recipe import load_recipe
from tutelage.runs.assemble import assemble
from tutelage.runs.cache import cache, estimate
from tutelage.runs.execute import distill
from tutelage.teachers import forms
from tutelage.teachers.store import Store

pytest.importorskip("transformers")
SYMBOLS = 60
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def recipe(folder: Path, **changes: Any) -> Any:
    base: dict[str, Any] = {
        "task": "language-model",
        "data": {
            "path": "markov",
            "max_length": 16,
            "validation": 16,
            "test": 16,
            "markov": {"symbols": SYMBOLS, "rows": 96, "sources": [{"name": "a", "concentration": 0.05}]},
        },
        "teacher": {"model": "config:llama", "options": LLAMA | {"hidden_size": 32}},
        "student": {"model": "config:llama", "options": LLAMA},
        "method": {"name": "fkl", "label_weight": 0.5},
        "train": {"steps": 4, "batch_size": 16, "optimizer": {"name": "adamw", "lr": 0.01}, "device": "cpu"},
        "cache": {"form": "topk", "k": 50, "batch_size": 32},
        "output": {"dir": str(folder), "report": False},
    }
    return load_recipe(base, [f"{key}={value}" for key, value in changes.items()])


def test_fifty_entries_take_at_most_304_bytes_a_token(tmp_path: Path) -> None:
    layout = forms.Layout(_form(50), (128, 150_000), {})
    assert layout.row_bytes == 128 * 304
    said = estimate(recipe(tmp_path / "run"), tmp_path / "store")
    made = cache(recipe(tmp_path / "run"), tmp_path / "store", progress=False)
    assert said.bytes == pytest.approx(made.bytes, rel=0.02)
    assert made.manifest.plan.spec.logits == (16, SYMBOLS + 1)


def _form(k: int) -> Any:
    return forms.FormPart(form="topk", k=k, scale="raw", dtype="float32", draw_temperature=1.0, seed=0)


@pytest.mark.parametrize("form", ["topk", "sampled"])
def test_what_is_stored_does_not_depend_on_how_many_logits_are_made_at_once(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recipe(tmp_path / "run", **{"cache.form": form, "cache.k": 7})
    cache(whole, tmp_path / "whole", progress=False)
    monkeypatch.setattr(forms, "_PART_BYTES", 4 * 32 * (SYMBOLS + 1) * 3)  # three tokens of a batch
    cache(whole, tmp_path / "parts", progress=False)
    index, view = torch.arange(64), torch.zeros(64, dtype=torch.int64)
    one, other = (Store(tmp_path / name).read(index, view).stored_logits for name in ("whole", "parts"))
    assert torch.equal(one.ids, other.ids)  # type: ignore[union-attr]
    values = "log_probs" if form == "topk" else "weights"
    torch.testing.assert_close(getattr(one, values), getattr(other, values), atol=1e-3, rtol=1e-3)


def test_a_run_from_all_entries_is_that_of_the_live_teacher(tmp_path: Path) -> None:
    live = distill(recipe(tmp_path / "live"), progress=False)
    cache(recipe(tmp_path / "run", **{"cache.k": SYMBOLS + 1}), tmp_path / "store", progress=False)
    stored = distill(recipe(tmp_path / "stored", teacher=f"{{store: {tmp_path / 'store'}}}"), progress=False)
    assert stored.result["test"]["loss"] == pytest.approx(live.result["test"]["loss"], abs=2e-4)
    assert "agreement" not in stored.result["test"]
    assert stored.result["teachers"]["teacher"]["test"] == live.result["teachers"]["teacher"]["test"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"data.packing": "wrapped"}, "packing"),
        ({"data.max_length": 8}, "max_length"),
        ({"data.seed": 3}, "path"),
    ],
)
def test_a_store_of_other_tokens_is_refused_by_the_field(
    tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    cache(recipe(tmp_path / "run"), tmp_path / "store", progress=False)
    other = recipe(tmp_path / "other", **{"teacher": f"{{store: {tmp_path / 'store'}}}", **change})
    with pytest.raises(ValueError, match=rf"other tokens \(data\.{field}\)"):
        assemble(other)


def test_rows_of_unequal_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.packing is none"):
        cache(recipe(tmp_path / "run", **{"data.packing": "none"}), tmp_path / "store", progress=False)


def test_draws_serve_the_forward_kl_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rkl.*needs dense or topk"):
        cache(
            recipe(tmp_path / "run", **{"cache.form": "sampled", "method": "rkl"}),
            tmp_path / "store",
            progress=False,
        )
