"""Parquet, CSV and image folders, read by `datasets`: from the hub, or from a local path without the network."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutelage.data.columns import Column, Travelling, class_ids, matrix, travelling
from tutelage.data.images import Format, ImageSource, ImageTable
from tutelage.data.source import DataError, RowSource, TensorSource, digest, tensor_digest
from tutelage.data.splits import Rows
from tutelage.data.tokenizer import Tokenizer
from tutelage.recipe.schema import DataConfig

_FILES = {".csv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}
_HASHED = 2**30
"""Bytes of local files up to which the fingerprint is that of their contents, not the library's."""
_TARGETS = ("label", "labels", "target", "class", "fine_label")


class Tables:
    """Splits of a data set of the `datasets` library.

    Raises:
        DataError: a path that does not exist, or that the library cannot read; a column that is not there.
    """

    def __init__(self, config: DataConfig, task: str) -> None:
        self.config, self.task = config, task
        self.splits, self.fingerprint = load_splits(config)
        self.sizes: Mapping[str, int] = {name: len(rows) for name, rows in self.splits.items()}

    def read(self, splits: Sequence[str], train: str) -> ReadTables:
        return ReadTables(self, splits, train)


class ReadColumns:
    """The columns of some splits: travelling ones in memory, and targets."""

    tokenizer: Tokenizer | None = None

    def __init__(self, tables: Tables, splits: Sequence[str], train: str) -> None:
        self.tables, self.config, self.names = tables, tables.config, list(dict.fromkeys(splits))
        self.features = tables.splits[train].features
        self.scale = torch.ones(())
        self.columns: dict[str, Travelling] = {
            name: travelling({split: self._column(split, name) for split in self.names})
            for name in self.config.columns
        }

    def travelling_of(self, rows: Rows) -> dict[str, Any]:
        """Travelling columns of some rows, and the names of their codes."""
        ids = torch.from_numpy(rows.ids)
        named = {name: column.names for name, column in self.columns.items() if column.names is not None}
        return {
            "columns": {name: column.values[rows.split][ids] for name, column in self.columns.items()},
            "names": named,
        }

    def _targets(self, train: str) -> tuple[int, tuple[str, ...] | None, dict[str, Tensor]]:
        """Outputs, class names, and targets by split."""
        wanted = self.config.target if self.config.target is not None else self._target_column()
        several = (wanted,) if isinstance(wanted, str) else wanted
        task = self.tables.task
        if task == "classification":
            if len(several) != 1:
                raise DataError(
                    f"classification has one target column; data.target names {len(several)}: set task: multilabel"
                )
            labels = class_ids(
                {split: self._column(split, several[0], "data.target") for split in self.names}, train
            )
            return labels.classes, labels.names, labels.ids
        if task == "multilabel" and len(several) < 2:
            raise DataError(
                f"multilabel needs several target columns of 0 and 1; data.target names {several[0]!r} alone"
            )
        targets = {split: matrix(self._columns(split, several, "data.target")) for split in self.names}
        if task == "multilabel":
            for split, values in targets.items():
                _refuse_not_a_share(values, split, several)
        return len(several), several if task == "multilabel" else None, targets

    def _target_column(self) -> str:
        import datasets

        found: list[str] = [
            name for name, kind in self.features.items() if isinstance(kind, datasets.ClassLabel)
        ]
        found = found if len(found) == 1 else [name for name in self.features if name in _TARGETS]
        if len(found) != 1:
            raise DataError(
                f"set data.target to the column with the label; columns: {', '.join(self.features)}"
            )
        return found[0]

    def _columns(self, split: str, names: Sequence[str], where: str = "data.features") -> list[Column]:
        return [self._column(split, name, where) for name in names]

    def _column(self, split: str, name: str, where: str = "data.columns") -> Column:
        rows = self.tables.splits[split]
        self._refuse_unknown(name, where, rows.features, split)
        values = rows.select_columns([name]).with_format("arrow")[:].column(name)
        class_names = getattr(rows.features[name], "names", None)
        return Column(name, split, values, tuple(class_names) if class_names else None)

    def _refuse_unknown(
        self, name: str, where: str, known: Mapping[str, Any], split: str | None = None
    ) -> None:
        if name in known:
            return
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        place = f"split {split!r} of {self.config.path}" if split else self.config.path
        raise DataError(f"{where}: {place} has no column {name!r}; there are {', '.join(known)}{hint}")


class ReadTables(ReadColumns):
    """Targets and numbers in memory, images decoded when fetched."""

    def __init__(self, tables: Tables, splits: Sequence[str], train: str) -> None:
        super().__init__(tables, splits, train)
        self.image = self._image_column()
        self.format: Format | None = None
        self.inputs: dict[str, Tensor] = {}
        if self.image is not None:
            self.format = self._images(train).format(self.config.image_size)
        else:
            self.inputs = {split: matrix(self._columns(split, self.config.features)) for split in self.names}
            self.scale = self.inputs[train].amax(0) - self.inputs[train].amin(0)
        self.outputs, self.class_names, self.targets = self._targets(train)

    def source(self, rows: Rows) -> RowSource:
        ids = torch.from_numpy(rows.ids)
        config, split = self.config, rows.split
        shared: dict[str, Any] = {
            "index": ids,
            "target": self.targets[split][ids],
            **self.travelling_of(rows),
            "fingerprint": digest(
                [
                    [self.tables.fingerprint, split, tensor_digest(ids), self.tables.task],
                    [self.image, config.image_size, config.features, config.target, config.columns],
                    [tensor_digest(self.targets[split]), self.class_names],
                ]
            ),
        }
        if self.format is not None:
            return ImageSource(self._images(split), self.format, **shared)
        return TensorSource(self.inputs[split][ids], **shared)

    def _images(self, split: str) -> ImageTable:
        assert self.image is not None
        rows = self.tables.splits[split].select_columns([self.image]).with_format("arrow")
        return ImageTable(rows, self.image, split, _roots(self.config))

    def _image_column(self) -> str | None:
        """The column with images; None where `features` are the inputs."""
        if self.config.features:
            if self.config.image_size is not None:
                raise DataError("data.image_size is set, but data.features are numbers; leave one out")
            return None
        named = self.config.image
        if named is not None:
            self._refuse_unknown(named, "data.image", self.features)
            kind = self.features[named]
            if not _holds_images(kind) and getattr(kind, "dtype", None) != "binary":
                raise DataError(f"data.image is {named!r}, whose values are no images: {kind}")
            return named
        found: list[str] = [name for name, kind in self.features.items() if _holds_images(kind)]
        if len(found) != 1:
            wanted = "set data.image to one of them" if found else "set data.features to columns with numbers"
            raise DataError(
                f"{self.config.path} has {len(found)} columns with images ({', '.join(found) or 'none'}); {wanted}. "
                f"Columns: {', '.join(self.features)}"
            )
        return found[0]


def _roots(config: DataConfig) -> list[Path]:
    """Where files of images lie: in the data's own folder, or where the libraries put what the hub gave."""
    import datasets
    import huggingface_hub

    path = Path(config.path).expanduser()
    if path.exists():
        return [path if path.is_dir() else path.parent]
    return [Path(datasets.config.HF_DATASETS_CACHE), Path(huggingface_hub.constants.HF_HUB_CACHE)]


def _holds_images(kind: Any) -> bool:
    """Whether a column is of the library's image type, or of the plain struct in which that is stored."""
    import datasets

    return isinstance(kind, datasets.Image) or (isinstance(kind, Mapping) and set(kind) == {"bytes", "path"})


def _refuse_not_a_share(values: Tensor, split: str, names: Sequence[str]) -> None:
    wrong = torch.nonzero((values < 0) | (values > 1))
    if len(wrong):
        row, column = wrong[0].tolist()
        raise DataError(
            f"row {row} of column {names[column]!r}, split {split!r}, is {float(values[row, column]):g}; "
            "a label of several is 0 or 1"
        )


def load_splits(config: DataConfig, *, streaming: bool = False) -> tuple[dict[str, Any], str]:
    """Splits by name, and the fingerprint of all; ``streaming``: splits that are read as they come.

    Raises:
        DataError: a path that does not exist, or that the library cannot read.
    """
    import datasets

    path = Path(config.path).expanduser()
    local = path.exists()
    if not local and (path.is_absolute() or config.path.startswith((".", "~")) or path.suffix in _FILES):
        raise DataError(f"data.path: there is no file or folder {config.path!r}")
    if not local and config.path in datasets.packaged_modules._PACKAGED_DATASETS_MODULES:
        raise DataError(
            f"data.path {config.path!r} is a kind of files, of which the library would read those in this folder; "
            "give a file, a folder, or a data set's name on the hub"
        )
    if local and (config.config is not None or config.revision is not None):
        name = "config" if config.config is not None else "revision"
        raise DataError(f"data.{name} is for the hub; {config.path!r} is a local path, so leave it out")
    if path.is_file() and path.suffix not in _FILES:
        raise DataError(f"data.path is the file {config.path!r}; allowed: {', '.join(_FILES)}, or a folder")
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"data.path: the file {config.path!r} is empty; it needs a header and rows")
    with _quiet():
        try:
            if path.is_file():
                files = {"train": str(path)}
                found = datasets.load_dataset(_FILES[path.suffix], data_files=files, streaming=streaming)
            elif local:
                found = datasets.load_dataset(str(path), streaming=streaming)
            else:
                found = datasets.load_dataset(
                    config.path, name=config.config, revision=config.revision, streaming=streaming
                )
        except Exception as error:  # files may be broken in any way, and each parser has errors of its own
            reason = str(error.__cause__ or error).strip().splitlines()
            if local and "corresponds to no data" in str(error):
                raise DataError(f"data.path {config.path!r} has no rows") from error
            where = (
                "" if local else "is neither `digits`, a local path, nor a data set that the hub gives here: "
            )
            raise DataError(
                f"data.path {config.path!r} {where or 'cannot be read: '}{reason[0] if reason else error!r}"
            ) from error
    splits = dict(found)
    mark = _content_digest(path) if local else None
    if mark is None and streaming:  # nothing was read yet: what it is called is all there is
        mark = digest([config.path, config.config, config.revision])
    return splits, mark or digest({name: rows._fingerprint for name, rows in splits.items()})


def _content_digest(path: Path) -> str | None:
    """sha256 over the names and contents of local files; None where they are too large to read each time."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if sum(file.stat().st_size for file in files) > _HASHED:
        return None
    whole = hashlib.sha256()
    for file in files:
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        with file.open("rb") as stream:
            whole.update(f"{name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bars and complaints, which are then as they were."""
    import datasets

    shown = datasets.are_progress_bars_disabled() is False
    level = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()
