"""Whatever is done to a store's files: only our own error comes out, or the outputs that were stored; and where neither
does, ``verify`` names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import stores
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tutelage.engine.checkpoint_files import checksum
from tutelage.teachers.manifest import StoreError
from tutelage.teachers.store import Store, verify

FILES = [
    "manifest.json",
    "plan.json",
    "rows.safetensors",
    "shard-00000.safetensors",
    "shard-00001.safetensors",
    "shard-00001.json",
]
NUMBERS = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "store"
    stores.write(folder, stores.plan(rows=6, views=3))
    return folder


def outputs(folder: Path) -> tuple[torch.Tensor, ...]:
    store = Store(folder)
    view, rank = torch.arange(18) // 6, torch.arange(18) % 6
    found = store.read(stores.row_ids(6)[rank], view, ("body",))
    return found.logits, found.features["body"]


def damage(content: bytes, how: str, where: float, what: bytes) -> bytes:
    place = int(where * len(content))
    if how == "cut":
        return content[:place]
    if how == "flip":
        place = min(place, len(content) - 1)
        return content[:place] + bytes([content[place] ^ (what[0] or 1)]) + content[place + 1 :]
    if how == "insert":
        return content[:place] + what + content[place:]
    if how == "overwrite":
        return content[:place] + what + content[place + len(what) :]
    return what


@NUMBERS
@given(
    name=st.sampled_from(FILES),
    how=st.sampled_from(["cut", "flip", "insert", "overwrite", "replace"]),
    where=st.floats(0, 1, exclude_max=True),
    what=st.binary(min_size=1, max_size=40),
)
def test_damage_is_an_error_of_ours_or_does_no_harm(
    whole: Path, tmp_path: Path, name: str, how: str, where: float, what: bytes
) -> None:
    folder = tmp_path / "store"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    content = damage((whole / name).read_bytes(), how, where, what)
    (folder / name).write_bytes(content)
    changed = content != (whole / name).read_bytes()
    try:
        same = all(torch.equal(a, b) for a, b in zip(outputs(folder), outputs(whole), strict=True))
        problem = ""
    except StoreError as error:
        problem = str(error)
    if problem:
        assert changed
        assert name in problem
        return
    reasons = {path: reason for path, reason in verify(folder) if reason is not None}
    assert same or list(reasons) == [name]
    if changed and name.endswith(".safetensors"):
        assert list(reasons) == [name]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [leaf for key, item in inner for leaf in leaves(item, (*path, key))]


@NUMBERS
@given(data=st.data())
def test_a_forged_manifest_is_an_error_of_ours(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    """One whose checksum fits: fields of any value, none of which may crash the reader or lead out of the folder."""
    folder = tmp_path / "store"
    if not folder.exists():
        shutil.copytree(whole, folder)
    content = json.loads((whole / "manifest.json").read_text())["content"]
    *parents, key = data.draw(st.sampled_from(leaves(content)))
    inner = content
    for step in parents:
        inner = inner[step]
    inner[key] = data.draw(
        st.one_of(
            st.none(),
            st.integers(-(2**70), 2**70),
            st.sampled_from(["", ".", "a.b", "../../x", "forward", "training", "fc", "body"]),
            st.floats(allow_nan=False, allow_infinity=False),
            st.just([]),
            st.just({}),
            st.lists(st.integers(-3, 2**40), max_size=3),
        )
    )
    (folder / "manifest.json").write_text(json.dumps({"checksum": checksum(content), "content": content}))
    try:
        found = outputs(folder)
    except StoreError:
        return
    assert [part.shape for part in found] == [(18, stores.CLASSES), (18, 3, 2)]
