"""Masked autoencoding with and without a teacher: pre-train on images alone, then fine-tune on labels.

Bai, Wang, Xiao, Wei, Wang, Yuille, Zhou, Xie: Masked Autoencoders Enable Efficient Knowledge Distillers. CVPR 2023.
He, Chen, Xie, Li, Dollár, Girshick: Masked Autoencoders Are Scalable Vision Learners. CVPR 2022.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tutelage.data import row_ids, subset
from tutelage.data.splits import positions_in_order
from tutelage.engine.loading import Source
from tutelage.engine.loop import Trainer
from tutelage.engine.method import Paper
from tutelage.engine.needs import Needs
from tutelage.engine.rng import derive_seed, seeded
from tutelage.engine.types import Plot, Table
from tutelage.engine.views import to_float
from tutelage.methods.dmae.config import DMAEConfig, MAEConfig
from tutelage.methods.dmae.cost import RATIOS, StepCost
from tutelage.methods.dmae.decoder import initialise_linear, sincos_positions
from tutelage.methods.dmae.method import Pretraining
from tutelage.methods.dmae.pictures import reconstructions
from tutelage.methods.dmae.probe import probe_accuracy
from tutelage.methods.dmae.vit import MaskedViT
from tutelage.procedures.procedure import Artifacts, Procedure
from tutelage.procedures.run import Run
from tutelage.teachers.local import LocalTeacher

_COSTED_ROWS = 32
_PICTURES = 6


class MAE(Procedure):
    """Pre-train a vision transformer as a masked autoencoder, then fine-tune it on labels."""

    Config = MAEConfig
    paper = Paper(
        title="Masked Autoencoders Are Scalable Vision Learners",
        venue="CVPR",
        year=2022,
        arxiv="2111.06377",
        claim="A vision transformer that first learns to predict the pixels of masked patches is more accurate after "
        "fine-tuning than one trained with labels alone.",
        card="dmae",
        family="vision self-supervised",
    )
    needs = Needs(
        teacher="none",
        logits=(),
        fields=("index",),
        sharding="ddp",
        tasks=("classification", "multilabel", "regression"),
    )
    missing: ClassVar[tuple[str, ...]] = ("mixup, cutmix and RandAugment in fine-tuning",)

    def __init__(self, config: MAEConfig) -> None:
        super().__init__(config)
        if config.finetune is not None or config.probe:
            self.needs = dataclasses.replace(self.needs, fields=("index", "target"))  # type: ignore[misc]

    def check(self, run: Run) -> None:
        """One batch of each stage, on untrained models. See `Procedure.check`."""
        _Stages(run, self.config).check()

    def run(self, run: Run) -> Artifacts:
        """Pre-train, probe, fine-tune. See `Procedure.run`."""
        return _Stages(run, self.config).run_all()


class DMAE(MAE):
    """`MAE` whose features at one block (or several) are drawn to those of a teacher on the same visible patches."""

    Config = DMAEConfig
    paper = Paper(
        title="Masked Autoencoders Enable Efficient Knowledge Distillers",
        venue="CVPR",
        year=2023,
        arxiv="2208.12256",
        claim="At equal pre-training steps, a student pre-trained with reconstruction and alignment has a higher "
        "linear-probe accuracy than the same student pre-trained with reconstruction alone.",
        card="dmae",
        family="vision self-supervised",
    )
    needs = dataclasses.replace(MAE.needs, teacher="frozen", teacher_taps=True, live=True)


class _Stages:
    """The stages of one run; each follows from the recipe, and is read back where it is done."""

    def __init__(self, run: Run, config: MAEConfig) -> None:
        self.run, self.config = run, config
        if config.probe and (run.data.test is None or run.task.name != "classification"):
            raise ValueError("method.probe measures accuracy on test data: it needs classes and data.test")
        images = to_float(
            run.data.train.fetch([0, min(1, len(run.data.train) - 1)]).to(run.runtime.device)
        ).inputs
        if not isinstance(images, Tensor) or images.dim() != 4:
            raise ValueError("masked pre-training takes images [rows, channels, height, width]")
        self.student = self._student(images)
        given = run.teachers if isinstance(config, DMAEConfig) else {}
        self.teachers = {name: _masked_teacher(name, teacher, images) for name, teacher in given.items()}
        if len(self.teachers) > 1:
            raise ValueError(f"this method takes one teacher; there are {', '.join(self.teachers)}")

    def check(self) -> None:
        self._pretraining().dry_step()
        if self.config.finetune is not None:
            self._finetuning(self.student.vit.requires_grad_(True)).dry_step()

    def run_all(self) -> Artifacts:
        tables = {"cost of a step by mask ratio": _table(self.run.once("cost", self._cost))}
        trainer = self._pretraining()
        encoder = self._fitted(trainer)
        assert isinstance(encoder, MaskedViT)
        method = trainer.method
        assert isinstance(method, Pretraining)
        if method.reconstructs and encoder.channels in (1, 3):
            pictures = self.run.once("pictures", lambda: self._pictures(encoder, method))
            tables["reconstructions"] = _table(pictures)
        metrics = self.run.once("probe", lambda: self._probe(encoder)) if self.config.probe else {}
        student = encoder.vit.requires_grad_(True)
        if self.config.finetune is not None:
            student = self._fitted(self._finetuning(student))
            if self.run.data.test is not None:
                metrics = metrics | self.run.evaluate(student, self.run.data.test)
        return Artifacts(
            student=student.eval(),
            metrics=metrics,
            tables=tables,
            figures={"train_seconds": self.run.trained_seconds},
        )

    def _student(self, images: Tensor) -> MaskedViT:
        """The student's encoder. Where the recipe brings no weights it starts as the authors' does, with sine-cosine
        positions. Positions stay fixed; what follows the blocks starts anew in fine-tuning."""
        module = self.run.new_student(self.run.data.info.outputs).to(self.run.runtime.device)
        student = MaskedViT("the student", module, images)
        if self.run.recipe.student.weights is None:
            with torch.no_grad(), seeded(derive_seed(self.run.seed, "encoder")):
                for part in student.encoder_modules():
                    part.apply(initialise_linear)
                positions, fixed = student.positions, sincos_positions(student.grid, student.width)
                positions.zero_()
                positions[:, -student.patches :] = fixed[:, 1:].to(positions)
        trained = {id(parameter) for parameter in student.encoder_parameters()}
        for parameter in student.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        return student

    def _pretraining(self) -> Trainer:
        return self.run.trainer(
            "pretrain", self.student, self._method(), self.run.data.train, teachers=self.teachers
        )

    def _method(self) -> Pretraining:
        return Pretraining(self.config, seed=derive_seed(self.run.seed, "masks"), aligned=bool(self.teachers))

    def _finetuning(self, student: nn.Module) -> Trainer:
        options = self.config.finetune
        assert options is not None
        changes = options.length | {
            "batch_size": options.batch_size or self.run.recipe.train.batch_size,
            "optimizer": options.optimizer.model_dump(),
            "schedule": options.schedule.model_dump(),
        }
        return self.run.trainer(
            "finetune",
            student,
            self.run.method("none"),
            self._labelled(),
            config=changes,
            views=options.views,
        )

    def _fitted(self, trainer: Trainer) -> nn.Module:
        trainer.fit()
        self.run.trained_seconds += trainer.progress.seconds
        return trainer.shipped.model

    def _labelled(self) -> Source:
        """The rows whose labels may be used: those that a ``data.limit`` of as many would keep."""
        train, wanted = self.run.data.train, self.config.labels
        if wanted is None:
            return train
        if wanted > len(train):
            raise ValueError(f"method.labels is {wanted}, but there are {len(train)} training rows")
        data = self.run.recipe.data
        return subset(
            train, positions_in_order(row_ids(train).numpy(), data.seed, data.train)[:wanted].tolist()
        )

    def _probe(self, encoder: MaskedViT) -> dict[str, Any]:
        assert self.run.data.test is not None
        accuracy = probe_accuracy(self.run, encoder, self._labelled(), self.run.data.test)
        return {"probe_accuracy": accuracy}

    def _cost(self) -> dict[str, Any]:
        count = min(_COSTED_ROWS, self.run.recipe.train.batch_size, len(self.run.data.train))
        batch = to_float(self.run.data.train.fetch(range(count)).to(self.run.runtime.device))
        assert isinstance(batch.inputs, Tensor)
        with seeded(derive_seed(self.run.seed, "cost")):
            cost = StepCost(
                self.student,
                next(iter(self.teachers.values()), None),
                self._method(),
                batch.inputs,
                self.run.runtime,
                self.run.mean,
                self.run.std,
            )
            return dataclasses.asdict(cost.table(tuple(sorted({*RATIOS, self.config.mask_ratio}))))

    def _pictures(self, encoder: MaskedViT, method: Pretraining) -> dict[str, Any]:
        source = self.run.data.train if self.run.data.test is None else self.run.data.test
        rows = to_float(source.fetch(range(min(_PICTURES, len(source)))).to(self.run.runtime.device))
        return dataclasses.asdict(reconstructions(encoder, method, rows, self.run.mean, self.run.std))


def _table(kept: dict[str, Any]) -> Table:
    """The table that ``once`` has kept as JSON."""
    plots = tuple(Plot(plot["x"], tuple(plot["y"])) for plot in kept["plots"])
    return Table(kept["columns"], kept["rows"], plots)


def _masked_teacher(name: str, teacher: Any, images: Tensor) -> LocalTeacher:
    """The teacher's model, run on visible patches; its normalisation stays its own."""
    held = teacher.module
    mean, std = (None if value is None else value.tolist() for value in (held.mean, held.std))
    return LocalTeacher(
        name, MaskedViT(f"the {name}", held.model, images), images, mean=mean, std=std
    ).freeze()
