"""Data sets of text that a procedure leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet

from tutelage.engine.checkpoint_files import sync
from tutelage.engine.writing import writing

FILE = "train-00000-of-00001.parquet"


def write_text_data(folder: Path, columns: Mapping[str, Sequence[str]]) -> None:
    """Write columns of text so that a recipe's ``data.path`` reads the folder: one split, ``train``. The file is whole
    or not there, and the same columns give the same bytes.

    Raises:
        UnwrittenError: the disk refuses.
    """
    path, beside = folder / FILE, folder / f".tmp-{FILE}"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        texts = {name: pyarrow.array(values, pyarrow.string()) for name, values in columns.items()}
        parquet.write_table(pyarrow.table(texts), beside)
        sync(beside)
        beside.replace(path)
