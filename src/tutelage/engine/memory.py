"""What a training step needs how much memory for, by formulas that a run, its dry run and the documentation share.

All is of one process, in bytes, at the moment when most is held: the end of the student's forward. Formulas leave out
what the allocator and the libraries keep for themselves, and attention weights where they are made whole (``eager``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from tutelage.engine.heads import HeadPlan
from tutelage.engine.spec import ModelSpec
from tutelage.functional.fused_pass import chunk_rows

_KEPT = 1.4
"""Elements kept for the backward pass, for each that a layer gives: sums and products between layers are no layer's."""
_HALF = 2.6
"""Bytes of such an element in half precision: norms and sums stay in float32."""
_DENSE = 5
"""Tensors as large as the logits where these are whole: both models' logits and log-probabilities, the gradient."""
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class ModelSize:
    """What of a model decides its memory. Numbers of parameters, unless said otherwise.

    Attributes:
        parameters, trained: all, and those that learn.
        itemsize: bytes of a parameter.
        block: of the largest block. ``root``: of all that lies in no block and not in the head.
        head: of a head that is a layer of its own.
        head_trained: whether the head learns, tied or not.
        width, vocabulary: of the hidden states and logits of a language model; 0 of any other.
        kept: elements that layers give for an item (a token, or a row), all of them; ``edges``: those of no
            block, and the blocks' own; ``inner``: those inside the largest block.
    """

    parameters: int
    trained: int
    itemsize: int
    block: int
    root: int
    head: int = 0
    head_trained: bool = False
    width: int = 0
    vocabulary: int = 0
    kept: int = 0
    edges: int = 0
    inner: int = 0

    @classmethod
    def of(cls, module: nn.Module, spec: ModelSpec, plan: HeadPlan | None) -> ModelSize:
        """Of a model that is not sharded yet."""
        parameters = list(module.parameters())
        blocks = [module.get_submodule(path) for path in spec.stages()]
        sizes = [_count(block) for block in blocks]
        head = 0 if plan is None or plan.tied(module) else _count(module.get_submodule(plan.path))
        given = {
            info.path: _elements(info.shape, plan is not None)
            for info in spec.infos
            if info.shape is not None and (plan is None or info.path != plan.path)
        }
        leaves = {
            path: each for path, each in given.items() if not list(module.get_submodule(path).children())
        }
        inner = [
            sum(n for path, n in leaves.items() if path.startswith(f"{stage}.")) for stage in spec.stages()
        ]
        total = sum(parameter.numel() for parameter in parameters)
        return cls(
            parameters=total,
            trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            itemsize=max((parameter.itemsize for parameter in parameters), default=4),
            block=max(sizes, default=0),
            root=total - sum(sizes) - head,
            head=head,
            head_trained=plan is not None and plan.parameters(module)["weight"].requires_grad,
            width=0 if plan is None else plan.parameters(module)["weight"].shape[1],
            vocabulary=0 if plan is None else plan.outputs,
            kept=sum(leaves.values()),
            edges=sum(given.get(path, 0) for path in spec.stages()) + sum(leaves.values()) - sum(inner),
            inner=max(inner, default=0),
        )

    @classmethod
    def transformer(
        cls, *, width: int, inner: int, layers: int, keys: int, vocabulary: int, itemsize: int = 4
    ) -> ModelSize:
        """A decoder with gated layers and a head of its own (Llama, Qwen, Mistral …).

        Args:
            inner: width between the two products of a gated layer.
            keys: width of the keys: heads that share theirs have fewer.
        """
        block = 2 * width * (width + keys) + 3 * width * inner + 2 * width
        head = vocabulary * width
        parameters = layers * block + 2 * head + width
        given = 5 * width + 2 * keys + 3 * inner
        return cls(
            parameters=parameters,
            trained=parameters,
            itemsize=itemsize,
            block=block,
            root=head + width,
            head=head,
            head_trained=True,
            width=width,
            vocabulary=vocabulary,
            kept=layers * given + 2 * width,
            edges=(layers + 2) * width,
            inner=given,
        )

    @property
    def bytes(self) -> int:
        return self.parameters * self.itemsize


@dataclass(frozen=True)
class Situation:
    """A step of one process.

    Attributes:
        items: tokens (or rows) of a micro-batch of this process.
        states: numbers that the optimiser keeps for each that is trained.
        half: forwards are in half precision.
        fused: logits are never made whole.
        accelerator: whether it has memory of its own, beside the CPU's.
    """

    student: ModelSize
    teachers: Sequence[ModelSize]
    items: int
    ranks: int = 1
    states: float = 2.0
    half: bool = False
    fused: bool = True
    recomputed: bool = False
    average: bool = False
    sharded: bool = False
    shard_teacher: bool = False
    shard_head: bool = False
    offload_teacher: bool = False
    accelerator: bool = False


def estimate(now: Situation) -> dict[str, int]:
    """Bytes of one process, by what they are for, largest first; what needs none is left out."""
    student, parts = now.student, _parts(now)
    mine = student.itemsize / parts
    compute = 2 if now.half else student.itemsize
    found = {
        "student's weights": student.parameters * mine,
        "gradients": student.trained * (mine + (student.itemsize if parts == 1 < now.ranks else 0)),
        "optimiser's state": now.states * student.trained * mine,
        "moving average": student.parameters * mine * now.average,
        "weights in half precision": 2
        * student.parameters
        * (now.half and student.itemsize > 2 and parts == 1),
        "student's gathered weights": _gathered(student, now, compute) if parts > 1 else 0,
        "teacher's weights": sum(_teacher(teacher, now) for teacher in now.teachers),
        "activations": _activations(now),
        "hidden states": _hidden(now),
        "heads and their gradient": _heads(now),
        "logits": _logits(now),
    }
    return {name: round(size) for name, size in sorted(found.items(), key=lambda each: -each[1]) if size}


def _parts(now: Situation) -> int:
    return now.ranks if now.sharded else 1


def _gathered(student: ModelSize, now: Situation, itemsize: int) -> float:
    """A block that is computed and the next one, one block's gradients; what lies in no block, and its gradients."""
    gradients = student.trained / student.parameters
    return (2 + gradients) * student.block * itemsize + (1 + gradients) * student.root * student.itemsize


def _teacher(teacher: ModelSize, now: Situation) -> float:
    some = 2 * teacher.block + teacher.root
    if now.offload_teacher and now.accelerator:
        return some * teacher.itemsize
    if now.shard_teacher and now.ranks > 1:
        return (teacher.parameters / now.ranks + some) * teacher.itemsize
    return teacher.bytes


def _activations(now: Situation) -> float:
    student = now.student
    size = _KEPT * (_HALF if now.half else student.itemsize)
    if now.recomputed:
        return now.items * (student.edges * student.itemsize + student.inner * size)
    return now.items * student.kept * size


def _hidden(now: Situation) -> float:
    """Of both models, and the gradient of the student's; those of all processes where heads are spread."""
    size = 2 if now.half else now.student.itemsize
    wide = sum(model.width for model in (now.student, *now.teachers)) * size + now.student.width * 4
    return now.items * wide * (now.ranks if now.shard_head else 1)


def _heads(now: Situation) -> float:
    """Gathered heads, where models are sharded, and the float32 gradient of the student's."""
    gathered = (*((now.student,) * now.sharded), *(tuple(now.teachers) if now.shard_teacher else ()))
    whole = sum(model.vocabulary * model.width * model.itemsize for model in gathered)
    gradient = 4 * now.student.vocabulary * now.student.width * now.student.head_trained
    return gradient / now.ranks if now.shard_head else whole + gradient


def _logits(now: Situation) -> float:
    student = now.student
    taught = any(teacher.vocabulary for teacher in now.teachers)
    if not now.fused:
        return now.items * student.vocabulary * 4 * (_DENSE if taught else _DENSE - 2)
    ranks = now.ranks if now.shard_head else 1
    line, models = student.vocabulary * 4 // ranks, 1 + taught
    if not line:
        return 0
    rows = chunk_rows(now.items * ranks, line, models, "cuda" if now.accelerator else "cpu")
    return min(rows, now.items * ranks) * line * (models + 1)


def advice(now: Situation) -> dict[str, int]:
    """What to switch on, with the bytes that it would save, the largest saving first."""
    total = sum(estimate(now).values())
    saved = {name: total - sum(estimate(then).values()) for name, then in _changes(now).items()}
    return {name: size for name, size in sorted(saved.items(), key=lambda each: -each[1]) if size > 0}


def _changes(now: Situation) -> Mapping[str, Situation]:
    change = dataclasses.replace
    changes = {
        "losses that never make logits whole (method.fused=true)": change(now, fused=True),
        "activations computed again (train.activation_checkpointing=true)": change(now, recomputed=True),
        "smaller micro-batches (train.accumulate, doubled)": change(now, items=-(-now.items // 2)),
    }
    if now.teachers:
        changes["stored teacher answers (tutelage cache)"] = change(now, teachers=())
        changes["the teacher in CPU memory (train.offload_teacher=true)"] = change(now, offload_teacher=True)
    if now.ranks > 1:
        shared = change(now, sharded=True, shard_teacher=bool(now.teachers))
        changes["weights shared by processes (train.sharding=fsdp)"] = shared
        if now.student.head:
            changes["heads shared by processes (train.shard_head=true)"] = change(shared, shard_head=True)
    else:
        several = change(
            now, ranks=8, sharded=True, shard_teacher=bool(now.teachers), items=-(-now.items // 8)
        )
        changes["eight processes on as many devices (torchrun, train.sharding=fsdp)"] = several
    return changes


def needed(now: Situation) -> dict[str, str]:
    """The estimate in words, its sum first."""
    parts = estimate(now)
    whole = {"a step, in all": sum(parts.values())} | parts
    return {name: in_words(size) for name, size in whole.items()}


def in_words(size: float) -> str:
    """Bytes with a unit: ``1.5 GiB``."""
    for unit in _UNITS[:-1]:
        if size < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1024
    return f"{size:.1f} {_UNITS[-1]}"


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _elements(shape: tuple[int, ...], tokens: bool) -> int:
    """Of one item: of a row, or of one of the row's tokens."""
    found = 1
    for size in shape[1:] if tokens else shape:
        found *= size
    return found
