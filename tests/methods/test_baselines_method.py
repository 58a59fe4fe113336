"""none, kd and fitnet as methods: terms, weights, masks, taps, stages, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from tutelage.engine.spec import ModelSpec
from tutelage.engine.types import Batch, Outputs, Term
from tutelage.functional import fitnet_loss, kd_loss
from tutelage.methods.baselines.method import KD, FitNet, PlainTraining
from tutelage.methods.baselines.model import HintRegressor

GOLDEN = Path(__file__).parent.parent / "golden" / "baselines"
ROWS, CLASSES = 6, 5


class Context:
    """What the objectives use of a step."""

    items = "rows"

    def __init__(self, step: int = 0, total_steps: int = 10) -> None:
        self.step, self.total_steps = step, total_steps

    def label_loss(self, outputs: Outputs, batch: Batch) -> Term:
        rows = slice(None) if batch.mask is None else batch.mask.bool()
        return Term(F.cross_entropy(outputs.logits[rows], batch.target[rows]))  # type: ignore[index]


def spec(name: str, **shapes: tuple[int, ...]) -> ModelSpec:
    stages = tuple(path for path in shapes if path.startswith("layer"))
    return ModelSpec(name, None, CLASSES, None, shapes=shapes, stage_paths=stages)


STUDENT = spec("student", stem=(2, 8, 8), layer1=(3, 8, 8), layer2=(4, 8, 8))
TEACHER = spec("teacher", layer1=(6, 8, 8), layer2=(7, 4, 4), head=(CLASSES,))


def batch(**changes: Any) -> Batch:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    return Batch(torch.zeros(ROWS, 1), target=target).replace(**changes)


def outputs(seed: int, **taps: tuple[int, ...]) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    features = {path: torch.randn(ROWS, *shape, generator=generator) for path, shape in taps.items()}
    return Outputs(torch.randn(ROWS, CLASSES, generator=generator).requires_grad_(), features=features)


def fitnet(**options: Any) -> FitNet:
    method = FitNet(FitNet.Config(name="fitnet", **options))
    method.build(TEACHER, STUDENT, batch())
    return method


def values(terms: dict[str, Term]) -> dict[str, Tensor]:
    return {name: term.mean for name, term in terms.items()}


def test_none_is_the_label_loss_and_takes_soft_labels() -> None:
    method, student = PlainTraining(PlainTraining.Config(name="none")), outputs(1)
    for target in (batch().target, torch.full((ROWS, CLASSES), 1 / CLASSES)):
        terms = method.objective(student, None, batch(target=target), Context())
        torch.testing.assert_close(values(terms), {"label": F.cross_entropy(student.logits, target)})


@pytest.mark.parametrize("mask", [None, torch.tensor([1, 1, 0, 0, 1, 0])], ids=["all", "masked"])
def test_kd_terms_carry_their_weights(mask: Tensor | None) -> None:
    method = KD(KD.Config(name="kd", label_weight=0.3, loss_weight=2.0, temperature=3.0))
    student, teacher, given = outputs(1), outputs(2), batch(mask=mask)
    rows = slice(None) if mask is None else mask.bool()
    wanted = {
        "label": 0.3 * F.cross_entropy(student.logits[rows], given.target[rows]),
        "kd": 2.0 * kd_loss(student.logits[rows], teacher.logits[rows], 3.0),
    }
    torch.testing.assert_close(values(method.objective(student, teacher, given, Context())), wanted)


def test_card_defaults() -> None:
    kd, fit = KD.Config(name="kd"), FitNet.Config(name="fitnet")
    assert (kd.label_weight, kd.loss_weight, kd.temperature) == (0.1, 0.9, 4.0)
    assert (fit.label_weight, fit.loss_weight, fit.hint_layer, fit.two_stage) == (1.0, 100.0, 2, False)


@pytest.mark.parametrize(("method", "option"), [(KD, {"temperature": 0}), (FitNet, {"hint_layer": 0})])
def test_bounds_are_refused_by_name(method: Any, option: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(option))):
        method.Config(name="x", **option)


@pytest.mark.parametrize("mask", [None, torch.tensor([1, 1, 0, 0, 1, 0])], ids=["all", "masked"])
def test_fitnet_terms(mask: Tensor | None) -> None:
    method = fitnet(loss_weight=10.0).eval()
    student, teacher = outputs(1, layer2=(4, 8, 8)), outputs(2, layer2=(7, 4, 4))
    given = batch(mask=mask)
    terms = values(method.objective(student, teacher, given, Context()))
    rows = slice(None) if mask is None else mask.bool()
    hint = fitnet_loss(method.regressor(student.features["layer2"])[rows], teacher.features["layer2"][rows])
    torch.testing.assert_close(terms["hint"], 10 * hint)
    torch.testing.assert_close(terms["label"], F.cross_entropy(student.logits[rows], given.target[rows]))
    assert set(terms) == {"label", "hint"}


def test_fitnet_without_rows_that_count_has_a_zero_hint_with_a_gradient() -> None:
    method = fitnet()
    student, teacher = outputs(1, layer2=(4, 8, 8)), outputs(2, layer2=(7, 4, 4))
    term = method._hint(student, teacher, batch(mask=torch.zeros(ROWS)))["hint"]
    term.mean.backward()
    assert term.mean == 0
    assert all(parameter.grad is not None for parameter in method.regressor.parameters())


def test_fitnet_taps_the_second_stage_and_lets_the_teacher_stop_there() -> None:
    method = fitnet()
    taps = method.taps(TEACHER, STUDENT)
    assert (taps.student, taps.teacher, taps.teacher_logits) == (("layer2",), ("layer2",), False)
    assert method.needs.logits == ()
    assert sum(p.numel() for p in method.parameters()) == 7 * 4 * 3 * 3 + 7 + 2 * 7


def test_fitnet_taps_by_path() -> None:
    method = FitNet(FitNet.Config(name="fitnet", student_tap="stem", teacher_tap="layer1"))
    method.build(TEACHER, STUDENT, batch())
    assert method.taps(TEACHER, STUDENT).student == ("stem",)
    assert method.regressor(torch.randn(2, 2, 8, 8)).shape == (2, 6, 8, 8)
    several = FitNet(FitNet.Config(name="fitnet", student_tap="layer*"))
    with pytest.raises(
        ValueError, match=r"method.student_tap='layer\*' must name one module .* layer1, layer2"
    ):
        several.taps(TEACHER, STUDENT)
    unknown = FitNet(FitNet.Config(name="fitnet", teacher_tap="layer9"))
    with pytest.raises(ValueError, match=r"teacher: tap 'layer9' is not stored"):
        unknown.taps(TEACHER, STUDENT)


def test_fitnet_names_a_model_with_too_few_stages() -> None:
    method = FitNet(FitNet.Config(name="fitnet", hint_layer=3))
    with pytest.raises(
        ValueError, match=r"hint_layer=3: the student student has 2 stage\(s\) \(layer1, layer2\)"
    ):
        method.taps(TEACHER, STUDENT)


def test_two_stages_follow_each_other() -> None:
    method = fitnet(two_stage=True, hint_share=0.25, kd_weight=0.5, temperature=2.0)
    student, teacher = outputs(1, layer2=(4, 8, 8)), outputs(2, layer2=(7, 4, 4))
    terms = [method.objective(student, teacher, batch(), Context(step, 10)) for step in range(10)]
    assert [set(t) for t in terms] == [{"hint"}] * 3 + [{"label", "kd"}] * 7
    torch.testing.assert_close(terms[3]["kd"].mean, 0.5 * kd_loss(student.logits, teacher.logits, 2.0))
    assert method.taps(TEACHER, STUDENT).teacher_logits
    assert method.needs.logits == ("dense",)
    assert method.needs.dynamic
    assert FitNet.needs.logits == ()


def test_the_first_stage_trains_the_student_up_to_its_hint_alone() -> None:
    method = fitnet(two_stage=True)
    below, above = nn.Conv2d(1, 4, 1), nn.Linear(4 * 8 * 8, CLASSES)
    for step in (0, 9):
        for module in (method, below, above):
            module.zero_grad()
        hidden = below(torch.randn(ROWS, 1, 8, 8))
        student = Outputs(above(hidden.flatten(1)), features={"layer2": hidden})
        terms = method.objective(student, outputs(2, layer2=(7, 4, 4)), batch(), Context(step))
        torch.stack([term.mean for term in terms.values()]).sum().backward()
        assert below.weight.grad is not None
        assert (above.weight.grad is None) == (step == 0)
        assert (method.regressor.projection.weight.grad is None) == (step == 9)


def test_no_gradient_reaches_the_teacher() -> None:
    method, kd = fitnet(), KD(KD.Config(name="kd"))
    student, teacher = outputs(1, layer2=(4, 8, 8)), outputs(2, layer2=(7, 4, 4))
    teacher.features["layer2"].requires_grad_()
    for each in (method, kd):
        torch.stack(
            [t.mean for t in each.objective(student, teacher, batch(), Context()).values()]
        ).sum().backward()
    assert teacher.logits.grad is None
    assert teacher.features["layer2"].grad is None
    assert student.logits.grad is not None


@pytest.mark.parametrize("case", ["fitnet_same_size", "fitnet_student_2x"])
def test_regressor_golden(case: str) -> None:
    with np.load(GOLDEN / f"{case}.npz") as data:
        arrays = {name: torch.from_numpy(np.asarray(data[name])) for name in data}
    student, teacher = arrays["in_feat_student"].requires_grad_(), arrays["in_feat_teacher"]
    regressor = HintRegressor(student.shape[1:], teacher.shape[1:]).double().train()
    weight = regressor.projection.weight
    with torch.no_grad():
        weight.copy_(arrays["in_conv_weight"])
        regressor.projection.bias.copy_(arrays["in_conv_bias"])
    projected = regressor(student)
    loss = fitnet_loss(projected, teacher)
    loss.backward()
    torch.testing.assert_close(projected, arrays["out_projected"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(loss, arrays["out_loss"], rtol=1e-10, atol=0)
    torch.testing.assert_close(student.grad, arrays["grad_feat_student"], rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(weight.grad, arrays["grad_conv_weight"], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    ("student", "teacher", "kernel"),
    [
        ((3, 8, 8), (5, 4, 4), (3, 3)),
        ((3, 4, 4), (5, 8, 8), (4, 4)),
        ((3, 7, 5), (5, 7, 5), (1, 1)),
        ((3, 9, 6), (5, 7, 6), (3, 1)),
        ((3, 8, 4), (5, 4, 4), (5, 1)),
        ((3, 8, 8), (5,), (8, 8)),
        ((3,), (5,), (1, 1)),
    ],
    ids=str,
)
def test_regressor_gives_the_teachers_shape(
    student: tuple[int, ...], teacher: tuple[int, ...], kernel: tuple[int, int]
) -> None:
    regressor = HintRegressor(student, teacher)
    assert regressor.projection.kernel_size == kernel
    hint = regressor(torch.randn(2, *student))
    assert hint.shape == (2, *teacher)
    assert (hint >= 0).all()


@pytest.mark.parametrize(
    ("student", "teacher"), [((3, 5, 5), (4, 8, 8)), ((3, 8, 2), (4, 4, 4)), ((3, 4, 8), (4, 8, 8))]
)
def test_regressor_refuses_a_smaller_map(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"smaller than the teacher's \(4, .*not half of it"):
        HintRegressor(student, teacher)


def test_regressor_refuses_tokens_by_shape() -> None:
    with pytest.raises(ValueError, match=r"this tap gives \(197, 192\)"):
        HintRegressor((3, 4, 4), (197, 192))


def test_regressor_says_why_one_value_a_channel_is_too_few() -> None:
    regressor = HintRegressor((3,), (5,))
    with pytest.raises(ValueError, match=r"cannot train on 1 row\(s\) of a 1x1 map; use at least 2 rows"):
        regressor(torch.randn(1, 3))
    assert regressor.eval()(torch.randn(1, 3)).shape == (1, 5)
