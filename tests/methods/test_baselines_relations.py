"""rkd, pkt, sp and at as methods: terms, taps, masks, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from objectives import ROWS, FakeStep, Pairing
from pydantic import ValidationError
from torch import Tensor

from tutelage.engine.method import Method
from tutelage.functional.features import at_loss
from tutelage.functional.relations import pkt_loss, rkd_loss, sp_loss
from tutelage.methods.baselines.maps import AT
from tutelage.methods.baselines.relations import PKT, RKD, SP

METHODS: dict[str, type[Method]] = {"rkd": RKD, "pkt": PKT, "sp": SP, "at": AT}
LOSSES: dict[str, Callable[..., Tensor]] = {"rkd": rkd_loss, "pkt": pkt_loss, "sp": sp_loss}
MASK = torch.tensor([1, 1, 0, 0, 1, 0])
masks = pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
every = pytest.mark.parametrize("name", METHODS)


def make(name: str, **options: Any) -> Method:
    return METHODS[name](METHODS[name].Config(name=name, **options))


def counted(pairing: Pairing) -> tuple[list[Tensor], list[Tensor]]:
    """Tapped features of the rows that count."""
    rows = slice(None) if pairing.batch.mask is None else pairing.batch.mask.bool()
    return (
        [pairing.student.features[tap][rows] for tap in pairing.taps.student],
        [pairing.teacher.features[tap][rows] for tap in pairing.taps.teacher],
    )


@masks
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rkd", {"distance_weight": 2.0, "angle_weight": 3.0, "squared": True, "eps": 1e-6}),
        ("pkt", {"eps": 1e-3}),
        ("sp", {}),
    ],
)
def test_terms_of_one_feature(name: str, options: dict[str, Any], mask: Tensor | None) -> None:
    pairing = Pairing(make(name, label_weight=0.5, loss_weight=3.0, **options), mask=mask)
    (student,), (teacher,) = counted(pairing)
    loss = LOSSES[name](student, teacher, **options)
    label = FakeStep().label_loss(pairing.student, pairing.batch).mean
    wanted = {"label": 0.5 * label, name: 3 * loss}
    torch.testing.assert_close({key: term.mean for key, term in pairing.terms().items()}, wanted)


@masks
def test_at_sums_over_stages(mask: Tensor | None) -> None:
    pairing = Pairing(make("at", label_weight=0.5, loss_weight=3.0, p=3), mask=mask)
    student, teacher = counted(pairing)
    assert len(student) == 2
    label = FakeStep().label_loss(pairing.student, pairing.batch).mean
    wanted = {"label": 0.5 * label, "at": 3 * at_loss(student, teacher, 3)}
    torch.testing.assert_close({key: term.mean for key, term in pairing.terms().items()}, wanted)


@pytest.mark.parametrize(
    ("name", "taps"),
    [("rkd", ("head:in",)), ("pkt", ("head:in",)), ("sp", ("layer2",)), ("at", ("layer1", "layer2"))],
)
def test_default_taps(name: str, taps: tuple[str, ...]) -> None:
    pairing = Pairing(make(name))
    assert pairing.taps.student == pairing.taps.teacher == taps
    assert not pairing.taps.teacher_logits


def test_taps_by_path() -> None:
    pairing = Pairing(make("rkd", student_tap="layer1", teacher_tap="layer2"))
    assert (pairing.taps.student, pairing.taps.teacher) == (("layer1",), ("layer2",))
    pairing = Pairing(make("at", student_taps=["layer2"], teacher_taps=["layer1"]))
    assert (pairing.taps.student, pairing.taps.teacher) == (("layer2",), ("layer1",))
    assert pairing.terms()["at"].mean > 0


@every
def test_where_no_row_counts_the_loss_is_zero_with_a_gradient(name: str) -> None:
    term = Pairing(make(name), mask=torch.zeros(ROWS)).terms()[name]
    assert term.mean == 0
    assert term.mean.requires_grad


@every
def test_gradients_reach_the_student_alone(name: str) -> None:
    pairing = Pairing(make(name))
    pairing.backward()
    student, teacher = pairing.nets
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_which_losses_couple_rows() -> None:
    assert [METHODS[name].needs.couples_rows for name in METHODS] == ["loss", "loss", "loss", None]


def test_card_defaults() -> None:
    weights = {name: make(name).config.loss_weight for name in METHODS}
    assert weights == {"rkd": 1, "pkt": 30_000, "sp": 3000, "at": 1000}
    rkd, pkt, at = (make(name).config for name in ("rkd", "pkt", "at"))
    assert (rkd.distance_weight, rkd.angle_weight, rkd.squared, rkd.eps) == (25, 50, False, 1e-12)
    assert pkt.eps == 1e-7
    assert at.p == 2


def test_at_refuses_models_without_positions() -> None:
    with pytest.raises(ValueError, match=r"at compares positions, .*\(7, 1, 1\).* of the student"):
        Pairing(make("at"), student="mlp-7-9")


@pytest.mark.parametrize(
    ("name", "option"), [("at", {"p": 0}), ("rkd", {"eps": 0}), ("pkt", {"loss_weight": -1})]
)
def test_bounds_are_refused_by_name(name: str, option: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(option))):
        make(name, **option)
