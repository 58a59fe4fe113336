"""Writes constraints.txt: the exact version of everything that tutelage and its extras pull in, as installed here.

What else lies in the environment is left out, and so are local version suffixes (``+cpu``): an index knows only the
public version.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

TARGET = Path(__file__).parent.parent / "constraints.txt"
HEADER = """\
# Versions that tutelage was tested with, for `pip install --constraint`: all that it and its extras pull in.
# Written by `make constraints`. CUDA's libraries come with PyTorch on Linux alone; elsewhere they are not asked for.
"""


def required(package: str, extras: Iterable[str]) -> dict[str, str]:
    """Versions of all that an installed package needs with these extras, by canonical name; itself left out."""
    wanted: dict[str, set[str]] = {}

    def visit(name: str, extras: set[str]) -> None:
        known = wanted.setdefault(canonicalize_name(name), set())
        fresh = extras - known
        if not fresh:
            return
        known |= fresh
        for line in distribution(name).requires or ():
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in fresh):
                visit(requirement.name, {"", *requirement.extras})

    visit(package, {"", *extras})
    del wanted[canonicalize_name(package)]
    return {name: Version(distribution(name).version).public for name in sorted(wanted)}


def main() -> None:
    extras = distribution("tutelage").metadata.get_all("Provides-Extra") or []
    try:
        versions = required("tutelage", extras)
    except PackageNotFoundError as error:
        raise SystemExit(
            f"{error.name} is not installed; install every extra first: pip install -e '.[{','.join(extras)}]'"
        ) from None
    TARGET.write_text(HEADER + "".join(f"{name}=={version}\n" for name, version in versions.items()))
    print(f"{TARGET.name}: {len(versions)} packages")


if __name__ == "__main__":
    main()
