"""One micro-batch: `Step` is what a method may touch, `TrainStep` the one module that everything trainable runs in."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tutelage.engine.distributed import gather_rows, mean_over_ranks
from tutelage.engine.gathering import AllRows
from tutelage.engine.generation import Generation, Prompt, generate
from tutelage.engine.loading import Stream
from tutelage.engine.method import Method
from tutelage.engine.optim import Optim
from tutelage.engine.passes import TrainingRows
from tutelage.engine.rng import derive_seed
from tutelage.engine.runtime import Runtime
from tutelage.engine.taps import Tapped
from tutelage.engine.teacher import Grad, Teacher
from tutelage.engine.types import Batch, Outputs, Taps, Term, Terms
from tutelage.engine.units import let_go, may_be_sharded
from tutelage.recipe.generation import GenerationConfig

Phase = Literal["transform", "step"]


@dataclass
class Setup:
    """What all steps of a run share."""

    student: Tapped
    teachers: Mapping[str, Teacher]
    task: Any
    runtime: Runtime
    taps: Taps
    """With every pattern resolved to module paths."""
    seed: int
    total_steps: int
    steps_per_epoch: int
    data: TrainingRows
    streams: dict[str, Stream] = field(default_factory=dict)
    optimizers: Mapping[str, Optim] = field(default_factory=dict)


class Step:
    """One micro-batch of one step, and all that a method may ask for.

    Attributes:
        batch: the micro-batch, on the device, views drawn.
        step, epoch: counted from 0; ``total_steps`` and ``steps_per_epoch`` say where the run ends.
        micro: number of the micro-batch among the step's, counted from 0; it has a part on every rank.
        data: the training rows, for passes over the whole of them.
    """

    def __init__(self, setup: Setup, batch: Batch, step: int, micro: int = 0) -> None:
        self.setup, self.batch, self.step, self.micro = setup, batch, step, micro
        self.epoch = step // setup.steps_per_epoch
        self.total_steps, self.steps_per_epoch = setup.total_steps, setup.steps_per_epoch
        self.data = setup.data
        self.seen: dict[str, Outputs] = {}
        """The last outputs of each model: what a message about a loss that is not finite looks at."""
        self._sees_all = setup.runtime.world == 1
        self._all_rows: AllRows | None = None

    @property
    def seed(self) -> int:
        """A seed of this rank's part of this micro-batch; see `generator`."""
        runtime = self.setup.runtime
        return derive_seed(self.setup.seed, self.micro * runtime.world + runtime.rank, self.step)

    @cached_property
    def generator(self) -> torch.Generator:
        """For draws within this rank's rows (partners, masks). What it gives depends on seed, step and place of the
        rows in the step alone: two ranks draw as one process does that cuts the step into twice as many micro-batches.
        """
        return self._generator("rows", self.seed)

    @cached_property
    def shared_generator(self) -> torch.Generator:
        """For draws that concern the rows of all ranks: it gives the same on each, whatever their number."""
        return self._generator("all rows", derive_seed(self.setup.seed, self.micro, self.step))

    def _generator(self, purpose: str, seed: int) -> torch.Generator:
        generator = torch.Generator(self.setup.runtime.device)
        return generator.manual_seed(derive_seed(seed, purpose))

    def rand(self, *shape: int) -> Tensor:
        """Uniform numbers ``[rows, *shape]`` in [0, 1), those of a row the same whichever rank has it."""
        rows, device = len(self.batch), self.setup.runtime.device
        parts, own = (1, 0) if self._sees_all else (self.setup.runtime.world, self.setup.runtime.rank)
        drawn = torch.rand(parts * rows, *shape, generator=self.shared_generator, device=device)
        return drawn[own * rows : (own + 1) * rows]

    @cached_property
    def everyone(self) -> Step:
        """This micro-batch as all ranks hold it together (`AllRows`), for a loss that couples rows: its ``batch`` has
        all rows, its ``generator`` is the shared one, and there is nothing left to gather."""
        ctx = copy.copy(self)
        ctx.generator = self.shared_generator
        if not self._sees_all:
            ctx._all_rows = AllRows(self.batch)
            ctx.batch, ctx._sees_all = ctx._all_rows.batch, True
        return ctx

    def of_everyone(self, own: Outputs) -> Outputs:
        """Of `everyone`: a model's outputs for all rows, from those for this rank's."""
        return own if self._all_rows is None else self._all_rows.outputs(own)

    def student(
        self,
        batch: Batch | None = None,
        taps: tuple[str, ...] | None = None,
        *,
        params: Mapping[str, Tensor] | None = None,
        frozen: bool = False,
        from_tap: tuple[str, Tensor] | None = None,
    ) -> Outputs:
        """The student's outputs.

        Args:
            batch: another batch than the step's.
            taps: other taps than the method's.
            params: run with these instead of the student's parameters (names as ``parameters()`` gives them); buffers
                are cloned, so that BatchNorm's statistics move on real steps only.
            frozen: parameters constant and eval mode, with gradients through the activations.
            from_tap: (path, tensor): the tensor takes the place of that module's output.
        """
        module, wanted = self.setup.student, self.setup.taps.student if taps is None else taps
        inputs = (batch or self.batch).inputs
        arguments = (inputs, wanted, self.setup.taps.student_logits or taps is not None, from_tap)
        if params is not None:
            buffers = {f"model.{name}": value.clone() for name, value in module.model.named_buffers()}
            swapped = {f"model.{name}": value for name, value in params.items()} | buffers
            outputs = module.outputs(torch.func.functional_call(module, swapped, arguments), params)
        else:
            outputs = frozen_outputs(module, *arguments) if frozen else module.outputs(module(*arguments))
        self.seen["student"] = outputs
        return outputs

    def teacher(
        self,
        batch: Batch | None = None,
        taps: tuple[str, ...] | None = None,
        *,
        name: str | None = None,
        grad: Grad = "none",
    ) -> Outputs:
        """A teacher's outputs; ``name`` is needed where there are several.

        Raises:
            ValueError: no such teacher, or several and no name.
        """
        teachers = self.setup.teachers
        if name is None and len(teachers) != 1:
            raise ValueError(
                f"the method takes one teacher, there are {len(teachers)} ({', '.join(teachers) or 'none'}); "
                "give one, or choose by `ctx.teacher(name=…)`"
            )
        name = next(iter(teachers)) if name is None else name
        if name not in teachers:
            raise ValueError(f"no teacher {name!r}; there are {', '.join(teachers) or 'none'}")
        wanted = self.setup.taps.teachers.get(name, ()) if taps is None else taps
        logits = self.setup.taps.teacher_logits or taps is not None
        outputs = teachers[name].outputs(batch or self.batch, wanted, grad, logits=logits)
        self.seen[f"teacher {name}"] = outputs
        return outputs

    @property
    def items(self) -> str:
        """What the task's losses are means over: ``rows`` or ``tokens``."""
        return str(self.setup.task.items)

    def label_loss(self, outputs: Outputs, batch: Batch | None = None) -> Term:
        """The task's own loss against the labels."""
        term: Term = self.setup.task.label_loss(outputs, batch or self.batch)
        return term

    def loader(self, name: str) -> Stream:
        """An endless iterator of further batches that ``Needs.loaders`` asked for."""
        if name not in self.setup.streams:
            raise ValueError(
                f"no loader {name!r}; this method's Needs.loaders names {sorted(self.setup.streams)}"
            )
        return self.setup.streams[name]

    def rows(self, name: str) -> TrainingRows:
        """Whole passes over ``train`` or over another part of the data that ``Needs.loaders`` names; ranks share its
        rows. See `TrainingRows.rows`."""
        return self.data.rows(name)

    def learning_rate(self, name: str = "main") -> float:
        """The rate at which one of the method's optimisers moved last, or will move first."""
        return self.setup.optimizers[name].lr

    def generate(self, who: str, prompts: Sequence[Prompt], options: GenerationConfig) -> list[Generation]:
        """What ``student`` or a teacher (by name) writes after each prompt; draws differ from step to step."""
        seed = derive_seed(self.setup.seed, "generate", self.step)
        if who == "student":
            return generate(self.setup.student, prompts, options, seed)
        return self.setup.teachers[who].generate(prompts, options, seed)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The student's parameters by name."""
        return dict(self.setup.student.model.named_parameters())

    def gather(self, tensor: Tensor) -> Tensor:
        """Rows of all ranks, in rank order; differentiable. Every rank must bring the same shape."""
        return tensor if self._sees_all else gather_rows(tensor)

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over ranks; differentiable."""
        return tensor if self._sees_all else mean_over_ranks(tensor)


def frozen_outputs(module: Tapped, *arguments: Any) -> Outputs:
    """A model's outputs with constant parameters and in eval mode; arguments as `Tapped.forward` takes them."""
    if may_be_sharded():
        let_go(
            module
        )  # else what an earlier forward left gathered would be made constant, and not the shards of it
    with constant(module):
        outputs = module.outputs(module(*arguments))
    if may_be_sharded():
        let_go(module)
    return outputs


@contextlib.contextmanager
def constant(module: nn.Module) -> Iterator[None]:
    """Parameters without gradients and eval mode, for one forward; both are put back as they were."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    training = [child for child in module.modules() if child.training]
    for parameter in parameters:
        parameter.requires_grad_(False)
    module.eval()
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for child in training:
            child.training = True


class TrainStep(nn.Module):
    """Student, method and trained teachers in one forward: nothing trainable is called outside it, so that DDP and
    FSDP2 see every parameter's use. A trained teacher left outside would silently never be synchronised."""

    def __init__(self, student: Tapped, method: Method, teachers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.student, self.method = student, method
        self.teachers = nn.ModuleDict(teachers)

    def forward(self, ctx: Step, phase: Phase = "step") -> Batch | Terms:
        if phase == "transform":
            with torch.no_grad():
                return self.method.transform(ctx.batch, ctx)
        terms: Terms = self.method(ctx)
        return terms


def trained_names(module: TrainStep) -> dict[str, nn.Parameter]:
    """Trainable parameters under the names that `OptimSpec` patterns and checkpoints use: the holder's ``model.`` level
    is left out of students and teachers."""
    return {
        _plain(name): parameter for name, parameter in module.named_parameters() if parameter.requires_grad
    }


def _plain(name: str) -> str:
    root, _, rest = name.partition(".")
    if root == "student":
        return f"student.{rest.removeprefix('model.')}"
    if root == "teachers":
        teacher, _, path = rest.partition(".")
        return f"teachers.{teacher}.{path.removeprefix('model.')}"
    return name
