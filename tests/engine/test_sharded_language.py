"""Language models on two gloo processes: losses, gradients and weights are those of one process."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from support import train_config
from tutelage import catalogue
from tutelage.engine import heads, spread
from tutelage.engine.distributed import sum_over_ranks, whole
from tutelage.engine.evaluate import evaluate
from tutelage.engine.loop import Trainer
from tutelage.engine.needs import PairingError
from tutelage.engine.runtime import Runtime
from tutelage.engine.step import Step
from tutelage.engine.types import Batch
from tutelage.models.language_head import language_head
from tutelage.recipe.schema import OptimizerConfig
from tutelage.tasks import LanguageModel
from tutelage.teachers.local import LocalTeacher

pytest.importorskip("transformers")

TOKENS, PADDED, LENGTH, ROWS = 37, 48, 12, 32


class Text:
    """Rows of tokens of which uneven numbers count: two of three rows have none, and ranks may have none at all."""

    fields = frozenset({"target", "index"})
    fingerprint = "text"

    def __init__(self, rows: int = ROWS) -> None:
        generator = torch.Generator().manual_seed(5)
        self.rows = rows
        self.ids = torch.randint(TOKENS, (ROWS, LENGTH + 1), generator=generator)
        counts = torch.rand(ROWS, LENGTH, generator=generator) < 0.6
        self.mask = counts & (torch.arange(ROWS) % 3 == 0)[:, None]
        self.target = torch.where(self.mask, self.ids[:, 1:], -100)

    def __len__(self) -> int:
        return self.rows

    def fetch(self, positions: Sequence[int]) -> Batch:
        rows = torch.as_tensor(list(positions))
        places = torch.arange(LENGTH).expand(len(rows), LENGTH).clone()
        return Batch(
            {"input_ids": self.ids[rows, :-1], "position_ids": places},
            self.target[rows],
            index=rows,
            mask=self.mask[rows],
        )


def causal(width: int, *, tied: bool, rows: int = PADDED, seed: int) -> nn.Module:
    """A small transformer of two layers, in double precision, whose vocabulary is padded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        attn_implementation="eager",
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(config).double()
    return model


def make(sharding: Any, case: dict[str, Any]) -> Trainer:
    precision = case.get("precision", "fp32")
    runtime, source = Runtime("cpu", precision, sharding), Text()
    inputs = source.fetch([0, 1]).inputs
    big = causal(16, tied=False, rows=case.get("teacher_rows", PADDED), seed=1)
    small = causal(8, tied=case.get("tied", False), seed=2)
    if precision != "fp32":
        big, small = big.float(), small.float()
    teacher = LocalTeacher(
        "teacher", big, inputs, head=language_head("the teacher", big, TOKENS, inputs)
    ).freeze()
    plan = language_head("the student", small, TOKENS, inputs)
    if case.get("lora"):
        from tutelage.models.adapters import add_lora
        from tutelage.recipe.models import LoraConfig

        with torch.random.fork_rng():
            torch.manual_seed(3)
            add_lora(small, LoraConfig(rank=2), "language-model")
            small.double()
    found = catalogue.load(case.get("method", "fkl"))
    options = {"label_weight": 0.5, "fused": True} | case.get("options", {})
    method = found(found.Config(name=case.get("method", "fkl"), **options))
    train = {
        "steps": 3,
        "batch_size": 8,
        "accumulate": 2,
        "clip": 1.0,
        "optimizer": OptimizerConfig(name="sgd", lr=0.5, momentum=0.9),
    } | case.get("train", {})
    return Trainer(
        runtime,
        small,
        method,
        LanguageModel(TOKENS),
        source,
        train_config(**train),
        teachers={"teacher": teacher},
        head=plan,
    )


class Watch:
    """Keeps every step's terms and gradient norm."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_step_end(self, trainer: Any) -> None:
        terms, norm = trainer.last
        self.steps.append({name: float(term) for name, term in (terms | {"norm": norm}).items()})


def train(sharding: str, case: dict[str, Any]) -> dict[str, Any]:
    trainer, watch = make(sharding, case), Watch()
    trainer.events.add(watch)
    counted: list[int] = []
    original = trainer.method.count

    def count(batch: Batch) -> dict[str, int | Tensor]:
        found = original(batch)
        counted.append(int(found["tokens"]))
        return found

    trainer.method.count = count  # type: ignore[method-assign]
    trainer.fit()
    held: dict[str, Any] = {"student": trainer.student, "teacher": trainer.setup.teachers["teacher"].module}
    runtime, teacher = trainer.runtime, trainer.setup.teachers["teacher"]
    metrics = evaluate(
        trainer.predict,
        Text(7),  # not as many on each rank
        trainer.task,
        batch_size=2,
        device="cpu",
        rank=runtime.rank,
        world=runtime.world,
        teacher=teacher.outputs,
    )
    return {
        "metrics": metrics,
        "losses": watch.steps,
        "counted": counted,
        "weights": {name: whole(p.detach()).clone() for name, p in trainer.parameters.items()},
        "plain": {
            name: [path for path, p in module.named_parameters() if not isinstance(p, DTensor)]
            for name, module in held.items()
        },
    }


SPREAD = {"train": {"shard_head": True, "sharding": "fsdp"}}
BOTH = ("ddp", "fsdp")
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "recomputed": (BOTH, {"train": {"activation_checkpointing": True}}),
    "tied": (BOTH, {"tied": True}),
    "plain": (("fsdp",), {"tied": True, "method": "jsd", "options": {"fused": False}}),
    "lora": (BOTH, {"lora": True, "method": "rkl"}),
    "spread": (("fsdp",), SPREAD),
    "spread, softened": (("fsdp",), SPREAD | {"method": "rkl", "options": {"temperature": 2.0}}),
    "spread, divergence alone": (("fsdp",), SPREAD | {"method": "jsd", "options": {"label_weight": 0.0}}),
    "spread, lora": (("fsdp",), SPREAD | {"lora": True}),
    "teacher in CPU memory": (BOTH, {"train": {"offload_teacher": True}}),
    "spread, teacher in CPU memory": (("fsdp",), {"train": SPREAD["train"] | {"offload_teacher": True}}),
}


@pytest.mark.two_processes
@pytest.mark.parametrize("name", list(CASES))
def test_two_ranks_train_a_language_model_as_one_process(name: str, pair: Any) -> None:
    launches, case = CASES[name]
    in_memory = {**case.get("train", {}), "offload_teacher": False}
    alone = train("ddp", case | {"train": in_memory})
    for sharding in launches:
        ranks = pair.run(train, sharding, case)
        for found in ranks:
            for ours, theirs in zip(found["losses"], alone["losses"], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
            assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-6)
            torch.testing.assert_close(found["weights"], alone["weights"], rtol=1e-6, atol=1e-6)
            if sharding == "fsdp":
                assert found["plain"] == {"student": [], "teacher": []}
        one_has_none = [
            0 in pair and sum(pair) > 0 for pair in zip(*(r["counted"] for r in ranks), strict=True)
        ]
        assert any(one_has_none)


def together(sharding: str, tied: bool) -> dict[str, Any]:
    """Gradients of a step whose loss reads a frozen forward beside the trained one; what is gathered after evaluation;
    and the metrics of the rows that one rank has."""
    trainer = make(sharding, {"tied": tied})
    rank, world = trainer.runtime.rank, trainer.runtime.world
    batch = trainer.source.fetch(range(0, 12, 3)).select(slice(rank, None, world))
    ctx = Step(trainer.setup, batch, 0)
    before = ctx.student()
    frozen = ctx.student(frozen=True)
    after = ctx.student()
    losses = [ctx.label_loss(outputs).mean for outputs in (frozen, before, after)]
    whole_mask: Any = trainer.source.fetch(range(0, 12, 3)).mask
    share = batch.mask.sum() * world / whole_mask.sum()  # type: ignore[union-attr]
    (sum(losses, torch.zeros(())) * share).backward()
    gradients = {name: whole(p.grad) for name, p in trainer.parameters.items() if p.grad is not None}
    total = sum_over_ranks(torch.stack([loss.detach() for loss in losses]) * share) / world
    logits = trainer.predict(batch).logits
    teacher = trainer.setup.teachers["teacher"].outputs(batch).logits
    held = [trainer.student, trainer.setup.teachers["teacher"].module]
    plain = [n for module in held for n, p in module.named_parameters() if not isinstance(p, DTensor)]  # type: ignore[union-attr]
    return {"gradients": gradients, "losses": total, "logits": logits, "teacher": teacher, "plain": plain}


@pytest.mark.two_processes
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_frozen_forward_between_and_an_evaluation_after(tied: bool, pair: Any) -> None:
    alone = together("ddp", tied)
    ranks = pair.run(together, "fsdp", tied)
    for rank, found in enumerate(ranks):
        assert found["plain"] == []
        torch.testing.assert_close(found["losses"], alone["losses"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["gradients"], alone["gradients"], rtol=1e-6, atol=1e-6)
        for name in ("logits", "teacher"):
            torch.testing.assert_close(found[name], alone[name][rank::2], rtol=1e-6, atol=1e-6)


def never_gathered() -> tuple[list[str], list[int]]:
    """What asks for whole heads in a training step with spread ones, and the rows that this rank holds."""
    asked: list[str] = []

    def refuse(value: DTensor) -> Tensor:
        asked.append(str(tuple(value.shape)))
        return value.full_tensor()

    trainer = make("fsdp", SPREAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spread, "gathered", refuse)
        patch.setattr(heads, "gathered", refuse)
        trainer.run(1)
    outputs = [trainer.student.outputs(trainer.student(trainer.example.inputs))]
    outputs.append(trainer.setup.teachers["teacher"].outputs(trainer.example))
    return asked, [len(each.head.rows.weight) for each in outputs]  # type: ignore[union-attr]


@pytest.mark.two_processes
def test_spread_heads_are_never_gathered_in_training(pair: Any) -> None:
    first, second = pair.run(never_gathered)
    assert first == ([], [PADDED // 2] * 2)
    assert second == ([], [TOKENS - PADDED // 2] * 2)


def refusal(case: dict[str, Any]) -> str:
    try:
        make("fsdp", case)
    except PairingError as error:
        return str(error)
    return "it was not refused"


@pytest.mark.two_processes
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"tied": True}, "the head of student is tied"),
        ({"teacher_rows": 40}, "equally many rows.*student 48, teacher 40"),
        ({"train": {"shard_teacher": False}}, "needs sharded teachers"),
    ],
)
def test_heads_that_cannot_be_spread_are_refused(case: dict[str, Any], reason: str, pair: Any) -> None:
    changed = case | {"train": SPREAD["train"] | case.get("train", {})}
    for answer in pair.run(refusal, changed):
        assert re.search(reason, answer), answer


def test_between_forwards_an_offloaded_teacher_has_no_weights_on_the_device() -> None:
    kept, offloaded = (make("ddp", {"train": {"offload_teacher": flag}}) for flag in (False, True))
    held: Any = offloaded.setup.teachers["teacher"].module
    found = [offloaded.setup.teachers["teacher"].outputs(offloaded.example).logits for _ in range(2)]
    assert {p.device.type for p in held.parameters()} == {"meta"}
    wanted = kept.setup.teachers["teacher"].outputs(kept.example).logits
    for logits in found:
        torch.testing.assert_close(logits, wanted, rtol=0, atol=0)


def seen_in_a_forward() -> tuple[list[torch.dtype], list[torch.dtype], list[float]]:
    """Under bfloat16: types of a block's weight and of the embedding while a step runs, and the terms."""
    trainer = make("fsdp", {"precision": "bf16"})
    block: Any = trainer.student.model.get_submodule("model.layers.0")
    embedding: Any = trainer.student.model.get_submodule("model.embed_tokens")
    inside: list[torch.dtype] = []
    outside: list[torch.dtype] = []
    block.register_forward_pre_hook(lambda *_: inside.append(block.mlp.up_proj.weight.dtype))
    embedding.register_forward_pre_hook(lambda *_: outside.append(embedding.weight.dtype))
    trainer.run(1)
    assert {parameter.dtype for parameter in trainer.parameters.values()} == {torch.float32}
    return inside, outside, [float(term) for term in trainer.last[0].values()]


@pytest.mark.two_processes
def test_blocks_are_gathered_in_half_precision_and_trained_in_float32(pair: Any) -> None:
    alone = make("ddp", {"precision": "bf16"})
    alone.run(1)
    for inside, outside, terms in pair.run(seen_in_a_forward):
        assert inside == [torch.bfloat16] * 2  # micro-batches
        assert outside == [torch.float32] * 2
        assert terms == pytest.approx([float(term) for term in alone.last[0].values()], rel=0.02)
