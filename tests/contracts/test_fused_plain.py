"""Every method that has both trains a language model as well from hidden states and heads as from whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import NAMES, recipe, tasks_of

from tutelage import catalogue
from tutelage.engine.loop import Trainer
from tutelage.recipe import load_recipe
from tutelage.runs.assemble import assemble

FUSED = [
    name
    for name in NAMES
    if "fused" in catalogue.load(name).Config.model_fields and "language-model" in tasks_of(name)
]
LABELLED = {"label_weight": 0.4, "loss_weight": 0.6}


def trained(name: str, *, fused: bool) -> Trainer:
    """After three steps of two micro-batches."""
    content: dict[str, Any] = recipe("fkl", steps=3, accumulate=2)
    content["method"] = recipe(name)["method"]
    fields = catalogue.load(name).Config.model_fields
    labelled = {key: value for key, value in LABELLED.items() if key in fields}
    content["method"] |= {"fused": fused, **labelled}
    trainer = assemble(load_recipe(content)).trainer(None)
    trainer.validation = None
    trainer.run()
    return trainer


@pytest.mark.parametrize("name", FUSED)
def test_fused_and_plain_losses_take_the_same_steps(name: str) -> None:
    fused, plain = (trained(name, fused=flag) for flag in (True, False))
    assert fused.setup.student.head is not None
    assert list(fused.last[0]) == list(plain.last[0])
    for term, value in fused.last[0].items():
        torch.testing.assert_close(value, plain.last[0][term], rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(fused.parameters.values(), plain.parameters.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_there_are_such_methods() -> None:
    assert {"fkl", "taid", "sinkd", "ddk"} <= set(FUSED)
