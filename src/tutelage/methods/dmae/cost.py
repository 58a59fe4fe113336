"""What a step of pre-training costs at each mask ratio, beside distilling features of whole images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tutelage.engine.runtime import Runtime
from tutelage.engine.spec import ModelSpec
from tutelage.engine.taps import Tapped, outputs_of
from tutelage.engine.types import Batch, Outputs, Plot, Table
from tutelage.methods.dmae.functional import dmae_align_loss
from tutelage.methods.dmae.method import Pretraining, masked
from tutelage.methods.dmae.vit import MaskedViT
from tutelage.models.profile import count_flops
from tutelage.teachers.local import LocalTeacher

RATIOS = (0.0, 0.5, 0.75, 0.9, 0.95)
COLUMNS = [
    "mask_ratio", "visible_patches", "gflops_a_row", "ms_a_row", "times_fewer_flops", "times_faster",
    "times_fewer_flops_stopped", "times_faster_stopped", "teacher_share",
]  # fmt: skip
"""How many times cheaper a step is than feature distillation on whole images (the student's forward and backward on all
patches with its classifier, no decoder, and the teacher's forward); ``stopped``: than one whose teacher stops at its
deepest tap too. ``teacher_share``: of the teacher's whole forward on all patches, what is run."""

_TIMED = 3


class StepCost:
    """Forward and backward of one step on given rows, at any mask ratio and on whole images.

    Args:
        images: rows before normalisation, on the models' device.
    """

    def __init__(
        self,
        student: MaskedViT,
        teacher: LocalTeacher | None,
        method: Pretraining,
        images: Tensor,
        runtime: Runtime,
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
    ) -> None:
        self.student = Tapped(student, mean=mean, std=std).to(runtime.device).train()
        self.teacher, self.method, self.runtime = teacher, method, runtime
        self.batch = Batch(images)
        spec = ModelSpec.of("student", student, self.student.normalise(images))
        theirs = None if teacher is None else teacher.spec
        self.taps = method.taps(theirs, spec)
        method.build(theirs, spec, self.batch)
        method.to(runtime.device)
        self.noise = torch.rand(len(images), student.patches, device=images.device)

    def table(self, ratios: tuple[float, ...]) -> Table:
        """A row for each ratio that leaves a patch visible."""
        whole, stopped = (self._measured(partial(self._whole, stop=stop)) for stop in (False, True))
        teacher_flops = count_flops(self._teacher_whole)
        rows = []
        for ratio in ratios:
            visible = int(self.noise.shape[1] * (1 - ratio))
            if visible == 0:
                continue
            batch = masked(self.batch, self.noise, ratio)
            ours = self._measured(partial(self._masked, batch))
            times = [
                theirs / mine for peer in (whole, stopped) for theirs, mine in zip(peer, ours, strict=True)
            ]
            share = count_flops(partial(self._teacher, batch)) / teacher_flops if teacher_flops else None
            rows.append([ratio, visible, *ours, *times, share])
        return Table(COLUMNS, rows, (Plot("mask_ratio", ("times_fewer_flops", "times_faster")),))

    def _measured(self, step: Callable[[], object]) -> tuple[float, float]:
        """GFLOPs and milliseconds a row."""
        flops = count_flops(step)
        times = []
        for _ in range(_TIMED):
            self._wait()
            started = time.perf_counter()
            step()
            self._wait()
            times.append(time.perf_counter() - started)
        rows = len(self.batch)
        return flops / rows / 1e9, 1e3 * statistics.median(times) / rows

    def _wait(self) -> None:
        if self.runtime.device.type != "cpu":
            torch.accelerator.synchronize(self.runtime.device)

    def _masked(self, batch: Batch) -> None:
        with self.runtime.autocast():
            teacher = self._teacher(batch)
            student = outputs_of(self.student(batch.inputs, self.taps.student, self.taps.student_logits))
            loss = self.method.losses(student, teacher, batch).total
        self._backward(loss)

    def _whole(self, *, stop: bool) -> None:
        with self.runtime.autocast():
            teacher = self._teacher(self.batch, stop=stop)
            student = outputs_of(self.student(self.batch.inputs, self.taps.student))
            # Any label loss costs the same beside the networks.
            loss = student.logits.float().logsumexp(1).mean()
            if teacher is not None:
                for pair, head in zip(self.method.pairs, self.method.heads, strict=True):
                    loss = loss + dmae_align_loss(
                        head(student.features[pair.student]), teacher.features[pair.teacher]
                    )
        self._backward(loss)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        for module in (self.student, self.method):
            module.zero_grad(set_to_none=True)

    def _teacher(self, batch: Batch, *, stop: bool = True) -> Outputs | None:
        return (
            None if self.teacher is None else self.teacher.outputs(batch, self.taps.teacher, logits=not stop)
        )

    def _teacher_whole(self) -> None:
        if self.teacher is not None:
            self.teacher.outputs(self.batch)
