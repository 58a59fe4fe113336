"""An attention that needs a GPU in half precision is refused elsewhere, before anything is built."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tutelage.recipe import load_recipe
from tutelage.runs.checks import flash_gaps


def gaps(device: str, precision: str, *overrides: str) -> list[str]:
    runtime: Any = SimpleNamespace(device=torch.device(device), precision=precision)
    return flash_gaps(load_recipe("tiny-shakespeare", list(overrides)), runtime)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_others_run_anywhere(attention: str) -> None:
    assert gaps("cpu", "fp32", f"student.attention={attention}") == []


def test_kernels_need_a_gpu() -> None:
    (reason,) = gaps("cpu", "bf16", "student.attention=flash_attention_2")
    assert reason.startswith("student: flash_attention_2 needs a GPU (train.device is cpu)")


def test_kernels_need_half_precision() -> None:
    flash = "student.attention=flash_attention_2"
    (reason,) = gaps("cuda", "fp32", flash)
    assert reason.startswith("student: flash_attention_2 computes in half precision alone")
    assert gaps("cuda", "bf16", flash) == []


def test_every_teacher_is_looked_at() -> None:
    teacher = (
        "teacher={model: config:llama, weights: here.safetensors, attention: flash_attention_3, dtype: %s}"
    )
    assert gaps("cuda", "fp32", teacher % "bfloat16") == []
    (reason,) = gaps("cuda", "fp32", teacher % "float32")
    assert reason.startswith("teacher: flash_attention_3")
