"""Where a classifier's last feature puts held-out rows, seen from the side that shows most: for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tutelage.engine.loading import Source
from tutelage.engine.spec import ModelSpec
from tutelage.engine.taps import Tapped, outputs_of
from tutelage.engine.types import Batch
from tutelage.engine.views import to_float

MOST_ROWS = 500


@torch.no_grad()
def embeddings(
    models: Mapping[str, Tapped], source: Source, *, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """The first two principal components of every model's classifier input, over the same rows.

    Args:
        models: by name, in eval mode. One whose logits are no single layer's is left out.
        source: labelled rows of a classification; 500 of them, evenly spread, where there are more.

    Returns:
        JSON values: ``classes`` of the rows; by model ``points`` ``[rows][2]`` and ``shares``, the parts of the
        features' variance that the two hold.
    """
    count = min(MOST_ROWS, len(source))
    positions = torch.linspace(0, len(source) - 1, count).round().long().tolist()
    batches = [
        to_float(source.fetch(positions[start : start + batch_size]).to(device))
        for start in range(0, count, batch_size)
    ]
    drawn = {}
    for name, model in models.items():
        spec = ModelSpec.of(name, model.model, model.normalise(batches[0].inputs))
        if spec.head is not None:
            drawn[name] = _components(_features(model, spec.pooled, batches))
    return {"classes": torch.cat([_classes(batch) for batch in batches]).tolist(), "models": drawn}


def _features(model: Tapped, tap: str, batches: list[Batch]) -> Tensor:
    found = [outputs_of(model(batch.inputs, (tap,), False)).feature() for batch in batches]
    return torch.cat([feature.flatten(1).double().cpu() for feature in found])


def _classes(batch: Batch) -> Tensor:
    assert batch.target is not None
    return (batch.target if batch.target.dim() == 1 else batch.target.argmax(1)).cpu()


def _components(features: Tensor) -> dict[str, Any]:
    centred = features - features.mean(0)
    left, values, right = torch.linalg.svd(centred, full_matrices=False)
    # Which way a component points is arbitrary; so that pictures repeat, its largest weight is positive.
    largest = right.gather(1, right.abs().argmax(1, keepdim=True))[:, 0]
    points = (left * values * largest.sign())[:, :2]
    points = torch.nn.functional.pad(points, (0, 2 - points.shape[1]))  # a single feature, or a single row
    shares = values.square() / values.square().sum().clamp(min=1e-30)
    return {
        "points": [[round(x, 4), round(y, 4)] for x, y in points.tolist()],
        "shares": [round(share, 4) for share in shares[:2].tolist()],
    }
