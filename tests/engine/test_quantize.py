"""Weights rounded in training: the plain model stays, and what is rounded is what an int4 file holds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from killing import stop_after
from tutelage.engine.compile import compile_regions
from tutelage.engine.quantize import Kind, block, coverage, floats, prepare, quantised, release
from tutelage.export.int4 import pack
from tutelage.models import build_model, load_model
from tutelage.recipe import load_recipe
from tutelage.runs import check, distill

KINDS: tuple[Kind, ...] = ("int8", "int4")
RECIPE: dict[str, Any] = {
    "data": {"path": "digits", "limit": 128, "validation": 32, "test": 64},
    "teacher": {"model": "digits:cnn-8-8"},
    "student": {"model": "digits:cnn-16-16"},
    "method": "fitnet",
    "train": {"steps": 6, "batch_size": 32, "device": "cpu", "threads": 1, "ema": 0.5, "quantize": "int4"},
    "output": {"report": False},
}


def net(seed: int = 0) -> nn.Module:
    return build_model("digits:cnn-16-32", outputs=10, input_shape=(1, 8, 8), seed=seed).module.eval()


ROWS = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("to", KINDS)
def test_the_model_keeps_names_places_and_floats(to: Kind) -> None:
    model, plain = net(), net()
    paths, kinds = list(dict(model.named_modules())), [type(m).__name__ for m in model.modules()]
    prepare(model, to)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert list(dict(model.named_modules())) == paths
    assert [type(m).__name__ for m in model.modules()] == kinds
    assert not torch.equal(model(ROWS), plain(ROWS))
    with floats(model):
        assert torch.equal(model(ROWS), plain(ROWS))
    assert not torch.equal(model(ROWS), plain(ROWS))
    release(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize(("to", "levels"), [("int8", 256), ("int4", 16)])
def test_weights_have_as_many_values_as_the_numbers(to: Kind, levels: int) -> None:
    layer = nn.Linear(64, 3)
    weight, size = layer.weight.detach().clone(), block(layer, to)
    prepare(layer, to)
    groups = layer.weight.detach().view(-1, size[1])  # type: ignore[index]
    assert all(len(group.unique()) <= levels for group in groups)
    numbers, scale = quantised(weight, size, to)  # type: ignore[arg-type]
    again = numbers.view(3, -1, size[1]) * scale.unsqueeze(-1)  # type: ignore[index]
    torch.testing.assert_close(layer.weight.detach(), again.view(3, 64), atol=1e-7, rtol=0)
    assert float((layer.weight - weight).detach().abs().max()) <= float(scale.max()) * 0.51


@pytest.mark.parametrize("to", KINDS)
def test_gradients_pass_as_if_nothing_was_rounded(to: Kind) -> None:
    layer = nn.Linear(32, 4)
    prepare(layer, to)
    rows = torch.rand(5, 32, requires_grad=True)
    layer(rows).sum().backward()
    release(layer)
    assert rows.grad is not None
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, rows.detach().sum(0).expand(4, 32), atol=0.1, rtol=0)


@pytest.mark.parametrize("to", KINDS)
def test_a_rows_answer_does_not_depend_on_its_batch(to: Kind) -> None:
    model = net()
    prepare(model, to)
    torch.testing.assert_close(model(ROWS)[:1], model(ROWS[:1]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("to", KINDS)
def test_swapped_parameters_copies_and_compiled_regions_are_rounded_too(to: Kind) -> None:
    model = net()
    prepare(model, to)
    expected = model(ROWS)
    zeros = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    assert not torch.func.functional_call(model, zeros, (ROWS,)).any()
    assert torch.equal(copy.deepcopy(model)(ROWS), expected)
    assert compile_regions(model, [], backend="aot_eager") > 0
    torch.testing.assert_close(model(ROWS), expected, atol=1e-5, rtol=1e-4)


def test_the_int4_file_holds_what_the_rounded_student_computes() -> None:
    rounded, packed = net(), net()
    prepare(rounded, "int4")
    layers = pack(packed)
    assert layers == coverage(net(), "int4").layers == ("layer2.0", "head")
    torch.testing.assert_close(packed(ROWS), rounded(ROWS), atol=1e-6, rtol=1e-5)


def test_a_student_with_nothing_to_round_is_refused_with_the_reason() -> None:
    small = {"student": {"model": "digits:cnn-4-8"}}
    with pytest.raises(ValueError, match="no linear layer and no convolution with 16 inputs or more"):
        check(load_recipe(RECIPE | small))


class Own(nn.Linear):
    """Reads its weight in a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        return nn.functional.linear(input, self.weight, self.bias)


def test_a_layer_with_a_forward_of_its_own_is_rounded_but_not_compiled() -> None:
    layer = Own(32, 4)
    plain = copy.deepcopy(layer)
    rows = torch.rand(3, 32)
    prepare(layer, "int4")
    assert not torch.equal(layer(rows), plain(rows))
    with pytest.raises(ValueError, match=r"train\.quantize and train\.compile"):
        prepare(layer, "int4", compiled=True)


def test_a_run_that_was_killed_ends_with_the_same_plain_weights(tmp_path: Path) -> None:
    whole = distill(RECIPE, folder=tmp_path / "whole", progress=False)

    def start(killer: Any) -> Any:
        return distill(RECIPE | often, folder=tmp_path / "cut", progress=False, callbacks=[killer])

    often = {"train": RECIPE["train"] | {"checkpoint": {"every": 2}}}
    stop_after(5, start)
    distill(RECIPE | often, folder=tmp_path / "cut", resume=True, progress=False)
    ours = load_model(tmp_path / "cut" / "student").module.state_dict()
    theirs = load_model(tmp_path / "whole" / "student").module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [type(m).__name__ for m in whole.student.modules()] == [type(m).__name__ for m in net().modules()][
        : len(list(whole.student.modules()))
    ]
    unrounded = RECIPE | {"train": RECIPE["train"] | {"quantize": None}}
    other = distill(unrounded, folder=tmp_path / "floats", progress=False).student.state_dict()
    assert not torch.equal(other["head.weight"], theirs["head.weight"])


def test_a_student_taught_with_rounding_loses_less_by_it() -> None:
    """Small and seeded: an MLP that is taught with int4 weights, and one whose weights are rounded afterwards."""
    losses: dict[str | None, list[float]] = {None: [], "int4": []}
    for seed in (0, 1, 2):
        for kind in losses:
            model = build_model("digits:mlp-32-32", outputs=10, input_shape=(1, 8, 8), seed=seed).module
            losses[kind].append(_rounded_loss(model, kind, seed))
    taught, afterwards = losses["int4"], losses[None]
    assert sum(taught) < sum(afterwards), losses


def _rounded_loss(model: nn.Module, kind: Any, seed: int) -> float:
    """Cross-entropy of held-out digits with int4 weights, after training with or without rounding."""
    from sklearn.datasets import load_digits

    images, target = load_digits(return_X_y=True)
    rows, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(target)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1000], order[1000:]
    if kind:
        prepare(model, kind)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(150):
        batch = train[(step * 64) % 960 :][:64]
        loss = nn.functional.cross_entropy(model(rows[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    prepare(model, "int4")
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(rows[test]), labels[test]))
