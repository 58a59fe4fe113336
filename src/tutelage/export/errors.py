"""What goes wrong in an export, and libraries that may be missing."""

from __future__ import annotations

import importlib.util


class ExportError(ValueError):
    """Something asked for that cannot be exported."""


class CheckFailedError(RuntimeError):
    """A file that does not answer as the student does; it was not put in place."""


def need(*packages: str) -> None:
    """Raises:
    ImportError: one of these packages is not installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"this format needs {package}; install it with: pip install 'tutelage[export]'")
