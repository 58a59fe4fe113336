"""How hard each domain's held-out rows are for a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from tutelage.data import subset
from tutelage.engine.passes import TrainingRows
from tutelage.engine.types import Batch, Outputs
from tutelage.engine.views import Views
from tutelage.methods.ddk.mixture import rows_by_domain
from tutelage.tasks.token_losses import label_nll


def held_out_rows(
    rows: TrainingRows, column: str, domains: Iterable[str], most: int
) -> dict[str, TrainingRows]:
    """Of each domain at most ``most`` rows, evenly spread.

    Raises:
        ValueError: a domain of the training rows is not among these, or the other way round.
    """
    found, wanted = rows_by_domain(rows.source, column), list(domains)
    for name in wanted:
        if name not in found:
            raise ValueError(
                f"domain {name!r} of the column {column!r} has no validation row, so how far the student is off there "
                "cannot be told; give data.validation more rows, or leave the domain out"
            )
    for name in found:
        if name not in wanted:
            raise ValueError(
                f"domain {name!r} of the column {column!r} has validation rows but no training row; leave it out"
            )
    return {
        name: TrainingRows(
            subset(rows.source, found[name][:: -(-len(found[name]) // most)]),
            Views((), 0),
            rows.runtime,
            rows.batch_size,
        )
        for name in wanted
    }


@torch.no_grad()
def perplexities(who: str, predict: Callable[[Batch], Outputs], parts: Mapping[str, TrainingRows]) -> Tensor:
    """``exp(Σ nll / tokens)`` of each domain, over all its tokens and all ranks' rows, ``[domains]`` float64 on the
    CPU: `domain_perplexity` of rows that come in batches.

    Raises:
        ValueError: a domain without a token that counts, or whose perplexity is not finite.
    """
    runtime = next(iter(parts.values())).runtime
    sums = torch.zeros(len(parts), 2, dtype=torch.float64, device=runtime.device)
    for number, rows in enumerate(parts.values()):
        for batch in rows.batches():
            with runtime.autocast():
                outputs = predict(batch)
            nll = label_nll(outputs, batch)
            assert batch.target is not None
            counts = (
                batch.target != -100 if batch.mask is None else (batch.target != -100) & (batch.mask != 0)
            )
            sums[number] += torch.stack([nll.double().sum(), counts.double().sum()])
    total, tokens = runtime.sum(sums).cpu().unbind(1)
    found = (total / tokens).exp()
    for name, count, value in zip(parts, tokens.tolist(), found.tolist(), strict=True):
        if not count:
            raise ValueError(f"the validation rows of domain {name!r} have no token that counts")
        if not torch.isfinite(torch.tensor(value)):
            raise ValueError(f"the {who}'s perplexity on domain {name!r} is {value}; it must be finite")
    return found
