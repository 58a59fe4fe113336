"""Where a run's figures go while it trains: trackers, the terminal, plain lines."""

from __future__ import annotations

import importlib.util
import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from tutelage.cli.app import app
from tutelage.engine.metrics import read_metrics
from tutelage.engine.progress import LiveProgress, PlainProgress, progress
from tutelage.runs import distill


def recipe(method: str, **output: Any) -> dict[str, Any]:
    return {
        "data": {"path": "digits", "limit": 100, "validation": 20, "test": 50},
        "teacher": {"model": "digits:mlp-8"} if method == "kd" else None,
        "student": {"model": "digits:mlp-4"},
        "method": method,
        "train": {"epochs": 1, "batch_size": 10, "device": "cpu", "threads": 1},
        "output": {"report": False, **output},
    }


def scalars(folder: Path) -> dict[str, list[Any]]:
    """Every figure below a folder as tensorboard reads it: (step, value) by tag."""
    from tensorboard.backend.event_processing.event_file_loader import (  # type: ignore[import-untyped]
        EventFileLoader,
    )

    found: dict[str, list[Any]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    return found


needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None,
    reason="tensorboard is not installed; pip install 'tutelage[trackers]'",
)


@needs_tensorboard
@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    distill(recipe("kd", trackers=["tensorboard"]), folder=folder, progress=False)
    found = scalars(folder / "tensorboard")
    for line in read_metrics(folder / "metrics.jsonl"):
        if line["kind"] == "train":
            assert (line["step"], pytest.approx(line["loss"])) in found["train/loss"]
            for name, value in line["terms"].items():
                assert (line["step"], pytest.approx(value)) in found[f"train/terms/{name}"]
        else:
            values = found[f"{line['split']}/metrics/accuracy"]
            assert (line["step"], pytest.approx(line["metrics"]["accuracy"])) in values


@needs_tensorboard
@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_each_stage_of_a_procedure_is_tracked(tmp_path: Path) -> None:
    distill(recipe("wa", trackers=["tensorboard"]), folder=tmp_path, progress=False)
    stages = sorted((tmp_path / "stages").iterdir())
    assert len(stages) == 5
    for stage in stages:
        last = read_metrics(stage / "metrics.jsonl")[-1]
        assert (last["step"], pytest.approx(last["loss"])) in scalars(stage)["train/loss"]


def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe("none", trackers=["tensorboard", "wandb"])))
    done = CliRunner().invoke(app, ["run", str(tmp_path / "recipe.yaml"), "--dir", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert done.stderr == (
        "error: output.trackers has wandb, which is not installed; pip install wandb, or leave it out\n"
    )
    assert not (tmp_path / "run").exists()


def shown(terminal: bool, width: int = 140) -> str:
    """What a display prints over 20 of 200 steps."""
    out = io.StringIO()
    display = cast("Any", progress("kd seed 0", Console(file=out, force_terminal=terminal, width=width)))
    assert type(display) is (LiveProgress if terminal else PlainProgress)
    record = {
        "loss": 1.25,
        "terms": {"label": 0.75, "kd": 0.5},
        "samples_per_second": 4321.0,
        "memory_mb": 883.0,
    }
    trainer: Any = SimpleNamespace(
        step=0, total_steps=200, record=None, progress=SimpleNamespace(metrics={"accuracy": 0.9}, seconds=2.0)
    )
    if terminal:
        display.on_fit_start(trainer)
    else:
        display._last -= 60
    for step in range(1, 21):
        trainer.step, trainer.record = step, record if step % 10 == 0 else None
        display.on_step_end(trainer)
    display.close()
    return out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_time_left_speed_terms_and_memory_are_shown(terminal: bool) -> None:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(terminal))
    for words in ("/200", "loss 1.25", "label 0.75", "kd 0.5", "4321 samples/s", "883 MB", "accuracy 0.9"):
        assert words in text
    assert re.search(r"\d:\d\d:\d\d" if terminal else r"\d+ s left", text)


def test_without_a_terminal_there_are_plain_lines_alone() -> None:
    text = shown(terminal=False)
    assert "\x1b" not in text
    assert "\r" not in text
    (line,) = text.splitlines()
    assert line.startswith("kd seed 0: step 10/200, 38 s left, ")
