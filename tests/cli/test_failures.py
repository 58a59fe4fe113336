"""Errors on the command line: one short message, an exit code of its own, or a traceback where nobody foresaw it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from typed import tutelage

from tutelage.cli.failures import exit_code, report_failure


def test_a_wrong_recipe_is_two_with_every_error_and_no_traceback(runs: Any) -> None:
    done = tutelage("run", "digits", "method=nkdd", "train.epoch=3")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: digits: 2 errors")
    assert "did you mean `nkd`" in done.stderr
    assert "did you mean epochs?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not runs.distill.calls


@pytest.mark.parametrize(
    "words", [["--debug", "run", "nope"], ["run", "nope", "--debug"], ["run", "--debug", "nope"]]
)
def test_debug_shows_the_traceback_wherever_it_stands(words: list[str]) -> None:
    done = tutelage(*words)
    assert done.exit_code == 2
    assert "Traceback" in done.stderr
    assert "error: nope" in done.stderr


def ours(error: Exception) -> Exception:
    """The error as if a line of the package had raised it."""
    try:
        exec("raise error", {"__name__": "tutelage.somewhere", "error": error})
    except Exception as raised:
        return raised
    raise AssertionError


def kinds() -> dict[str, tuple[Exception, int | None]]:
    from tutelage.engine.interrupt import Interrupted
    from tutelage.engine.needs import PairingError
    from tutelage.runs.folder import FolderError

    return {
        "pairing": (PairingError("unfit"), 3),
        "folder": (FolderError("taken"), 2),
        "ctrl-c": (Interrupted(2, 10), 130),
        "sigterm": (Interrupted(15, 10), 143),
        "wrong value": (ours(ValueError("labels out of range")), 2),
        "no run": (ours(FileNotFoundError("holds no run")), 2),
        "failed": (ours(RuntimeError("diverged")), 1),
        "disk": (OSError("disk full"), 1),
        "permission": (PermissionError("no permission"), 1),
        "extra": (ModuleNotFoundError("needs transformers: pip install 'tutelage[llm]'"), 1),
        "unforeseen value": (ValueError("too many values to unpack"), None),
        "unforeseen": (ours(KeyError("x")), None),
        "missing module": (ours(ModuleNotFoundError("No module named 'x'")), None),
    }


@pytest.mark.parametrize("kind", kinds())
def test_each_error_has_its_exit_code(kind: str, runs: Any) -> None:
    error, code = kinds()[kind]
    assert exit_code(error) == code
    runs.distill.outcome = error
    done = tutelage("run", "digits")
    if code is None:
        assert done.exception is error
    else:
        assert done.exit_code == code
        last = done.stderr.splitlines()[-1]
        assert last == f"error: {error}" if code < 128 else last.startswith("stopped: by SIG")
        assert done.stdout == "chatter from deep inside\n"


def test_of_several_processes_one_complains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others, which fail alike or because of it, are silent."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from tutelage.engine.runtime import RankError

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}.items():
        monkeypatch.setenv(name, str(value))
    assert report_failure(ours(ValueError("rows are missing")), debug=False) == 2
    assert capsys.readouterr().err == "error: rows are missing\n"
    assert report_failure(ours(ValueError("rows are missing")), debug=False) == 2
    assert report_failure(RankError("ValueError on rank 0: rows are missing"), debug=False) == 1
    assert report_failure(RuntimeError("connection closed by peer"), debug=False) == 1
    assert capsys.readouterr() == ("", "")


def test_an_unforeseen_error_keeps_its_traceback() -> None:
    code = (
        "import sys; sys.argv = ['tutelage', 'recipes']; import tutelage.recipe as r\n"
        "def broken(): raise KeyError('surprise')\n"
        "r.shipped = broken\nfrom tutelage.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "surprise" in done.stderr
