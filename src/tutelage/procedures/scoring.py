"""How likely a model holds every row of a corpus: one number a row, found once and kept in shards.

A shard is a fixed range of the rows, and its tensors depend on the plan alone. So a run that is killed loses the shards
that it was at, and one that goes on, with as many ranks or with others, ends with the same numbers.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tutelage.data import TokenSource
from tutelage.engine.checkpoint_files import checksum
from tutelage.engine.interrupt import Interrupted, StopRequest
from tutelage.engine.progress import rows_progress
from tutelage.engine.writing import writing
from tutelage.procedures.run import Run
from tutelage.tasks.token_losses import label_nll
from tutelage.teachers.local import LocalTeacher
from tutelage.teachers.manifest import write_whole
from tutelage.untrusted import FileError, read_object

FORMAT = 1
PLAN = "plan.json"
SHARD_BATCHES = 16
"""Batches of a shard: what a kill loses at most."""


@dataclass(frozen=True)
class Scores:
    """Of every row, in the source's order: id, the sum of its tokens' negative log-likelihoods in nats (float64), and
    how many tokens count; all ``[rows]``. ``seconds`` are those of all ranks, and of runs before this one."""

    ids: Tensor
    nll: Tensor
    tokens: Tensor
    seconds: float

    def per_row(self, *, normalise: bool) -> Tensor:
        """The mean over a row's tokens, or their sum."""
        return self.nll / self.tokens if normalise else self.nll


def score_rows(
    run: Run, model: LocalTeacher, source: TokenSource, folder: Path | None, *, batch_size: int
) -> Scores:
    """Score every row once. Ranks share the shards; every rank gets all scores. Logits of all tokens are never made.

    Args:
        folder: where shards are kept; what another run left there is taken over. None: nothing is written, and every
            rank scores all rows.

    Raises:
        FileError: the folder holds scores of something else: the field that differs is named.
        ValueError: a row without a token that counts (`counted_rows` finds the others), or whose score is not finite.
        Interrupted: the run was asked to stop; it can be resumed.
        UnwrittenError: the disk refuses.
    """
    scoring = _Scoring(run, model, source, batch_size)
    if folder is None:
        return _joined([scoring.shard(number) for number in range(scoring.shards)])
    run.runtime.on_main(lambda: _begin(folder, scoring.plan))
    _fill(run, scoring, folder)
    return _joined([scoring.read(folder, number) for number in range(scoring.shards)])


def check_scores(
    run: Run, model: LocalTeacher, source: TokenSource, folder: Path, *, batch_size: int
) -> None:
    """See, before anything is spent, that the scores in a folder, if any, are those that `score_rows` would write.

    Raises:
        FileError: as `score_rows`.
    """
    _refuse_other(folder, _Scoring(run, model, source, batch_size).plan)


def counted_rows(source: TokenSource) -> TokenSource:
    """The rows that have a token that counts; the source itself where all have one.

    Raises:
        ValueError: there is none.
    """
    counts = source.teaching
    if not counts.any():
        raise ValueError(
            f"none of {len(source)} rows has a token that counts, so none has a score; give longer documents"
        )
    return source if counts.all() else source.keep(np.flatnonzero(counts))


class _Scoring:
    """What is scored, and how it is cut."""

    def __init__(self, run: Run, model: LocalTeacher, source: TokenSource, batch_size: int) -> None:
        self.run, self.model, self.source, self.batch_size = run, model, source, batch_size
        tokenizer = run.data.info.tokenizer
        assert tokenizer is not None
        self.plan: dict[str, Any] = {
            "format": FORMAT,
            "model": model.spec.fingerprint(),
            "tokenizer": tokenizer.fingerprint,
            "max_length": run.recipe.data.max_length,
            "packing": run.recipe.data.packing,
            "rows": len(source),
            "fingerprint": source.fingerprint,
            "precision": run.recipe.train.precision,
            "batch_size": batch_size,
            "shard_rows": batch_size * SHARD_BATCHES,
        }
        self.shards = -(-len(source) // self.plan["shard_rows"])

    def span(self, shard: int) -> range:
        size = self.plan["shard_rows"]
        return range(shard * size, min((shard + 1) * size, len(self.source)))

    def shard(self, shard: int) -> Scores:
        """The scores of a shard's rows."""
        span, started = self.span(shard), time.perf_counter()
        parts = [
            self._batch(range(start, min(start + self.batch_size, span.stop)))
            for start in range(span.start, span.stop, self.batch_size)
        ]
        index, nll, tokens = (torch.cat(part) for part in zip(*parts, strict=True))
        return Scores(index, nll, tokens, time.perf_counter() - started)

    def _batch(self, positions: range) -> tuple[Tensor, Tensor, Tensor]:
        batch = self.source.fetch(positions).to(self.run.runtime.device)
        with torch.no_grad(), self.run.runtime.autocast():
            outputs = self.model.outputs(batch)
        nll = label_nll(outputs, batch).double().sum(1).cpu()
        assert batch.index is not None
        assert batch.mask is not None
        index, tokens = batch.index.cpu(), batch.mask.sum(1).cpu()
        for row, value, count in zip(index.tolist(), nll.tolist(), tokens.tolist(), strict=True):
            if not count:
                raise ValueError(f"row {row} has no token that counts, and so no score; leave it out")
            if not torch.isfinite(torch.tensor(value)):
                raise ValueError(
                    f"row {row} has the score {value} under {self.model.spec.name}; allowed: finite numbers"
                )
        return index, nll, tokens

    def write(self, folder: Path, shard: int) -> None:
        """The tensors first, then the record that says they are there."""
        found = self.shard(shard)
        content = save({"ids": found.ids, "nll": found.nll, "tokens": found.tokens})
        record = {"plan": checksum(self.plan), "sha256": sha256(content).hexdigest()}
        with writing(folder / _file(shard)):
            write_whole(folder / _file(shard), content)
            write_whole(
                folder / _record(shard),
                _json(record | {"rows": len(self.span(shard)), "seconds": found.seconds}),
            )

    def read(self, folder: Path, shard: int) -> Scores:
        """A shard from its files.

        Raises:
            FileNotFoundError, FileError: it is not there, or not what was written.
        """
        record = read_object(folder / _record(shard))
        content = (folder / _file(shard)).read_bytes()
        same = record.get("sha256") == sha256(content).hexdigest()
        if not same or record.get("plan") != checksum(self.plan):
            raise FileError(
                f"{folder / _file(shard)} does not hold what was written; remove it to score its rows anew"
            )
        try:
            found = load(content)
            return Scores(found["ids"], found["nll"], found["tokens"], float(record["seconds"]))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise FileError(f"{folder / _file(shard)} is damaged: {error}; remove it") from error

    def has(self, folder: Path, shard: int) -> bool:
        """Whether a shard is there and whole."""
        try:
            self.read(folder, shard)
        except (FileNotFoundError, FileError):
            return False
        return True


def _fill(run: Run, scoring: _Scoring, folder: Path) -> None:
    """This rank's shards of those that are missing; ranks leave together."""
    runtime, name = run.runtime, scoring.model.spec.name
    bar = rows_progress(f"{name} scores", len(scoring.source), visible=run.show_progress and runtime.is_main)
    try:
        with StopRequest(runtime) as stop:
            for first in range(0, scoring.shards, runtime.world):
                own = first + runtime.rank
                if own < scoring.shards and not scoring.has(folder, own):
                    scoring.write(folder, own)
                bar.update(scoring.span(min(first + runtime.world, scoring.shards) - 1).stop)
                if stop.requested(first // runtime.world):
                    raise Interrupted(stop.signal, first // runtime.world)
    finally:
        bar.close()
    runtime.barrier()


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    """Say what the folder is to hold, or see that it says so already."""
    path = folder / PLAN
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_whole(path, _json(plan))
    _refuse_other(folder, plan)


def _refuse_other(folder: Path, plan: dict[str, Any]) -> None:
    if not (folder / PLAN).exists():
        return
    found = read_object(folder / PLAN)
    other = [field for field, value in plan.items() if found.get(field) != value]
    if other:
        field = other[0]
        raise FileError(
            f"{folder} holds scores of something else: {field} is {found.get(field)!r} there and {plan[field]!r} here; "
            "give another folder (method.scores), or remove it to score anew"
        )


def _joined(parts: list[Scores]) -> Scores:
    return Scores(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.nll for part in parts]),
        torch.cat([part.tokens for part in parts]),
        sum(part.seconds for part in parts),
    )


def _file(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def _record(shard: int) -> str:
    return f"shard-{shard:05d}.json"


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
