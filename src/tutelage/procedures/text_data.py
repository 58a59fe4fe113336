"""Data sets of text that a procedure leaves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.engine.checkpoint_files import sync
from tutelage.engine.writing import writing

FILE = "train-00000-of-00001.parquet"

_TYPES = {str: "string", int: "int64", float: "float64"}


def write_text_data(
    folder: Path,
    columns: Mapping[str, type],
    parts: Iterable[Mapping[str, Sequence[Any]]],
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write rows so that a recipe's ``data.path`` reads the folder: one split, ``train``. The file is whole or not
    there, and the same rows give the same bytes.

    Args:
        columns: their names, and whether they hold ``str``, ``int`` or ``float``.
        parts: some rows each: every column's values. One is in memory at a time.
        about: what the rows come from; kept in the file's metadata.

    Raises:
        UnwrittenError: the disk refuses.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [(name, pa.type_for_alias(_TYPES[kind])) for name, kind in columns.items()]
    schema = pa.schema(fields, metadata=None if about is None else {"tutelage": json.dumps(about)})
    path, beside = folder / FILE, folder / f".tmp-{FILE}"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(beside, schema) as writer:
            for part in parts:
                writer.write_table(pa.table(dict(part), schema))
        sync(beside)
        beside.replace(path)
