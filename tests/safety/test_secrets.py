"""Secrets stay in the environment: no run, report, log, error or table holds one, and no recipe may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typed import tutelage
from typer.testing import Result

from tutelage.recipe import RecipeError, load_recipe, validate
from tutelage.recipe.schema import ModelConfig, TeacherConfig

SECRET = "sesame-4f1d9c7e-do-not-write-me"
VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "OPENAI_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "GITHUB_TOKEN",
    "HTTPS_PROXY_PASSWORD",
)
RECIPE: dict[str, Any] = {
    "data": {"path": "digits", "limit": 96, "validation": 32, "test": 60},
    "teacher": {"recipe": "teacher.yaml"},
    "student": {"model": "digits:mlp-8"},
    "method": "kd",
    "train": {"steps": 6, "batch_size": 32, "device": "cpu", "threads": 1},
    "output": {"trackers": ["tensorboard"]},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, and an environment full of secrets."""
    for name in VARIABLES:
        monkeypatch.setenv(name, SECRET)
    monkeypatch.chdir(tmp_path)
    teacher = {
        **RECIPE,
        "student": {"model": "digits:mlp-16"},
        "method": "none",
        "output": {},
        "teacher": None,
    }
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(teacher))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def files_with(place: Path, text: str) -> list[str]:
    found = (path for path in place.rglob("*") if path.is_file())
    return [str(path.relative_to(place)) for path in found if text.encode() in path.read_bytes()]


def test_nothing_that_is_written_or_printed_holds_a_secret(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def typed(*words: str) -> Result:
        done: Result = tutelage(*words)
        printed.append(done.output)
        return done

    printed: list[str] = []
    good = [
        ["run", "recipe.yaml", "--dry-run"],
        ["run", "recipe.yaml", "--dir", "run"],
        ["run", "recipe.yaml", "--dir", "run", "--resume", "--json"],
        ["resume", "run"],
        ["explain", "run"],
        ["report", "run"],
        ["compare", "recipe.yaml", "--methods", "none,kd", "--seeds", "1", "--dir", "all", "--jobs", "1"],
        ["doctor"],
        ["doctor", "--json"],
    ]
    bad = [
        [
            "run",
            "recipe.yaml",
            "--dir",
            "failed",
            "method.loss_weight=1e37",
            "train.optimizer.name=sgd",
            "--debug",
        ],
        ["run", "recipe.yaml", "student.weights=hub:no/such-model", "--debug"],
        ["run", "recipe.yaml", "data.path=no/such-data", "--debug"],
        ["run", "recipe.yaml", "nonsense=1"],
    ]
    for words in good:
        assert typed(*words).exit_code == 0, printed[-1]
    for words in bad:
        assert typed(*words).exit_code in (1, 2), printed[-1]
    printed += capfd.readouterr()
    assert {"run/report.html", "run/environment.json", "all/comparison.json", "failed/result.json"} <= {
        str(path.relative_to(place)) for path in place.rglob("*")
    }
    assert any("tfevents" in path.name for path in place.rglob("*")), "trackers are written too"
    assert SECRET not in "".join(printed)
    assert files_with(place, SECRET) == []
    (place / "proof").write_text(f"x {SECRET}")
    assert files_with(place, SECRET) == ["proof"]


@pytest.mark.parametrize(
    "name",
    ["token", "hf_token", "auth_token", "api_key", "OPENAI_API_KEY", "apikey", "password", "client_secret"],
)
@pytest.mark.parametrize("part", [ModelConfig, TeacherConfig])
def test_a_recipe_with_a_secret_is_refused_and_not_repeated(name: str, part: Any) -> None:
    with pytest.raises(RecipeError, match=f"options.{name} looks like a secret") as caught:
        validate(part, {"model": "hf:x", "options": {name: SECRET}})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["pad_token_id", "tokens", "num_tokens", "class_token", "key_dim", "secretary"]
)
def test_other_options_pass(name: str) -> None:
    assert validate(ModelConfig, {"model": "timm:x", "options": {name: 1}}).options == {name: 1}


def test_an_address_with_a_password_is_refused_and_not_repeated() -> None:
    with pytest.raises(RecipeError, match="put that into the environment") as caught:
        load_recipe({**RECIPE, "teacher": {"endpoint": f"https://me:{SECRET}@example.org/v1"}})
    assert SECRET not in str(caught.value)
