"""What every test shares: runtime shape checks, one thread, real data where it is at hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDERS = sorted((REPOSITORY / "src/tutelage/methods").glob("*/functional.py"))
jaxtyping.install_import_hook(
    ["tutelage.functional", *[f"tutelage.methods.{path.parent.name}.functional" for path in FOLDERS]],
    "beartype.beartype",
)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of real data sets in the hub's layout; the test is skipped where there is none."""
    root = Path(os.environ.get("TUTELAGE_DATA", REPOSITORY.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no real data at {root}; set TUTELAGE_DATA")
    return root


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def pair() -> Iterator[Any]:
    """Two gloo processes; one pair serves every test that asks for it."""
    from support import Pair

    started = Pair()
    yield started
    started.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the pair share one xdist worker, so that one pair is started."""
    for item in items:
        if "pair" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.two_processes)
            item.add_marker(pytest.mark.xdist_group("pair"))
