"""The rows of all ranks: what is exchanged, how often, and where gradients go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tutelage.engine import gathering
from tutelage.engine.distributed import gather_rows
from tutelage.engine.gathering import AllRows
from tutelage.engine.runtime import Runtime
from tutelage.engine.types import Batch, Head, Outputs, TopK, first_tensor


def own(rank: int) -> tuple[Batch, Outputs]:
    """Three rows of a rank, with fields of several types and shapes."""
    base = torch.arange(3) + 3 * rank
    batch = Batch(
        torch.rand(3, 1, 8, 8),
        target=base.double()[:, None].expand(3, 2) / 7,
        index=base + 2**40,
        mask=base % 2 == 0,
        columns={"group": base.to(torch.int16), "site": base.float()[:, None, None].expand(3, 2, 2)},
    )
    features = {"used": base.float()[:, None].requires_grad_(), "unused": torch.rand(3, 9)}
    outputs = Outputs(
        hidden=base.float()[:, None], head=Head(torch.tensor([[2.0], [3.0]])), features=features
    )
    return batch, outputs


def everyone() -> dict[str, Any]:
    runtime, exchanged = Runtime("cpu"), []

    def counted(tensor: Tensor) -> Tensor:
        exchanged.append(tuple(tensor.shape))
        return gather_rows(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering, "gather_rows", counted)
        batch, outputs = own(runtime.rank)
        rows = AllRows(batch)
        found = rows.outputs(outputs)
        again = rows.outputs(outputs)
        feature = found.features["used"]
        (again.features["used"] * feature.detach() * (runtime.rank + 1)).sum().backward()
        gradient = outputs.features["used"].grad
        logits = found.logits.detach()
    wide, index = rows.batch, torch.arange(3)[:, None]
    sparse: Any = rows.outputs(Outputs(TopK(index, torch.rand(3, 1), torch.rand(3)))).stored_logits
    return {
        "fields": [wide.target, wide.index, wide.mask, wide.columns["group"], wide.columns["site"]],
        "inputs": tuple(first_tensor(wide.inputs).shape),
        "rows": len(wide),
        "logits": logits,
        "feature": feature.detach(),
        "gradient": gradient,
        "names": list(found.features),
        "exchanged": exchanged,
        "topk": sparse.ids,
    }


def test_what_is_read_is_exchanged_once(pair: Any) -> None:
    first, second = pair.run(everyone)
    batches = [own(rank)[0] for rank in (0, 1)]
    for found in (first, second):
        assert (found["rows"], found["inputs"], found["names"]) == (6, (6, 0), ["used", "unused"])
        fields = [[b.target, b.index, b.mask, b.columns["group"], b.columns["site"]] for b in batches]
        for value, *parts in zip(found["fields"], *fields, strict=True):
            assert value.dtype == parts[0].dtype
            assert torch.equal(value, torch.cat(parts))
        assert found["feature"].flatten().tolist() == [0, 1, 2, 3, 4, 5]
        assert found["logits"][:, 1].tolist() == [0, 3, 6, 9, 12, 15]
        assert len(found["exchanged"]) == 3, "the batch's small fields together, the feature, the logits"
        assert found["topk"].shape == (6, 1)
    # Of each rank's loss, here once and twice the feature itself.
    assert first["gradient"].flatten().tolist() == [0, 3, 6]
    assert second["gradient"].flatten().tolist() == [9, 12, 15]


@pytest.mark.parametrize("columns", [{}, {"group": torch.zeros(3)}])
def test_a_batch_without_fields_keeps_its_rows(columns: dict[str, Tensor]) -> None:
    rows = AllRows(Batch(torch.rand(3, 2), columns=columns)).batch
    assert len(rows) == 3
    assert rows.target is None
    assert list(rows.columns) == list(columns)
