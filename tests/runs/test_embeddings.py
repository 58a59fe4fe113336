"""Principal components of the last feature, against numpy's."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from tutelage.data import TensorSource
from tutelage.engine.taps import Tapped
from tutelage.models import build_model
from tutelage.runs.embeddings import MOST_ROWS, embeddings

CPU = torch.device("cpu")


def rows(count: int) -> TensorSource:
    generator = torch.Generator().manual_seed(0)
    return TensorSource(torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % 3)


def net(name: str) -> Tapped:
    return Tapped(build_model(f"digits:{name}", outputs=3, input_shape=(1, 8, 8)).module).eval()


def test_the_components_of_the_classifiers_input() -> None:
    source, model = rows(20), net("mlp-12")
    found = embeddings({"student": model}, source, batch_size=8, device=CPU)
    assert found["classes"] == source.target.tolist()  # type: ignore[union-attr]
    features = model.model.layer1(source.fetch(range(20)).inputs.flatten(1)).detach().double().numpy()
    left, values, right = np.linalg.svd(features - features.mean(0), full_matrices=False)
    points = np.array(found["models"]["student"]["points"])
    for k in range(2):
        sign = np.sign(right[k][np.abs(right[k]).argmax()])
        np.testing.assert_allclose(points[:, k], left[:, k] * values[k] * sign, atol=1e-3)
    np.testing.assert_allclose(
        found["models"]["student"]["shares"], (values**2 / (values**2).sum())[:2], atol=1e-3
    )


def test_rows_are_spread_and_batches_do_not_matter() -> None:
    source = rows(700)
    one, other = (embeddings({"a": net("mlp-4")}, source, batch_size=size, device=CPU) for size in (64, 500))
    assert len(one["classes"]) == MOST_ROWS
    assert one["classes"][-1] == 699 % 3
    np.testing.assert_allclose(one["models"]["a"]["points"], other["models"]["a"]["points"], atol=2e-3)


def test_models_without_a_classifier_and_features_of_one_number() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(64, 3), nn.Linear(64, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x.flatten(1)) * self.other(x.flatten(1))

    found = embeddings(
        {"no head": Tapped(Two()).eval(), "one": net("mlp-1")}, rows(5), batch_size=8, device=CPU
    )
    assert list(found["models"]) == ["one"]
    assert all(y == 0 for _, y in found["models"]["one"]["points"])
