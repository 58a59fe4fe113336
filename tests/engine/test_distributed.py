"""What ranks exchange, on two gloo processes against one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tutelage.engine.distributed import (
    AllRanksBatchNorm,
    gather_rows,
    mean_over_ranks,
    over_all_ranks,
    world_size,
)
from tutelage.engine.runtime import Runtime

SIZES = (5, 3)


def batch_norm_case() -> dict[str, Tensor]:
    Runtime("cpu")
    torch.manual_seed(0)
    inputs = torch.randn(sum(SIZES), 3, 2, 2) + 2
    norm = nn.Sequential(nn.BatchNorm2d(3))
    over_all_ranks(norm)
    part = inputs
    if world_size() > 1:
        part = inputs.split(SIZES)[torch.distributed.get_rank()]
    part = part.clone().requires_grad_()
    output = norm(part)
    (output**3).sum().backward()
    return {
        "output": output.detach(),
        "gradient": part.grad,
        "mean": norm[0].running_mean,
        "var": norm[0].running_var,
        "weight": norm[0].weight.grad,
    }


def test_batch_norm_over_ranks_is_that_of_the_whole_batch(pair: Any) -> None:
    alone = batch_norm_case()
    first, second = pair.run(batch_norm_case)
    for name in ("output", "gradient"):
        torch.testing.assert_close(torch.cat([first[name], second[name]]), alone[name], rtol=1e-4, atol=1e-5)
    for name in ("mean", "var"):
        torch.testing.assert_close(first[name], alone[name])
        torch.testing.assert_close(second[name], alone[name])
    torch.testing.assert_close(first["weight"] + second["weight"], alone["weight"], rtol=1e-4, atol=1e-4)


def test_batch_norm_is_torchs_own_where_there_is_one_process() -> None:
    norm = nn.BatchNorm2d(3)
    holder = nn.Sequential(norm)
    over_all_ranks(holder)
    assert isinstance(holder[0], AllRanksBatchNorm)
    plain = nn.BatchNorm2d(3)
    inputs = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(holder(inputs), plain(inputs))


def gather_case() -> dict[str, Tensor]:
    Runtime("cpu")
    rank = torch.distributed.get_rank() if world_size() > 1 else 0
    values = torch.arange(3.0).add(10 * rank).requires_grad_()
    gathered = gather_rows(values)
    (gathered * torch.arange(len(gathered))).sum().backward()
    mean = mean_over_ranks(torch.tensor(float(rank)))
    return {"gathered": gathered.detach(), "gradient": values.grad, "mean": mean}


def test_gather_keeps_gradients(pair: Any) -> None:
    first, second = pair.run(gather_case)
    assert first["gathered"].tolist() == second["gathered"].tolist() == [0, 1, 2, 10, 11, 12]
    assert first["gradient"].tolist() == [0, 2, 4]
    assert second["gradient"].tolist() == [6, 8, 10]
    assert first["mean"] == second["mean"] == 0.5
