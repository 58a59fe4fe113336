"""Errors on the command line: which are a user's to mend, and the exit code of each."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

from tutelage.cli.output import complain
from tutelage.cli.processes import one_complains

FAILED, WRONG, UNFIT = 1, 2, 3

_FOLLOWS = {"tutelage.engine.runtime.RankError"}

_UNFIT = {"tutelage.engine.needs.PairingError"}
_WRONG = {"tutelage.runs.folder.FolderError"}
_STOPPED = {"tutelage.engine.interrupt.Interrupted"}


def report_failure(error: Exception, *, debug: bool) -> int | None:
    """Print the error in short, with its traceback where ``debug``, and return its exit code.

    Of several processes that fail, one prints. None, and nothing printed, for an error that nobody foresaw: its
    traceback is what helps.
    """
    code = exit_code(error)
    with one_complains(follower=bool(_names(error) & _FOLLOWS)) as speaks:
        if not speaks:
            return FAILED if code is None else code
        if code is None:
            return None
        if debug:
            traceback.print_exception(error, file=sys.stderr)
        message = str(error) or type(error).__name__
        complain("stopped", message.removeprefix("stopped ")) if code > 128 else complain("error", message)
        return code


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: Any = None,
) -> None:
    """What `warnings.showwarning` becomes: our own warnings in short, others with the line that they come from."""
    ours = Path(filename).is_relative_to(Path(__file__).parent.parent)
    complain("warning", str(message) if ours else f"{filename}:{lineno}: {category.__name__}: {message}")


def exit_code(error: Exception) -> int | None:
    """1 failed, 2 wrong input, 3 unfit together, 128 + signal stopped, None unforeseen.

    Errors are known by name, so that none of their modules is imported for it.
    """
    names = _names(error)
    if names & _STOPPED:
        return 128 + int(getattr(error, "signal", 2))
    if names & _UNFIT:
        return UNFIT
    if names & _WRONG:
        return WRONG
    if isinstance(error, ImportError):
        return FAILED if "tutelage[" in str(error) else None
    if _is_ours(error) and isinstance(error, ValueError | FileNotFoundError):
        return WRONG
    return (
        FAILED
        if isinstance(error, OSError) or (_is_ours(error) and isinstance(error, RuntimeError))
        else None
    )


def _names(error: Exception) -> set[str]:
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}


def _is_ours(error: Exception) -> bool:
    """Whether it was raised on purpose: of a class of ours, or by a line of ours."""
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    return any(name.partition(".")[0] == "tutelage" for name in (type(error).__module__, raised_in))
