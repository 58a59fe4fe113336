"""`Trainer`: the one training loop. It knows no method; `engine/events.py` lists what happens in which order."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.engine.backward import Gradients, item_shares, weighed
from tutelage.engine.checkpoint import CheckpointFolder
from tutelage.engine.diagnosis import describe
from tutelage.engine.distributed import replicate
from tutelage.engine.events import Events
from tutelage.engine.exhausted import memory_explained, situation_of
from tutelage.engine.feeding import feed, make_loader
from tutelage.engine.finite import FiniteGuard, check_terms
from tutelage.engine.gradients import clip_, grad_norm
from tutelage.engine.heads import HeadPlan
from tutelage.engine.interrupt import Interrupted, StopRequest
from tutelage.engine.loading import ShuffleSampler, Source, Stream
from tutelage.engine.method import Method
from tutelage.engine.metrics import step_record
from tutelage.engine.optim import build_optimizers
from tutelage.engine.passes import TrainingRows
from tutelage.engine.rng import derive_seed, preserved, seed_all, seeded
from tutelage.engine.runtime import Runtime
from tutelage.engine.setup import wire
from tutelage.engine.sharded import load_together, mesh_of, save_together
from tutelage.engine.state import restore, snapshot
from tutelage.engine.step import Setup, Step, trained_names
from tutelage.engine.streaming import RowStream
from tutelage.engine.taps import Tapped
from tutelage.engine.teacher import Teacher
from tutelage.engine.types import Batch, Outputs, Table
from tutelage.engine.units import let_go, may_be_sharded
from tutelage.engine.validation import Validation
from tutelage.engine.views import Views
from tutelage.recipe.schema import TrainConfig

LOG_EVERY = 10
"""Steps between recorded figures; the last step of an epoch is recorded too."""


@dataclass
class Progress:
    """What a run remembers besides weights and optimiser state; part of every checkpoint."""

    step: int = 0
    prepared: bool = False
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    """Evaluations in a row without a better value of the early-stop metric."""
    early_best: float | None = None
    stopped_early: bool = False
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Trains a student by a method.

    Args:
        runtime: device, precision and ranks.
        student: the bare model; its parameters are trained.
        method: the method, not yet built.
        task: gives the label loss and the first batch's check.
        source: training rows; of a stream, those of its first window.
        stream: what is trained on in place of ``source``.
        config: the recipe's ``train`` part.
        teachers: by name; empty where there is none.
        views: random changes of the rows; none: rows as they are.
        loaders: sources of the further loaders that the method needs, by name.
        workers: loader processes.
        mean, std: the student's input normalisation by channel.
        head: where the student makes its logits, if these are to be made only where they are read.
        validation: evaluation on validation data, and what follows from it.
        folder: where checkpoints go; none: none are written.
        callbacks: objects with methods ``on_<event>``.
    """

    def __init__(
        self,
        runtime: Runtime,
        student: nn.Module,
        method: Method,
        task: Any,
        source: Source,
        config: TrainConfig,
        *,
        stream: RowStream | None = None,
        teachers: Mapping[str, Teacher] | None = None,
        views: Views | None = None,
        loaders: Mapping[str, Source] | None = None,
        workers: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        head: HeadPlan | None = None,
        validation: Validation | None = None,
        folder: Path | None = None,
        callbacks: Iterable[object] = (),
    ) -> None:
        self.runtime, self.method, self.task, self.config = runtime, method, task, config
        self.source, self.views = source, views or Views((), config.seed)
        self.validation, self.events = validation, Events(callbacks)
        self.checkpoints = CheckpointFolder(folder, config.checkpoint.keep) if folder else None
        self.progress = Progress()
        self.last: tuple[dict[str, Tensor], Tensor] = ({}, torch.zeros(()))
        """Terms and gradient norm of the step just done, on the device."""
        self.record: dict[str, Any] | None = None
        """Figures of the step just done, where it is one that is recorded."""
        with seeded(derive_seed(config.seed, "build")):
            self.sampler, self.loader = feed(runtime, method, source, stream, config, workers)
            self.total_steps = config.steps or (config.epochs or 0) * self.loader.steps_per_epoch
            self.student = Tapped(student, mean=mean, std=std, head=head).to(runtime.device)
            used = dict(teachers or {}) if method.needs.teacher != "none" else {}
            self.example = self._on_device(source.fetch(list(range(min(2, len(source))))))
            wiring = wire(runtime, self.student, method, used, self.example, config)
        further = {name: (loaders or {})[name] for name in method.needs.loaders}
        self.wiring, self.whole, self.ema, self.shipped = wiring, wiring.whole, wiring.ema, wiring.shipped
        self.setup = Setup(
            student=self.student,
            teachers=used,
            task=task,
            runtime=runtime,
            taps=wiring.taps,
            seed=config.seed,
            total_steps=self.total_steps,
            steps_per_epoch=self.loader.steps_per_epoch,
            data=TrainingRows(source, self.views, runtime, self.loader.batch_size, further),
            streams={name: self._stream(name, source) for name, source in further.items()},
        )
        self._make_optimizers()

    def _stream(self, name: str, source: Source) -> Stream:
        sampler = ShuffleSampler(len(source), derive_seed(self.config.seed, "loader", name))
        # Not yet: a method that only passes over these rows may have fewer of them than a step takes.
        return Stream(lambda: make_loader(self.runtime, source, sampler, self.config), self.runtime.device)

    def _make_optimizers(self) -> None:
        specs = self.method.optimizers()
        self.parameters = trained_names(self.whole)
        self.optimizers = build_optimizers(
            self.parameters,
            specs,
            self.config.optimizer,
            self.config.schedule,
            self.total_steps,
            student=self.student.model,
        )
        self.setup.optimizers = self.optimizers
        find_unused = len(specs) > 1 or self.method.needs.dynamic
        ddp = self.runtime.sharding == "ddp"
        self.wrapped: nn.Module = replicate(self.whole, find_unused=find_unused) if ddp else self.whole
        self.scaler = self.runtime.scaler()
        self.gradients = Gradients(self.wrapped, self.method, list(self.parameters.values()), self.scaler)
        self.guard = FiniteGuard(self.runtime.device, [optim.optimizer for optim in self.optimizers.values()])

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.progress.step

    @property
    def epoch(self) -> int:
        return self.step // self.loader.steps_per_epoch

    def fit(self) -> None:
        """Train to the end, from the newest checkpoint where the folder has one.

        Raises:
            Interrupted: SIGTERM or Ctrl-C came; the checkpoint is written.
            NonFiniteError: a term or a gradient is not finite; the weights are those before the step.
        OutOfMemoryError: a step needs more memory than there is.
        """
        if self.step == 0:
            self.restore()
        self.events.emit("fit_start", self)
        self.run()
        self.events.emit("fit_end", self)

    def restore(self) -> bool:
        """Go on from the newest checkpoint; whether there was one."""
        if self.checkpoints is None:
            return False
        found = load_together(self.checkpoints, self.runtime, mesh_of(self.parameters.values()))
        if found is not None:
            restore(self, found)
        return found is not None

    def run(self, steps: int | None = None) -> None:
        """Do ``steps`` more steps, or all that are left. Trainers may take turns: each leaves the global random state
        as it found it."""
        end = self.total_steps if steps is None else min(self.step + steps, self.total_steps)
        with preserved(), StopRequest(self.runtime) as stop:
            self._prepare_once()
            batches: Iterator[list[Batch]] = self.loader.steps(self.step) if self.step < end else iter(())
            while self.step < end and not self.progress.stopped_early:
                started = time.perf_counter()
                if self.step % self.loader.steps_per_epoch == 0:
                    self.events.emit("epoch_start", self)
                self.events.emit("step_start", self)
                with memory_explained(lambda: situation_of(self), f"step {self.step}"):
                    self.last = self._train_step(next(batches))
                self.progress.seconds += time.perf_counter() - started
                self._after_step()
                if self.step < self.total_steps and stop.requested(self.step):
                    self.save()
                    raise Interrupted(stop.signal, self.step)
            self.guard.poll(wait=True)

    def _prepare_once(self) -> None:
        if not self.progress.prepared:
            seed_all(derive_seed(self.config.seed, "prepare"))
            self.method.prepare(self.setup.data, self.student, next(iter(self.setup.teachers.values()), None))
            self.progress.prepared = True

    def _train_step(self, micro: list[Batch]) -> tuple[dict[str, Tensor], Tensor]:
        """One optimiser step over its micro-batches: the terms' values over all ranks, and the gradient's norm."""
        if not all(module.training for module in self.wrapped.modules()):  # to ask is cheaper than to set
            self.wrapped.train()
        contexts = [
            Step(self.setup, self._on_device(batch), self.step, number) for number, batch in enumerate(micro)
        ]
        self._transform(contexts)
        shares = item_shares(self.method, [ctx.batch for ctx in contexts], self.runtime)
        totals: dict[str, Tensor] = {}
        for i, (ctx, share) in enumerate(zip(contexts, shares, strict=True)):
            seed_all(ctx.seed)
            with self.gradients.sync(last=i == len(contexts) - 1):
                with self.runtime.autocast():
                    terms = weighed(self.wrapped(ctx), share, self.method)
                self.gradients.backward(terms)
            for name, term in terms.items():
                totals[name] = totals[name] + term.detach() if name in totals else term.detach()
        self.gradients.finish()
        totals = self.runtime.mean(totals)  # what is not finite on one rank must stop all of them
        norm = self._update(contexts[-1], totals)
        with torch.no_grad():
            self.method.after_step(contexts[-1])
        return totals, norm

    def _transform(self, contexts: list[Step]) -> None:
        if type(self.method).transform is not Method.transform:
            with torch.no_grad():
                for ctx in contexts:
                    seed_all(derive_seed(ctx.seed, "transform"))
                    ctx.batch = self.wrapped(ctx, "transform")

    def _update(self, ctx: Step, totals: dict[str, Tensor]) -> Tensor:
        """Check, clip and let the active optimisers move; the gradient's norm before clipping."""
        active = self.method.active(ctx)
        moving = [optim for name, optim in self.optimizers.items() if name in active]
        for optim in moving:
            optim.set_step(self.step)
            if self.scaler:
                self.scaler.unscale_(optim.optimizer)
        parameters = [self.parameters[name] for optim in moving for name in optim.names]
        norm = grad_norm(parameters)
        checked = torch.zeros_like(norm) if self.scaler else norm  # the scaler deals with its own overflows
        self.guard.inspect(self.step, totals, checked, lambda: describe(ctx, totals))
        if self.config.clip is not None:
            clip_(parameters, self.config.clip, norm)
        for optim in moving:
            if self.scaler:
                self.scaler.step(optim.optimizer)
            else:
                optim.optimizer.step()
        if self.scaler:
            self.scaler.update()
        for parameter in self.parameters.values():
            parameter.grad = None
        if self.ema:
            self.ema.update(self.student.model)
        return norm

    def _after_step(self) -> None:
        self.progress.step += 1
        epoch_done = self.step % self.loader.steps_per_epoch == 0
        ended = self.method.ended
        last = self.step == self.total_steps or ended
        recorded = epoch_done or last or self.step % LOG_EVERY == 0
        self.record = step_record(self, *self.last) if recorded else None
        self.events.emit("step_end", self)
        best = False
        if self.validation and (last or (epoch_done and self.epoch % self.validation.every == 0)):
            best = self.validation.run(self)
            self.method.after_evaluation(self.progress.metrics, Step(self.setup, self.example, self.step))
        self.progress.stopped_early = self.progress.stopped_early or ended
        every = self.config.checkpoint.every
        due = epoch_done if every is None else self.step % every == 0
        if due or last or best or self.progress.stopped_early:
            self.save(best=best)
        if epoch_done:
            self.events.emit("epoch_end", self)

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint of the present step, all ranks together."""
        if self.checkpoints is None:
            return
        self.guard.poll(wait=True)
        save_together(self.checkpoints, snapshot(self), self.runtime, best=best)
        self.events.emit("checkpoint", self)

    def _on_device(self, batch: Batch) -> Batch:
        """The batch on the device, with this epoch's views drawn."""
        chosen = self.views.numbers(self.epoch, self.method.needs.views)
        numbers = [torch.full((len(batch),), number) for number in chosen]
        draws = [self.views.draw(batch, view) for view in numbers]
        batch = batch.to(self.runtime.device)
        drawn = [self.views(batch, view, draw) for view, draw in zip(numbers, draws, strict=True)]
        return drawn[0].replace(views=drawn[1:])

    def dry_step(self) -> dict[str, float]:
        """One forward of the first step's first micro-batch; nothing moves and nothing is written. Gives the terms.

        Raises:
            ValueError: rows or outputs that the task refuses.
            NonFiniteError: a term is not finite.
        """
        with seeded(self.config.seed):
            buffers = {name: value.clone() for name, value in self.whole.named_buffers()}
            ctx = Step(self.setup, self._on_device(next(self.loader.steps(0))[0]), 0)
            self.task.check(ctx.batch, None)
            self.whole.train()
            try:
                with torch.no_grad():
                    ctx.batch = self.method.transform(ctx.batch, ctx)
                with self.runtime.autocast(), memory_explained(lambda: situation_of(self), "dry step"):
                    terms = self.whole(ctx)
            finally:
                self._put_back(buffers)
            seen = ctx.seen.get("student")
            if seen is not None and seen.rows == len(ctx.batch):
                self.task.check(ctx.batch, seen)
            means = self.runtime.mean({name: term.mean.detach() for name, term in terms.items()})
            check_terms(means, 0, lambda: describe(ctx, means))
            return {name: float(mean) for name, mean in means.items()}

    @torch.no_grad()
    def _put_back(self, buffers: dict[str, Tensor]) -> None:
        for name, value in self.whole.named_buffers():
            if name in buffers:
                value.copy_(buffers[name])

    def predict(self, batch: Batch) -> Outputs:
        """Outputs of the model that ships, in eval mode and without gradients."""
        self.shipped.eval()
        with torch.no_grad(), self.runtime.autocast():
            outputs = self.shipped.outputs(self.shipped(batch.inputs))
        if may_be_sharded():
            let_go(self.shipped)
        return outputs

    def finished(self) -> nn.Module:
        """The plain student that ships, as the method finishes it: of the moving average where there is one. Where
        models are sharded, every rank gets it whole: a collective call."""
        held = self.wiring.plan.filled(self.shipped) if self.wiring.plan else self.shipped
        return self.method.finish(held.model).eval()

    def plain_teachers(self) -> dict[str, Any]:
        """What holds the teachers that are sharded, made whole on every rank: a collective call. A frozen language
        model stays sharded: it may fit nowhere."""
        found: dict[str, Any] = {}
        for name, plan in self.wiring.teacher_plans.items():
            teacher: Any = self.setup.teachers[name]
            if teacher.offers.trainable or teacher.module.head is None:
                found[name] = plan.filled(teacher.module)
        return found

    @torch.no_grad()
    def tables(self) -> dict[str, Table]:
        """The method's tables for the report, those measured on training rows included. Every rank must call."""
        self.method.eval()
        with preserved(), self.runtime.autocast():
            return self.method.tables() | self.method.measure(Step(self.setup, self.example, self.step))
