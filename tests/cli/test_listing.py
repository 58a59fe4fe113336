"""The verbs that list and look: methods, recipes, taps, report, reproduce, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typed import Calls, tutelage

from tutelage import catalogue
from tutelage.recipe import load_recipe, shipped


def test_methods_lists_what_the_catalogue_has() -> None:
    found = json.loads(tutelage("methods", "--json").stdout)
    assert [method["name"] for method in found] == catalogue.names()
    for method in found:
        assert method.keys() >= {"name", "card", "title", "family", "kind", "needs", "claim", "missing"}
    table = tutelage("methods").stdout
    assert all(name in table for name in catalogue.names())


def test_one_method_is_shown_with_its_options() -> None:
    found = json.loads(tutelage("methods", "kd", "--json").stdout)
    option = {option["name"]: option for option in found["options"]}["temperature"]
    assert option["default"] == found["defaults"]["temperature"]
    assert option["allowed"].startswith("a number > 0")
    text = tutelage("methods", "kd").stdout
    assert found["claim"][:40] in text
    assert "temperature" in text
    done = tutelage("methods", "kdd")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "did you mean `kd`" in done.stderr


def test_recipes_are_listed_printed_and_copied(tmp_path: Path) -> None:
    found = json.loads(tutelage("recipes", "--json").stdout)
    assert [recipe["name"] for recipe in found] == list(shipped())
    assert all(recipe["title"] for recipe in found)
    assert tutelage("recipes", "digits").stdout == shipped()["digits"].read_text()
    target = tmp_path / "new" / "my.yaml"
    assert tutelage("recipes", "digits", "--copy", str(target)).exit_code == 0
    assert load_recipe(target) == load_recipe("digits")
    again = tutelage("recipes", "digits", "--copy", str(target))
    assert again.exit_code == 2
    assert "exists" in again.stderr
    assert tutelage("recipes", "digits", "--copy", str(tmp_path)).exit_code == 0
    assert (tmp_path / "digits.yaml").is_file()
    assert tutelage("recipes", "--copy", str(tmp_path)).exit_code == 2
    assert tutelage("recipes", "digitz").exit_code == 2


def test_the_schema_is_printed_alone() -> None:
    schema = json.loads(tutelage("recipes", "--schema").stdout)
    assert schema["$defs"]["method"]["anyOf"][0]["enum"] == catalogue.names()


def test_taps_lists_paths_shapes_and_depth() -> None:
    found = json.loads(tutelage("taps", "digits:mlp-16", "--shape", "1,8,8", "--json").stdout)
    assert found[-1]["depth"] <= 1
    assert {"path", "kind", "shape", "depth"} <= found[0].keys()
    assert "digits:mlp-16" in tutelage("taps", "digits:mlp-16").stdout
    assert tutelage("taps", "digits:mlp-16", "--shape", "a,b").exit_code == 2
    wrong = tutelage("taps", "cifar:resnet8x5")
    assert wrong.exit_code == 2
    assert "cifar:resnet8x4" in wrong.stderr


def test_report_writes_and_says_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tutelage import report

    write = Calls(tmp_path / "both.html")
    monkeypatch.setattr(report, "write_report", write)
    done = tutelage("report", "a", "b", "--out", str(tmp_path / "both.html"))
    assert done.stdout.splitlines()[-1] == str(tmp_path / "both.html")
    assert write.calls == [(([Path("a"), Path("b")], tmp_path / "both.html"), {})]


def test_reproduce_prints_verdicts_and_where_they_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tutelage.studies import ledger, registry

    entry = {"method": "kd", "claim": "It helps.", "seeds": [0, 1, 2, 3, 4], "arm": "kd", "baseline": "none"}
    judged = {"verdict": "holds", "metric": "accuracy", "mean": 0.02, "interval": [0.01, 0.03]}
    study = Calls({**entry, **judged})
    monkeypatch.setattr(ledger, "reproduce", study)
    monkeypatch.setattr(registry, "study_names", lambda: ["kd", "nkd"])
    done = tutelage("reproduce", "kd", "--dir", str(tmp_path), "--no-progress")
    assert "holds" in done.stdout
    assert "+2.0 [1.0, 3.0]" in done.stdout
    assert done.stdout.splitlines()[-1] == str(tmp_path / "kd.json")
    assert study.calls == [(("kd",), {"folder": tmp_path, "progress": False})]
    assert len(json.loads(tutelage("reproduce", "--all", "--json").stdout)) == 2
    study.outcome |= {"verdict": "incomplete", "mean": None, "interval": None}
    assert "incomplete" in tutelage("reproduce", "kd").stdout


def test_doctor_looks_at_everything() -> None:
    done = tutelage("doctor", "--json")
    found = json.loads(done.stdout)
    names = {finding["what"] for finding in found["findings"]}
    assert names >= {
        "tutelage",
        "python",
        "packages",
        "extra llm",
        "torch",
        "devices",
        "disk",
        "TUTELAGE_DATA",
        "catalogue",
    }
    bad = [finding for finding in found["findings"] if finding["state"] == "bad"]
    assert found["healthy"] == (not bad)
    assert done.exit_code == (1 if bad else 0), bad
    assert "torch" in tutelage("doctor").stdout


def test_doctor_finds_a_broken_method(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> dict[str, Any]:
        raise ImportError("half installed")

    monkeypatch.setattr(catalogue, "describe", broken)
    done = tutelage("doctor", "--json")
    assert done.exit_code == 1
    states = {finding["what"]: finding["state"] for finding in json.loads(done.stdout)["findings"]}
    assert states["method kd"] == states["catalogue"] == "bad"
