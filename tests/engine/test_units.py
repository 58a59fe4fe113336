"""Taps under FSDP2: gradients of a tap strictly inside a unit, with and without a stop there, against one process."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tutelage.engine.runtime import Runtime
from tutelage.engine.taps import Tapped


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, 10), nn.ReLU(inplace=True), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(
            stem=nn.Linear(5, 6),
            block1=Block(),
            block2=Block(),
            block3=Block(),
            head=nn.Linear(6, 4, bias=False),
        )
    )


ROWS = 8
# What is tapped, and whether the forward stops there.
CASES: dict[str, tuple[tuple[str, ...], bool]] = {
    "inside, whole": (("block2.up",), True),
    "inside, stopped": (("block2.up",), False),
    "inside a frozen-input unit, stopped": (("block1.act", "stem"), False),
    "input of an inner layer, stopped": (("block2.down:in", "block1"), False),
    "the unit itself, stopped": (("block2",), False),
    "a deeper one after a shallower one": (("block1.up", "block3.down"), False),
}


def loss_of(result: dict[str, Tensor], use_logits: bool) -> Tensor:
    """A mean over rows that reads the taps twice, so that weights inside the unit get second-order shapes."""
    loss = sum(
        ((tensor**2).sum(-1).mean() for key, tensor in result.items() if key != "logits"), torch.zeros(())
    )
    return loss + result["logits"].logsumexp(-1).mean() if use_logits else loss


def train_case(taps: tuple[str, ...], logits: bool, use_logits: bool, sharded: bool) -> dict[str, Any]:
    """Gradients of two steps with an update between them, as whole tensors; and how many weights stay gathered."""
    from torch.distributed.tensor import DTensor

    Runtime("cpu")
    rank = dist.get_rank() if dist.is_initialized() else 0
    tapped, _ = hold(net(), sharded)
    x = torch.randn(2, ROWS, 5, generator=torch.Generator().manual_seed(3))
    if sharded:
        x = x.chunk(2, dim=1)[rank]
        assert all(isinstance(parameter, DTensor) for parameter in tapped.parameters())
    found = []
    for step in range(2):
        tapped.zero_grad()
        loss_of(tapped(x[step], taps, logits), use_logits).backward()
        found.append({name: whole(p.grad) for name, p in tapped.named_parameters() if p.grad is not None})
        with torch.no_grad():
            for parameter in tapped.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
    return {"gradients": found}


def hold(model: nn.Sequential, sharded: bool) -> tuple[Tapped, list[nn.Module]]:
    tapped = Tapped(model)
    units = [model.block1, model.block2, model.block3]
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for unit in units:
            fully_shard(unit)
        fully_shard(tapped)
    return tapped, units


def whole(gradient: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


@pytest.mark.two_processes
@pytest.mark.parametrize(
    ("case", "use_logits"), [(case, False) for case in CASES] + [("inside, whole", True)]
)
def test_gradients_are_those_of_one_process(case: str, use_logits: bool, pair: Any) -> None:
    taps, logits = CASES[case]
    alone = train_case(taps, logits, use_logits, sharded=False)["gradients"]
    for answer in pair.run(train_case, taps, logits, use_logits, True):
        for ours, theirs in zip(answer["gradients"], alone, strict=True):
            assert ours.keys() == theirs.keys()
            for name in theirs:
                torch.testing.assert_close(
                    ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=f"{case}: {name}"
                )


def teacher_case() -> dict[str, Any]:
    """A frozen, sharded teacher: stopped inside a unit, then run whole, then with other weights."""
    from torch.distributed.tensor import DTensor

    Runtime("cpu")
    tapped, units = hold(net(), True)
    tapped.requires_grad_(False).eval()
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        stopped = tapped(x, ("block2.up",), logits=False)["tap:block2.up"].clone()
        gathered = [not isinstance(p, DTensor) for unit in units for p in unit.parameters()]
        before = tapped(x)["logits"].clone()
        for parameter in tapped.parameters():
            parameter.mul_(0.5)
        after = tapped(x, ("block2.up",))
    return {
        "stopped": stopped,
        "gathered": any(gathered),
        "before": before,
        "tap": after["tap:block2.up"].clone(),
    }


@pytest.mark.two_processes
def test_a_frozen_teacher_is_sharded_again_after_a_stop(pair: Any) -> None:
    model = net()
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(3))
    halved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in halved.parameters():
            parameter.mul_(0.5)
        expected = Tapped(model)(x, ("block2.up",))
        later = Tapped(halved)(x, ("block2.up",))
    for answer in pair.run(teacher_case):
        assert not answer["gathered"]
        torch.testing.assert_close(answer["stopped"], expected["tap:block2.up"])
        torch.testing.assert_close(answer["before"], expected["logits"])
        torch.testing.assert_close(answer["tap"], later["tap:block2.up"])


def mixed_case(sharded: bool) -> dict[str, Any]:
    """A stopped and a whole forward of one student in one step, each with a tap inside a unit, then one backward."""
    Runtime("cpu")
    tapped, _ = hold(net(), sharded)
    x = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(4))
    if sharded:
        x = x.chunk(2)[dist.get_rank()]
    with torch.no_grad():
        tapped(x, ("block3.up",), logits=False)
    first = tapped(x, ("block2.up",), logits=False)
    second = tapped(2 * x, ("block1.down:in",))
    loss = first["tap:block2.up"].square().mean() + second["tap:block1.down:in"].square().mean()
    (loss + second["logits"].logsumexp(-1).mean()).backward()
    return {name: whole(p.grad) for name, p in tapped.named_parameters() if p.grad is not None}


@pytest.mark.two_processes
def test_a_stopped_and_a_whole_forward_in_one_step(pair: Any) -> None:
    alone = mixed_case(False)
    for answer in pair.run(mixed_case, True):
        assert answer.keys() == alone.keys()
        for name in alone:
            torch.testing.assert_close(answer[name], alone[name], rtol=1e-4, atol=1e-6, msg=name)


def ddp_case(wrapped: bool) -> dict[str, Any]:
    """A tap inside a block under DDP, the forward stopped there: what lies above has no gradient."""
    from torch.nn.parallel import DistributedDataParallel

    Runtime("cpu")
    tapped = Tapped(net())
    x = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(5))
    holder: nn.Module = tapped
    if wrapped:
        holder = DistributedDataParallel(tapped, find_unused_parameters=True)
        x = x.chunk(2)[dist.get_rank()]
    holder(x, ("block2.up",), False)["tap:block2.up"].square().mean().backward()
    return {name: p.grad.clone() for name, p in tapped.named_parameters() if p.grad is not None}


@pytest.mark.two_processes
def test_ddp(pair: Any) -> None:
    alone = ddp_case(False)
    for answer in pair.run(ddp_case, True):
        for name, gradient in alone.items():
            torch.testing.assert_close(answer[name], gradient, rtol=1e-4, atol=1e-6)
