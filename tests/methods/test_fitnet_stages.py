"""fitnet's two stages in the real loop: which weights move when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support import Rows, train_config
from tutelage.engine.loop import Trainer
from tutelage.engine.runtime import Runtime
from tutelage.methods.baselines.method import FitNet
from tutelage.models import build_model
from tutelage.recipe.schema import OptimizerConfig
from tutelage.tasks import build_task
from tutelage.teachers.local import LocalTeacher


class Moved:
    """Which parameters each step changed."""

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.steps: list[set[str]] = []

    def on_step_end(self, trainer: Any) -> None:
        now = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
        if self.before:
            self.steps.append(
                {name for name, value in now.items() if not torch.equal(value, self.before[name])}
            )
        self.before = now


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_hint_first_then_logits(momentum: float) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(32, 1, 8, 8, generator=generator)
    source = Rows(inputs, torch.randint(10, (32,), generator=generator))
    student, teacher = (
        build_model(name, outputs=10, input_shape=(1, 8, 8)).module
        for name in ("digits:cnn-2-3-4", "digits:cnn-4-6-8")
    )
    moved = Moved()
    Trainer(
        Runtime("cpu"),
        student,
        FitNet(FitNet.Config(name="fitnet", two_stage=True, hint_share=0.5)),
        build_task("classification", 10),
        source,
        train_config(
            steps=8, optimizer=OptimizerConfig(name="sgd", lr=0.05, momentum=momentum, weight_decay=0.1)
        ),
        teachers={"teacher": LocalTeacher("teacher", teacher, inputs[:2]).freeze()},
        callbacks=[moved],
    ).fit()
    first, second = moved.steps[0], moved.steps[-1]
    deeper = {"layer3", "head"}
    assert {name.split(".")[0] for name in first} == {"student", "method"}
    assert not {name for name in first if name.split(".")[1] in deeper}  # weight decay leaves them alone too
    assert {name.split(".")[0] for name in second} == {"student"}
    assert deeper <= {name.split(".")[1] for name in second}
