"""``result.json`` of a run, read back: it may come from elsewhere, or be cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tutelage.untrusted import FileError, read_object

FILE = "result.json"

Metrics = dict[str, float | None]


class _Part(BaseModel):
    """What is shown of a result; further keys may be anything."""

    model_config = ConfigDict(strict=True)


class _Model(_Part):
    model: str | None = None
    test: Metrics | None = None
    validation: Metrics | None = None
    parameters: float | None = None
    flops: float | None = None
    latency_ms: float | None = None


class _Table(_Part):
    columns: list[str]
    rows: list[list[Any]]


class _Result(_Part):
    status: str
    name: str | None = None
    error: str | None = None
    test: Metrics | None = None
    validation: Metrics | None = None
    train_seconds: float | None = None
    student: _Model | None = None
    teachers: dict[str, _Model] = {}
    tables: dict[str, _Table] = {}


def read_result(folder: Path) -> dict[str, Any] | None:
    """What ``result.json`` in a run's folder says; none where there is none.

    Raises:
        FileError: it holds what no run writes.
    """
    path = folder / FILE
    try:
        found = read_object(path)
        _Result.model_validate(found)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise FileError(
            f"{path} holds what no run writes ({where}: {first['msg']}); remove it, then resume the run"
        ) from error
    return found
