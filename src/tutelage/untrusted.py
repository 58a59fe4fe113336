"""What may come from elsewhere: names that become files, small JSON files, text that goes to a terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

LONGEST_NAME = 200
"""Bytes; file systems take 255, and some names get an ending."""
LARGEST_JSON = 2**26
"""Bytes of a file that is read whole; the largest that a run writes is a hundredth of it."""

_NAME = re.compile(r"\w[\w.,=+@-]*")
_DEVICE = re.compile(r"(con|prn|aux|nul|(com|lpt)\d)(\..*)?", re.IGNORECASE)
"""Names that Windows keeps for devices: a run's folder may be copied there."""

_TURNS_TEXT = (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
_CONTROL |= {code: f"\\u{code:04x}" for code in _TURNS_TEXT}
_IN_JSON = {code: f"\\u{code:04x}" for code in _CONTROL if code > 31}
"""JSON has escapes of its own for the others."""


class FileError(ValueError):
    """A name that cannot be a file's, or a file whose content is not what it should be."""


def file_name(name: str, what: str) -> str:
    """The name, where it can be one part of a path: so that no name leads out of the folder that it is put in.

    Args:
        what: what messages call it, such as ``the stage``.

    Raises:
        FileError: it is empty, longer than 200 bytes, starts with anything but a letter, a digit or ``_``, holds
            another character than those and ``. , = + @ -``, ends with a dot, or is a device's name.
    """
    fits = isinstance(name, str) and _NAME.fullmatch(name) and not name.endswith(".")
    if not fits or _DEVICE.fullmatch(name) or len(name.encode()) > LONGEST_NAME:
        raise FileError(
            f"{what} {str(name)[:60]!r} cannot name a file: start with a letter, a digit or _, go on with those and "
            f"., = + @ -, use at most {LONGEST_NAME} bytes, and no name of a device such as con or nul"
        )
    return name


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: it is larger than 64 MiB, no JSON, or holds something else than an object.
    """
    with path.open("rb") as file:
        content = file.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise FileError(f"{path} is larger than {LARGEST_JSON // 2**20} MiB; a run writes no such file")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FileError(
            f"{path} is no JSON ({error}), so it is damaged; remove it, or the folder it lies in"
        ) from error
    if not isinstance(found, dict):
        raise FileError(f"{path} holds no JSON object, so it is damaged; remove it, or the folder it lies in")
    return found


def visible(text: str) -> str:
    """The text as it may stand on a terminal: what would move the cursor, colour it or turn its direction is written
    out, as in ``\\x1b``."""
    return text.translate(_CONTROL)


def visible_json(text: str) -> str:
    """JSON as it may stand on a terminal: the same values, with the same characters as JSON's escapes."""
    return text.translate(_IN_JSON)
