"""Norm and clipping of gradients, of plain and of sharded parameters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tutelage.engine.gradients import clip_, grad_norm


def parameter(*values: float) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(len(values)))
    made.grad = torch.tensor(values)
    return made


def test_norm_is_over_all_gradients_together() -> None:
    without = nn.Parameter(torch.ones(3))
    norm = grad_norm(iter([parameter(3.0), without, parameter(0.0, 4.0)]))
    assert norm.item() == 5.0
    assert norm.shape == ()
    assert not norm.requires_grad


@pytest.mark.parametrize("parameters", [[], [nn.Parameter(torch.ones(2))]], ids=["none", "without gradient"])
def test_norm_of_nothing_is_zero(parameters: list[nn.Parameter]) -> None:
    assert grad_norm(parameters).item() == 0.0
    clip_(parameters, 1.0, grad_norm(parameters))


def test_clipping_keeps_the_direction_and_leaves_short_gradients() -> None:
    parameters = [parameter(3.0), parameter(0.0, 4.0)]
    clip_(parameters, 10.0, grad_norm(parameters))
    assert parameters[0].grad is not None
    assert parameters[0].grad.tolist() == [3.0]
    clip_(iter(parameters), 1.0, grad_norm(parameters))
    assert torch.cat([p.grad for p in parameters if p.grad is not None]).tolist() == pytest.approx(
        [0.6, 0, 0.8]
    )
    assert grad_norm(parameters).item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_told(value: float) -> None:
    assert not torch.isfinite(grad_norm([parameter(1.0, value)]))


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_and_plain_gradients_count_together(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    def gradients(shard: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(0)
        first, second = nn.Linear(4, 3), nn.Linear(3, 2)
        if shard:
            fully_shard(first, mesh=mesh)
            assert isinstance(first.weight, DTensor)
        second(first(torch.ones(2, 4))).square().sum().backward()
        parameters = [*first.parameters(), *second.parameters()]
        norm = grad_norm(parameters)
        clip_(parameters, 0.1, norm)
        grads = [p.grad for p in parameters if p.grad is not None]
        return norm, [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]

    (norm, plain), (sharded_norm, sharded) = gradients(False), gradients(True)
    assert not isinstance(sharded_norm, DTensor)
    torch.testing.assert_close(sharded_norm, norm, rtol=1e-6, atol=0)
    for one, other in zip(plain, sharded, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    assert torch.cat([grad.flatten() for grad in sharded]).norm().item() == pytest.approx(0.1, abs=1e-4)
