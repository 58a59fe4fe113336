"""`reproduce` on a study of functions: what is run, what is kept, what is written."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tutelage import catalogue
from tutelage.studies import trials
from tutelage.studies.ledger import reproduce, reproduce_all
from tutelage.studies.registry import find_study, study_names

STUDY = """
from pathlib import Path
from tutelage.studies.study import Arm, Comparison, Study

LOG = Path({log!r})

def arm(name, gain):
    def run(seed, folder):
        with LOG.open("a") as log:
            print(name, seed, file=log)
        if (LOG.parent / "broken").exists() and (name, seed) == ("new", 3):
            raise RuntimeError("out of luck")
        return {{"accuracy": 0.8 + gain + 0.01 * seed * gain, "loss": 0.5}}
    return Arm(run=run)

STUDIES = {{
    "toy": Study(
        claim="The new arm beats the old one.",
        primary=("new", "old"),
        arms={{"new": arm("new", 0.1), "old": arm("old", 0.0)}},
        secondary=(Comparison("new", "old", "Losses agree.", metric="loss", higher_is_better=False),),
        falsified_if="new - old is below 0",
        falsified=lambda results: results.difference("new", "old", "accuracy").mean < 0,
    ),
}}
"""


class Toy:
    def __init__(self, root: Path, package: str) -> None:
        self.root, self.package, self.log = root, package, root / "log.txt"
        self.study = root / package / "study.py"

    def run(self, **options: Any) -> dict[str, Any]:
        return reproduce(
            "toy", self.root / "ledger", progress=False, work=self.root / "work", jobs=1, **options
        )

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Toy:
    package = f"toy_{abs(hash(request.node.name))}"
    toy = Toy(tmp_path, package)
    toy.study.parent.mkdir()
    (toy.study.parent / "__init__.py").write_text('CATALOGUE = {"toy": "method:Toy", "bare": "method:Toy"}\n')
    toy.study.write_text(textwrap.dedent(STUDY).format(log=str(toy.log)))
    entries = {name: catalogue.Entry(name, package, "method:Toy") for name in ("bare", "toy")}
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(catalogue, "entries", lambda: entries)
    monkeypatch.setattr(catalogue, "describe", lambda name: {"name": name, "card": "toy_card"})
    return toy


def test_entry_has_all_that_the_ledger_promises(toy: Toy) -> None:
    entry = toy.run()
    assert json.loads((toy.root / "ledger" / "toy.json").read_text()) == entry
    assert (entry["method"], entry["card"], entry["verdict"]) == ("toy", "toy_card", "holds")
    assert entry["claim"] == "The new arm beats the old one."
    assert entry["seeds"] == [0, 1, 2, 3, 4]
    assert entry["paired_differences"] == pytest.approx([0.1, 0.101, 0.102, 0.103, 0.104])
    assert entry["interval"][0] < entry["mean"] < entry["interval"][1]
    assert (entry["margin"], entry["falsified"], entry["reason"]) == (0.0, False, None)
    assert entry["secondary"][0]["paired_differences"] == [0.0] * 5
    assert entry["study_hash"] == find_study("toy").hash
    assert len(entry["study_hash"]) == len(entry["code_hash"]) == 64
    assert {"tutelage", "torch", "python"} <= set(entry["versions"])
    assert {"cpu", "cores", "threads"} <= set(entry["machine"])
    assert "commit" in entry
    assert entry["cost"]["runs"] == 10
    assert entry["tuning"]["trials"] == 1


def test_page_is_made_from_the_entry(toy: Toy) -> None:
    toy.run()
    page = (toy.root / "ledger" / "toy.md").read_text()
    assert page.startswith("# toy: holds\n")
    assert "> The new arm beats the old one." in page
    assert "+0.1020" in page
    assert "| `new` | 0.9020 |" in page
    assert "new - old is below 0: no." in page
    assert "tutelage reproduce toy" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert rows
    assert all(line.count("|") == rows[0].count("|") for line in rows[:4])


def test_a_second_call_runs_nothing(toy: Toy) -> None:
    first = toy.run()
    assert len(toy.calls()) == 10
    second = toy.run()
    assert len(toy.calls()) == 10
    assert {**first, "date": None} == {**second, "date": None}


def test_a_stopped_call_goes_on_where_it_was(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    run_trial = trials.run_trial

    def stopped(name: str, arm: str, seed: int, trial: int, folder: Path) -> dict[str, Any]:
        if seed == 2:
            raise KeyboardInterrupt
        return run_trial(name, arm, seed, trial, folder)

    with monkeypatch.context() as patch:
        patch.setattr(trials, "run_trial", stopped)
        with pytest.raises(KeyboardInterrupt):
            toy.run()
    assert toy.calls() == ["new 0", "old 0", "new 1", "old 1"]
    assert not (toy.root / "ledger").exists()
    assert toy.run()["verdict"] == "holds"
    assert sorted(toy.calls()) == sorted(f"{arm} {seed}" for arm in ("new", "old") for seed in range(5))


def test_a_failed_arm_makes_it_incomplete_and_is_tried_again(toy: Toy) -> None:
    (toy.root / "broken").touch()
    entry = toy.run()
    assert entry["verdict"] == "incomplete"
    assert "new, seed 3, trial 0: RuntimeError: out of luck" in entry["reason"]
    assert entry["interval"] is None
    assert "No verdict is computed" in (toy.root / "ledger" / "toy.md").read_text()
    (toy.root / "broken").unlink()
    assert toy.run()["verdict"] == "holds"
    assert toy.calls()[10:] == ["new 3"]


def change_study(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.study.write_text(toy.study.read_text() + "\n# another study file\n")


def change_code(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tutelage.studies.provenance.code_hash", lambda: "0" * 64)


@pytest.mark.parametrize("change", [change_study, change_code])
def test_results_of_another_study_or_code_are_not_reused(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, change: Callable[[Toy, pytest.MonkeyPatch], None]
) -> None:
    before = toy.run()
    change(toy, monkeypatch)
    after = toy.run()
    assert len(toy.calls()) == 20
    assert (before["study_hash"], before["code_hash"]) != (after["study_hash"], after["code_hash"])


def test_what_cannot_be_reproduced_is_refused_before_anything_runs(toy: Toy) -> None:
    with pytest.raises(ValueError, match=r"'toi' is no method; studies are toy; nearest: toy"):
        reproduce("toi", toy.root / "ledger")
    with pytest.raises(ValueError, match=r"'bare' has no study"):
        reproduce("bare", toy.root / "ledger")
    assert not toy.calls()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_is_found_before_anything_runs(toy: Toy) -> None:
    closed = toy.root / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="ledger cannot be written"):
        reproduce("toy", closed / "ledger", work=toy.root / "work")
    assert not toy.calls()


def test_a_file_in_the_ledgers_place_is_refused(toy: Toy) -> None:
    (toy.root / "ledger").touch()
    with pytest.raises(PermissionError, match="ledger cannot be written"):
        toy.run()
    assert not toy.calls()


def test_all_studies_are_those_with_a_study_file(toy: Toy) -> None:
    assert study_names() == ["toy"]
    entries = reproduce_all(toy.root / "ledger", progress=False, work=toy.root / "work", jobs=1)
    assert list(entries) == ["toy"]


def test_progress_is_plain_lines_without_a_terminal(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    reproduce("toy", toy.root / "ledger", work=toy.root / "work", jobs=1)
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("toy  1/10  new, seed 0, trial 0: accuracy 0.9000")
