"""Finished runs of tiny students, trained once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tutelage.runs import distill

RECIPE: dict[str, Any] = {
    "data": {"path": "digits", "limit": 500, "validation": 64, "test": 200},
    "teacher": {"model": "digits:mlp-32"},
    "student": {"model": "digits:cnn-16-16"},
    "method": "kd",
    "train": {
        "epochs": 6,
        "batch_size": 32,
        "device": "cpu",
        "threads": 1,
        "optimizer": {"name": "adamw", "lr": 0.01},
    },
    "output": {"report": False},
}


def train(folder: Path, **changes: Any) -> Path:
    """Run `RECIPE` with some parts replaced."""
    return distill(RECIPE | changes, folder=folder, progress=False).folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="session")
def cnn_run(folders: Path) -> Path:
    """A plain net of ours, taught by another."""
    return train(folders / "cnn")


@pytest.fixture(scope="session")
def timm_run(folders: Path) -> Path:
    """A transformer of timm, of linear layers."""
    student = {"model": "timm:test_vit", "options": {"img_size": 8, "patch_size": 4}}
    return train(folders / "timm", student=student, method="none", teacher=None)


@pytest.fixture(scope="session")
def hf_run(folders: Path) -> Path:
    """A transformer of transformers."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    settings = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes)
    settings.save_pretrained(folders / "vit")
    short = RECIPE["train"] | {"epochs": 1}
    student = {"model": f"hf:{folders / 'vit'}"}
    return train(folders / "hf", student=student, method="none", teacher=None, train=short)
