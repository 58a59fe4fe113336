"""What is measured by what a language model writes: against figures computed by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from models.small_text import TOKENS, text_model
from tutelage.data import open_data
from tutelage.data.tokens import TokenSource
from tutelage.engine.generation import Prompt, generate, greedy_tokens
from tutelage.engine.heads import HeadPlan
from tutelage.engine.taps import Tapped
from tutelage.models import load_model
from tutelage.recipe import load_recipe
from tutelage.recipe.generation import GenerationConfig
from tutelage.runs import RunResult, check, distill
from tutelage.runs.drafting import NoDraftsError, measure_drafting
from tutelage.runs.samples import held_out_prompts

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LARGE = SMALL | {"hidden_size": 32}
DATA = {"path": "markov", "markov": {"rows": 60, "symbols": 8}, "max_length": 16, "validation": 8, "test": 12}


def recipe(**changes: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "task": "language-model",
        "data": DATA,
        "teacher": {"model": "config:llama", "options": LARGE},
        "student": {"model": "config:llama", "options": SMALL},
        "method": "fkl",
        "train": {"steps": 2, "batch_size": 8, "device": "cpu", "threads": 1},
        "evaluation": {"samples": 6},
    } | changes


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return distill(recipe(), folder=tmp_path_factory.mktemp("samples") / "run", progress=False)


def held_out(part: str = "test") -> TokenSource:
    source = getattr(open_data(load_recipe(recipe()).data, "language-model"), part)
    assert isinstance(source, TokenSource)
    return source


@torch.no_grad()
def test_sample_perplexity_is_the_teachers_on_the_students_own_tokens(finished: RunResult) -> None:
    from tutelage.runs.assemble import assemble

    teacher = assemble(load_recipe(recipe())).live_teachers["teacher"].held.model.eval()
    outputs = open_data(load_recipe(recipe()).data, "language-model").info.outputs
    student: Any = load_model(finished.folder / "student").module
    prompts = held_out_prompts(held_out(), 6)
    options = GenerationConfig(max_new_tokens=12, do_sample=True)
    texts = generate(Tapped(student, head=HeadPlan("lm_head", outputs)), prompts, options, 0)
    losses = []
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([[*prompt.tokens, *text.tokens]])
        scores = teacher(input_ids=ids).logits[0, :, :outputs].log_softmax(-1)
        losses += [
            -float(scores[place - 1, ids[0, place]]) for place in range(len(prompt.tokens), ids.shape[1])
        ]
    wanted = float(torch.tensor(losses, dtype=torch.float64).mean().exp())
    assert finished.result["test"]["sample_perplexity"] == pytest.approx(wanted, rel=1e-5)


def test_student_teacher_and_data_stand_side_by_side(finished: RunResult) -> None:
    table = finished.result["tables"]["samples"]
    assert table["columns"] == ["prompt", "the data goes on", "the student writes", "the teacher writes"]
    rows = held_out().fetch(range(12)).inputs["input_ids"]  # type: ignore[index]
    texts = {" ".join(f"s{token}" for token in row) for row in rows.tolist()}
    assert len(table["rows"]) == 6
    assert {f"{given} {rest}" for given, rest, *_ in table["rows"]} <= texts
    assert "not measured" not in finished.result["tables"]
    report = (finished.folder / "report.html").read_text()
    assert "The student writes" in report or "the student writes" in report


def test_the_draft_speedup_is_timed_for_the_report(finished: RunResult, tmp_path: Path) -> None:
    table = finished.result["tables"]["the student as a draft model"]
    alone, drafted, speedup, kept = table["rows"][0]
    assert min(alone, drafted, speedup) > 0
    assert 0 <= kept <= 1
    assert finished.result["test"]["draft_speedup"] == speedup
    quiet = distill(recipe(output={"report": False}), folder=tmp_path / "run", progress=False).result
    assert "draft_speedup" not in quiet["test"]
    assert quiet["test"]["sample_perplexity"] == finished.result["test"]["sample_perplexity"]


def test_without_test_rows_validation_rows_are_gone_on_from(tmp_path: Path) -> None:
    values = recipe(data=DATA | {"test": None}, output={"report": False})
    result = distill(values, folder=tmp_path / "run", progress=False).result
    assert result["test"] is None
    assert result["validation"]["sample_perplexity"] > 1


def test_what_cannot_be_had_is_left_out_with_a_reason(tmp_path: Path) -> None:
    alone = distill(recipe(teacher=None, method="none"), folder=tmp_path / "alone", progress=False).result
    assert alone["tables"]["not measured"]["rows"] == [
        ["sample_perplexity, draft_speedup", "there is no teacher that is a model"]
    ]
    assert len(alone["tables"]["samples"]["columns"]) == 3
    student = {"model": "config:llama", "options": SMALL | {"vocab_size": 80}}
    other = distill(recipe(student=student), folder=tmp_path / "other", progress=False).result
    ((what, why),) = other["tables"]["not measured"]["rows"]
    assert what == "draft_speedup"
    assert "the teacher's head has 64 outputs and the student's 80" in why
    assert other["test"]["sample_perplexity"] > 1


def test_samples_need_held_out_text() -> None:
    with pytest.raises(ValueError, match=r"evaluation\.samples is 6: .* this run has none"):
        check(recipe(data=DATA | {"validation": None, "test": None}))
    digits = {
        "data": {"path": "digits"},
        "student": {"model": "digits:mlp-8"},
        "teacher": None,
        "method": "none",
    }
    with pytest.raises(ValueError, match="this run has the task classification"):
        check(recipe(task="classification", **digits))


def test_prompts_are_spread_over_the_rows() -> None:
    found = held_out_prompts(held_out(), 5)
    assert [len(prompt.tokens) for prompt in found] == [4] * 5
    assert [prompt.id for prompt in found] == [0, 3, 6, 8, 11]
    assert len(held_out_prompts(held_out(), 99)) == 12


def held(kind: str = "llama", **fields: Any) -> Tapped:
    return Tapped(text_model(kind, **fields).module, head=HeadPlan("lm_head", TOKENS.size))


GIVEN = [Prompt(i, (5 + i, 6, 7)) for i in range(2)]


def test_a_model_drafts_for_itself_without_fail() -> None:
    teacher = held()
    teacher.model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    found = measure_drafting(teacher, copy.deepcopy(teacher), GIVEN, 12)
    assert found.accepted == 1
    assert found.speedup == pytest.approx(found.drafted / found.alone, rel=1)


def test_drafts_that_are_all_wrong_are_not_kept() -> None:
    """A student whose likeliest token never is the teacher's."""
    teacher, student = held(), held()
    with torch.no_grad():
        student.get_parameter("model.lm_head.weight").neg_()
    assert measure_drafting(teacher, student, GIVEN, 12).accepted == 0


def test_texts_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*arguments: Any) -> list[int]:
        return greedy_tokens(*arguments)[: 5 if len(arguments) > 3 else None]

    monkeypatch.setattr("tutelage.runs.drafting.greedy_tokens", other)
    with pytest.raises(NoDraftsError, match="after prompt 0 assisted generation gives another text"):
        measure_drafting(held(), held(seed=1), GIVEN, 12)


def test_who_cannot_draft_is_named() -> None:
    with pytest.raises(NoDraftsError, match="the student is a Linear, which has no `generate`"):
        measure_drafting(held(), Tapped(torch.nn.Linear(2, 2)), GIVEN, 4)
    with pytest.raises(NoDraftsError, match="the teacher's head has 128 outputs and the student's 160"):
        measure_drafting(held(), held(options={"vocab_size": 160}), GIVEN, 4)
