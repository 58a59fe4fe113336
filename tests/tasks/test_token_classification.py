"""Classes of tokens: the loss against torch, entities against known values, metrics over any cut and ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from support import Pair
from tutelage.engine.types import Batch, Outputs
from tutelage.tasks import build_task
from tutelage.tasks.spans import SpanTags

NAMES = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
CLASSES, ROWS, TOKENS = len(NAMES), 9, 12


def task(**options: Any) -> Any:
    return build_task("token-classification", CLASSES, class_names=NAMES, **options)


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, class ids and which tokens count."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, TOKENS, CLASSES, generator=generator)
    counted = torch.rand(ROWS, TOKENS, generator=generator) < 0.7
    target = torch.randint(0, CLASSES, (ROWS, TOKENS), generator=generator)
    return logits, target.masked_fill(~counted, -100), counted


def batch(target: Tensor, mask: Tensor | None = None) -> Batch:
    return Batch({"input_ids": torch.zeros_like(target)}, target, torch.arange(len(target)) + 100, mask=mask)


def measure(
    name: str, logits: Tensor, rows: Batch, teacher: Tensor | None = None, cut: int = ROWS
) -> float | None:
    """By batches as long as their longest row, as `TaggedSource` makes them."""
    metric = task().metrics([name])[name]
    for start in range(0, len(rows), cut):
        part = slice(start, start + cut)
        assert rows.target is not None
        target = rows.target[part]
        mask = None if rows.mask is None else rows.mask[part]
        counted = (target != -100).any(0).nonzero()
        length = int(counted.max()) + 1 if len(counted) else 1
        given = batch(target[:, :length], None if mask is None else mask[:, :length])
        compared = None if teacher is None else Outputs(teacher[part, :length])
        metric.update(Outputs(logits[part, :length]), given, compared)
    found: float | None = metric.compute()
    return found


def tagged(*rows: str) -> Tensor:
    """Class ids of rows of tags, ``.`` where none counts; rows are padded on the right."""
    found = [[-100 if tag == "." else NAMES.index(tag) for tag in row.split()] for row in rows]
    longest = max(map(len, found))
    return torch.tensor([row + [-100] * (longest - len(row)) for row in found])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_and_its_gradient_are_torchs_over_the_tokens_that_count(smoothing: float) -> None:
    logits, target, counted = drawn()
    logits.requires_grad_()
    found = task(label_smoothing=smoothing).label_loss(Outputs(logits), batch(target, counted))
    assert found.items == "tokens"
    wanted = functional.cross_entropy(logits[counted], target[counted], label_smoothing=smoothing)
    torch.testing.assert_close(found.mean, wanted)
    ours, theirs = (torch.autograd.grad(value, logits)[0] for value in (found.mean, wanted))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_ids_of_any_integers_serve(dtype: torch.dtype) -> None:
    logits, target, _ = drawn()
    rows = batch(target.to(dtype))
    task().check(rows)
    wanted = task().label_loss(Outputs(logits), batch(target)).mean
    assert task().label_loss(Outputs(logits), rows).mean == wanted
    assert measure("loss", logits, rows) == measure("loss", logits, batch(target))


def test_where_no_token_counts_the_loss_is_zero_with_a_gradient() -> None:
    logits = drawn()[0].requires_grad_()
    target = torch.full((ROWS, TOKENS), -100)
    found = task().label_loss(Outputs(logits), batch(target, target != -100)).mean
    (gradient,) = torch.autograd.grad(found, logits)
    assert found.item() == 0
    assert torch.equal(gradient, torch.zeros_like(logits))
    assert measure("accuracy", logits.detach(), batch(target)) is None


def test_what_stands_where_no_token_counts_does_not_matter() -> None:
    """The mask and -100 each leave a token out, and what its logits are."""
    logits, target, counted = drawn()
    broken = logits.masked_fill(~counted[..., None], math.nan).requires_grad_()
    anything = target.masked_fill(~counted, 3)
    found = task().label_loss(Outputs(broken), batch(anything, counted)).mean
    torch.testing.assert_close(found, task().label_loss(Outputs(logits), batch(target)).mean)
    (gradient,) = torch.autograd.grad(found, broken)
    assert bool(torch.isfinite(gradient).all())
    for name in ("accuracy", "f1", "loss"):
        masked = measure(name, broken.detach(), batch(anything, counted))
        assert masked == pytest.approx(measure(name, logits, batch(target)))


def test_the_loss_is_float32_at_least_and_finite_at_large_logits() -> None:
    logits, target, counted = drawn()
    rows = batch(target, counted)
    assert task().label_loss(Outputs(logits.bfloat16()), rows).mean.dtype == torch.float32
    assert task().label_loss(Outputs(logits.double()), rows).mean.dtype == torch.float64
    large = (logits * 1e4).requires_grad_()
    (gradient,) = torch.autograd.grad(task().label_loss(Outputs(large), rows).mean, large)
    assert bool(torch.isfinite(gradient).all())


# Values of seqeval 1.2.2, whose default (conlleval's) reading this is.
@pytest.mark.parametrize(
    ("wanted", "answered", "f1"),
    [
        (
            ["O O O B-LOC I-LOC I-LOC O", "B-PER I-PER O"],
            ["O O B-LOC I-LOC I-LOC I-LOC O", "B-PER I-PER O"],
            0.5,
        ),
        (["B-PER I-PER O B-ORG"], ["B-PER I-PER O B-ORG"], 1.0),
        (["B-PER I-PER O B-ORG"], ["B-PER O O B-ORG"], 0.5),
        (["B-PER B-PER"], ["B-PER I-PER"], 0.0),
        (["I-PER I-PER O I-LOC"], ["B-PER I-PER O B-LOC"], 1.0),
        (["B-PER I-LOC"], ["B-PER B-LOC"], 1.0),
        (["B-LOC O", "O B-LOC"], ["O O", "O B-LOC"], 2 / 3),
        (["O O"], ["O B-PER"], 0.0),
    ],
)
def test_f1_counts_whole_entities(wanted: list[str], answered: list[str], f1: float) -> None:
    logits = functional.one_hot(tagged(*answered).clamp(min=0), CLASSES).float()
    assert measure("f1", logits, batch(tagged(*wanted))) == pytest.approx(f1)


def test_tokens_that_do_not_count_are_passed_over() -> None:
    """Further pieces of words stand between the words of an entity, and after its last."""
    wanted = tagged(". B-PER . I-PER . O B-LOC . .", ". . O")
    answered = tagged("O B-PER O I-PER I-PER O B-LOC I-LOC I-LOC", "B-PER I-PER O")
    logits = functional.one_hot(answered.clamp(min=0), CLASSES).float()
    assert measure("f1", logits, batch(wanted)) == 1.0
    assert measure("accuracy", logits, batch(wanted)) == 1.0


def test_f1_is_not_defined_without_any_entity() -> None:
    logits = functional.one_hot(torch.zeros(1, 3, dtype=torch.int64), CLASSES).float()
    assert measure("f1", logits, batch(tagged("O O O"))) is None


def test_metrics_are_of_all_tokens_whatever_the_cut() -> None:
    logits, target, counted = drawn()
    other = drawn(seed=1)[0]
    rows, answer = batch(target, counted), logits.argmax(2)
    wanted: dict[str, Any] = {
        "accuracy": (answer == target)[counted].float().mean(),
        "loss": functional.cross_entropy(logits[counted], target[counted]),
        "agreement": (answer == other.argmax(2))[counted].float().mean(),
        "f1": by_hand(answer, target, counted),
    }
    for name, value in wanted.items():
        teacher = other if name == "agreement" else None
        for cut in (1, 4, ROWS):
            assert measure(name, logits, rows, teacher, cut) == pytest.approx(float(value), abs=1e-6), name


def by_hand(answer: Tensor, target: Tensor, counted: Tensor) -> float:
    ours, theirs = (
        {(row, *span) for row in range(ROWS) for span in spans(tags[row][counted[row]].tolist())}
        for tags in (answer, target)
    )
    return 2 * len(ours & theirs) / (len(ours) + len(theirs))


def spans(tags: list[int]) -> list[tuple[int, int, str]]:
    found: list[tuple[int, int, str]] = []
    for place, (kind, _, name) in enumerate(NAMES[tag].partition("-") for tag in tags):
        if kind == "I" and found and found[-1][1:] == (place, name):
            found[-1] = (found[-1][0], place + 1, name)
        elif kind != "O":
            found.append((place, place + 1, name))
    return found


def test_entities_by_hand_on_many_draws() -> None:
    tags = SpanTags.of(NAMES)
    assert tags is not None
    for seed in range(60):
        _, target, counted = drawn(seed)
        swapped = torch.rand(ROWS, TOKENS, generator=torch.Generator().manual_seed(seed)) < 0.3
        answer = torch.where(swapped, drawn(seed + 100)[0].argmax(2), target.clamp(min=0))
        right, ours, theirs = (count.sum() for count in tags.counts(answer, target, counted))
        assert float(2 * right / (ours + theirs)) == pytest.approx(by_hand(answer, target, counted))


@pytest.mark.parametrize("names", [None, ["NOUN", "VERB", "O"], ["O", "O", "O"], ["O", "B-", "I-"]])
def test_class_names_that_are_no_tags_have_no_entities(names: list[str] | None) -> None:
    found = build_task("token-classification", 3, class_names=names)
    assert list(found.metrics()) == ["accuracy", "loss", "agreement"]
    with pytest.raises(ValueError, match="'f1' is not defined for 3 outputs"):
        found.metrics(["f1"])


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            torch.tensor([[0, 1], [-100, 7]]),
            "label of token 1 of row 101 is 7; allowed: 0 to 6 .* or -100 where",
        ),
        (torch.tensor([[0, -1], [0, 0]]), "label of token 1 of row 100 is -1"),
        (torch.tensor([0, 1]), r"class ids \[rows, tokens\]; got int64 of shape \[2\]"),
        (torch.zeros(2, 2), r"class ids \[rows, tokens\]; got float32 of shape \[2, 2\]"),
    ],
)
def test_check_names_value_and_token(target: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        task().check(Batch(torch.zeros(2, 2), target, torch.arange(2) + 100))


def test_a_loss_without_target_says_where_it_comes_from() -> None:
    with pytest.raises(ValueError, match=r"needs a target.*data\.target"):
        task().label_loss(Outputs(drawn()[0]), Batch(torch.zeros(ROWS, TOKENS)))


class Tagged:
    """Rows of `drawn`; a batch is as long as its longest row."""

    fields, fingerprint = frozenset({"target", "mask", "index"}), "tagged"

    def __len__(self) -> int:
        return ROWS

    def fetch(self, positions: Any) -> Batch:
        rows, (_, target, counted) = torch.tensor(list(positions)), drawn()
        length = int(counted[rows].any(0).nonzero().max()) + 1
        target = target[rows, :length]
        return Batch({"rows": rows[:, None].expand(-1, length)}, target, rows, mask=target != -100)


def answers(given: Batch) -> Outputs:
    rows: Any = given.inputs
    return Outputs(drawn(seed=2)[0][rows["rows"][:, 0], : rows["rows"].shape[1]])


def evaluated(rank: int = 0, world: int = 1) -> dict[str, float]:
    from tutelage.engine.evaluate import evaluate

    return evaluate(
        answers, Tagged(), task(), batch_size=2, device="cpu", rank=rank, world=world, teacher=answers
    )


def of_two() -> dict[str, float]:
    import torch.distributed as dist

    from tutelage.engine.runtime import Runtime

    Runtime("cpu", "fp32", "ddp")
    return evaluated(dist.get_rank(), 2)


def test_two_ranks_measure_what_one_does(pair: Pair) -> None:
    alone = evaluated()
    assert {"accuracy", "f1", "loss", "agreement"} == set(alone)
    assert alone["agreement"] == 1
    for found in pair.run(of_two):
        assert found == pytest.approx(alone)
