"""Every study that the catalogue knows, as it stands: its recipes are valid and would run; nothing is trained."""

from __future__ import annotations

from typing import Any

import pytest

from tutelage.data import Data, open_data, row_ids
from tutelage.data.splits import choose_rows
from tutelage.recipe import load_recipe
from tutelage.recipe.schema import DataConfig
from tutelage.runs import check
from tutelage.studies.registry import FoundStudy, find_study, study_names
from tutelage.studies.study import with_overrides
from tutelage.studies.trials import FIXED

pytestmark = pytest.mark.parametrize("name", study_names())


def recipe_of(found: FoundStudy, arm: str, seed: int, trial: int) -> dict[str, Any]:
    """A trial's recipe, with an untrained teacher in the trained one's place."""
    recipe = with_overrides(found.study.trial_recipe(arm, seed, trial), FIXED)
    if found.study.teacher:
        recipe["teacher"] = dict(found.study.teacher["student"])
    return recipe


def identities(data: Data, part: str, config: DataConfig) -> set[int]:
    """What tells rows apart; of a language made on the spot, whose rows are numbered anew in every part, documents."""
    if config.markov is None:
        return set(row_ids(getattr(data, part)).tolist())
    rows = choose_rows(config.model_copy(update={"limit": None}), {"train": config.markov.rows})
    return set(rows.parts()[part].ids.tolist())


def test_every_recipe_is_valid(name: str) -> None:
    found = find_study(name)
    study = found.study
    for seed in study.seeds:
        recipes = [
            load_recipe(recipe_of(found, arm, seed, trial))
            for arm in study.arms
            for trial in range(study.trials)
        ]
        if study.teacher:
            recipes.append(load_recipe(with_overrides(study.teacher_recipe(seed), FIXED)))
        for recipe in recipes:
            assert (recipe.data.seed, recipe.train.seed) == (seed, seed)


def test_every_arm_would_run(name: str) -> None:
    found = find_study(name)
    for arm in found.study.arms:
        recipe = load_recipe(recipe_of(found, arm, 0, 0))
        assert check(recipe)["method"] == "+".join(method.name for method in recipe.method)


def test_teacher_and_students_are_tested_on_the_same_rows(name: str) -> None:
    study = find_study(name).study
    if study.teacher is None:
        pytest.skip("no teacher")
    recipes = (study.trial_recipe(study.primary[0], 3, 0) | {"teacher": None}, study.teacher_recipe(3))
    student, teacher = loaded = [load_recipe(each) for each in recipes]
    student_data, teacher_data = (open_data(each.data, each.task) for each in loaded)
    assert student_data.test is not None
    assert teacher_data.test is not None
    assert student_data.test.fingerprint == teacher_data.test.fingerprint
    taught = identities(teacher_data, "train", teacher.data)
    assert not taught & identities(student_data, "test", student.data)
    assert identities(student_data, "train", student.data) <= taught


def test_claim_is_the_methods_and_one_sentence(name: str) -> None:
    study = find_study(name).study
    assert study.claim.endswith(".")
    assert study.claim.count(". ") == 0
    assert study.primary[0] != study.primary[1]
