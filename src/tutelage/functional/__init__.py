"""One flat namespace of tensor math for those who keep their own loop: ``from tutelage.functional import nkd_loss``.

It hands on what the files of this folder and every ``methods/*/functional.py`` list in ``__all__``. The lists are read
as text, so that a name's own module is imported only when the name is first asked for.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import re
from pathlib import Path
from typing import Any

_PACKAGE = __name__.partition(".")[0]
_EXPORTS = re.compile(r"^__all__(?:: [^=]+)? = (\[[^\]]*\])", re.MULTILINE)


def scan(root: Path) -> dict[str, str]:
    """The module of every exported name, found below the package's folder ``root`` without importing anything.

    Raises:
        ImportError: a file lists no literal ``__all__``, two files export one name, or a name is also a file's.
    """
    shared = sorted(path for path in (root / "functional").glob("*.py") if path.name != "__init__.py")
    homes: dict[str, str] = {}
    for path in [*shared, *sorted((root / "methods").glob("*/functional.py"))]:
        module = ".".join([_PACKAGE, *path.relative_to(root).with_suffix("").parts])
        listed = _EXPORTS.search(path.read_text(encoding="utf-8"))
        if listed is None:
            raise ImportError(
                f"{path} has no literal `__all__ = [...]`; list there what it exports, or nothing"
            )
        for name in ast.literal_eval(listed[1]):
            if name in homes:
                raise ImportError(
                    f"`{name}` is exported by both {homes[name]} and {module}; rename one of them"
                )
            homes[name] = module
    # Importing a file of this folder binds its name here, and would hide a function that is called the same.
    hidden = sorted(homes.keys() & {path.stem for path in shared})
    if hidden:
        raise ImportError(f"`{hidden[0]}` is a function and a file of {_PACKAGE}.functional; rename the file")
    return homes


_HOMES = scan(Path(__file__).resolve().parent.parent)
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        near = difflib.get_close_matches(name, __all__, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
