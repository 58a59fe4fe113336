"""scikit-learn's digits: 1797 handwritten digits of 8×8 pixels, built in, so that everything can be tried offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from tutelage.data.source import DataError, RowSource, TensorSource, digest, tensor_digest
from tutelage.data.splits import Rows
from tutelage.recipe.schema import DataConfig

CLASSES = 10


class Digits:
    """Images float32 ``[rows, 1, 8, 8]`` in [0, 1]; one split, ``train``.

    Raises:
        DataError: settings that choose columns or a size, which digits do not have, or a task that they do not fit.
    """

    sizes: Mapping[str, int] = MappingProxyType({"train": 1797})
    class_names: tuple[str, ...] | None
    tokenizer = None

    def __init__(self, config: DataConfig, task: str) -> None:
        from sklearn.datasets import load_digits

        for name in ("config", "revision", "image", "features", "target", "columns", "image_size", "text"):
            if getattr(config, name):
                raise DataError(
                    f"data.{name} is {getattr(config, name)!r}, but `digits` is 8×8 images with one label; leave it out"
                )
        if task not in ("classification", "regression"):
            raise DataError(f"`digits` has one label a row; the task {task} needs several (data.target)")
        found = load_digits()
        self.images = torch.from_numpy(found.images).float().div(16).unsqueeze(1)
        self.labels = torch.from_numpy(found.target).long()
        if task == "regression":
            self.labels = self.labels.float()
        self.outputs = CLASSES if task == "classification" else 1
        self.class_names = tuple(map(str, range(CLASSES))) if task == "classification" else None
        self.scale = torch.ones(())
        self.fingerprint = digest([tensor_digest(self.images), tensor_digest(self.labels)])

    def read(self, splits: Sequence[str], train: str) -> Digits:
        return self

    def source(self, rows: Rows) -> RowSource:
        ids = torch.from_numpy(rows.ids)
        mark = digest(["digits", self.fingerprint, tensor_digest(ids)])
        return TensorSource(self.images[ids], self.labels[ids], index=ids, fingerprint=mark)
