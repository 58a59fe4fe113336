"""The memory estimate against what models, optimisers and autograd hold, and what an out-of-memory error says."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from test_sharded_language import Text, causal, make
from torch import Tensor, nn

from tutelage.engine.exhausted import (
    OutOfMemoryError,
    is_out_of_memory,
    memory_explained,
    optimizer_states,
    situation_of,
)
from tutelage.engine.memory import ModelSize, Situation, advice, estimate, in_words
from tutelage.engine.spec import ModelSpec
from tutelage.models.language_head import language_head
from tutelage.recipe.schema import OptimizerConfig

SMALL = {"width": 32, "inner": 96, "layers": 6, "keys": 16, "vocabulary": 50}
"""Of six layers: with fewer a block's parts count as blocks."""


def llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    values = SMALL | changes
    config = LlamaConfig(
        vocab_size=values["vocabulary"],
        hidden_size=values["width"],
        intermediate_size=values["inner"],
        num_hidden_layers=values["layers"],
        num_attention_heads=4,
        num_key_value_heads=4 * values["keys"] // values["width"],
        tie_word_embeddings=False,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def size_of(module: nn.Module) -> ModelSize:
    inputs: Any = Text().fetch([0, 1]).inputs
    plan = language_head("it", module, 37, inputs)
    return ModelSize.of(module, ModelSpec.of("it", module, inputs, head=plan), plan)


def test_a_size_from_figures_is_that_of_the_model() -> None:
    found, wanted = size_of(llama()), ModelSize.transformer(**SMALL)
    assert found.vocabulary == 37  # what pads a vocabulary is cut off
    for name in (
        "parameters",
        "trained",
        "itemsize",
        "block",
        "root",
        "head",
        "head_trained",
        "width",
        "inner",
    ):
        assert getattr(found, name) == getattr(wanted, name), name
    assert (
        found.edges - wanted.edges == found.kept - wanted.kept == 8
    )  # rotations of positions, one a forward


@pytest.mark.parametrize("recomputed", [False, True])
def test_activations_are_what_autograd_keeps(recomputed: bool) -> None:
    from tutelage.engine.activations import checkpoint_activations

    model, rows, length = llama(width=64, inner=192, keys=32), 4, 64
    size = size_of(model)
    inputs = {
        "input_ids": torch.randint(37, (rows, length)),
        "position_ids": torch.arange(length).expand(rows, length).clone(),
    }
    if recomputed:
        checkpoint_activations(model, inputs)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(**inputs)  # type: ignore[operator]
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    now = Situation(size, (), rows * length, recomputed=recomputed)
    estimated = estimate(now)["activations"]
    if recomputed:  # the block that is computed again comes on top of what is measured here
        estimated -= round(1.4 * size.inner * 4 * rows * length)
    assert estimated == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("name", "momentum", "states"), [("adamw", None, 2), ("sgd", 0.0, 0), ("sgd", 0.9, 1), ("lion", None, 1)]
)
def test_optimizer_states(name: str, momentum: float | None, states: float) -> None:
    assert optimizer_states(OptimizerConfig(name=name, lr=0.1, momentum=momentum)) == states


def test_the_estimate_of_a_trainer_is_what_it_holds() -> None:
    trainer = make("ddp", {"train": {"ema": 0.9, "steps": 1}})
    parts = estimate(situation_of(trainer))
    trainer.run()
    weights = list(trainer.parameters.values())
    state = trainer.optimizers["main"].optimizer.state
    kept = sum(
        v.nbytes for each in state.values() for v in each.values() if isinstance(v, Tensor) and v.dim()
    )
    teacher: Any = trainer.setup.teachers["teacher"].module
    assert parts["student's weights"] == parts["gradients"] == sum(p.nbytes for p in weights)
    assert parts["moving average"] == sum(p.nbytes for p in weights)
    assert parts["optimiser's state"] == kept
    assert parts["teacher's weights"] == sum(p.nbytes for p in teacher.parameters())
    assert list(parts.values()) == sorted(parts.values(), reverse=True)


BIG = ModelSize.transformer(width=4096, inner=14336, layers=32, keys=1024, vocabulary=128_256)


def test_every_measure_saves_what_it_should() -> None:
    now = Situation(BIG, (BIG,), 8192, ranks=8, half=True, fused=False, accelerator=True)
    saved = advice(now)
    assert list(saved.values()) == sorted(saved.values(), reverse=True)
    assert {re.search(r"\((?:train\.|method\.)?([a-z_ ]+)", name)[1].strip() for name in saved} == {  # type: ignore[index]
        "fused",
        "activation_checkpointing",
        "accumulate",
        "tutelage cache",
        "offload_teacher",
        "sharding",
        "shard_head",
    }
    alone = Situation(BIG, (), 8192, ranks=8, sharded=True, shard_head=True, recomputed=True)
    assert not {name for name in advice(alone) if "fused" in name or "teacher" in name or "sharding" in name}


def test_an_error_of_the_allocator_says_what_needs_how_much() -> None:
    trainer = make("ddp", {"options": {"fused": False}})
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    trainer.task.label_loss = lambda *_: torch.empty(2**55)  # no machine has so much
    with pytest.raises(OutOfMemoryError) as caught:
        trainer.run()
    told = str(caught.value)
    assert told.startswith("step 0: out of memory (")
    for words in (
        "teacher's weights: ",
        "logits: ",
        "method.fused=true",
        "tutelage cache",
        "train.accumulate",
    ):
        assert words in told
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert all(torch.equal(p, before[name]) for name, p in trainer.parameters.items())


def test_other_errors_stay_what_they_are() -> None:
    with (
        pytest.raises(RuntimeError, match="something else") as caught,
        memory_explained(lambda: pytest.fail("nobody asks"), ""),
    ):
        raise RuntimeError("something else")
    assert type(caught.value) is RuntimeError
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**40, "3.0 TiB"), (2**60, "1048576.0 TiB")],
)
def test_units(size: int, words: str) -> None:
    assert in_words(size) == words


def test_a_tied_head_is_no_layer_of_its_own() -> None:
    size = size_of(causal(8, tied=True, seed=0).float())
    assert size.head == 0
    assert size.width == 8


def test_a_dry_run_says_what_a_step_needs() -> None:
    from tutelage.runs import check

    layers: dict[str, Any] = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    recipe = {
        "task": "language-model",
        "data": {"path": "markov", "markov": {"rows": 200, "symbols": 20}, "max_length": 16},
        "teacher": {"model": "config:llama", "options": {"hidden_size": 32, **layers}},
        "student": {"model": "config:llama", "options": {"hidden_size": 16, **layers}},
        "method": "fkl",
        "train": {"steps": 2, "batch_size": 16, "device": "cpu", "optimizer": {"name": "adamw"}},
    }
    plan = check(recipe)
    weights = 4 * plan["student"]["parameters"]
    assert next(iter(plan["memory"])) == "a step, in all"
    assert plan["memory"]["optimiser's state"] == in_words(2 * weights)
    assert plan["memory"]["teacher's weights"] == in_words(4 * plan["teachers"]["teacher"]["parameters"])
