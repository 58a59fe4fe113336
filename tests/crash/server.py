"""Runs recipes in forked children, one a rank: what takes long to import is imported once, and every child is a process
of its own that can be killed. Reads a job a line, answers with the children's ids, and later with how they ended."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from tutelage.engine.checkpoint import CheckpointFolder
from tutelage.runs import distill


class Events:
    """Writes down what happens, each line by one call of the system: a kill cannot hold any of it back."""

    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, *words: object) -> None:
        os.write(self.file, (" ".join(map(str, words)) + "\n").encode())

    def on_fit_start(self, trainer: Any) -> None:
        self.write("start", trainer.step)

    def on_step_end(self, trainer: Any) -> None:
        self.write("step", trainer.step)

    def around_saves(self) -> None:
        """Every checkpoint is written between two lines, from before its first file to after the last call."""
        draft = CheckpointFolder.draft

        def watched(folder: CheckpointFolder, step: int, *, best: bool) -> Any:
            self.write("save", "begin", step)
            return draft(folder, step, best=best)

        CheckpointFolder.draft = watched  # type: ignore[method-assign, assignment]

    def on_checkpoint(self, trainer: Any) -> None:
        self.write("save", "end", trainer.step)


def child(job: dict[str, Any], rank: int) -> None:
    errors = os.open(f"{job['events']}.{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    if job["ranks"] > 1:
        os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
        os.environ |= {name: str(job["ranks"]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
    listeners = []
    if rank == 0:
        events = Events(job["events"])
        events.around_saves()
        listeners = [events]
    distill(job["recipe"], folder=Path(job["folder"]), resume=True, progress=False, callbacks=listeners)
    Path(f"{job['events']}.modules").write_text("\n".join(sys.modules))


def fork(job: dict[str, Any], rank: int) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child(job, rank)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def learn(path: Path) -> None:
    """Import what a run that ended well had imported, so that the next one need not."""
    for name in path.read_text().splitlines() if path.exists() else []:
        if name not in sys.modules and name != "__mp_main__":
            with contextlib.suppress(Exception):  # some modules are made, not imported
                importlib.import_module(name)


def answer(value: Any) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    answer("ready")
    for line in sys.stdin:
        job = json.loads(line)
        assert threading.active_count() == 1, "a child has one thread: what another holds would stay held"
        children = [fork(job, rank) for rank in range(job["ranks"])]
        answer(children)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        learn(Path(f"{job['events']}.modules"))
        answer(codes)
