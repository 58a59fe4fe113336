"""A store comes out the same however it is written: in one go, killed and gone on with, by several at once, mended."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import stores
import torch

from tutelage.recipe import load_recipe
from tutelage.runs.cache import cache, estimate
from tutelage.teachers import manifest, writing
from tutelage.teachers.manifest import StoreError
from tutelage.teachers.store import Store, verify
from tutelage.teachers.writing import store_bytes

fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the formula that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    assert stores.write(folder, stores.plan()) == list(range(9))
    return folder


def damaged(folder: Path) -> dict[str, str]:
    return {name: reason for name, reason in verify(folder) if reason is not None}


def test_what_was_written_is_read(whole: Path) -> None:
    store = Store(whole)
    rank, view = torch.arange(80) % 40, torch.arange(80) // 40
    index, wanted = stores.answer(rank, view)
    found = store.read(index, view, ("body",))
    torch.testing.assert_close(found.logits, wanted.logits, atol=0.5 / 127, rtol=0)
    torch.testing.assert_close(found.features["body"], wanted.features["body"], atol=0.5 / 127, rtol=0)
    assert store.spec.resolve(("body",)) == ("body",)
    assert store.spec.pooled == "fc:in"
    assert damaged(whole) == {}


def test_killed_at_any_instant_it_comes_out_the_same(whole: Path, tmp_path: Path) -> None:
    """``kill -9`` of a real process at 30 random instants, a third of them or more in mid-work."""
    generator, midway = random.Random(0), 0

    def start(folder: Path) -> Any:
        worker = fork.Process(target=stores.write, args=(folder, stores.plan()), kwargs={"pause": 0.003})
        worker.start()
        return worker

    started = time.perf_counter()
    start(tmp_path / "measured").join()
    seconds = time.perf_counter() - started
    for number in range(30):
        folder = tmp_path / str(number)
        worker = start(folder)
        worker.join(timeout=generator.uniform(0, seconds))
        worker.kill()
        worker.join()
        midway += 0 < len(list(folder.glob("shard-*.json"))) < 9
        stores.write(folder, stores.plan())
        assert stores.contents(folder) == stores.contents(whole)
    assert midway >= 10


def test_two_processes_share_the_work(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    found = fork.Queue()

    def work(first: int) -> None:
        found.put(stores.write(folder, stores.plan(), first=first, pause=0.01))

    workers = [fork.Process(target=work, args=(first,)) for first in (0, 4)]
    for worker in workers:
        worker.start()
    made = [found.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(made[0] + made[1]) == list(range(9))
    assert min(map(len, made)) > 0
    assert stores.contents(folder) == stores.contents(whole)


def test_the_ranks_of_a_launch_share_the_work(pair: Any, tmp_path: Path) -> None:
    made = pair.run(made_of_eight, tmp_path / "two")
    assert sorted(made[0] + made[1]) == list(range(8))
    assert made_of_eight(tmp_path / "one") == tuple(range(8))
    assert stores.contents(tmp_path / "two") == stores.contents(tmp_path / "one")


def made_of_eight(folder: Path) -> tuple[int, ...]:
    return stores.make(folder, cache={"shard_rows": 16}).made


def test_a_finished_store_is_only_read(whole: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    assert stores.write(whole, stores.plan()) == []
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before


@pytest.mark.parametrize("name", ["shard-00004.safetensors", "rows.safetensors"])
def test_a_flipped_bit_is_found_and_mended(name: str, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "store")
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    assert list(damaged(folder)) == [name]
    assert stores.write(folder, stores.plan()) == ([4] if name.startswith("shard") else [])
    assert damaged(folder) == {}
    assert stores.contents(folder) == stores.contents(whole)


@pytest.mark.parametrize(
    "name", ["shard-00004.safetensors", "shard-00004.json", "rows.safetensors", "plan.json", "manifest.json"]
)
@pytest.mark.parametrize("how", ["missing", "empty", "cut"])
def test_any_file_that_is_lost_is_made_again(name: str, how: str, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "store")
    path = folder / name
    content = path.read_bytes()
    path.unlink() if how == "missing" else path.write_bytes(
        content[: len(content) // 2 if how == "cut" else 0]
    )
    if name not in ("shard-00004.json", "plan.json"):  # those are the writer's own
        with pytest.raises(
            StoreError, match=name if name != "manifest.json" or how != "missing" else "not finished"
        ):
            Store(folder)
        if name != "manifest.json":
            assert list(damaged(folder)) == [name]
    assert stores.write(folder, stores.plan()) == ([4] if name.startswith("shard") else [])
    assert stores.contents(folder) == stores.contents(whole)


@pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
def test_without_shards_nothing_is_lost_with_a_damaged_note(name: str, whole: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes((whole / name).read_bytes()[:-9])
    assert stores.write(tmp_path, stores.plan()) == list(range(9))
    assert stores.contents(tmp_path) == stores.contents(whole)
    other = tmp_path / "other"
    other.mkdir()
    (other / name).touch()
    (other / "photo.jpg").touch()
    with pytest.raises(StoreError, match=r"holds no store \(photo.jpg\)"):
        stores.write(other, stores.plan())


def test_a_shard_of_another_place_is_no_shard_of_this_one(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "store")
    shutil.copy(folder / "shard-00002.safetensors", folder / "shard-00001.safetensors")
    with pytest.raises(StoreError, match="another shard of this one"):
        Store(folder)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"cache": {"dtype": "float16"}}, r'cache.dtype is "float32" there and "float16" here'),
        ({"cache": {"batch_size": 8}}, r"batch_size is 256 there and 8 here"),
        ({"cache": {"taps": ["head:in"]}}, "taps is "),
        ({"data": {"distinct_views": 1}}, "views.number is 2 there and 1 here"),
        ({"data": {"view_seed": 6}}, "views.seed is 5 there and 6 here"),
        ({"data": {"limit": 63}}, "data.fingerprint is"),
        ({"data": {"views": []}}, "views.changes is"),
        ({"train": {"seed": 1}}, "teacher.weights is"),
        ({"teacher": stores.TEACHER | {"mean": [0.5], "std": [0.5]}}, "teacher.mean is"),
        ({"train": {"precision": "bf16"}}, 'precision is "fp32" there and "bf16" here'),
    ],
)
def test_a_folder_with_another_store_is_refused(made: Path, changes: dict[str, Any], field: str) -> None:
    before = stores.contents(made)
    with pytest.raises(StoreError, match=f"holds a store of something else: {field}"):
        stores.make(made, **changes)
    with pytest.raises(StoreError, match=f"holds a store of something else: {field}"):
        estimate(stores.recipe(**changes), made)
    assert stores.contents(made) == before


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "store"
    stores.make(folder)
    return folder


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(StoreError, match=r"is not empty and holds no store \(photo.jpg\)"):
        stores.write(tmp_path, stores.plan())
    with pytest.raises(StoreError, match="is a file; give a folder"):
        stores.write(tmp_path / "photo.jpg", stores.plan())
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_one_begun_by_other_versions_says_so(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "store")
    (folder / "shard-00003.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"was begun elsewhere \(torch x → y\)"):
        assert stores.write(folder, stores.plan(made_by={"torch": "y"})) == [3]


def test_a_later_format_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "store")
    found = json.loads((folder / "manifest.json").read_text())
    found["content"]["plan"]["format"] = 9
    (folder / "manifest.json").write_text(json.dumps(found))
    with pytest.raises(StoreError, match=r"has format 9; this tutelage reads up to 1. Install a newer one"):
        Store(folder)


def test_a_full_disk_is_seen_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "free_bytes", lambda folder: 2000)
    with pytest.raises(
        StoreError, match=r"the store needs 0.00\d+ MB more, the disk has 0.002 MB; free some"
    ):
        stores.write(tmp_path / "store", stores.plan())
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_leaves_what_is_whole(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = manifest.write_whole, [5]

    def full(path: Path, content: bytes) -> None:
        left[0] -= path.name.endswith(".safetensors")
        if left[0] == 0:
            path.with_name(f".tmp-{path.name}").write_bytes(content[:40])
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(writing, "write_whole", full)
    folder = tmp_path / "store"
    with pytest.raises(OSError, match="No space left"):
        stores.write(folder, stores.plan())
    monkeypatch.undo()
    assert stores.write(folder, stores.plan()) == list(range(3, 9))
    assert stores.contents(folder) == stores.contents(whole)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "int8", "taps": ["head:in", "-1"]},
        {"form": "topk", "k": 3},
        {"form": "sampled", "k": 20, "shard_rows": 37},
        {"form": "none", "taps": ["-1"], "dtype": "float8_e4m3fn"},
    ],
)
def test_the_estimate_is_the_size(options: dict[str, Any], tmp_path: Path) -> None:
    """Nothing is written for it; to the byte for the shards, and within 1 % in all."""
    recipe = stores.recipe(
        "none", cache=options, data={"limit": 400, "distinct_views": 3}, train={"steps": 80}
    )
    found = estimate(recipe, tmp_path / "store")
    assert list(tmp_path.iterdir()) == []
    made = cache(recipe, tmp_path / "store", progress=False)
    size = sum(map(len, stores.contents(tmp_path / "store").values()))
    assert found.bytes == pytest.approx(size, rel=0.01)
    assert (found.rows, found.views, found.files) == (400, 3, made.manifest.plan.shards)
    assert found.seconds > 0
    assert found.error.keys() == made.manifest.error.keys()
    for shard, record in enumerate(made.manifest.shards):
        assert record.bytes == writing._shard_bytes(made.manifest.plan, record.rows)
        assert record.bytes == (tmp_path / "store" / f"shard-{shard:05d}.safetensors").stat().st_size


def test_the_size_of_a_large_store_is_known_without_making_it() -> None:
    plan = stores.plan(rows=10**6, views=100, shard_rows=2**20)
    row = stores.CLASSES + 4 + 6 + 4
    assert store_bytes(plan, {}, {}) == pytest.approx(row * 10**8 + 8 * 10**6, rel=1e-3)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"cache": {"form": "topk", "k": 11}}, "cache.k is 11, but the teacher has 10 classes"),
        ({"cache": {"form": "none"}}, "there is nothing to store; set cache.taps"),
        ({"cache": {"taps": ["nowhere"]}}, "names no module"),
        ({"teacher": None}, "has no teacher whose outputs could be stored"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    parts: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    recipe = (
        stores.recipe("none") | {"teacher": None} if "teacher" in parts else stores.recipe("none", **parts)
    )
    for work in (cache, estimate):
        with pytest.raises(ValueError, match=reason):
            work(recipe, tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_command_says_how_to_go_on(tmp_path: Path) -> None:
    """SIGTERM to the real command: exit code 143, and the same command ends what it began."""
    recipe = stores.recipe(cache={"shard_rows": 1, "batch_size": 1}, data={"limit": 1000})
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = [
        sys.executable,
        "-m",
        "tutelage",
        "cache",
        str(tmp_path / "recipe.yaml"),
        "--dir",
        str(tmp_path / "s"),
    ]
    running = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    while not (tmp_path / "s" / "shard-00003.json").exists():
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 143
    assert "stopped" in said
    assert "the same command goes on" in said
    written = len(list((tmp_path / "s").glob("shard-*.safetensors")))
    assert 3 < written < 2000
    assert load_recipe(tmp_path / "recipe.yaml").cache.shard_rows == 1
