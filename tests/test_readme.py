"""What README and the other documents say is so: tables, commands and Python."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

MARKED = "before\n<!-- methods:begin -->\nold\n<!-- methods:end -->\nafter\n"


@pytest.fixture(scope="module")
def generator(repository: Path) -> ModuleType:
    sys.path.insert(0, str(repository))
    try:
        import tools.readme
    finally:
        sys.path.remove(str(repository))
    return tools.readme


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL)


def documents(repository: Path) -> list[Path]:
    return [*repository.glob("*.md"), *(repository / "docs").glob("*.md")]


def test_the_table_of_methods_is_the_registrys(generator: ModuleType, repository: Path) -> None:
    text = (repository / "README.md").read_text()
    assert generator.filled(text, "methods", generator.methods_table()) == text, "run `make readme`"


def test_the_table_has_every_method_once(generator: ModuleType) -> None:
    from tutelage import catalogue

    rows = generator.methods_table().splitlines()[2:]
    names = [re.match(r"\| \[`(\w+)`\]", row) for row in rows]
    assert [found[1] if found else "" for found in names] == catalogue.names()


def test_a_verdict_comes_from_the_ledger_alone(generator: ModuleType, tmp_path: Path) -> None:
    assert generator.verdict("kd", tmp_path) == "not tested"
    ledger = tmp_path / "docs" / "ledger"
    ledger.mkdir(parents=True)
    (ledger / "kd.json").write_text(json.dumps({"verdict": "holds"}))
    assert generator.verdict("kd", tmp_path) == "[holds](docs/ledger/kd.json)"


def test_the_quickstarts_figures(generator: ModuleType) -> None:
    model = {"parameters": 1234, "flops": 56789, "latency_ms": 0.25}
    comparison = {
        "metric": "accuracy",
        "baseline": "none",
        "seeds": [0, 1],
        "teacher": {**model, "test": {"accuracy": 0.97}},
        "student": model,
        "methods": [
            {"name": "none", "mean": 0.9, "low": 0.88, "high": 0.92, "difference": None, "seconds": 1.25},
            {
                "name": "kd",
                "mean": 0.93,
                "low": 0.92,
                "high": 0.94,
                "difference": {"mean": 0.03, "low": -0.01, "high": 0.07},
                "seconds": 2.0,
            },
        ],
    }
    lines = generator.quickstart_table(comparison).splitlines()
    assert lines[2].startswith("| teacher | 97.00 |  | 1,234, 56,789, 0.25 ms |")
    assert lines[3].startswith("| `none` | 90.00 (88.00 to 92.00) |  |")
    assert lines[4].startswith("| `kd` | 93.00 (92.00 to 94.00) | +3.00 (-1.00 to +7.00) |")
    assert lines[-1].startswith("Means over 2 seeds")


def test_only_what_stands_between_the_markers_changes(generator: ModuleType) -> None:
    assert generator.filled(MARKED, "methods", "new") == MARKED.replace("old", "new")
    with pytest.raises(ValueError, match="lacks the markers"):
        generator.filled(MARKED, "quickstart", "new")


def test_a_bar_does_not_break_a_table(generator: ModuleType) -> None:
    assert generator.table(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"


def test_python_in_the_readme_runs(repository: Path, tmp_path: Path) -> None:
    found = blocks(repository / "README.md", "python")
    assert len(found) == 3
    # The documents' own runs, made short: what is tested is that every call is as it is written.
    (tmp_path / "conf.py").write_text("\n\n".join(found).replace('folder="runs/python"', 'folder="python"'))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "conf.py"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_make_target_of_the_documents_exists(repository: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (repository / "Makefile").read_text(), re.MULTILINE))
    workflow = (repository / ".ci" / "run").read_text()
    for text in (*(document.read_text() for document in documents(repository)), workflow):
        for named in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
            assert named in targets, named


def test_every_verb_of_the_documents_exists(repository: Path) -> None:
    help_text = subprocess.run(
        [sys.executable, "-c", "from tutelage.cli import main; main()", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    verbs = set(re.findall(r"^\W*([a-z]+)\s{2,}", help_text, re.MULTILINE))
    assert {"run", "compare", "methods"} <= verbs
    named = {
        verb
        for document in documents(repository)
        for line in document.read_text().split("## What is not here yet")[0].splitlines()
        for verb in re.findall(r"(?:^\.venv/bin/|`)tutelage ([a-z]+)", line)
    }
    assert {"compare", "run", "resume"} <= named <= verbs


def test_recipes_that_the_documents_name_ship(repository: Path) -> None:
    from tutelage.recipe import load_recipe

    assert load_recipe("cifar10").data.path == "uoft-cs/cifar10"
    assert (
        load_recipe("cifar10", ["method=nkd", "data.path=/path/to/cifar10"]).data.path == "/path/to/cifar10"
    )
    assert load_recipe("digits").data.path == "digits"


def test_the_citation_can_be_read(repository: Path) -> None:
    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def promises(repository: Path) -> list[tuple[str, list[str]]]:
    """Each promise, and what it says that holds it."""
    text = (repository / "README.md").read_text().split("## What we promise")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    return [(promise, re.findall(r"`([^`]+)`", held)) for promise, held in rows]


def test_every_promise_is_held_by_something_that_is_there(repository: Path) -> None:
    sys.path.insert(0, str(repository))
    try:
        from benchmarks.registry import BENCHMARKS, chosen
    finally:
        sys.path.remove(str(repository))
    targets = re.findall(r"^([a-z-]+):", (repository / "Makefile").read_text(), re.MULTILINE)
    found = promises(repository)
    assert len(found) > 20
    for promise, holders in found:
        assert holders, promise
        for name in holders:
            file, _, test = name.partition("::")
            if file.startswith("tests/"):
                assert (f"def {test}(" if test else "test_") in (repository / file).read_text(), name
            elif file.startswith("make "):
                assert file.removeprefix("make ") in targets
            else:
                assert chosen(BENCHMARKS, file)
