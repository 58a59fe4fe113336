"""TRG as a method: which tokens of which maps, its terms, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from objectives import FakeStep, Pairing

from tutelage.engine.spec import ModelSpec
from tutelage.engine.types import Taps
from tutelage.methods.trg.functional import (
    gather_patch_tokens,
    sample_token_index,
    trg_contextual_loss,
    trg_global_loss,
    trg_local_loss,
)
from tutelage.methods.trg.method import TRG, Tokens, TRGConfig
from tutelage.models import build_model


class OneStep(FakeStep):
    total_steps = 10


def method(**options: Any) -> TRG:
    return TRG(TRGConfig(name="trg", **options))


def test_the_last_but_one_stage_is_tapped() -> None:
    pairing = Pairing(method(), "cnn-4-6-8", "cnn-6-8-10")
    assert (pairing.taps.student, pairing.taps.teacher) == (("layer2",), ("layer2",))
    assert pairing.method.tokens.count == 4
    assert pairing.method.projection.weight.shape == (8 * 4, 6 * 4)
    assert Pairing(method(student_tap="layer1", teacher_tap="layer1")).method.tokens.grid == (4, 4)


def test_the_terms_are_the_losses_of_the_sampled_tokens() -> None:
    pairing = Pairing(method(patch=2, loss_weight=2.0))
    terms = pairing.terms(OneStep(step=5))
    ours, theirs = pairing.method.tokens(pairing.student.feature(), pairing.teacher.feature())
    index = sample_token_index(len(ours), 16, 4, torch.Generator().manual_seed(0))
    student, teacher = gather_patch_tokens(ours, index), gather_patch_tokens(theirs, index)
    torch.testing.assert_close(terms["local"].mean, 2 * trg_local_loss(student, teacher))
    contrast = trg_global_loss(pairing.method.projection(student), teacher, temperature=0.3)
    torch.testing.assert_close(terms["global"].mean, 2 * 0.1 * contrast)
    assert list(terms) == ["label", "kd", "contextual", "local", "global"]


def test_masked_rows_do_not_count() -> None:
    keep = torch.tensor([1, 1, 0, 1, 0, 1])
    masked = Pairing(method(), mask=keep)
    ours, theirs = masked.method.tokens(masked.student.feature(), masked.teacher.feature())
    wanted = trg_contextual_loss(ours[keep.bool()], theirs[keep.bool()])
    torch.testing.assert_close(masked.terms(OneStep())["contextual"].mean, wanted)
    none = Pairing(method(), mask=torch.zeros(6))
    terms = none.terms(OneStep())
    assert {name: term.mean.item() for name, term in terms.items() if name != "label"} == dict.fromkeys(
        ("kd", "contextual", "local", "global"), 0.0
    )


def test_grids_that_differ_are_pooled_to_the_smaller() -> None:
    rows = torch.rand(2, 3, 32, 32)
    deep = build_model("cifar:resnet8", outputs=5, input_shape=(3, 32, 32)).module
    cnn = build_model("digits:cnn-4-6", outputs=5, input_shape=(3, 32, 32)).module
    student, teacher = ModelSpec.of("student", cnn, rows), ModelSpec.of("teacher", deep, rows)
    taps = Taps(student=(student.stages()[0],), teacher=(teacher.stages()[-1],))
    tokens = Tokens(student, teacher, taps, None)
    ours, theirs = tokens(torch.rand(2, 4, 32, 32), torch.rand(2, 64, 8, 8))
    assert tokens.grid == (4, 4)
    assert (ours.shape, theirs.shape) == ((2, 16, 16), (2, 16, 256))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens_per_image": 17}, "method.tokens_per_image=17, but an image has 16 tokens"),
        ({"patch": 3}, "method.patch=3 does not divide the tapped map's 8×8"),
        ({"student_tap": "layer*"}, "method.student_tap='layer\\*' must name one module"),
        ({"student_tap": "head:in"}, "trg needs a map or tokens; the tap gives a vector"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pairing(method(**options))


def test_a_graph_that_is_too_large_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"6 images of 4 tokens give a graph of 24; method\.max_tokens is 23"
    ):
        Pairing(method(max_tokens=23)).terms(OneStep())


def test_the_projection_is_trained() -> None:
    pairing = Pairing(method())
    torch.stack([term.mean for term in pairing.terms(OneStep()).values()]).sum().backward()
    assert pairing.method.projection.weight.grad.abs().sum() > 0
