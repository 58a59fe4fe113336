"""Text of a causal model: the tokens themselves, what they depend on, and what is left as it was."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.small_text import TOKENS, text_model
from tutelage.engine.generation import (
    Generation,
    GenerationError,
    Prompt,
    batches,
    check_prompts,
    generate,
    greedy_tokens,
)
from tutelage.engine.heads import HeadPlan
from tutelage.engine.step import Step
from tutelage.engine.taps import Tapped
from tutelage.engine.types import Batch
from tutelage.recipe.generation import GenerationConfig
from tutelage.teachers.local import LocalTeacher

GREEDY = GenerationConfig(max_new_tokens=10)
BEAMS = GenerationConfig(max_new_tokens=10, beams=3)
DRAWN = GenerationConfig(max_new_tokens=10, do_sample=True, temperature=0.9, top_p=0.95)
WAYS = pytest.mark.parametrize("options", [GREEDY, BEAMS, DRAWN], ids=["greedy", "beams", "drawn"])


def held(kind: str = "llama", **fields: Any) -> Tapped:
    return Tapped(text_model(kind, **fields).module, head=HeadPlan("lm_head", TOKENS.size))


def prompts(count: int = 7) -> list[Prompt]:
    """Of 1 to 5 tokens, with ids that are no positions."""
    draw = random.Random(0)
    return [Prompt(3 * i + 1, tuple(draw.choices(range(4, 100), k=1 + i % 5))) for i in range(count)]


def sized(options: GenerationConfig, batch_size: int) -> GenerationConfig:
    return options.model_copy(update={"batch_size": batch_size})


@torch.no_grad()
def by_hand(model: Any, tokens: tuple[int, ...], count: int) -> list[int]:
    """The likeliest token each time, from whole forwards without a cache."""
    ids = list(tokens)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1, : TOKENS.size].argmax()))
        if ids[-1] == TOKENS.eos:
            break
    return ids[len(tokens) :]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_greedy_text_is_the_likeliest_token_each_time(kind: str) -> None:
    model = held(kind)
    model.eval()
    for prompt, answer in zip(prompts(), generate(model, prompts(), sized(GREEDY, 4), 0), strict=True):
        assert list(answer.tokens) == by_hand(model.model, prompt.tokens, 10)
        assert answer.prompt == prompt.id


@WAYS
def test_a_text_does_not_depend_on_its_batch(options: GenerationConfig) -> None:
    model, given = held(), prompts()
    wanted = generate(model, given, sized(options, 1), 5)
    for size in (3, 32):
        assert generate(model, given, sized(options, size), 5) == wanted
    assert generate(model, given[::-1], sized(options, 2), 5) == wanted[::-1]
    assert generate(model, given[2:4], options, 5) == wanted[2:4]


def test_drawn_texts_differ_by_seed_and_prompt_id() -> None:
    model = held()
    twins = [Prompt(1, (5, 6)), Prompt(2, (5, 6))]
    one, other = generate(model, twins, DRAWN, 0)
    assert one.tokens != other.tokens
    assert generate(model, twins[:1], DRAWN, 1)[0].tokens != one.tokens


def test_tokens_are_drawn_from_the_models_distribution() -> None:
    model = held()
    with torch.no_grad():
        model.get_parameter("model.lm_head.weight").mul_(8)
        options = GenerationConfig(max_new_tokens=1, do_sample=True, temperature=0.7, batch_size=4000)
        drawn = [
            answer.tokens[0] for answer in generate(model, [Prompt(i, (9,)) for i in range(4000)], options, 0)
        ]
        logits = model.model.eval()(input_ids=torch.tensor([[9]])).logits[0, -1, : TOKENS.size]
    found = torch.bincount(torch.tensor(drawn), minlength=TOKENS.size) / 4000
    wanted = (logits / 0.7).softmax(0)
    assert wanted.max() > 0.05
    assert (found - wanted).abs().sum() / 2 < 0.08  # 0.06 is what 4000 fair draws give


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_tiny_temperature_draws_the_likeliest_token(top_p: float) -> None:
    model = held(options={"vocab_size": 128})
    options = GREEDY.model_copy(update={"do_sample": True, "temperature": 1e-40, "top_p": top_p})
    assert generate(model, prompts(), options, 0) == generate(model, prompts(), GREEDY, 0)


def test_top_p_leaves_only_the_likeliest_tokens() -> None:
    model = held()
    with torch.no_grad():
        model.get_parameter("model.lm_head.weight").mul_(8)
        logits = model.model.eval()(input_ids=torch.tensor([[9]])).logits[0, -1, : TOKENS.size]
    mass, order = logits.softmax(0).sort(descending=True)
    allowed = set(order[: int((mass.cumsum(0) < 0.5).sum()) + 1].tolist())
    options = GenerationConfig(max_new_tokens=1, do_sample=True, top_p=0.5)
    drawn = {
        answer.tokens[0] for answer in generate(model, [Prompt(i, (9,)) for i in range(300)], options, 0)
    }
    assert drawn <= allowed
    assert len(drawn) > 1


@WAYS
def test_padding_of_the_vocabulary_is_never_written(options: GenerationConfig) -> None:
    model = held(options={"vocab_size": 128})
    head: Tensor = model.get_parameter("model.lm_head.weight")
    with torch.no_grad():
        head[TOKENS.size :] = 100 * head[: 128 - TOKENS.size].sign()
    assert all(
        token < TOKENS.size for answer in generate(model, prompts(), options, 0) for token in answer.tokens
    )


@WAYS
def test_a_text_ends_at_the_first_stop_token_which_stays(options: GenerationConfig) -> None:
    model = held()
    more = options.model_copy(update={"max_new_tokens": 60})
    likely = generate(model, prompts(1), GREEDY, 0)[0].tokens[2]
    model.model.generation_config.eos_token_id = [TOKENS.eos, likely]  # type: ignore[union-attr]
    answers = generate(model, prompts(20), more, 0)
    assert any(answer.ended for answer in answers)
    for answer in answers:
        stops = [token in (TOKENS.eos, likely) for token in answer.tokens]
        assert answer.ended == stops[-1]
        assert not any(stops[:-1])
        assert answer.ended or len(answer.tokens) == 60


@WAYS
def test_the_model_and_the_generators_are_left_as_they_were(options: GenerationConfig) -> None:
    model = held("gpt2")
    model.train()
    model.model.transformer.h[0].eval()  # type: ignore[union-attr, index]
    modes = {name: module.training for name, module in model.named_modules()}
    settings = copy.deepcopy(model.model.generation_config.to_dict())  # type: ignore[union-attr, operator]
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    generate(model, prompts(), options, 0)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.model.generation_config.to_dict() == settings  # type: ignore[union-attr, operator]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # type: ignore[index]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.model.config.use_cache is False  # type: ignore[union-attr]


@WAYS
def test_settings_that_come_with_a_model_do_not_count(options: GenerationConfig) -> None:
    plain, set_up = held(), held()
    own: Any = set_up.model.generation_config
    own.repetition_penalty, own.temperature, own.top_k, own.do_sample = 9.0, 0.1, 1, True
    own.suppress_tokens, own.min_new_tokens = list(range(4, 60)), 9
    assert generate(set_up, prompts(), options, 0) == generate(plain, prompts(), options, 0)


def test_drafts_do_not_change_the_text() -> None:
    teacher, student = held(), held(seed=1)
    for prompt in prompts(3):
        assert greedy_tokens(teacher, prompt.tokens, 12, student) == greedy_tokens(teacher, prompt.tokens, 12)


def test_a_step_lets_student_and_teacher_write() -> None:
    student, teacher = held(), held(seed=1)
    example = {"input_ids": torch.tensor([[5, 6]]), "position_ids": torch.tensor([[0, 1]])}
    teachers = {"big": LocalTeacher("big", teacher.model, example, head=teacher.head)}
    runtime = SimpleNamespace(world=1, rank=0)
    setup: Any = SimpleNamespace(
        student=student,
        teachers=teachers,
        runtime=runtime,
        seed=3,
        total_steps=9,
        steps_per_epoch=3,
        data=None,
    )
    ours, later = (Step(setup, Batch(example), step).generate("student", prompts(), DRAWN) for step in (0, 1))
    assert ours != later
    assert Step(setup, Batch(example), 0).generate("student", prompts(), DRAWN) == ours
    theirs = Step(setup, Batch(example), 0).generate("big", prompts(), GREEDY)
    assert theirs == generate(teacher, prompts(), GREEDY, 0)


def test_batches_are_of_similar_length_and_depend_on_the_prompts_alone() -> None:
    found = batches(prompts(11), 4)
    assert [len(batch) for batch in found] == [4, 4, 3]
    lengths = [len(prompt.tokens) for batch in found for prompt in batch]
    assert lengths == sorted(lengths)
    assert found == batches(prompts(11)[::-1], 4)


def test_what_cannot_be_gone_on_from() -> None:
    model = held()
    with pytest.raises(GenerationError, match="two prompts have one id"):
        generate(model, [Prompt(0, (4,)), Prompt(0, (5,))], GREEDY, 0)
    with pytest.raises(GenerationError, match="prompt 7 is empty"):
        generate(model, [Prompt(7, ())], GREEDY, 0)
    with pytest.raises(
        GenerationError, match=r"2040 tokens and max_new_tokens 10 are more than the 2048 positions"
    ):
        check_prompts(model, [Prompt(0, (4,) * 2040)], 10)
    with pytest.raises(GenerationError, match="Linear writes no text"):
        generate(Tapped(nn.Linear(2, 2)), [Prompt(0, (4,))], GREEDY, 0)
    assert generate(model, [], GREEDY, 0) == []


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="temperature and top_p only together with do_sample"):
        GenerationConfig(temperature=0.5, top_p=0.9)
    with pytest.raises(ValueError, match="beams are not drawn"):
        GenerationConfig(beams=2, do_sample=True)


def test_an_answer_is_plain() -> None:
    answer = generate(held(), [Prompt(5, (4, 5))], GREEDY, 0)[0]
    assert isinstance(answer, Generation)
    assert all(type(token) is int for token in answer.tokens)
