"""crd_loss and crd_linear_loss: official values, plain arithmetic over two steps, memories, odd inputs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage.functional import CRDStep, crd_linear_loss, crd_loss
from tutelage.functional.contrastive import contrast_scores, moved_rows

GOLDEN = Path(__file__).parent.parent / "golden" / "baselines"
ROWS, WIDTH = 12, 5


def units(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def step(index: list[int], negatives: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    places = torch.tensor(index, dtype=torch.int64)
    others = torch.randint(ROWS, (len(index), negatives), generator=generator)
    return {
        "student_embedding": units(len(index), WIDTH, seed=seed + 1),
        "teacher_embedding": units(len(index), WIDTH, seed=seed + 2),
        "memory_student": units(ROWS, WIDTH, seed=3),
        "memory_teacher": units(ROWS, WIDTH, seed=4),
        "index": places,
        "contrast_index": torch.cat([places[:, None], others], 1),
    }


def by_hand(
    given: dict[str, Tensor],
    z: tuple[Any, Any] = (None, None),
    temperature: float = 0.07,
    momentum: float = 0.5,
) -> tuple[Tensor, dict[str, Tensor], tuple[Any, Any]]:
    """Loss, memories and normalisers in plain probabilities, one row after the other."""
    n, eps, used, loss = ROWS, 1e-7, [], torch.zeros((), dtype=torch.float64)
    k = given["contrast_index"].shape[1] - 1
    for side, other, constant in (("student", "teacher", z[0]), ("teacher", "student", z[1])):
        memory, embedding = given[f"memory_{other}"], given[f"{side}_embedding"]
        a = torch.stack(
            [
                (memory[ci] @ g / temperature).exp()
                for ci, g in zip(given["contrast_index"], embedding, strict=True)
            ]
        )
        constant = n * a.mean() if constant is None else constant
        used.append(constant)
        a, c = a / constant, k / n
        loss = loss - (
            (a[:, 0] / (a[:, 0] + c + eps)).log().sum() + (c / (a[:, 1:] + c + eps)).log().sum()
        ) / len(a)
    memories = {}
    for side in ("student", "teacher"):
        old = given[f"memory_{side}"]
        memories[side] = old.clone()
        for i, g in zip(given["index"], given[f"{side}_embedding"], strict=True):
            memories[side][i] = F.normalize(momentum * old[i] + (1 - momentum) * g, dim=0)
    return loss, memories, (used[0], used[1])


def same(found: CRDStep, wanted: tuple[Tensor, dict[str, Tensor], tuple[Any, Any]]) -> None:
    loss, memories, z = wanted
    torch.testing.assert_close(found.loss, loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.memory_student, memories["student"])
    torch.testing.assert_close(found.memory_teacher, memories["teacher"])
    torch.testing.assert_close((found.z_student, found.z_teacher), z)


def test_golden_with_all_gradients() -> None:
    with np.load(GOLDEN / "crd_first_step.npz") as data:
        arrays = {name: torch.from_numpy(np.asarray(data[name])) for name in data}
    given = {
        name: arrays[f"in_{key}"].requires_grad_(trained)
        for name, key, trained in (
            ("student_features", "feat_student", True),
            ("teacher_features", "feat_teacher", True),
            ("student_weight", "embed_student_weight", True),
            ("student_bias", "embed_student_bias", True),
            ("teacher_weight", "embed_teacher_weight", True),
            ("teacher_bias", "embed_teacher_bias", True),
            ("memory_student", "memory_student", True),
            ("memory_teacher", "memory_teacher", True),
            ("index", "index", False),
            ("contrast_index", "contrast_index", False),
        )
    }
    found = crd_linear_loss(**given)
    found.loss.backward()
    torch.testing.assert_close(found.loss, arrays["out_loss"], rtol=1e-10, atol=0)
    torch.testing.assert_close(found.memory_student, arrays["out_memory_student"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.memory_teacher, arrays["out_memory_teacher"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.z_student, arrays["out_Z_student"], rtol=1e-10, atol=0)
    torch.testing.assert_close(found.z_teacher, arrays["out_Z_teacher"], rtol=1e-10, atol=0)
    for name, key in (
        ("student_features", "grad_feat_student"),
        ("student_weight", "grad_embed_student_weight"),
        ("teacher_weight", "grad_embed_teacher_weight"),
    ):
        torch.testing.assert_close(given[name].grad, arrays[key], rtol=1e-8, atol=1e-11)
    for name in ("student_bias", "teacher_bias"):
        assert given[name].grad is not None
    for name in ("teacher_features", "memory_student", "memory_teacher"):
        assert given[name].grad is None
    assert not found.memory_student.requires_grad
    assert not found.z_student.requires_grad


def test_two_steps() -> None:
    """The second reads the first one's memories and keeps its normalisers."""
    first, second = step([0, 5, 7]), step([7, 1, 2], seed=10)
    found, wanted = crd_loss(**first), by_hand(first)
    same(found, wanted)
    after = {"memory_student": found.memory_student, "memory_teacher": found.memory_teacher}
    constants = {"z_student": found.z_student, "z_teacher": found.z_teacher}
    same(crd_loss(**(second | after), **constants), by_hand(second | after, wanted[2]))


@pytest.mark.parametrize(("temperature", "momentum"), [(1.0, 0.0), (0.1, 1.0), (0.5, 0.9)])
@pytest.mark.parametrize("index", [[4], [0, 3, 5, 11]])
@pytest.mark.parametrize("negatives", [1, 9])
def test_options(temperature: float, momentum: float, index: list[int], negatives: int) -> None:
    given = step(index, negatives)
    found = crd_loss(**given, temperature=temperature, momentum=momentum, z_student=3.0, z_teacher=5.0)
    z = (torch.tensor(3.0, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64))
    same(found, by_hand(given, z, temperature, momentum))


def test_the_last_of_several_equal_indices_counts() -> None:
    given = step([2, 8, 2, 2, 8])
    found = crd_loss(**given)
    same(found, by_hand(given))
    once = given | {name: given[name][[3, 4]] for name in ("student_embedding", "teacher_embedding", "index")}
    memories = by_hand(once | {"contrast_index": given["contrast_index"][[3, 4]]})[1]
    torch.testing.assert_close(found.memory_student, memories["student"])


def test_the_memories_given_stay_as_they_are() -> None:
    given = step([0, 1])
    before = given["memory_student"].clone()
    found = crd_loss(**given)
    assert torch.equal(given["memory_student"], before)
    changed = (found.memory_student != before).any(1)
    assert changed.nonzero().flatten().tolist() == [0, 1]
    torch.testing.assert_close(found.memory_student.norm(dim=1), torch.ones(ROWS, dtype=torch.float64))


def test_gradients_reach_both_embeddings() -> None:
    given = step([0, 5, 7])
    names = ("student_embedding", "teacher_embedding")

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        changed = given | {"student_embedding": student, "teacher_embedding": teacher}
        found: Tensor = crd_loss(**changed, temperature=0.5, z_student=4, z_teacher=4.0).loss
        return found

    assert torch.autograd.gradcheck(loss, tuple(given[name].requires_grad_() for name in names))


@pytest.mark.parametrize("rows", [3, 60, 61, 500])
def test_scores_are_the_same_whichever_way_they_are_made(rows: int) -> None:
    """Up to a number of rows all scores are made at once, above it the contrasted rows are copied."""
    memory, query = units(rows, WIDTH, seed=0), units(4, WIDTH, seed=1)
    contrast = torch.randint(rows, (4, 12), generator=torch.Generator().manual_seed(2))
    found = contrast_scores(query.requires_grad_(), memory, contrast, 0.1)
    wanted = torch.einsum("bkd,bd->bk", memory[contrast], query) / 0.1
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(each.sin().sum(), query)[0] for each in (found, wanted)]
    torch.testing.assert_close(*gradients)


def test_a_zero_embedding_and_a_zero_memory_stay_finite() -> None:
    memory = torch.zeros(3, WIDTH)
    moved = moved_rows(memory, torch.tensor([1]), torch.zeros(1, WIDTH), 0.5)
    assert torch.equal(moved, torch.zeros(1, WIDTH))
    weight = torch.zeros(WIDTH, 2, requires_grad=True)
    loss = crd_linear_loss(
        torch.zeros(1, 2),
        torch.zeros(1, 3),
        weight,
        torch.zeros(WIDTH),
        torch.zeros(WIDTH, 3),
        torch.zeros(WIDTH),
        memory,
        memory,
        torch.tensor([1]),
        torch.tensor([[1, 0]]),
    ).loss
    loss.backward()
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()


def test_small_temperatures_do_not_overflow() -> None:
    given = {name: t.float() if t.is_floating_point() else t for name, t in step([0, 5, 7]).items()}
    student = given["student_embedding"].requires_grad_()
    loss = crd_loss(**given, temperature=0.001, z_student=1.0, z_teacher=1.0).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_precision() -> None:
    given = step([0, 5, 7])
    assert crd_loss(**given).loss.dtype == torch.float64
    half = {name: t.half() if t.is_floating_point() else t for name, t in given.items()}
    single = {name: t.float() if t.is_floating_point() else t for name, t in half.items()}
    found = crd_loss(**half)
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, crd_loss(**single).loss)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(crd_loss(**single).loss, found.loss)


def test_an_empty_batch_is_zero_with_a_gradient() -> None:
    given = step([])
    student = given["student_embedding"].requires_grad_()
    found = crd_loss(**given)
    found.loss.backward()
    assert found.loss == 0
    assert student.grad is not None
    assert torch.equal(found.memory_student, given["memory_student"])


def test_a_positive_that_is_another_row_needs_relax() -> None:
    given = step([0, 5, 7])
    contrast = given["contrast_index"].clone()
    contrast[1, 0] = 6
    with pytest.raises(ValueError, match="in row 1 it is 6, index is 5"):
        crd_loss(**(given | {"contrast_index": contrast}))
    found = crd_loss(**(given | {"contrast_index": contrast}), mode="relax")
    same(found, by_hand(given | {"contrast_index": contrast}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0}, "temperature must be finite and above 0; got 0"),
        ({"momentum": 1.5}, r"momentum must lie in \[0, 1\]; got 1.5"),
        ({"eps": -1e-7}, "eps must be finite and above 0"),
        ({"contrast_index": torch.tensor([[0], [5], [7]])}, "at least one negative; got shape"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        crd_loss(**(step([0, 5, 7]) | change))


def test_chance_level() -> None:
    """Embeddings that tell nothing give scores of 1 / rows each: an even bet against K others is lost at this rate."""
    given = step([0, 5, 7])
    flat = given | {
        name: torch.zeros_like(given[name]) for name in ("student_embedding", "teacher_embedding")
    }
    k = 4
    wanted = 2 * (math.log(1 + k) + k * math.log(1 + 1 / k))
    assert float(crd_loss(**flat, eps=1e-12).loss) == pytest.approx(wanted, rel=1e-9)
