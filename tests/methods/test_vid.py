"""vid as a method: its term, its learned variance, pairs of stages, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from objectives import ROWS, FakeStep, Pairing
from pydantic import ValidationError
from torch import Tensor

from support import Rows, train_config
from tutelage.engine.loop import Trainer
from tutelage.engine.runtime import Runtime
from tutelage.functional import vid_linear_loss
from tutelage.methods.baselines.model import VIDRegressor
from tutelage.methods.baselines.vid import VID
from tutelage.models import build_model
from tutelage.tasks import build_task
from tutelage.teachers.local import LocalTeacher

MASK = torch.tensor([1, 1, 0, 0, 1, 0])


def vid(**options: Any) -> VID:
    return VID(VID.Config(name="vid", **options))


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("student", ["cnn-4-6", "mlp-7-9"])
def test_terms(mask: Tensor | None, student: str) -> None:
    """Stages are summed; those of a fully connected student meet maps that are pooled to one position."""
    pairing = Pairing(vid(loss_weight=2.0, label_weight=0.5, eps=1e-4), student, mask=mask)
    terms = pairing.terms()
    rows = slice(None) if mask is None else mask.bool()
    total = torch.zeros(())
    for regressor, ours, theirs in zip(
        pairing.method.regressors, pairing.taps.student, pairing.taps.teacher, strict=True
    ):
        weights = [layer.weight[:, :, 0, 0] for layer in regressor.layers]
        features = (pairing.student.features[ours][rows], pairing.teacher.features[theirs][rows])
        total = total + vid_linear_loss(*features, weights, regressor.log_scale, 1e-4)
    torch.testing.assert_close(terms["vid"].mean, 2 * total)
    label = FakeStep().label_loss(pairing.student, pairing.batch)
    torch.testing.assert_close(terms["label"].mean, 0.5 * label.mean)
    assert set(terms) == {"label", "vid"}


def test_card_defaults() -> None:
    config = VID.Config(name="vid")
    assert (config.label_weight, config.loss_weight, config.variance, config.eps) == (1, 1, 5, 1e-5)
    pairing = Pairing(vid())
    assert pairing.taps.student == pairing.taps.teacher == ("layer1", "layer2")
    assert not pairing.taps.teacher_logits


@pytest.mark.parametrize("variance", [0.01, 5.0, 1e6])
def test_the_variance_starts_where_it_is_told(variance: float) -> None:
    regressor = VIDRegressor(2, 3, variance, 1e-5)
    found = F.softplus(regressor.log_scale) + 1e-5
    torch.testing.assert_close(found, torch.full((3,), variance))
    assert all(layer.bias is None for layer in regressor.layers)
    assert [tuple(layer.weight.shape) for layer in regressor.layers] == [
        (3, 2, 1, 1),
        (3, 3, 1, 1),
        (3, 3, 1, 1),
    ]


def test_regressor_refuses_a_variance_below_its_least() -> None:
    with pytest.raises(ValueError, match=r"above eps=0\.1; got 0\.05"):
        VIDRegressor(2, 3, 0.05, 0.1)


def test_the_variance_is_learned() -> None:
    generator = torch.Generator().manual_seed(0)
    source = Rows(torch.rand(32, 1, 8, 8, generator=generator), torch.randint(10, (32,), generator=generator))
    student, teacher = (
        build_model(name, outputs=10, input_shape=(1, 8, 8)).module
        for name in ("digits:cnn-2-3", "digits:cnn-4-6")
    )
    method = vid()
    Trainer(
        Runtime("cpu"),
        student,
        method,
        build_task("classification", 10),
        source,
        train_config(steps=3),
        teachers={"teacher": LocalTeacher("teacher", teacher, source.inputs[:2]).freeze()},
    ).fit()
    for regressor in method.regressors:
        assert isinstance(regressor, VIDRegressor)
        assert (F.softplus(regressor.log_scale) + 1e-5 < 4.999).all()


def test_no_gradient_reaches_the_teacher() -> None:
    pairing = Pairing(vid())
    for features in pairing.teacher.features.values():
        features.retain_grad()
    pairing.backward()
    assert all(features.grad is None for features in pairing.teacher.features.values())
    assert all(parameter.grad is not None for parameter in pairing.method.parameters())
    assert all(parameter.grad is not None for parameter in pairing.nets[0].parameters())


def test_a_batch_without_rows_that_count_has_a_zero_loss_with_a_gradient() -> None:
    pairing = Pairing(vid(label_weight=0), mask=torch.zeros(ROWS))
    term = pairing.terms()["vid"].mean
    term.backward()
    assert term == 0
    assert all(parameter.grad is not None for parameter in pairing.method.parameters())


def test_stages_of_a_deeper_teacher_are_paired_by_depth() -> None:
    taps = Pairing(vid(), "cnn-4-6", "cnn-4-5-6-7").taps
    assert taps.student == ("layer1", "layer2")
    assert len(taps.teacher) == 2


def test_named_taps() -> None:
    taps = Pairing(vid(student_taps=["layer2.0"], teacher_taps=["-1"])).taps
    assert (taps.student, taps.teacher) == (("layer2.0",), ("layer2",))
    with pytest.raises(ValueError, match=r"the student has 1 \(layer2\), the teacher 2 \(layer1, layer2\)"):
        Pairing(vid(student_taps=["layer2"]))


@pytest.mark.parametrize("option", [{"variance": 0}, {"eps": 0}, {"loss_weight": -1}, {"student_taps": []}])
def test_bounds_are_refused_by_name(option: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(option))):
        vid(**option)
