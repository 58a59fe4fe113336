"""Checkpoints on disk: round trips, kills at any instant, damage, full disks; and the folder's lock."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.engine import checkpoint_files as module
from tutelage.engine.checkpoint import (
    CheckpointError,
    CheckpointFolder,
    DamagedCheckpointError,
    FolderLock,
    RunLockedError,
    Snapshot,
)

DTYPES = sorted(module.STORABLE.values(), key=str)


def snapshot(step: int, **state: Any) -> Snapshot:
    return Snapshot(step, {"student": {"weight": torch.full((3,), float(step))}}, {"step": step, **state})


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


# -- what goes in comes out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (6 * dtype.itemsize,), dtype=torch.uint8)
    tensor = raw.view(dtype)
    CheckpointFolder(tmp_path, 1).save(
        Snapshot(1, {"a": {"x": tensor, "scalar": tensor[0], "empty": tensor[:0]}})
    )
    loaded = CheckpointFolder(tmp_path, 1).load(1).tensors["a"]
    assert {name: value.dtype for name, value in loaded.items()} == dict.fromkeys(
        ("x", "scalar", "empty"), dtype
    )
    assert bits(loaded["x"]) == bits(tensor)
    assert loaded["scalar"].shape == ()
    assert bits(loaded["scalar"]) == bits(tensor[:1])
    assert loaded["empty"].shape == (0,)


def test_views_shared_memory_and_lazy_conjugates_are_stored_as_values(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    conjugate = torch.tensor([1 + 2j, 3 - 1j]).conj()
    tensors = {
        "base": base,
        "same": base,
        "turned": base.t(),
        "part": base[1:, 1:3],
        "wide": base[0].expand(2, 4),
    }
    CheckpointFolder(tmp_path, 1).save(Snapshot(7, {"a": tensors | {"conjugate": conjugate}, "b": {}}))
    loaded = CheckpointFolder(tmp_path, 1).load(7).tensors
    assert loaded["b"] == {}
    for name, tensor in tensors.items():
        assert torch.equal(loaded["a"][name], tensor), name
    assert loaded["a"]["conjugate"].tolist() == [1 - 2j, 3 + 1j]
    loaded["a"]["base"].zero_()
    assert torch.equal(loaded["a"]["same"], base), "loaded tensors must not share memory"


def test_parameters_are_stored_without_graph(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    CheckpointFolder(tmp_path, 1).save(Snapshot(1, {"a": {"weight": weight, "twice": weight * 2}}))
    loaded = CheckpointFolder(tmp_path, 1).load(1).tensors["a"]
    assert loaded["twice"].tolist() == [2, 2]
    assert not loaded["weight"].requires_grad


def test_state_comes_back_exactly(tmp_path: Path) -> None:
    state = {"big": 2**200 + 1, "small": -(2**63) - 1, "third": 1 / 3, "tiny": 5e-324, "zero": -0.0, "none": None,
             "text": "ü\u2028\ud800", "flag": True, "nested": [{"a": [1, 2.5, "x"]}, []], "": {}}  # fmt: skip
    CheckpointFolder(tmp_path, 1).save(Snapshot(1, {}, state))
    loaded = CheckpointFolder(tmp_path, 1).load(1).state
    assert loaded == state
    assert math.copysign(1, loaded["zero"]) == -1
    assert loaded["flag"] is True


@pytest.mark.parametrize(
    ("state", "path"),
    [
        ({"a": {"b": [1, (2, 3)]}}, r"state\['a'\]\['b'\]\[1\] is a tuple"),
        ({"a": torch.ones(1)}, r"state\['a'\] is a Tensor"),
        ({"a": [math.nan]}, r"state\['a'\]\[0\] is nan"),
        ({"a": math.inf}, r"state\['a'\] is inf"),
        ({"a": {1: 2}}, r"state\['a'\] has the key 1"),
        ({"a": {3}}, r"state\['a'\] is a set"),
        ({"a": b"x"}, r"state\['a'\] is a bytes"),
        ({"a": Path("x")}, r"state\['a'\] is a \w*Path"),
    ],
)
def test_values_that_json_would_change_are_refused_by_path(
    tmp_path: Path, state: dict[str, Any], path: str
) -> None:
    with pytest.raises(CheckpointError, match=path):
        CheckpointFolder(tmp_path / "new", 1).save(Snapshot(1, {}, state))
    assert not (tmp_path / "new").exists(), "refused before anything is written"


@pytest.mark.parametrize(
    ("stem", "name", "tensor", "message"),
    [
        ("a", "__metadata__", torch.ones(1), "keeps for itself"),
        ("a", "x", torch.ones(1, dtype=torch.complex128), "'x' of a is torch.complex128"),
        ("a", "x", torch.ones(1, device="meta"), "no plain memory"),
        ("a", "x", torch.eye(2).to_sparse(), "no plain memory"),
        ("../a", "x", torch.ones(1), "cannot name a file"),
        ("", "x", torch.ones(1), "cannot name a file"),
    ],
)
def test_what_cannot_be_stored_is_named(
    tmp_path: Path, stem: str, name: str, tensor: torch.Tensor, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        CheckpointFolder(tmp_path / "new", 1).save(Snapshot(1, {stem: {name: tensor}}))
    assert not (tmp_path / "new").exists()


# -- which ones are kept ------------------------------------------------------------------------------------------


def test_newest_are_kept_and_the_best_besides(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in range(1, 7):
        folder.save(snapshot(step), best=step in (1, 3))
    assert folder.steps() == [3, 5, 6]
    best, latest = folder.best(), folder.latest()
    assert best is not None
    assert best.state == {"step": 3}
    assert latest is not None
    assert latest.state == {"step": 6}
    again = CheckpointFolder(tmp_path, keep=2).best()
    assert again is not None
    assert again.step == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000003",
        "step-00000005",
        "step-00000006",
    ]


def test_best_and_latest_of_nothing(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "none", keep=2)
    assert folder.latest() is None
    assert folder.best() is None
    assert folder.steps() == []
    assert not (tmp_path / "none").exists()
    folder.save(snapshot(1))
    assert folder.best() is None


def test_same_step_is_replaced_and_may_become_the_best(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(snapshot(4, value=1))
    folder.save(snapshot(4, value=2), best=True)
    assert folder.load(4).state["value"] == 2
    best = folder.best()
    assert best is not None
    assert best.step == 4
    assert os.listdir(tmp_path) == ["step-00000004"]  # noqa: PTH208


def test_a_run_that_went_back_drops_later_steps(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (10, 20, 30):
        folder.save(snapshot(step))
    (tmp_path / "step-00000030" / "state.json").unlink()
    folder.save(snapshot(25))
    assert folder.steps() == [20, 25]


@pytest.mark.parametrize("keep", [0, -1])
def test_keep_at_least_one(tmp_path: Path, keep: int) -> None:
    with pytest.raises(ValueError, match=f"keep={keep}"):
        CheckpointFolder(tmp_path, keep)


def test_missing_step_lists_those_there(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, 3)
    folder.save(snapshot(5))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 6 .*steps there: 5"):
        folder.load(6)


def test_leftovers_are_removed_at_the_next_open(tmp_path: Path) -> None:
    CheckpointFolder(tmp_path, 3).save(snapshot(5))
    (tmp_path / ".tmp-dead").mkdir()
    (tmp_path / ".tmp-dead" / "student.safetensors").write_bytes(b"half")
    (tmp_path / "step-00000005").rename(tmp_path / ".old-step-00000005")
    folder = CheckpointFolder(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert folder.load(5).state == {"step": 5}


def test_opening_does_not_disturb_a_process_that_is_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    save_file = module.save_file

    def spy(tensors: Any, path: Path) -> None:
        CheckpointFolder(tmp_path, 3)
        seen.append({entry.name[:5] for entry in tmp_path.iterdir()})
        save_file(tensors, path)

    monkeypatch.setattr(module, "save_file", spy)
    CheckpointFolder(tmp_path, 3).save(snapshot(1))
    assert seen == [{".tmp-"}]


# -- damage -------------------------------------------------------------------------------------------------------


def test_any_changed_bit_is_found(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, 2)
    path = folder.save(snapshot(2))
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for position in range(len(content)):
            changed = bytearray(content)
            changed[position] ^= 1 << position % 8
            file.write_bytes(changed)
            with pytest.raises(DamagedCheckpointError, match=r"step-00000002 is damaged: .*"):
                folder.load(2)
        file.write_bytes(content)
    assert folder.load(2).state == {"step": 2}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


DAMAGE = [
    (name, damage)
    for name in ("student.safetensors", "state.json", "manifest.json")
    for damage in (_truncate, _lengthen, Path.unlink)
    if (name, damage) != ("manifest.json", _lengthen)  # a space after JSON means nothing
]


@pytest.mark.parametrize(("name", "damage"), DAMAGE, ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_newest_one_is_named_and_passed_over(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    folder = CheckpointFolder(tmp_path, 2)
    folder.save(snapshot(1), best=True)
    damage(folder.save(snapshot(2)) / name)
    with pytest.warns(UserWarning, match=rf"step-00000002 is damaged: .*{name}.*; going back to step 1"):
        loaded = folder.latest()
    assert loaded is not None
    assert loaded.state == {"step": 1}
    best = folder.best()
    assert best is not None
    assert best.step == 1


def test_all_damaged_lists_every_reason(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, 2)
    _truncate(folder.save(snapshot(1)) / "state.json")
    (folder.save(snapshot(2)) / "student.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"(?s)step-00000002.*missing.*step-00000001.*state.json has \d+ bytes"
    ):
        folder.latest()


def test_a_checkpoint_under_another_name_is_refused(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, 2)
    folder.save(snapshot(1)).rename(tmp_path / "step-00000009")
    with pytest.raises(CheckpointError, match="step-00000009 is damaged: it holds the checkpoint of step 1"):
        folder.load(9)


def test_a_newer_format_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, 2)
    folder.save(snapshot(1))
    path = folder.save(snapshot(2)) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    manifest["format"] = module.FORMAT + 1
    path.write_text(json.dumps(manifest | {"checksum": module.checksum(manifest)}))
    with pytest.raises(CheckpointError, match=r"has format 3; this tutelage reads up to 2\. Install a newer"):
        folder.latest()


# -- disks that refuse --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["mkdir", "write_bytes", "save_file", "fsync", "rename"])
def test_a_full_disk_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    folder = CheckpointFolder(tmp_path, 1)
    folder.save(snapshot(1), best=True)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*arguments: Any, **options: Any) -> None:
        raise full

    with monkeypatch.context() as patch:
        owner: Any = {"save_file": module, "fsync": os}.get(call, Path)
        patch.setattr(owner, call, fail)
        with pytest.raises(
            CheckpointError, match=r"step 2 .*step-00000002: .*No space left.*earlier .* untouched"
        ):
            folder.save(snapshot(2), best=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    loaded = folder.latest()
    assert loaded is not None
    assert loaded.state == {"step": 1}


def test_a_failed_replacement_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path, 1)
    folder.save(snapshot(1, value="old"))
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.startswith(".tmp-"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(CheckpointError, match="Input/output error"):
            folder.save(snapshot(1, value="new"))
    assert folder.load(1).state["value"] == "old"


def test_a_read_only_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # permission bits do not stop root
        mkdir = Path.mkdir

        def refuse(self: Path, *arguments: Any, **options: Any) -> None:
            if self.name.startswith(".tmp-"):
                raise PermissionError(errno.EACCES, "Permission denied", str(self))
            mkdir(self, *arguments, **options)

        monkeypatch.setattr(Path, "mkdir", refuse)
    else:
        tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match=r"step 1 could not be saved as .*Permission denied"):
        CheckpointFolder(tmp_path, 1).save(snapshot(1))
    tmp_path.chmod(0o700)


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file is not a folder"):
        CheckpointFolder(tmp_path / "file", 1)


# -- kill -9 ------------------------------------------------------------------------------------------------------

_KILLS = """
import os, random, resource, signal, sys, time, warnings
from pathlib import Path
import torch
from tutelage.engine.checkpoint import CheckpointError, CheckpointFolder, Snapshot

warnings.simplefilter("error")  # a damaged checkpoint would warn
mode, root = sys.argv[1], Path(sys.argv[2])

def snapshot(step, turn):
    tensors = {"student": {"w": torch.full((50,), float(turn))}, "optimizer": {"m": torch.full((50,), float(turn))}}
    return Snapshot(step, tensors, {"turn": turn})

def intact(folder):
    checkpoints = CheckpointFolder(folder, 1)
    for step in checkpoints.steps():
        checkpoints.load(step)  # none is half there
    found = checkpoints.latest()
    turn = found.state["turn"]
    values = [tensor for group in found.tensors.values() for tensor in group.values()]
    assert len(values) == 2 and all(torch.equal(value, torch.full((50,), float(turn))) for value in values)
    left = [path.name for path in folder.iterdir() if not path.name.startswith("step-")]
    assert not left, left
    return found.step, turn

def fork(work):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child

def at_every_event():
    # Python announces each call that touches the disk; the child kills itself before the n-th.
    counts = []
    for next_step in (1, 2):  # replaces the only checkpoint, or follows it
        event = 0
        while True:
            folder = root / f"{next_step}-{event}"
            CheckpointFolder(folder, 1).save(snapshot(1, 0), best=True)
            def work():
                left = [event]
                def hook(name, arguments):
                    if name.startswith(("open", "os.", "shutil.", "pathlib.", "glob.", "fcntl.")):
                        left[0] -= 1
                        if left[0] == -1:
                            os.kill(os.getpid(), signal.SIGKILL)
                sys.addaudithook(hook)
                CheckpointFolder(folder, 1).save(snapshot(next_step, 1), best=True)
            status = os.waitpid(fork(work), 0)[1]
            assert status in (0, signal.SIGKILL), status
            found = intact(folder)
            assert found in ((1, 0), (next_step, 1))
            assert CheckpointFolder(folder, 1).best().step == found[0]
            if status == 0:
                assert found == (next_step, 1)
                break
            event += 1
        counts.append(event)
    print(*counts)

def at_random():
    random.seed(0)
    started = time.perf_counter()
    for _ in range(5):
        CheckpointFolder(root, 1).save(snapshot(0, 0))
    one_save = (time.perf_counter() - started) / 5
    saved, kills = root / "saved", 0
    last, begin = 0, 0
    for _ in range(40):
        reader, writer = os.pipe()
        def work():
            folder = CheckpointFolder(root / ".", 1)
            turn = begin
            while True:
                turn += 1
                folder.save(snapshot(turn // 2, turn))
                os.write(writer, b"%d\\n" % turn)
        child = fork(work)
        os.close(writer)
        time.sleep(random.uniform(0.2, 3) * one_save)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        told = os.read(reader, 1 << 16).split()
        os.close(reader)
        step, turn = intact(root)
        last = int(told[-1]) if told else begin
        assert last <= turn <= last + 1, (last, turn)
        kills += turn > begin
        begin = turn
    print(kills)

def disk_full():
    folder = CheckpointFolder(root, 2)
    folder.save(snapshot(1, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        folder.save(Snapshot(2, {"student": {"w": torch.ones(100_000)}}, {"turn": 1}))
    except CheckpointError as error:
        assert intact(root) == (1, 0)
        folder.save(snapshot(3, 0))
        print(error)

{"events": at_every_event, "random": at_random, "full": disk_full}[mode]()
"""


def _run(mode: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _KILLS, mode, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_killed_before_any_call_that_touches_the_disk(tmp_path: Path) -> None:
    replaced, followed = map(int, _run("events", tmp_path).split())
    assert replaced > 15
    assert followed > 15


def test_killed_at_random_instants(tmp_path: Path) -> None:
    assert int(_run("random", tmp_path)) > 10, "many children must have saved something"


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    assert "File too large" in _run("full", tmp_path)


# -- the lock of a run's folder -----------------------------------------------------------------------------------

_HOLD = """
import multiprocessing, sys, time
from pathlib import Path
from tutelage.engine.lock import FolderLock

if __name__ == "__main__":
    with FolderLock(Path(sys.argv[1])):
        if sys.argv[2] == "workers":
            worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
            worker.start()
            print(worker.pid, flush=True)
        print("held", flush=True)
        time.sleep(30)
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(mode: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", _HOLD, str(tmp_path), mode], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_second_holder_learns_folder_and_pid(
    tmp_path: Path, hold: Callable[[str], subprocess.Popen[str]]
) -> None:
    process = hold("alone")
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with (
        pytest.raises(RunLockedError, match=rf"{tmp_path} is in use by pid {process.pid} "),
        FolderLock(tmp_path),
    ):
        pass
    process.kill()
    process.wait()
    with FolderLock(tmp_path):
        pass


def test_workers_that_outlive_a_killed_run_do_not_hold_its_lock(
    tmp_path: Path, hold: Callable[[str], subprocess.Popen[str]]
) -> None:
    process = hold("workers")
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    assert process.stdout.readline() == "held\n"
    time.sleep(0.1)
    process.kill()
    process.wait()
    os.kill(worker, 0)  # it lives
    try:
        with FolderLock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_lock_is_free_again_and_excludes_its_own_process(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "run")
    for _ in range(2):
        with lock, pytest.raises(RunLockedError, match=f"pid {os.getpid()}"), FolderLock(tmp_path / "run"):
            pass


def test_a_lock_ends_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), FolderLock(tmp_path):
        raise KeyError
    with FolderLock(tmp_path):
        pass
