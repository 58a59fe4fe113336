"""The catalogue: found by a scan, without torch; broken packages from elsewhere; names."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tutelage import catalogue

METHOD = """
from pydantic import Field

from tutelage.engine.method import Method, Paper
from tutelage.engine.needs import Needs
from tutelage.recipe.config import MethodConfig


class Config(MethodConfig):
    strength: float = Field(0.5, ge=0, le=1)


class Scratch(Method):
    Config = Config
    paper = Paper("A title", "A venue", 2026, None, "A claim.", "scratch", "a family")
    needs = Needs(fields=("target",))


class Bare:
    pass
"""


class Workshop:
    """Installs packages of methods into a scratch folder on ``sys.path``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, package: str, init: str, **modules: str) -> None:
        place = self.folder / package
        place.mkdir()
        (place / "__init__.py").write_text(init)
        for name, text in modules.items():
            (place / f"{name}.py").write_text(text)
        info = self.folder / f"{package}_dist-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}-dist\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[tutelage.methods]\n{package} = {package}\n")
        catalogue.refresh()


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield Workshop(tmp_path)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    monkeypatch.undo()
    catalogue.refresh()


def test_built_in_methods_are_found_without_torch() -> None:
    code = (
        "import sys; from tutelage import catalogue; "
        "print(*catalogue.names()); catalogue.entries(); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"none", "kd", "fitnet", "nkd", "uskd", "wa"} <= set(done.stdout.split())


def test_names_are_sorted_and_agree_with_entries() -> None:
    assert catalogue.names() == sorted(catalogue.names()) == list(catalogue.entries())


@pytest.mark.parametrize("name", catalogue.names())
def test_every_method_describes_itself(name: str) -> None:
    found = catalogue.describe(name)
    assert found["name"] == name
    for key in ("card", "title", "family", "claim"):
        assert isinstance(found[key], str)
        assert found[key]
    assert found["kind"] in ("Method", "Procedure")
    assert found["needs"]
    assert all(isinstance(words, str) for words in [*found["needs"], *found["missing"]])
    assert "weight" in found["defaults"]
    assert "name" not in found["defaults"]


@pytest.mark.parametrize("name", catalogue.names())
def test_every_folder_has_a_card_for_users_and_a_recipe(name: str) -> None:
    folder = catalogue.entries()[name].folder
    assert (folder / "README.md").is_file()
    assert (folder / "recipe.yaml").is_file()


def test_a_package_of_ones_own_is_found(workshop: Workshop) -> None:
    workshop.install("scratch_methods", 'CATALOGUE = {"scratch": "method:Scratch"}', method=METHOD)
    assert "scratch" in catalogue.names()
    assert catalogue.entries()["scratch"].folder == workshop.folder / "scratch_methods"
    found = catalogue.describe("scratch")
    assert (found["venue"], found["year"], found["arxiv"]) == ("A venue", 2026, None)
    assert found["defaults"] == {"weight": 1.0, "strength": 0.5}


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ("import no_such_module", "no_such_module"),
        ("1 / 0", "ZeroDivisionError"),
        ("", "CATALOGUE"),
        ("CATALOGUE = {}", "CATALOGUE"),
        ("CATALOGUE = {'scratch': object}", "strings only"),
        ("CATALOGUE = {'scratch': 'no_class'}", "module:Class"),
    ],
)
def test_a_broken_package_is_named_and_left_out(workshop: Workshop, init: str, reason: str) -> None:
    workshop.install("broken_methods", init)
    with pytest.warns(
        catalogue.CatalogueWarning, match="broken_methods.*broken-methods|broken_methods"
    ) as caught:
        names = catalogue.names()
    assert reason in str(caught[0].message)
    assert "scratch" not in names
    assert "kd" in names


def test_one_name_in_two_packages_is_an_error_that_names_both(workshop: Workshop) -> None:
    workshop.install("twin_methods", 'CATALOGUE = {"kd": "method:Scratch"}', method=METHOD)
    with pytest.raises(catalogue.CatalogueError, match=r"'kd'.*tutelage\.methods\.baselines.*twin_methods"):
        catalogue.names()


@pytest.mark.parametrize(
    ("target", "reason"),
    [("method:Nothing", "no class 'Nothing'"), ("method:Bare", "lacks Config, paper, needs")],
)
def test_a_target_that_is_no_method_is_named(workshop: Workshop, target: str, reason: str) -> None:
    workshop.install("scratch_methods", f'CATALOGUE = {{"scratch": "{target}"}}', method=METHOD)
    with pytest.raises(catalogue.CatalogueError, match=reason):
        catalogue.load("scratch")


def test_an_unknown_name_comes_with_the_nearest() -> None:
    with pytest.raises(catalogue.UnknownMethodError, match=r"'NKDD'; did you mean `nkd`.*tutelage methods"):
        catalogue.load("NKDD")
    with pytest.raises(ValueError, match="unknown method 'zzzzzz'; `tutelage methods`"):
        catalogue.load("zzzzzz")
