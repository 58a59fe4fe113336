"""A teacher that is a folder of stored outputs, keyed by (index, view): the answers to exactly the pixels that the
student sees. Files are mapped into memory, and of them only the wanted rows are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tutelage.data.source import tensor_digest
from tutelage.engine.generation import Generation, Prompt
from tutelage.engine.needs import Offers
from tutelage.engine.spec import ModelSpec
from tutelage.engine.teacher import Grad
from tutelage.engine.tracing import TapInfo
from tutelage.engine.types import Batch, Outputs
from tutelage.engine.writing import file_sha256
from tutelage.recipe.generation import GenerationConfig
from tutelage.teachers.forms import Column, Columns, Layout
from tutelage.teachers.manifest import (
    IDS,
    MANIFEST,
    PLAN,
    Manifest,
    Plan,
    SpecPart,
    StoreError,
    read_part,
    shard_name,
)

_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Types that torch can select rows of, by size: not all stored ones are."""


class MissingRowsError(StoreError, KeyError):
    """Rows that a store does not hold."""

    __str__ = Exception.__str__  # KeyError's own would quote the message


class Store:
    """A finished store. Opening it reads the manifest, the ids and every shard's header; checksums of the shards are
    `verify`'s, since to read all of a large store takes longer than many a run.

    Args:
        folder: what `tutelage cache` wrote.
        name: what messages call the teacher.

    Raises:
        StoreError: there is none, it is not finished, damaged, or of a later version.
    """

    def __init__(self, folder: Path, name: str = "teacher") -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self.plan = self.manifest.plan
        try:
            self.layout = layout_of(self.plan)
            self.spec = spec_of(self.plan, name)
            columns = self.layout.columns
        except (KeyError, TypeError, ValueError, AssertionError, AttributeError) as error:
            raise StoreError(
                f"{self.folder / MANIFEST} contradicts itself: {error}; make the store anew"
            ) from error
        self.ids = read_ids(self.folder, self.plan)
        self.shards = [_map_shard(self.folder, self.manifest, i, columns) for i in range(self.plan.shards)]
        self.offers = offers_of(self.plan)

    @property
    def taps(self) -> tuple[str, ...]:
        return self.plan.taps

    def metrics(self, split: str, fingerprint: str) -> dict[str, float]:
        """The teacher's own metrics on held-out rows; empty where they were not measured on these very rows."""
        found = self.manifest.metrics.get(split)
        return dict(found.values) if found is not None and found.fingerprint == fingerprint else {}

    def read(
        self, index: Tensor, view: Tensor, taps: tuple[str, ...] = (), *, logits: bool = True
    ) -> Outputs:
        """Outputs of rows, float32 on the device of ``index``: logits as the store keeps them (a tensor, `TopK` or
        `Sampled`), and the features of ``taps``.

        Args:
            index, view: ids of the rows and numbers of their views, ``[rows]`` int64.
            logits: False: they are not read.

        Raises:
            MissingRowsError: a row that is not stored (a KeyError); it names index and view.
            StoreError: a tap that is not stored.
        """
        unknown = [tap for tap in taps if tap not in self.layout.taps]
        if unknown:
            raise StoreError(
                f"the store {self.folder} keeps no tap {unknown[0]!r}; it has {', '.join(self.taps) or 'none'}"
            )
        places = self._places(index.cpu(), view.cpu())
        columns = self._rows(places, self.layout.needed(taps, logits))
        columns = {name: column.to(index.device, non_blocking=True) for name, column in columns.items()}
        return self.layout.decode(columns, taps, logits)

    def _places(self, index: Tensor, view: Tensor) -> Tensor:
        """Where rows lie among all rows of all shards."""
        rank = torch.searchsorted(self.ids, index).clamp(max=len(self.ids) - 1)
        known = (self.ids[rank] == index) & (view >= 0) & (view < self.plan.views.number)
        if not bool(known.all()):
            missing = (~known).nonzero().squeeze(1)
            first = (int(index[missing[0]]), int(view[missing[0]]))
            raise MissingRowsError(
                f"{len(missing)} rows were never stored in {self.folder}; the first is (index, view) = {first}; "
                f"it holds views 0 to {self.plan.views.number - 1} of {len(self.ids)} rows"
            )
        return view * len(self.ids) + rank

    def _rows(self, places: Tensor, names: list[str]) -> Columns:
        """Columns of the rows at ``places``, in their order: one selection a shard and column."""
        places, order = places.sort()
        shards = torch.div(places, self.plan.shard_rows, rounding_mode="floor")
        touched, counts = torch.unique(shards, return_counts=True)
        rows = torch.split(places % self.plan.shard_rows, counts.tolist())
        parts = list(zip(touched.tolist(), rows, strict=True))
        parts = parts or [(0, places)]  # no rows at all have the columns' shapes too
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        return {name: self._selected(name, parts, back) for name in names}

    def _selected(self, name: str, parts: list[tuple[int, Tensor]], back: Tensor) -> Tensor:
        column = self.layout.columns[name]
        plain = _AS_INTEGERS[column.dtype.itemsize]
        if len(parts) == 1:  # the rows in their own order at once
            shard, rows = parts[0]
            return self.shards[shard][name].view(plain).index_select(0, rows[back]).view(column.dtype)
        found = [self.shards[shard][name].view(plain).index_select(0, rows) for shard, rows in parts]
        return torch.cat(found).index_select(0, back).view(column.dtype)


class StoredTeacher:
    """Answers from a store; no model runs."""

    def __init__(self, store: Store) -> None:
        self.store, self.spec, self.offers = store, store.spec, store.offers
        self.module = None

    def outputs(
        self, batch: Batch, taps: tuple[str, ...] = (), grad: Grad = "none", *, logits: bool = True
    ) -> Outputs:
        """See `tutelage.engine.teacher.Teacher`.

        Raises:
            StoreError: gradients are asked for, the batch has no index and view, or its rows are not stored.
        """
        if grad != "none":
            raise StoreError(f"a stored teacher gives no gradients (grad={grad!r}); use a live one")
        if batch.index is None or batch.view is None:
            raise StoreError("a stored teacher is read by (index, view); this batch has none")
        return self.store.read(batch.index, batch.view, taps, logits=logits)

    def generate(self, prompts: Sequence[Prompt], options: GenerationConfig, seed: int) -> list[Generation]:
        """Raises:
        StoreError: always.
        """
        raise StoreError("a store holds outputs for the data's rows and writes no text; give a live teacher")


def verify(folder: Path) -> Iterator[tuple[str, str | None]]:
    """Every file of a finished store, and what is wrong with it, if anything: the checksums of all of it are taken.

    Raises:
        StoreError: there is no manifest to hold the files against, or it is damaged.
    """
    manifest = _read_manifest(folder)
    yield MANIFEST, None
    try:
        read_ids(folder, manifest.plan)
        yield IDS, None
    except StoreError as error:
        yield IDS, str(error)
    for shard, record in enumerate(manifest.shards):
        path = folder / shard_name(shard)
        if not path.is_file():
            yield path.name, "is missing"
        elif path.stat().st_size != record.bytes:
            yield path.name, f"has {path.stat().st_size} bytes, not {record.bytes}"
        else:
            same = file_sha256(path) == record.sha256
            yield path.name, None if same else "does not hold what was written"


def layout_of(plan: Plan) -> Layout:
    return Layout(plan.cache, plan.spec.logits, {tap: plan.spec.shapes[tap] for tap in plan.taps})


def offers_of(plan: Plan) -> Offers:
    """What a store made by a plan can give."""
    return Offers(
        logits=plan.cache.logit_form,
        scale=plan.cache.logit_scale,
        taps=bool(plan.taps),
        live=False,
        input_gradient=False,
        trainable=False,
    )


def spec_part(spec: ModelSpec, logits: tuple[int, ...] | None) -> SpecPart:
    """What a store keeps of a live teacher's spec."""
    assert spec.module is not None
    modules = spec.module.named_modules(remove_duplicate=False)
    hints = {name: getattr(spec.module, name, None) for name in ("output_fmt", "num_prefix_tokens")}
    return SpecPart(
        outputs=spec.outputs,
        logits=logits,
        head=spec.head,
        stages=spec.stages(),
        modules=tuple(
            (path, type(module).forward is not nn.Module.forward) for path, module in modules if path
        ),
        infos=tuple(spec.infos),
        shapes=spec.shapes,
        hints={
            name: int(hint) if isinstance(hint, int) else str(hint) for name, hint in hints.items() if hint
        },
    )


def spec_of(plan: Plan, name: str) -> ModelSpec:
    """What methods ask a teacher for. Its module is a tree of the teacher's paths with nothing in it, so that patterns
    of taps and what tells a feature's layout mean what they mean of the model itself."""
    part = plan.spec
    tree = nn.Module()
    for path, runs in part.modules:
        parent, _, child = path.rpartition(".")
        tree.get_submodule(parent).add_module(child, nn.Identity() if runs else nn.Module())
    for hint, value in part.hints.items():
        setattr(tree, hint, value)
    return ModelSpec(
        name,
        tree,
        part.outputs,
        part.head,
        plan.teacher.mean,
        plan.teacher.std,
        dict(part.shapes),
        tuple(TapInfo(*info) for info in part.infos),
        part.stages,
        kept=plan.taps,
        weights=plan.teacher.weights,
    )


def read_ids(folder: Path, plan: Plan) -> Tensor:
    """Ids of the stored rows, ascending."""
    try:
        ids: Tensor = load_file(folder / IDS)["index"]
        if ids.shape == (plan.data.rows,) and tensor_digest(ids) == plan.data.ids:
            return ids.clone()
        reason = "its content is not what was written"
    except (SafetensorError, OSError, KeyError) as error:
        reason = str(error)
    raise StoreError(
        f"{folder / IDS} is damaged ({reason}); `tutelage cache` into the same folder writes it again"
    )


def _read_manifest(folder: Path) -> Manifest:
    folder = Path(folder)
    try:
        manifest = read_part(Manifest, folder / MANIFEST)
    except FileNotFoundError:
        if (folder / PLAN).exists():
            raise StoreError(
                f"the store {folder} is not finished; `tutelage cache` into the same folder goes on with it"
            ) from None
        raise StoreError(f"{folder} holds no store (no {MANIFEST}); `tutelage cache` makes one") from None
    rows = [shard.rows for shard in manifest.shards]
    if len(rows) != manifest.plan.shards or rows != [len(manifest.plan.span(i)) for i in range(len(rows))]:
        raise StoreError(f"{folder / MANIFEST} contradicts itself: its shards do not hold its rows")
    return manifest


def _map_shard(folder: Path, manifest: Manifest, shard: int, columns: dict[str, Column]) -> Columns:
    """A shard's tensors, mapped; nothing of them is read yet."""
    path, record = folder / shard_name(shard), manifest.shards[shard]
    try:
        size = path.stat().st_size
        if size != record.bytes:
            raise StoreError(f"{path} is damaged: it has {size} bytes, not {record.bytes}; {_MEND}")
        with safe_open(path, framework="pt") as opened:
            mark = (opened.metadata() or {}).get("tutelage")
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} is damaged or missing ({error}); {_MEND}") from error
    if mark != manifest.plan.mark(shard):
        raise StoreError(f"{path} belongs to another store, or is another shard of this one; {_MEND}")
    wanted = {name: (column.dtype, (record.rows, *column.shape)) for name, column in columns.items()}
    if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()} != wanted:
        raise StoreError(f"{path} does not hold the columns that the manifest says; {_MEND}")
    return found


_MEND = "`tutelage cache` into the same folder makes it anew"
