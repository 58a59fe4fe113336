"""Every loss against its authors' arithmetic, forward and backward: time, and memory at its peak."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import official
from benchmarks.harness import Bar, Benchmark, Call, Sides, UnequalWorkError
from tutelage import functional

_TOLERANCE = 1e-5
"""Largest relative difference of the two sides' values and gradients, in float64."""


@dataclass(frozen=True)
class Pair:
    """One loss written twice, on the same tensors, and those that get a gradient."""

    ours: Callable[[], Tensor]
    official: Callable[[], Tensor]
    leaves: Sequence[Tensor]


class Draw:
    """Seeded tensors of one device and type."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return drawn.to(self.device, self.dtype)

    def leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.normal(*shape, scale=scale).requires_grad_()

    def unit(self, rows: int, width: int) -> Tensor:
        return F.normalize(self.normal(rows, width), dim=1)

    def ids(self, count: int, below: int) -> Tensor:
        return torch.randint(below, (count,), generator=self.generator).to(self.device)

    def rows(self, count: int, below: int) -> Tensor:
        """Ids that are all different."""
        return torch.randperm(below, generator=self.generator)[:count].to(self.device)


Make = Callable[[Draw], Pair]
SizedMake = Callable[..., Pair]
"""Takes ``rows`` and ``classes`` too."""


def _logits(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *, labelled: bool) -> SizedMake:
    """A loss of student logits, teacher logits and, where ``labelled``, labels."""

    def make(draw: Draw, rows: int, classes: int) -> Pair:
        student, teacher = draw.leaf(rows, classes, scale=3), draw.normal(rows, classes, scale=3)
        given = (student, teacher, draw.ids(rows, classes)) if labelled else (student, teacher)
        return Pair(lambda: ours(*given), lambda: theirs(*given), [student])

    return make


def _uskd(draw: Draw, rows: int, classes: int) -> Pair:
    student, weak = draw.leaf(rows, classes, scale=3), draw.leaf(rows, classes)
    target = draw.ids(rows, classes)
    return Pair(
        lambda: functional.uskd_loss(student, weak, target).total,
        lambda: official.uskd(student, weak, target),
        [student, weak],
    )


def _mcmi(draw: Draw, rows: int, classes: int) -> Pair:
    logits, target = draw.leaf(rows, classes, scale=3), draw.ids(rows, classes)
    centroids = draw.normal(classes, classes).softmax(1)
    return Pair(
        lambda: functional.mcmi_loss(logits, target, centroids).loss,
        lambda: official.mcmi(logits, target, centroids),
        [logits],
    )


def _tgeo_kd(draw: Draw, rows: int, classes: int) -> Pair:
    student, teacher = draw.leaf(rows, classes, scale=3), draw.normal(rows, classes, scale=3)
    target, mean = draw.ids(rows, classes), draw.normal(rows, classes).softmax(1)
    widths = (9 * classes, 32, 16, 1)
    layers = [
        (draw.normal(wide, narrow, scale=narrow**-0.5), draw.normal(wide))
        for narrow, wide in pairwise(widths)
    ]

    def ours() -> Tensor:
        state = functional.tgeo_state(
            student.detach().softmax(1), teacher.softmax(1), target, mean, edges="squared"
        )
        ratio = functional.tgeo_fusion_ratio(state, layers)
        total: Tensor = functional.tgeo_kd_loss(student, teacher, target, ratio).total
        return total

    return Pair(ours, lambda: official.tgeo_kd(student, teacher, target, mean, layers), [student])


def _mixstd(draw: Draw, rows: int, classes: int) -> Pair:
    student, teacher = draw.leaf(rows, classes, scale=3), draw.normal(rows, classes, scale=3)
    target = draw.normal(rows, classes, scale=3).softmax(1)
    return Pair(
        lambda: functional.mixstd_loss(student, teacher, target).total,
        lambda: official.mixstd(student, teacher, target),
        [student],
    )


def _trg(draw: Draw) -> Pair:
    """A batch of 64 images with 4 of 16 tokens each; both models' tokens have the teacher's width."""
    student, teacher = draw.leaf(256, 512), draw.normal(256, 512)
    images, others = draw.leaf(64, 16, 256), draw.normal(64, 16, 512)

    def ours() -> Tensor:
        local = functional.trg_local_loss(student, teacher)
        contrast = functional.trg_global_loss(student, teacher, 0.1)
        total: Tensor = local + contrast + functional.trg_contextual_loss(images, others)
        return total

    return Pair(ours, lambda: official.trg(student, teacher, images, others), [student, images])


def _ofakd(draw: Draw) -> Pair:
    student, *exits = [draw.leaf(64, 100, scale=3) for _ in range(5)]
    teacher, target = draw.normal(64, 100, scale=3), draw.ids(64, 100)
    return Pair(
        lambda: functional.ofakd_loss(student, exits, teacher, target, 1.5).total,
        lambda: official.ofakd(student, exits, teacher, target, 1.5),
        [student, *exits],
    )


def _wa(draw: Draw) -> Pair:
    student, teacher = draw.leaf(64, 100, scale=3), draw.normal(64, 80, scale=3)
    return Pair(
        lambda: functional.wa_distillation_loss(student, teacher),
        lambda: official.wa(student, teacher),
        [student],
    )


def _features(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], student_shape: tuple[int, ...], *teacher: int
) -> Make:
    """A loss of two features; the teacher's has the student's shape where it is not given."""

    def make(draw: Draw) -> Pair:
        student, fixed = draw.leaf(*student_shape), draw.normal(*(teacher or student_shape))
        return Pair(lambda: ours(student, fixed), lambda: theirs(student, fixed), [student])

    return make


def _vid(draw: Draw) -> Pair:
    mean, teacher, log_scale = draw.leaf(64, 256, 8, 8), draw.normal(64, 256, 8, 8), draw.leaf(256)
    return Pair(
        lambda: functional.vid_loss(mean, teacher, log_scale),
        lambda: official.vid(mean, teacher, log_scale),
        [mean, log_scale],
    )


def _nd(draw: Draw) -> Pair:
    student, teacher, means = draw.leaf(64, 512), draw.normal(64, 512), draw.normal(100, 512)
    target = draw.ids(64, 100)
    return Pair(
        lambda: functional.nd_loss(student, teacher, means, target),
        lambda: official.nd(student, teacher, means, target),
        [student],
    )


def _crd(draw: Draw, rows: int = 50_000, negatives: int = 4096, batch: int = 64, width: int = 128) -> Pair:
    student, teacher = (draw.unit(batch, width).requires_grad_() for _ in range(2))
    memories = (draw.unit(rows, width), draw.unit(rows, width))
    index = draw.rows(batch, rows)
    contrast = torch.cat([index[:, None], draw.ids(batch * negatives, rows).view(batch, -1)], dim=1)
    kept = (memories[0].clone(), memories[1].clone())  # the official ones move in place
    return Pair(
        lambda: functional.crd_loss(student, teacher, *memories, index, contrast).loss,
        lambda: official.crd(student, teacher, kept, index, contrast),
        [student, teacher],
    )


def _dmae_reconstruction(draw: Draw) -> Pair:
    """ViT-B's patches of 224×224 pixels, three quarters of them masked."""
    prediction, patches = draw.leaf(32, 196, 768), draw.normal(32, 196, 768)
    mask = functional.mask_indices(draw.normal(32, 196), 0.75).mask.to(draw.dtype)  # a float, as theirs is
    return Pair(
        lambda: functional.masked_reconstruction_loss(prediction, patches, mask, norm_pix=True),
        lambda: official.dmae_reconstruction(prediction, patches, mask),
        [prediction],
    )


def _dmae_align(draw: Draw) -> Pair:
    student, weight, bias = draw.leaf(32, 50, 768), draw.leaf(1024, 768, scale=0.03), draw.leaf(1024)
    teacher = draw.normal(32, 50, 1024)
    return Pair(
        lambda: functional.dmae_align_loss(student, teacher, weight=weight, bias=bias),
        lambda: official.dmae_align(student, teacher, weight, bias),
        [student, weight, bias],
    )


_MAP, _POOLED = (64, 256, 8, 8), (64, 256)

_SIZES = ((64, 100), (256, 1000))

_OF_LOGITS: dict[str, SizedMake] = {
    "kd": _logits(functional.kd_loss, official.kd, labelled=False),
    "dkd": _logits(functional.dkd_loss, official.dkd, labelled=True),
    "dist": _logits(functional.dist_loss, official.dist, labelled=False),
    "nkd": _logits(functional.nkd_loss, official.nkd, labelled=True),
    "ofa": _logits(partial(functional.ofa_loss, gamma=1.5), partial(official.ofa, gamma=1.5), labelled=True),
    "uskd": _uskd,
    "bdkd": _logits(
        lambda student, teacher: functional.bdkd_student_loss(student, teacher).total,
        official.bdkd,
        labelled=False,
    ),
    "binary_kl": _logits(functional.binary_kl_loss, official.binary_kl, labelled=False),
    "binary_kl_norm": _logits(functional.binary_kl_norm_loss, official.binary_kl_norm, labelled=False),
    "mcmi": _mcmi,
    "tgeo_kd": _tgeo_kd,
    "mixstd": _mixstd,
}

CASES: dict[str, Make] = {
    f"{name}.{rows}x{classes}": partial(make, rows=rows, classes=classes)
    for name, make in _OF_LOGITS.items()
    for rows, classes in _SIZES
} | {
    "ofakd.4-exits": _ofakd,
    "wa.64x100": _wa,
    "fitnet.map": _features(functional.fitnet_loss, official.fitnet, _MAP),
    "at.map": _features(functional.at_loss, official.at, _MAP),
    "hcl.map": _features(functional.hcl_loss, official.hcl, _MAP),
    "vid.map": _vid,
    "sp.map": _features(functional.sp_loss, official.sp, _MAP),
    "pkt.pooled": _features(functional.pkt_loss, official.pkt, _POOLED, 64, 512),
    "rkd.pooled": _features(functional.rkd_loss, official.rkd, _POOLED, 64, 512),
    "crd.50000x4096": _crd,
    "dmae.reconstruction": _dmae_reconstruction,
    "dmae.align": _dmae_align,
    "nd.pooled": _nd,
    "trg.256-tokens": _trg,
}


def sides(make: Make, device: torch.device) -> Sides:
    """Forward and backward of both, after a check that they agree.

    Raises:
        UnequalWorkError: values or gradients differ.
    """
    _check_equal(make(Draw(device, torch.float64)))
    pair = make(Draw(device, torch.float32))
    return Sides(_trained(pair.ours, pair.leaves), _trained(pair.official, pair.leaves))


def _trained(loss: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Call:
    def call() -> None:
        loss().backward()  # type: ignore[no-untyped-call]
        for leaf in leaves:
            leaf.grad = None

    return call


def _check_equal(pair: Pair) -> None:
    found = []
    for loss in (pair.ours, pair.official):
        value = loss()
        found.append([value, *torch.autograd.grad(value, list(pair.leaves))])
    for ours, theirs in zip(*found, strict=True):
        ours, theirs = ours.detach(), theirs.detach()
        if not float((ours - theirs).abs().max()) <= _TOLERANCE * float(theirs.abs().max()):
            raise UnequalWorkError(f"ours {ours} differs from the official {theirs}")


_PEER = "the official implementation's arithmetic, written plainly (`benchmarks/official.py`)"

BENCHMARKS = [
    Benchmark(f"loss.{name}", "forward and backward of the loss", _PEER, Bar(1.03), partial(sides, make))
    for name, make in CASES.items()
] + [
    Benchmark(
        f"memory.{name}",
        "bytes allocated at the peak of forward and backward",
        _PEER,
        Bar(1.01),
        partial(sides, make),
        quantity="memory",
    )
    for name, make in CASES.items()
]
