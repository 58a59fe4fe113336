"""A head spread over two processes, against the whole one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_cases import DIVERGENCES, Case, analytic, case, gradients, named
from torch import Tensor

from tutelage.engine.distributed import world_size
from tutelage.engine.runtime import Runtime
from tutelage.functional import fused_linear_loss
from tutelage.functional.analytic import DIVERGENCES as BY_NAME
from tutelage.functional.heads import Head, Sampled, TopK

SPLIT = 70
"""Entries of the first process, of 123: the parts are not equal."""


def sharded(of: Case, rank: int | None) -> Case:
    """What a rank holds of a case; None: all."""
    part = {None: slice(None), 0: slice(0, SPLIT), 1: slice(SPLIT, None)}[rank]

    def cut(head: Head) -> Head:
        bias = None if head.bias is None else head.bias.detach()[part]
        return Head(head.weight.detach()[part], bias, head.softcap, head.scale)

    made = Case(of.hidden, cut(of.head), of.teacher_hidden, cut(of.teacher_head), of.target, of.mask)
    return made.to(torch.float64)


def stored(of: Case, form: str) -> TopK | Sampled:
    """A sparse teacher, with the ids of the whole vocabulary."""
    log_probs = of.logits()[1].detach().log_softmax(-1)
    kept = log_probs.topk(9)
    if form == "sampled":
        return Sampled(kept.indices, kept.values.exp())
    return TopK(kept.indices, kept.values, 1 - kept.values.exp().sum(-1))


def losses() -> dict[str, list[Tensor]]:
    """Loss and gradients of every divergence and kind of teacher; over a group where there is one."""
    Runtime("cpu")
    several = world_size() > 1
    rank = torch.distributed.get_rank() if several else None
    group: Any = torch.distributed.group.WORLD if several else None
    whole = case(bias=True, softcap=5.0, scale=1.2)
    options: dict[str, Any] = {
        "mask": whole.mask,
        "target": whole.target,
        "label_weight": 0.4,
        "group": group,
        "chunk_size": 60,
    }
    found = {}
    for key in [*DIVERGENCES, "top-k", "sampled", "softened", "label"]:
        made = sharded(whole, rank)
        teacher: Any = made.teacher
        kind = {"divergence": analytic(key)} if key in DIVERGENCES else {}
        if key in ("top-k", "sampled"):
            teacher = stored(whole, key)
        if key == "softened":
            kind = {"temperature": 2.0, "divergence": "reverse_kl"}
        if key == "label":
            teacher = None
        made_loss = fused_linear_loss(made.hidden, made.head, teacher, **options, **kind)
        found[key] = [made_loss.loss.detach(), *gradients(made_loss.loss, made)]
    return found


@pytest.fixture(scope="module")
def runs(pair: Any) -> tuple[dict[str, list[Tensor]], list[dict[str, list[Tensor]]]]:
    return losses(), pair.run(losses)


@pytest.mark.parametrize("key", [*DIVERGENCES, "top-k", "sampled", "softened", "label"])
def test_two_processes_give_what_one_gives(runs: Any, key: str) -> None:
    alone, (first, second) = runs[0][key], [found[key] for found in runs[1]]
    loss, hidden, weight, bias = alone
    for rank in (first, second):
        torch.testing.assert_close(rank[0], loss, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(rank[1], hidden, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.cat([first[2], second[2]]), weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.cat([first[3], second[3]]), bias, rtol=1e-9, atol=1e-12)


def test_every_divergence_is_covered() -> None:
    assert {named(key) for key in DIVERGENCES} == set(BY_NAME)
