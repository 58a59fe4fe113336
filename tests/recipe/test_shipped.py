"""The shipped recipes: names, files, and rows that a teacher must not have seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tutelage import catalogue
from tutelage.data import open_data
from tutelage.engine.loading import Source
from tutelage.recipe import library, load_recipe, shipped
from tutelage.runs.assemble import teacher_configs


def ids(source: Source | None) -> set[int]:
    assert source is not None
    index = source.fetch(range(len(source))).index
    assert index is not None
    return set(index.tolist())


def test_the_digits_teacher_has_seen_every_image_but_those_of_the_test() -> None:
    student, teacher = (
        open_data(load_recipe(name).data, "classification") for name in ("digits", "digits-teacher")
    )
    assert [len(ids(part)) for part in (student.train, student.validation, student.test)] == [300, 300, 1000]
    assert teacher.validation is None
    assert len(ids(teacher.train)) == 797
    assert ids(teacher.test) == ids(student.test)
    assert not ids(teacher.train) & ids(student.test)
    assert not ids(student.train) & ids(student.validation)


def test_both_cifar_recipes_hold_the_same_rows_out() -> None:
    student, teacher = (load_recipe(name).data for name in ("cifar10", "cifar10-resnet32x4"))
    assert student == teacher


def test_recipes_lie_at_the_top_of_the_repository_too(repository: Path) -> None:
    assert (repository / "recipes").resolve() == library.FOLDER
    assert load_recipe(repository / "recipes" / "image-classification" / "digits.yaml") == load_recipe(
        "digits"
    )


def test_every_recipe_in_a_methods_folder_runs_a_method_of_that_folder_or_trains_its_teacher() -> None:
    folders = {name: entry.folder for name, entry in catalogue.entries().items()}
    own = {name: path for name, path in shipped().items() if path.parent in folders.values()}
    assert own
    taught = {teacher.recipe for name in own for teacher in teacher_configs(load_recipe(name)).values()}
    for name, path in own.items():
        of_folder = any(folders[method.name] == path.parent for method in load_recipe(name).method)
        assert of_folder or str(path) in taught or path.name in taught or name in taught


def test_one_name_for_two_files_is_an_error_that_names_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for task in ("a", "b"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "same.yaml").touch()
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    with pytest.raises(catalogue.CatalogueError, match=r"'same'.*a/same\.yaml.*b/same\.yaml"):
        shipped()
