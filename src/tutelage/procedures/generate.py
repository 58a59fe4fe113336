"""Texts that a teacher writes once: each is on disk before it is used, and a run that goes on writes none twice."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.data.documents import Documents
from tutelage.data.tokens import TokenSource
from tutelage.engine.generation import Generation, Prompt, batches
from tutelage.engine.interrupt import Interrupted, StopRequest
from tutelage.engine.progress import rows_progress
from tutelage.engine.rng import derive_seed
from tutelage.engine.teacher import Teacher
from tutelage.engine.writing import append, write_whole
from tutelage.procedures.run import Run
from tutelage.recipe.generation import GenerationConfig
from tutelage.untrusted import FileError, file_name, read_object

ABOUT = "about.json"


class DamagedAnswersWarning(UserWarning):
    """Lines of a journal that cannot be read; their texts are written anew."""


def prompts_of(source: TokenSource, tokens: int) -> list[Prompt]:
    """What a model may go on from in some rows: of raw text the first tokens of every document's piece that stands in a
    row; where a part of each document counts alone (chats, completions) all that stands before that part.

    A piece of one token, and one of which nothing or its very first token counts, gives no prompt.

    Args:
        tokens: of raw text, at most; one token of the piece stays behind.

    Returns:
        In the order of the rows. The id is the piece's number in the rows' layout.
    """
    layout, documents, found = source.layout, source.documents, []
    for number in source.piece_numbers().tolist():
        start = int(documents.offsets[layout.document[number]] + layout.start[number])
        length = int(layout.length[number])
        if documents.counted is None:
            kept = min(tokens, length - 1)
        else:
            counts = documents.counted[start : start + length]
            is_begin = layout.start[number] == 0
            kept = int(np.argmax(counts)) if is_begin and counts.any() else 0
        if kept > 0:
            found.append(Prompt(number, tuple(documents.tokens[start : start + kept].tolist())))
    return found


def written_documents(prompts: Sequence[Prompt], answers: Sequence[Generation]) -> Documents:
    """A document for each prompt with the text after it; what was written counts."""
    tokens, counted = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens.append(np.asarray([*prompt.tokens, *answer.tokens], dtype=np.int32))
        counted.append(np.arange(len(tokens[-1])) >= len(prompt.tokens))
    return Documents.of(tokens, counted)


def write_texts(
    run: Run, name: str, teacher: Teacher, prompts: Sequence[Prompt], options: GenerationConfig
) -> list[Generation]:
    """What the teacher writes after each prompt, in their order, on every rank.

    Prompts are written in batches that depend on them and ``options.batch_size`` alone; rank r has every batch whose
    number leaves r over when divided by the ranks. So a run that was stopped, or goes on with other ranks, ends with
    the bits of one that was not. Answers of a batch are in ``generated/<name>`` of the run's folder before the next
    batch begins; without a folder nothing is kept.

    Args:
        name: of the job; with the run's seed it decides on what is drawn.

    Raises:
        GenerationError: see `tutelage.engine.generation.check_prompts`.
        FileError: the folder holds texts of another teacher, other prompts or other options.
        Interrupted: the run was asked to stop; it can be resumed.
        UnwrittenError: the disk refuses.
    """
    seed = derive_seed(run.seed, "generate", name)
    if run.folder is None:
        with run.runtime.autocast():
            return teacher.generate(prompts, options, seed)
    journal = Journal(run.folder / "generated" / file_name(name, "the job"))
    about = {
        "prompts": _digest(prompts),
        "options": options.model_dump(mode="json"),
        "seed": seed,
        "teacher": teacher.spec.fingerprint(),
    }
    run.runtime.on_main(lambda: journal.open(about))
    _write_missing(run, name, teacher, batches(prompts, options.batch_size), options, seed, journal)
    found = journal.read()
    return [found[prompt.id] for prompt in prompts]


def _write_missing(
    run: Run,
    name: str,
    teacher: Teacher,
    parts: Sequence[Sequence[Prompt]],
    options: GenerationConfig,
    seed: int,
    journal: Journal,
) -> None:
    """This rank's share of what the journal lacks; ranks leave together."""
    runtime = run.runtime
    done = journal.read().keys()
    runtime.barrier()  # nobody reads what another one has begun to write
    bar = rows_progress(f"{name} writes", sum(map(len, parts)), visible=run.show_progress and runtime.is_main)
    try:
        with StopRequest(runtime) as stop:
            for first in range(0, len(parts), runtime.world):
                own = parts[first + runtime.rank] if first + runtime.rank < len(parts) else ()
                if any(prompt.id not in done for prompt in own):
                    with runtime.autocast():
                        answers = teacher.generate(own, options, seed)
                    journal.append(runtime.rank, [each for each in answers if each.prompt not in done])
                bar.update(sum(map(len, parts[: first + runtime.world])))
                if stop.requested(first // runtime.world):
                    raise Interrupted(stop.signal, first // runtime.world)
    finally:
        bar.close()
    runtime.barrier()


class Journal:
    """Answers of one job: JSON lines with a checksum each, in one file a rank, which only ever grow; ``about.json``
    says what they answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, about: dict[str, Any]) -> None:
        """Rank 0 alone, before any other call: hold the folder against ``about``, and cut off a line that a kill left
        half written. Warns of other lines that are damaged.

        Raises:
            FileError: it belongs to another job.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / ABOUT
        if not path.exists():
            write_whole(path, json.dumps(about, indent=1))
        found = read_object(path)
        other = [field for field, value in about.items() if found.get(field) != value]
        if other:
            raise FileError(
                f"{self.folder} holds texts of another job ({', '.join(other)} differ); remove the folder to have "
                "them written anew"
            )
        damaged = sum(map(_mend, self._parts()))
        if damaged:
            warnings.warn(
                f"{self.folder}: {damaged} damaged lines are left out, and their texts written anew",
                DamagedAnswersWarning,
                stacklevel=2,
            )

    def append(self, rank: int, answers: Sequence[Generation]) -> None:
        """Write answers behind those of the rank's file, and wait until the disk has them."""
        append(self.folder / f"part-{rank}.jsonl", b"".join(map(_line, answers)))

    def read(self) -> dict[int, Generation]:
        """All answers that are whole, by the id of their prompt."""
        lines = (line for path in self._parts() for line in path.read_bytes().splitlines())
        answers = (_parsed(line) for line in lines)
        return {answer.prompt: answer for answer in answers if answer is not None}

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.jsonl"))


def _mend(path: Path) -> int:
    """Cut off what follows the last whole line. Gives the number of whole lines that are damaged."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return sum(_parsed(line) is None for line in content[:whole].splitlines())


def _line(answer: Generation) -> bytes:
    content = {"prompt": answer.prompt, "tokens": list(answer.tokens), "ended": answer.ended}
    return json.dumps(content | {"crc32": _checksum(content)}).encode() + b"\n"


def _parsed(line: bytes) -> Generation | None:
    """The answer of a line; None where the line is damaged."""
    try:
        content = json.loads(line)
        if content.pop("crc32") != _checksum(content):
            return None
        return Generation(content["prompt"], tuple(content["tokens"]), content["ended"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _digest(prompts: Sequence[Prompt]) -> str:
    found = sha256()
    for prompt in prompts:
        found.update(json.dumps([prompt.id, *prompt.tokens]).encode() + b"\n")
    return found.hexdigest()
