"""What a store says of itself: what it belongs to (`Plan`), what was written (`Manifest`), and how these files are read
and held against what is wanted. Every file may come from elsewhere or be damaged: all of it is checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tutelage.engine.checkpoint_files import checksum, sync
from tutelage.engine.needs import LogitForm, LogitScale
from tutelage.recipe.caching import Dtype, Form
from tutelage.untrusted import FileError, read_object

FORMAT = 1
"""Version of the files. A later one is refused."""
CODE = 2
"""Version of what turns outputs into columns: counted up when the same outputs would give other bytes."""

PLAN, MANIFEST, IDS = "plan.json", "manifest.json", "rows.safetensors"

Shape = tuple[Annotated[int, Field(ge=0)], ...]
Count = Field(ge=0, le=2**48)
Json = dict[str, Any]


class StoreError(ValueError):
    """A store that cannot be made, read, or used for this."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TeacherPart(_Part):
    """Whose outputs they are. ``weights`` is the sha256 over every tensor of the state dict."""

    model: str
    weights: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    parameters: int = Count
    flops: int = Field(ge=0)
    description: Json


class SpecPart(_Part):
    """What methods ask a teacher for before the first step; see `tutelage.engine.spec.ModelSpec`.

    ``modules``: every path and whether it runs; ``logits``: shape of a row's logits, none where none are kept;
    ``hints``: numbers and words by which a feature's layout is told.
    """

    outputs: int | None = Field(ge=1)
    logits: Shape | None
    head: str | None
    stages: tuple[str, ...]
    modules: tuple[tuple[str, bool], ...]
    infos: tuple[tuple[str, str, Shape | None, float], ...]
    shapes: dict[str, Shape]
    hints: dict[str, str | int]


class TokensPart(_Part):
    """How text became rows of tokens. ``tokenizer`` is its fingerprint; ``fingerprint`` that of the packing, by which a
    row's id stands for the same tokens."""

    tokenizer: str
    max_length: int = Field(ge=1)
    packing: str
    fingerprint: str


class DataPart(_Part):
    """The rows: those of the training part. ``ids`` is the sha256 of their ids, ascending."""

    path: str
    fingerprint: str
    rows: int = Field(ge=1, le=2**40)
    ids: str
    tokens: TokensPart | None = None


class ViewsPart(_Part):
    """The views of each row: numbers 0 to ``number`` - 1."""

    changes: tuple[Json, ...]
    seed: int = Field(ge=0)
    number: int = Field(ge=1, le=2**31)


class FormPart(_Part):
    """How logits are kept; see `tutelage.recipe.caching.CacheConfig`."""

    form: Form
    k: int | None = Field(ge=1)
    scale: Literal["raw", "log_probs"]
    dtype: Dtype
    draw_temperature: float = Field(gt=0)
    seed: int = Field(ge=0)

    @property
    def logit_form(self) -> LogitForm | None:
        """As `Offers` names it."""
        return None if self.form == "none" else self.form

    @property
    def logit_scale(self) -> LogitScale:
        return "raw" if self.form == "dense" and self.scale == "raw" else "log_probs"


class Plan(_Part):
    """All that decides on the bytes of a store. ``made_by`` alone is no reason to refuse: versions and device."""

    format: int = Field(FORMAT, ge=1)
    code: int
    task: str
    data: DataPart
    views: ViewsPart
    taps: tuple[str, ...]
    cache: FormPart
    precision: str
    batch_size: int = Field(ge=1)
    shard_rows: int = Field(ge=1)
    teacher: TeacherPart
    spec: SpecPart
    made_by: dict[str, str]

    @property
    def total(self) -> int:
        """Rows of all shards: every view of every row."""
        return self.data.rows * self.views.number

    @property
    def shards(self) -> int:
        return -(-self.total // self.shard_rows)

    def span(self, shard: int) -> range:
        """The places (view number · rows + row) that a shard holds."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.total))

    @cached_property
    def digest(self) -> str:
        return checksum(self.model_dump(mode="json", exclude={"made_by"}))

    def mark(self, shard: int) -> str:
        """What a shard carries inside, so that it cannot be taken for another one."""
        return f"{self.digest}/{shard:08d}"


class ShardRecord(_Part):
    """One file: its rows, size and checksum; of the first shard also what its form lost (`ErrorMeter`)."""

    rows: int = Field(ge=1)
    bytes: int = Field(ge=8)
    sha256: str
    error: dict[str, float] = {}


class SplitMetrics(_Part):
    """The teacher's own metrics on held-out rows, and which rows those were."""

    fingerprint: str
    values: dict[str, float]


class Manifest(_Part):
    """A finished store."""

    plan: Plan
    shards: tuple[ShardRecord, ...]
    metrics: dict[str, SplitMetrics]

    @property
    def error(self) -> dict[str, float]:
        return self.shards[0].error


P = TypeVar("P", bound=_Part)


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def record_name(shard: int) -> str:
    return f"shard-{shard:05d}.json"


def text_of(part: _Part) -> str:
    """A part as JSON with a checksum of its own."""
    content = part.model_dump(mode="json")
    return json.dumps({"checksum": checksum(content), "content": content}, indent=1, allow_nan=False) + "\n"


def write_part(path: Path, part: _Part) -> None:
    write_whole(path, text_of(part).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Written beside, on disk for good, and renamed: complete or absent."""
    # One name: the writer holds the lock, and what a killed one left is replaced.
    beside = path.with_name(f".tmp-{path.name}")
    beside.unlink(missing_ok=True)  # never written through a link that lies there
    beside.write_bytes(content)
    sync(beside)
    beside.replace(path)
    sync(path.parent)


def read_part(kind: type[P], path: Path) -> P:
    """A part from its file.

    Raises:
        FileNotFoundError: there is none.
        StoreError: it is damaged, or of a later version.
    """
    try:
        found = read_object(path)
        content = found["content"]
        _check_version(path, content)
        if found["checksum"] != checksum(content):
            raise StoreError(f"{path} is damaged: its content is not what was written; {_AGAIN}")
        return kind.model_validate_json(json.dumps(content))
    except FileNotFoundError:
        raise
    except (FileError, KeyError, TypeError, RecursionError, OSError, ValidationError) as error:
        reason = f"{len(error.errors())} fields" if isinstance(error, ValidationError) else error
        raise StoreError(f"{path} is damaged ({reason}); {_AGAIN}") from error


_AGAIN = "`tutelage cache` into the same folder makes again what is not whole"


def _check_version(path: Path, content: Any) -> None:
    plan = content.get("plan", content) if isinstance(content, dict) else {}
    version = plan.get("format") if isinstance(plan, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise StoreError(
            f"{path} has format {version}; this tutelage reads up to {FORMAT}. Install a newer one"
        )


def difference(found: Plan, wanted: Plan) -> tuple[str, Any, Any] | None:
    """The first field in which two plans differ, and both values; versions and device do not count."""
    left, right = (part.model_dump(mode="json", exclude={"made_by"}) for part in (found, wanted))
    return next(_differences(left, right, ""), None)


def _differences(left: Any, right: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(left, dict) and isinstance(right, dict):
        for key in {**left, **right}:
            yield from _differences(left.get(key), right.get(key), f"{path}.{key}" if path else str(key))
    elif left != right:
        yield path, left, right
