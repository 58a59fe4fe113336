"""`--push-to-hub`, against a hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub as hub_client
import pytest
from stand_in import Hub
from typer.testing import CliRunner, Result

from tutelage.cli.app import app

TOKEN = "hf_notatokenofanyone"
NAMES = {"README.md", "export.json", "model.safetensors", "tutelage.json"}


@pytest.fixture
def run(cnn_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(cnn_run, tmp_path / "run")
    return tmp_path / "run"


def words(run: Path, *options: str) -> list[str]:
    return ["export", str(run), "--to", "safetensors", "--push-to-hub", "me/small", *options]


@pytest.fixture
def push(run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    def pushed(hub: str, *options: str, typed: str = "", token: str | None = TOKEN) -> Result:
        monkeypatch.setattr(hub_client.constants, "ENDPOINT", hub)
        monkeypatch.setattr(hub_client.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_client, "get_token", lambda: token)
        monkeypatch.setenv("HF_TOKEN", token or "")
        return CliRunner().invoke(app, words(run, *options), input=typed)

    return pushed


def test_what_is_uploaded_is_said_before_and_is_the_export_alone(run: Path) -> None:
    """With nothing but the environment, as a user does it."""
    own = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(run / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    with Hub() as hub:
        done = subprocess.run(
            [sys.executable, "-m", "tutelage", *words(run, "--json", "--yes")],
            capture_output=True,
            text=True,
            env=os.environ | own | {"HF_ENDPOINT": hub.address},
            check=False,
            timeout=200,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["address"].endswith("/me/small")
    assert set(hub.files) == NAMES
    assert all(hub.files[name] == (run / "export" / name).read_bytes() for name in NAMES)
    assert all(f"{name}  {len(hub.files[name]):,} bytes" in done.stderr for name in NAMES)
    assert hub.tokens - {None} == {f"Bearer {TOKEN}"}  # that a card is well formed is asked without one
    assert TOKEN not in done.stdout + done.stderr
    assert not [path for path in run.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_nothing_is_sent_without_a_yes(push: Callable[..., Result]) -> None:
    with Hub() as hub:
        done = push(hub.address, typed="n\n")
        assert (done.exit_code, hub.seen) == (0, [])
        assert "nothing was uploaded" in done.stdout
        done = push(hub.address, typed="y\n")
    assert done.exit_code == 0, done.output
    assert set(hub.files) == NAMES


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [
        ("api", 401, "the token is not valid"),
        ("api", 403, "the token may not write there"),
        ("commit", 409, "somebody else changed it meanwhile"),
    ],
)
def test_a_refusal_is_one_message_without_the_token(
    push: Callable[..., Result], part: str, status: int, said: str
) -> None:
    with Hub({part: status}) as hub:
        done = push(hub.address, "--yes")
    assert done.exit_code == 1
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.output
    assert hub.files == {}


def test_no_hub_no_token_and_no_name_are_said(push: Callable[..., Result], run: Path) -> None:
    done = push("http://127.0.0.1:9", "--yes")
    assert (done.exit_code, "cannot be reached" in done.stderr) == (1, True), done.stderr
    with Hub() as hub:
        done = push(hub.address, "--yes", token=None)
    assert (done.exit_code, "set HF_TOKEN" in done.stderr, hub.seen) == (1, True, [])
    done = CliRunner().invoke(app, ["export", str(run), "--to", "safetensors", "--push-to-hub", "a/b/c"])
    assert (done.exit_code, "no name on the hub" in done.stderr) == (2, True), done.stderr
