"""What a ``.pt2`` holds, looked at before torch loads it: torch unpickles what an archive says is pickled."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from tutelage.export.errors import ExportError

_TENSORS = ("weight_", "tensor_")
"""How files of plain numbers are named; others hold pickled objects."""


def refuse_pickles(file: Path) -> None:
    """Refuse an archive of which something would be unpickled, or run as a compiled library.

    What is left is still a program: torch runs the operations that it names. Load those that you made or trust.

    Raises:
        ExportError: it holds such a part, or is no archive of torch.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name.lower() for name in archive.namelist()]  # as torch's reader finds them
            if len(set(names)) != len(names):
                raise ExportError(f"{file} holds two files of one name; export the model anew")
            for name in archive.namelist():
                part = _refusal(archive, name)
                if part:
                    raise ExportError(
                        f"{file} holds {part} ({name}), which is never unpickled or run here; export the model anew"
                    )
    except ExportError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{file} is no archive of torch.export: {error}") from error


def _refusal(archive: zipfile.ZipFile, name: str) -> str | None:
    parts = PurePosixPath(name.lower()).parts[1:]  # the first is the archive's own name
    if parts[:2] == ("data", "aotinductor"):
        return "a compiled library"
    if parts[:1] != ("data",) or len(parts) < 3:
        return None
    if parts[1] == "sample_inputs":
        return "pickled example rows" if archive.getinfo(name).file_size else None
    if parts[-1].endswith("_config.json"):
        entries: dict[str, Any] = json.loads(archive.read(name))["config"]
        pickled = [
            key
            for key, entry in entries.items()
            if entry["use_pickle"] is not False or not entry["path_name"].startswith(_TENSORS)
        ]
        return f"pickled values of {pickled[0]!r}" if pickled else None
    return None if parts[-1].startswith(_TENSORS) else "a pickled object"
