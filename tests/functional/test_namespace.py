"""The flat namespace: complete, lazy, light, and without a name twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tutelage.functional
from tutelage.functional import scan


def test_hands_on_shared_and_papers_functions() -> None:
    from tutelage.functional import kd_loss, nkd_loss, wa_loss

    assert kd_loss.__module__ == "tutelage.functional.divergences"
    assert nkd_loss.__module__ == "tutelage.methods.nkd.functional"
    assert wa_loss.__module__ == "tutelage.methods.wa.functional"


def test_every_listed_name_is_there() -> None:
    assert {"kd_loss", "fitnet_loss", "nkd_terms", "herding_selection"} <= set(dir(tutelage.functional))
    for name in dir(tutelage.functional):
        assert getattr(tutelage.functional, name).__doc__, name


def test_an_unknown_name_lists_the_near_ones() -> None:
    with pytest.raises(AttributeError, match=r"did you mean nkd_loss"):
        tutelage.functional.nkd_los  # noqa: B018


def test_imports_nothing_heavy_and_no_paper_before_its_name_is_asked_for() -> None:
    code = """
import sys
import tutelage.functional
assert "torch" not in sys.modules and not any(name.startswith("tutelage.methods") for name in sys.modules)
tutelage.functional.kd_loss
assert "tutelage.methods.nkd" not in sys.modules
tutelage.functional.nkd_loss
heavy = {"accelerate", "pydantic", "timm", "torchvision", "datasets", "yaml", "tutelage.engine", "tutelage.recipe"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def _package(root: Path, **files: str) -> Path:
    (root / "functional").mkdir()
    (root / "functional" / "__init__.py").write_text("")
    for name, text in files.items():
        path = (
            root / "functional" / f"{name}.py"
            if name != "paper"
            else root / "methods" / name / "functional.py"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_scan_reads_lists_without_importing(tmp_path: Path) -> None:
    root = _package(
        tmp_path,
        losses='raise RuntimeError("imported")\n__all__ = [\n    "a",\n    "b",\n]\n',
        paper='__all__: list[str] = ["c"]\n',
    )
    assert scan(root) == {
        "a": "tutelage.functional.losses",
        "b": "tutelage.functional.losses",
        "c": "tutelage.methods.paper.functional",
    }


def test_scan_refuses_a_name_twice(tmp_path: Path) -> None:
    root = _package(tmp_path, losses='__all__ = ["twice"]\n', paper='__all__ = ["twice"]\n')
    with pytest.raises(ImportError, match=r"`twice` is exported by both .*losses and .*paper\.functional"):
        scan(root)


def test_scan_refuses_a_name_that_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"`mixup` is a function and a file"):
        scan(_package(tmp_path, mixup='__all__ = ["mixup"]\n'))


def test_scan_refuses_a_file_without_a_list(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"losses\.py has no literal `__all__"):
        scan(_package(tmp_path, losses="def a(): ...\n"))
