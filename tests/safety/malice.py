"""Files that would run something if they were unpickled, and the mark that they would leave."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def pickled(mark: Path, form: str = "pickle") -> bytes:
    """The evil object as ``pickle``, or inside what ``torch`` saves (``zip``) or saved (``legacy``)."""
    if form == "pickle":
        return pickle.dumps(Evil(mark))
    stream = io.BytesIO()
    torch.save({"weight": Evil(mark)}, stream, _use_new_zipfile_serialization=form == "zip")
    return stream.getvalue()


FORMS = ("pickle", "zip", "legacy")
