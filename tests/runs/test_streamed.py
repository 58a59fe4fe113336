"""A run on a stream, stopped in the middle of a window: what is left gives the weights that the whole run gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.recipe import load_recipe
from tutelage.runs.execute import distill

datasets = pytest.importorskip("datasets")
pytest.importorskip("transformers")


class Killed(Exception):
    """In place of a signal."""


class Killer:
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Any) -> None:
        if trainer.step == self.step:
            raise Killed


def recipe(folder: Path) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return load_recipe(
        {
            "task": "language-model",
            "data": {
                "path": str(folder),
                "text": "text",
                "tokenizer": {"train": 300},
                "max_length": 16,
                "stream": True,
                "window": 40,
                "epoch_rows": 16,
                "validation": 20,
            },
            "student": {"model": "config:llama", "options": sizes},
            "method": "none",
            "train": {
                "steps": 24,
                "batch_size": 8,
                "accumulate": 2,
                "optimizer": {"name": "adamw", "lr": 0.01},
                "device": "cpu",
                "checkpoint": {"every": 3},
            },
            "output": {"report": False},
        }
    )


@pytest.mark.parametrize("step", [4, 11])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, step: int) -> None:
    words = [f"word{number * number % 97} and word{number * 31 % 89}." for number in range(200)]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict({"text": words}).to_parquet(tmp_path / "data" / "train.parquet")
    made = recipe(tmp_path / "data")
    whole = distill(made, folder=tmp_path / "whole", progress=False)
    with pytest.raises(Killed):
        distill(made, folder=tmp_path / "killed", progress=False, callbacks=(Killer(step),))
    resumed = distill(made, folder=tmp_path / "killed", progress=False, resume=True)
    assert resumed.result["steps"] == 24
    for ours, theirs in zip(resumed.student.parameters(), whole.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)
