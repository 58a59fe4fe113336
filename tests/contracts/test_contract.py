"""What every method of the catalogue keeps to."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import NAMES, losses, on_tokens, recipe, run
from safetensors.torch import load_file

from killing import DiskChanges, Killed, stop_after
from tutelage import catalogue
from tutelage.engine.taps import Tapped
from tutelage.engine.views import to_float
from tutelage.models import build_model, load_model
from tutelage.recipe import load_recipe
from tutelage.runs import check, distill
from tutelage.runs.assemble import assemble
from tutelage.studies.study import with_overrides

CURVES = Path(__file__).resolve().parent.parent / "golden" / "loss_curves"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run of a method, made once; ``changes`` are what it did to checkpoints and journal."""
    done: dict[str, Any] = {}

    def of(name: str) -> Any:
        if name not in done:
            with DiskChanges() as changes:
                done[name] = run(name, tmp_path_factory.mktemp("contract") / name)
            done[name].changes = changes.seen
        return done[name]

    return of


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_described(name: str) -> None:
    described = catalogue.describe(name)
    assert described["name"] == name
    assert described["claim"].endswith(".")
    assert described["kind"] in ("Method", "Procedure")
    assert (catalogue.entries()[name].folder / "README.md").exists()


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_and_ships_a_plain_student(name: str, finished: Any) -> None:
    result = finished(name)
    assert result.result["status"] == "done"
    metric, most = ("loss", 2 * math.log(13)) if on_tokens(name) else ("accuracy", 1)
    assert 0 <= result.result["test"][metric] <= most
    assert all(torch.isfinite(torch.tensor(losses(result.folder))))
    assembly = assemble(load_recipe(recipe(name)))
    assert weights(result.folder).keys() == assembly.student.module.state_dict().keys()
    loaded = load_model(result.folder / "student").module.eval()
    inputs = to_float(assembly.data.train.fetch([0, 1, 2])).inputs
    ours, theirs = (Tapped(model)(inputs)["logits"] for model in (loaded, result.student))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_killed_run_ends_with_the_same_bits(name: str, step: int, finished: Any, tmp_path: Path) -> None:
    """Killed in mid-epoch, where nothing is saved, and resumed."""
    stop_after(step, lambda kill: run(name, tmp_path / "run", callbacks=[kill]))
    resumed = run(name, tmp_path / "run", resume=True)
    wanted, found = weights(finished(name).folder), weights(tmp_path / "run")
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())
    assert losses(resumed.folder) == losses(finished(name).folder)


PROCEDURES = [name for name in NAMES if catalogue.describe(name)["kind"] == "Procedure"]
SAVES, JOURNAL = 4, 12
KILLS = [(name, 0) for name in NAMES if name not in PROCEDURES]
KILLS += [(name, kill) for name in PROCEDURES for kill in range(SAVES + JOURNAL)]
"""A procedure keeps a folder of checkpoints a stage, and a journal, which is killed at each of its first changes."""


@pytest.mark.parametrize(("name", "kill"), KILLS)
def test_a_run_killed_inside_a_save_ends_with_the_same_bits(
    name: str, kill: int, finished: Any, tmp_path: Path
) -> None:
    """At a change on the disk: anywhere in a save, and at every change of the journal."""
    changes = finished(name).changes
    saves = [i for i, place in enumerate(changes, start=1) if place == "checkpoints"]
    journal = [i for i, place in enumerate(changes, start=1) if place == "once"]
    drawn = random.Random(f"{name} {kill}").choice(saves)
    if kill >= SAVES and not journal:
        pytest.skip(f"{name} keeps no journal")
    place = drawn if kill < SAVES else journal[(kill - SAVES) % len(journal)]
    with pytest.raises(Killed), DiskChanges(place):
        run(name, tmp_path / "run")
    resumed = run(name, tmp_path / "run", resume=True)
    wanted, found = weights(finished(name).folder), weights(tmp_path / "run")
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())
    assert losses(resumed.folder) == losses(finished(name).folder)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith((".tmp-", ".old-"))]


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_curve(name: str, finished: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Bit-equal between two runs; within 1e-4 of the stored curve. ``make curves`` writes them anew."""
    found = losses(finished(name).folder)
    assert losses(run(name, tmp_path / "again").folder) == found
    stored = json.loads((CURVES / f"{name}.json").read_text())
    assert found == pytest.approx(stored, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_writes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = check(recipe(name))
    assert plan["method"] == name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_its_recipes_are_valid(name: str) -> None:
    found = sorted(catalogue.entries()[name].folder.glob("recipe*.yaml"))
    assert any(load_recipe(path).method[0].name == name for path in found), found


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_of_other_classes_is_refused(name: str, tmp_path: Path) -> None:
    method = catalogue.load(name)
    if method.needs.teacher == "none":
        pytest.skip(f"{name} reads no teacher")
    if method.kind == "Procedure" and not method.needs.logits:
        pytest.skip(f"{name} takes a teacher of any classes, or none")
    from tutelage.engine.needs import PairingError
    from tutelage.models import save_model

    if on_tokens(name):
        values = with_overrides(recipe(name, steps=1), {"data.markov.symbols": 7, "method": {"name": "none"}})
        distill(values, folder=tmp_path / "teacher", progress=False)
        wrong = "has another vocabulary than the rows' tokeniser"
    else:
        other = build_model("digits:mlp-8", outputs=7, input_shape=(1, 8, 8))
        save_model(other, tmp_path / "teacher" / "student")
        wrong = "gives 7 outputs, the data has 10"
    with pytest.raises(PairingError, match=wrong):
        check(recipe(name) | {"teacher": {"run": str(tmp_path / "teacher")}})
