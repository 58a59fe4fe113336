"""Pre-training: pixels of masked patches, and features of visible ones drawn to a teacher's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tutelage.engine.method import Method
from tutelage.engine.needs import Needs
from tutelage.engine.spec import ModelSpec
from tutelage.engine.step import Step
from tutelage.engine.types import Batch, Outputs, Taps, Term, Terms
from tutelage.functional.reductions import keep_rows
from tutelage.methods.dmae.config import DMAEConfig, MAEConfig
from tutelage.methods.dmae.decoder import Decoder
from tutelage.methods.dmae.functional import (
    DMAELoss,
    dmae_align_loss,
    dmae_loss,
    mask_indices,
    masked_reconstruction_loss,
    patchify,
)
from tutelage.methods.dmae.noise import patch_noise
from tutelage.methods.dmae.vit import IMAGES, VISIBLE, MaskedViT, check_same_patches

ORDER = "ids_restore"
"""Column of a masked batch: the place of each patch among visible, then masked ones."""


class Pair(NamedTuple):
    """An aligned pair: taps of the student's and the teacher's block."""

    student: str
    teacher: str


class Pretraining(Method):
    """The first stage, for a student (and a teacher) held in `MaskedViT`.

    Which patches are masked is a function of (seed, view number, row index) alone, as the views of a row are: batch
    size, ranks and a resume do not change it.

    Args:
        seed: of the masks.
        aligned: there is a teacher.
    """

    Config = DMAEConfig

    def __init__(self, config: MAEConfig, *, seed: int, aligned: bool) -> None:
        super().__init__(config)
        self.seed, self.aligned = seed, aligned
        options = config if isinstance(config, DMAEConfig) else None
        self.reconstructs = options is None or options.reconstruct
        self.beta = 1.0 if options is None else options.beta
        self.needs = Needs(  # type: ignore[misc]
            teacher="frozen" if aligned else "none",
            logits=(),
            teacher_taps=aligned,
            live=True,
            fields=("index",),
            # Without reconstruction the blocks above the tap get no gradient.
            dynamic=not self.reconstructs,
        )

    def taps(self, teacher: ModelSpec | None, student: ModelSpec) -> Taps:
        self.student_model = [_held(student)]  # in a list: the trainer owns it
        self.teacher_model = [] if teacher is None else [_held(teacher)]
        self.pairs = self._pairs()
        return Taps(
            student=tuple(pair.student for pair in self.pairs),
            teacher=tuple(pair.teacher for pair in self.pairs),
            student_logits=self.reconstructs,
            teacher_logits=False,
        )

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        config, (model,) = self.config, self.student_model
        mask_indices(torch.zeros(1, model.patches), config.mask_ratio)  # refuses a ratio that leaves no patch
        if self.reconstructs:
            self.decoder = Decoder(
                model.width,
                model.grid,
                model.patch_size**2 * model.channels,
                width=config.decoder_width,
                depth=config.decoder_depth,
                heads=config.decoder_heads,
            )
        for other in self.teacher_model:
            check_same_patches(model, other)
            self.heads = nn.ModuleList(_head(config.projection, model, other) for _ in self.pairs)

    @torch.no_grad()
    def transform(self, batch: Batch, ctx: Step) -> Batch:
        """The batch with its visible patches drawn."""
        assert batch.index is not None
        view = torch.zeros_like(batch.index) if batch.view is None else batch.view
        noise = patch_noise(batch.index, view, self.seed, self.student_model[0].patches)
        return masked(batch, noise, self.config.mask_ratio)

    def step(self, ctx: Step) -> Terms:
        teacher = ctx.teacher() if self.aligned else None
        student = ctx.student()
        loss = self.losses(student, teacher, ctx.batch)
        terms = {"reconstruction": Term(loss.reconstruction)} if self.reconstructs else {}
        if self.aligned:
            terms["alignment"] = Term(self.beta * loss.alignment)
        return terms

    def losses(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> DMAELoss:
        """Losses of a masked batch, from both models' outputs on its visible patches. Pixels are the student's inputs,
        normalised as it gets them."""
        rows = batch.mask if batch.mask is not None and batch.mask.dim() == 1 else None
        alignments = [] if teacher is None else self._alignments(student, teacher, rows)
        if not self.reconstructs:
            return dmae_loss(alignments[0].new_zeros(()), alignments, beta=self.beta)
        model, order = self.student_model[0], batch.columns[ORDER]
        assert student.hidden is not None
        hidden = model.without_registers(student.hidden)
        hidden_patches = order >= hidden.shape[1] - 1
        reconstruction = masked_reconstruction_loss(
            self.decoder(hidden, order),
            patchify(student.extra[IMAGES], model.patch_size),
            hidden_patches if rows is None else hidden_patches & rows.bool()[:, None],
            norm_pix=self.config.norm_pix,
        )
        return dmae_loss(reconstruction, alignments, beta=self.beta)

    def _alignments(self, student: Outputs, teacher: Outputs, rows: Tensor | None) -> list[Tensor]:
        found = []
        for pair, head in zip(self.pairs, self.heads, strict=True):
            ours = self.student_model[0].without_registers(student.features[pair.student])
            theirs = self.teacher_model[0].without_registers(teacher.features[pair.teacher])
            found.append(
                dmae_align_loss(
                    *keep_rows(rows, head(ours), theirs),
                    normalize=self.config.projection is not None,
                    kind=self.config.kind,
                )
            )
        return found

    def _pairs(self) -> list[Pair]:
        if not self.teacher_model:
            return []
        chosen = []
        for model, given in (
            (self.student_model[0], self.config.student_blocks),
            (self.teacher_model[0], self.config.teacher_blocks),
        ):
            depth = len(model.blocks)
            wanted = (round(0.75 * depth) - 1,) if given is None else given
            wrong = [block for block in wanted if not 0 <= block < depth]
            if wrong:
                raise ValueError(f"{model.name} has blocks 0 to {depth - 1}; got {wrong[0]}")
            chosen.append([model.blocks[block] for block in wanted])
        return [Pair(ours, theirs) for ours, theirs in zip(*chosen, strict=True)]


def masked(batch: Batch, noise: Tensor, mask_ratio: float) -> Batch:
    """The batch as both models get it: images and their visible patches; the order of all patches as a column."""
    chosen = mask_indices(noise, mask_ratio)
    inputs: Any = {IMAGES: batch.inputs, VISIBLE: chosen.ids_keep}
    return batch.replace(inputs=inputs, columns={**batch.columns, ORDER: chosen.ids_restore})


def _held(spec: ModelSpec) -> MaskedViT:
    if not isinstance(spec.module, MaskedViT):
        raise TypeError(f"pre-training takes a MaskedViT; {spec.name} is a {type(spec.module).__name__}")
    return spec.module


def _head(projection: str | None, student: MaskedViT, teacher: MaskedViT) -> nn.Module:
    if projection is None:
        if student.width != teacher.width:
            raise ValueError(
                f"projection: null compares features as they are, but widths are {student.width} ({student.name}) and "
                f"{teacher.width} ({teacher.name}); set method.projection=linear"
            )
        return nn.Identity()
    if projection == "linear":
        return nn.Linear(student.width, teacher.width)
    return nn.Sequential(
        nn.Linear(student.width, teacher.width), nn.GELU(), nn.Linear(teacher.width, teacher.width)
    )
