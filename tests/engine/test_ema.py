"""The moving average of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tutelage.engine.checkpoint import CheckpointFolder, Snapshot
from tutelage.engine.ema import Ema


def student(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def move(model: nn.Module) -> None:
    """Change weights and running statistics."""
    model.train()
    model(torch.randn(8, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_average_is_that_of_the_formula() -> None:
    model = student()
    ema = Ema(model, 0.9)
    expected = None
    for _ in range(4):
        move(model)
        ema.update(model)
        weight = model[0].weight.detach().double()
        expected = weight if expected is None else 0.9 * expected + 0.1 * weight
    averaged = dict(ema.module.named_parameters())["0.weight"]
    assert expected is not None
    torch.testing.assert_close(averaged.double(), expected, rtol=1e-6, atol=1e-7)


def test_it_is_torchs_average_bit_for_bit() -> None:
    model = student()
    ema = Ema(model, 0.7)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    for _ in range(3):
        move(model)
        ema.update(model)
        reference.update_parameters(model)
        assert same(ema.state_dict(), reference.state_dict())


def test_buffers_are_the_students_and_the_student_is_left_alone() -> None:
    model = student()
    ema = Ema(model, 0.5)
    for _ in range(2):
        move(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        ema.update(model)
        assert same(before, model.state_dict())
    assert same(dict(ema.module.named_buffers()), dict(model.named_buffers()))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_average_is_frozen_and_evaluates() -> None:
    ema = Ema(student(), 0.5)
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert not any(module.training for module in ema.module.modules())


def test_it_resumes_bit_for_bit_through_a_checkpoint(tmp_path: Path) -> None:
    model = student()
    straight = Ema(model, 0.9)
    stopped = Ema(model, 0.9)
    for step in range(4):
        move(model)
        straight.update(model)
        if step == 2:
            folder = CheckpointFolder(tmp_path, 1)
            folder.save(Snapshot(2, {"ema": stopped.state_dict()}))
            saved = folder.latest()
            assert saved is not None
            stopped = Ema(student(seed=1), 0.9)
            stopped.load_state_dict(saved.tensors["ema"])
        stopped.update(model)
    assert same(straight.state_dict(), stopped.state_dict())


def test_a_state_of_another_model_is_refused() -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        Ema(student(), 0.9).load_state_dict(Ema(nn.Linear(4, 3), 0.9).state_dict())


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, float("nan")])
def test_decay_is_a_share(decay: float) -> None:
    with pytest.raises(ValueError, match="not between 0 and 1"):
        Ema(student(), decay)


def test_a_model_without_parameters() -> None:
    ema = Ema(nn.ReLU(), 0.9)
    ema.update(nn.ReLU())
    assert ema.state_dict()["n_averaged"].item() == 1
