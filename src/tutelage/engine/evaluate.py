"""Metrics over a whole source: one pass, no row left out or seen twice, whatever the batch size and the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from tutelage.engine.loading import Source
from tutelage.engine.spread import SpreadHead
from tutelage.engine.types import Batch, Outputs
from tutelage.engine.views import to_float

Predict = Callable[[Batch], Outputs]


class Metric(Protocol):
    """What `evaluate` asks of a metric. ``state`` gives CPU tensors with the rows first, or nothing; ``compute`` takes
    ``[rows]`` bool, and gives None where the metric is not defined for those rows."""

    teacher: bool

    def update(self, outputs: Outputs, batch: Batch, teacher_outputs: Outputs | None = None) -> None: ...

    def state(self) -> list[Tensor]: ...

    def load_state(self, states: Sequence[list[Tensor]]) -> None: ...

    def compute(self, rows: Tensor | None = None) -> float | None: ...


class MetricsTask(Protocol):
    """What `evaluate` asks of a task."""

    def metrics(self, names: Sequence[str] = ()) -> Mapping[str, Metric]: ...


@runtime_checkable
class Coded(Protocol):
    """A source that knows the names behind integer-coded columns: ``names[column][code]``."""

    names: Mapping[str, Sequence[str]]


def evaluate(
    student: Predict,
    source: Source,
    task: MetricsTask,
    *,
    names: Sequence[str] = (),
    group_by: str | None = None,
    batch_size: int,
    device: torch.device | str,
    rank: int = 0,
    world: int = 1,
    teacher: Predict | None = None,
) -> dict[str, float]:
    """Metrics of ``student`` on every row of ``source``.

    Each rank sees rows ``rank, rank + world, …`` and may have none; every rank gets the same figures. Metrics are
    collected on the device, without a synchronisation a batch.

    Args:
        student, teacher: outputs of a batch, in eval mode. Metrics that compare with a teacher need one, else they are
            left out.
        names: metrics; none: the task's own.
        group_by: a column: each metric is given once more for every value in it, as ``accuracy[sex=Male]``.
        device: where batches are sent.

    Returns:
        Metrics by name. One that is not defined for the rows it is asked of (r2 of a single row) is left out.

    Raises:
        ValueError: no rows that count, an unknown metric or an unknown column.
    """
    if len(source) == 0:
        raise ValueError("the data to evaluate on has no rows")
    if group_by is not None and group_by not in source.fields - {"target", "index"}:
        columns = sorted(source.fields - {"target", "index"})
        raise ValueError(
            f"evaluation.group_by is {group_by!r}; the data's columns are {', '.join(columns) or 'none'} "
            "(see data.columns)"
        )
    metrics = {
        name: metric
        for name, metric in task.metrics(names).items()
        if teacher is not None or not metric.teacher
    }
    if not metrics:
        raise ValueError(f"{', '.join(names)} can only be had with a teacher to compare with; there is none")
    groups = _collect(
        metrics, student, teacher, source, group_by, batch_size, device, range(rank, len(source), world)
    )
    if world > 1:
        groups = _merge(metrics, groups)
    results = _compute(metrics, groups, group_by, source)
    if not results:
        raise ValueError(
            f"{', '.join(metrics)} cannot be told from the {len(source)} rows to evaluate on: "
            "they are too few, or all masked"
        )
    return results


# no_grad, not inference mode: what FSDP2 and models cache in a forward could not be trained with afterwards.
@torch.no_grad()
def _collect(
    metrics: Mapping[str, Metric],
    student: Predict,
    teacher: Predict | None,
    source: Source,
    group_by: str | None,
    batch_size: int,
    device: torch.device | str,
    mine: range,
) -> list[Tensor]:
    """Update the metrics with this rank's rows; gives their groups."""
    groups: list[Tensor] = []
    most = -(-len(source) // mine.step)
    for start in range(0, most, batch_size):
        positions = list(mine[start : start + batch_size])
        # A sharded model's forward is a collective: a rank without rows goes along with one that is not counted.
        rows = source.fetch(positions or [0])
        batch = to_float(rows.to(device))
        outputs, compared = student(batch), teacher(batch) if teacher is not None else None
        for each in (outputs, compared):
            if each is not None and isinstance(each.head, SpreadHead):
                each.head = each.head.whole()  # a collective too
        if not positions:
            continue
        for metric in metrics.values():
            metric.update(outputs, batch, compared)
        if group_by is not None:
            groups.append(rows.columns[group_by])
    return groups


def _merge(metrics: Mapping[str, Metric], groups: list[Tensor]) -> list[Tensor]:
    """Give every metric what all ranks collected. One exchange of plain objects: torchmetrics' own sync of lists hangs
    where a rank has none."""
    mine: dict[str, Any] = {
        "groups": groups,
        "states": {name: metric.state() for name, metric in metrics.items()},
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for name, metric in metrics.items():
        metric.load_state([theirs["states"][name] for theirs in everyone])
    return [group for theirs in everyone for group in theirs["groups"]]


def _compute(
    metrics: Mapping[str, Metric], groups: list[Tensor], group_by: str | None, source: Source
) -> dict[str, float]:
    values: dict[str, float | None] = {name: metric.compute() for name, metric in metrics.items()}
    if group_by is not None:
        codes = torch.cat(groups)
        titles = source.names.get(group_by) if isinstance(source, Coded) else None
        for code in codes.unique().tolist():
            title = titles[code] if titles is not None else f"{code:g}"
            for name, metric in metrics.items():
                values[f"{name}[{group_by}={title}]"] = metric.compute(codes == code)
    return {name: value for name, value in values.items() if value is not None}
