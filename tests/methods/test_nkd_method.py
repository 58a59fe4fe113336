"""nkd and uskd as methods: terms, weights, masks, and where uskd taps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from tutelage.engine.spec import ModelSpec
from tutelage.engine.types import Batch, Outputs, Term
from tutelage.functional import nkd_terms, uskd_loss
from tutelage.methods.nkd.method import NKD, USKD, layout_of, pooled

ROWS, CLASSES = 6, 5


class Context:
    """What the objectives use of a step."""

    def label_loss(self, outputs: Outputs, batch: Batch) -> Term:
        rows = slice(None) if batch.mask is None else batch.mask.bool()
        return Term(F.cross_entropy(outputs.logits[rows], batch.target[rows]))  # type: ignore[index]


def spec(shapes: dict[str, tuple[int, ...]], outputs: int | None = CLASSES) -> ModelSpec:
    stages = tuple(path for path in shapes if path != "stem")
    return ModelSpec("student", None, outputs, None, shapes=shapes, stage_paths=stages)


CNN = {"stem": (2, 8, 8), "layer1": (3, 8, 8), "layer2": (4, 4, 4), "layer3": (6, 2, 2)}
VIT = {f"blocks.{i}": (17, 12) for i in range(12)}
SWIN = {
    f"layers.{i}": (size, size, width)
    for i, (size, width) in enumerate([(8, 96), (4, 192), (2, 384), (1, 768)])
}
MLP = {"layer1": (16,)}


def outputs(seed: int, **taps: tuple[int, ...]) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    features = {path: torch.randn(ROWS, *shape, generator=generator) for path, shape in taps.items()}
    return Outputs(torch.randn(ROWS, CLASSES, generator=generator).requires_grad_(), features=features)


def targets(soft: bool) -> Tensor:
    ids = torch.randint(CLASSES, (ROWS,), generator=torch.Generator().manual_seed(3))
    return 0.8 * F.one_hot(ids, CLASSES) + 0.2 * F.one_hot((ids + 1) % CLASSES, CLASSES) if soft else ids


def uskd(shapes: dict[str, tuple[int, ...]], **options: Any) -> USKD:
    method = USKD(USKD.Config(name="uskd", **options))
    method.build(None, spec(shapes), Batch(torch.zeros(2, 1)))
    return method


MASKS = [None, torch.tensor([1, 1, 0, 0, 1, 0])]


@pytest.mark.parametrize("soft", [False, True], ids=["ids", "distributions"])
@pytest.mark.parametrize("mask", MASKS, ids=["all", "masked"])
def test_nkd_terms_carry_their_weights(mask: Tensor | None, soft: bool) -> None:
    method = NKD(NKD.Config(name="nkd", label_weight=0.5, gamma=2.0, temperature=3.0))
    student, teacher, target = outputs(1), outputs(2), targets(soft)
    terms = method.objective(student, teacher, Batch(torch.zeros(ROWS, 1), target, mask=mask), Context())
    rows = slice(None) if mask is None else mask.bool()
    parts = nkd_terms(student.logits[rows], teacher.logits[rows], target[rows], 3.0)
    wanted = {
        "label": 0.5 * F.cross_entropy(student.logits[rows], target[rows]),
        "target": parts.target,
        "nontarget": 2.0 * 9.0 * parts.nontarget,
    }
    torch.testing.assert_close({name: term.mean for name, term in terms.items()}, wanted)
    torch.stack([term.mean for term in terms.values()]).sum().backward()
    assert teacher.logits.grad is None


@pytest.mark.parametrize("soft", [False, True], ids=["ids", "distributions"])
@pytest.mark.parametrize("mask", MASKS, ids=["all", "masked"])
def test_uskd_terms_carry_their_weights(mask: Tensor | None, soft: bool) -> None:
    options = {"alpha": 0.1, "beta": 0.2, "mu": 0.3, "smoothing": 0.2, "rank_form": "paper"}
    method = uskd(CNN, label_weight=0.5, **options)
    student, target = outputs(1, layer2=(4, 4, 4)), targets(soft)
    student.features["layer2"].requires_grad_()
    terms = method.objective(student, None, Batch(torch.zeros(ROWS, 1), target, mask=mask), Context())
    rows = slice(None) if mask is None else mask.bool()
    weak = method.weak_head(student.features["layer2"].mean((2, 3)))
    parts = uskd_loss(student.logits[rows], weak[rows], target[rows], smoothing=0.2, rank_form="paper")
    wanted = {
        "label": 0.5 * F.cross_entropy(student.logits[rows], target[rows]),
        "target": 0.1 * parts.target,
        "nontarget": 0.2 * parts.nontarget,
        "weak": 0.3 * parts.weak,
    }
    torch.testing.assert_close({name: term.mean for name, term in terms.items()}, wanted)
    terms["weak"].mean.backward()
    assert method.weak_head.weight.grad is not None
    assert student.features["layer2"].grad is not None  # the trunk learns from the weak head too


def test_no_rows_that_count_leave_zero_terms_with_a_gradient() -> None:
    mask = torch.zeros(ROWS)
    student, teacher, target = outputs(1, layer2=(4, 4, 4)), outputs(2), targets(False)
    given = Batch(torch.zeros(ROWS, 1), target, mask=mask)
    method = uskd(CNN)
    for terms in (
        NKD(NKD.Config(name="nkd")).objective(student, teacher, given, Context()),
        method.objective(student, None, given, Context()),
    ):
        own = torch.stack([term.mean for name, term in terms.items() if name != "label"]).sum()
        own.backward()
        assert own == 0
    assert student.logits.grad is not None
    assert method.weak_head.weight.grad is not None


@pytest.mark.parametrize(
    ("shapes", "tap", "layout", "width"),
    [
        (CNN, "layer2", "channels_first", 4),
        (VIT, "blocks.5", "class_token", 12),
        (dict.fromkeys(VIT, (16, 12)), "blocks.5", "token_mean", 12),
        (SWIN, "layers.2", "channels_last", 384),
        (MLP, "layer1", "vector", 16),
        ({"layer1": (64,), "layer2": (16,)}, "layer1", "vector", 64),
    ],
    ids=["cnn", "vit", "vit without class token", "swin", "mlp-16", "mlp-64-16"],
)
def test_default_tap_and_layout(
    shapes: dict[str, tuple[int, ...]], tap: str, layout: str, width: int
) -> None:
    method = uskd(shapes)
    assert method.taps(None, spec(shapes)).student == (tap,)
    assert (method.tap, method.layout) == (tap, layout)
    assert method.weak_head.weight.shape == (CLASSES, width)
    features = torch.randn(ROWS, *shapes[tap])
    assert method.weak_head(pooled(features, method.layout)).shape == (ROWS, CLASSES)


def test_pooling_by_hand() -> None:
    maps = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert pooled(maps, "channels_first").tolist() == [[5.5, 17.5]]
    assert pooled(maps.movedim(1, -1), "channels_last").tolist() == [[5.5, 17.5]]
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])
    assert pooled(tokens, "class_token").tolist() == [[1.0, 2.0]]
    assert pooled(tokens, "token_mean").tolist() == [[2.0, 4.0]]
    assert pooled(tokens[:, 0], "vector").tolist() == [[1.0, 2.0]]


def test_tap_and_layout_by_name() -> None:
    method = uskd(CNN, tap="stem", layout="channels_last")
    assert method.weak_head.in_features == 8
    with pytest.raises(
        ValueError, match=r"method.tap='layer\*' must name one module of student; it matches layer1"
    ):
        uskd(CNN, tap="layer*")
    with pytest.raises(
        ValueError, match=r"layout='class_token' does not fit `layer2`, which gives shape \(4, 4, 4\)"
    ):
        uskd(CNN, layout="class_token")


def test_bad_models() -> None:
    with pytest.raises(ValueError, match=r"no stages found in student; set method.tap"):
        uskd({"stem": (2,)})
    with pytest.raises(ValueError, match=r"must be a vector, tokens or a map; got shape \(2, 2, 2, 2\)"):
        layout_of((2, 2, 2, 2))
    with pytest.raises(ValueError, match=r"number of classes of student is not known"):
        USKD(USKD.Config(name="uskd")).build(None, spec(MLP, outputs=None), Batch(torch.zeros(2, 1)))


def test_card_defaults_needs_and_bounds() -> None:
    nkd, own = NKD.Config(name="nkd"), USKD.Config(name="uskd")
    assert (nkd.label_weight, nkd.gamma, nkd.temperature) == (1.0, 1.5, 1.0)
    assert (own.alpha, own.beta, own.mu, own.smoothing, own.rank_form) == (1.0, 0.1, 0.005, 0.1, "code")
    assert (NKD.needs.teacher, USKD.needs.teacher, USKD.needs.couples_rows) == ("frozen", "none", "loss")
    for config, option in ((NKD.Config, {"temperature": 0}), (USKD.Config, {"rank_form": "both"})):
        with pytest.raises(ValidationError, match=next(iter(option))):
            config(name="x", **option)
