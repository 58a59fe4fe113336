"""TRG's own math: tokens of maps, their nearest-neighbour graph, and the three losses on them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from tutelage.functional.checks import check_positive
from tutelage.functional.reductions import mean_squared, upcast, without_autocast

__all__ = [
    "gather_patch_tokens",
    "patch_tokens",
    "sample_token_index",
    "token_graph",
    "trg_contextual_loss",
    "trg_global_loss",
    "trg_local_loss",
    "trg_temperature",
]

Tokens = Float[Tensor, "tokens width"]
Graph = Float[Tensor, "tokens tokens"]

_SHORTEST = 1e-12
"""Least length that a token is divided by when it is normalised."""


def patch_tokens(
    feature_map: Float[Tensor, "batch channels height width"], patch: int = 2
) -> Float[Tensor, "batch tokens features"]:
    """A map cut into patches that do not overlap, row by row; within a patch channel, row, column.

    Args:
        feature_map: ``[batch, channels, height, width]``.
        patch: side of a patch; it divides height and width.

    Returns:
        ``[batch, height / patch * width / patch, channels * patch²]``, in the map's dtype.

    Raises:
        ValueError: ``patch`` is below 1 or does not divide the map's sides.

    Source: Zhang et al. (arXiv 2306.12442), section 3.
    """
    batch, channels, height, width = feature_map.shape
    if patch < 1 or height % patch or width % patch:
        raise ValueError(f"patch={patch} must be at least 1 and divide the map's {height}×{width}")
    cut = feature_map.reshape(batch, channels, height // patch, patch, width // patch, patch)
    tokens = (height // patch) * (width // patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, tokens, channels * patch * patch)


def sample_token_index(
    batch: int,
    tokens: int,
    per_image: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Int64[Tensor, "batch per_image"]:
    """Token positions of each image, drawn uniformly without replacement, ascending in every row.

    Args:
        batch: images.
        tokens: positions of an image.
        per_image: how many of them are drawn, from 1 to ``tokens``.
        generator: lies on ``device``.
        device: where the index is made; left out: the generator's, else the CPU.

    Raises:
        ValueError: ``per_image`` is not between 1 and ``tokens``.

    Source: Zhang et al. (arXiv 2306.12442), section 3.
    """
    if not 1 <= per_image <= tokens:
        raise ValueError(f"per_image={per_image} must lie between 1 and the {tokens} tokens of an image")
    where = device if device is not None else generator.device if generator is not None else None
    noise = torch.rand(batch, tokens, generator=generator, device=where)
    return noise.argsort(1)[:, :per_image].sort(1).values


def gather_patch_tokens(
    tokens: Float[Tensor, "batch positions width"], index: Int64[Tensor, "batch per_image"]
) -> Float[Tensor, "picked width"]:
    """The tokens at the given positions of each image, one image after the other: ``[batch * per_image, width]``."""
    picked = tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))
    return picked.flatten(0, 1)


def token_graph(tokens: Tokens, k: int = 8, sigma: float | int = 1.0, normalize: bool = True) -> Graph:
    """Weights of the nearest-neighbour graph, ``A_ij = exp(-|T_i - T_j|² / (2 sigma))`` where i is one of the k nearest
    of j, else 0.

    So every column holds k neighbours; the diagonal is 0 and the matrix is not symmetric. Of equally near tokens those
    with the lowest index are neighbours. Which are neighbours has no gradient, the weights have.

    Args:
        tokens: ``[tokens, width]``.
        k: neighbours, at least 1; of fewer than ``k + 1`` tokens all others are.
        sigma: width of the kernel, above 0.
        normalize: tokens are brought to length 1 first; a token of zeros stays one.

    Returns:
        ``[tokens, tokens]`` in [0, 1], at least float32.

    Raises:
        ValueError: ``k`` is below 1, or ``sigma`` not above 0.

    Source: Zhang et al. (arXiv 2306.12442), section 3.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    check_positive("sigma", sigma)
    tokens = upcast(tokens)
    if normalize:
        tokens = F.normalize(tokens, dim=1, eps=_SHORTEST)
    distances = _squared_distances(tokens)
    weights = (distances * (-0.5 / sigma)).exp()
    return weights.masked_fill(~_neighbours(distances.detach(), k), 0.0)


def trg_local_loss(
    student_tokens: Float[Tensor, "ours student_width"],
    teacher_tokens: Float[Tensor, "theirs teacher_width"],
    k: int = 8,
    sigma: float | int = 1.0,
    normalize: bool = True,
    direction: str = "forward",
    graph_temperature: float | int = 1.0,
) -> Float[Tensor, ""]:
    """Mean divergence of the rows of both graphs, ``mean_i KL(P_t,i || P_s,i)``, ``P = softmax(A / temperature)`` over
    all tokens, zeros of ``A`` included.

    Args:
        student_tokens: ``[tokens, width]``, of any width.
        teacher_tokens: ``[tokens, width]``: the same positions of the same images; detached.
        k, sigma, normalize: see `token_graph`; each side finds neighbours of its own.
        direction: ``reverse`` takes ``KL(P_s,i || P_t,i)``, the order that the paper prints.
        graph_temperature: what ``A`` is divided by, above 0; 1 is the paper's, a flat distribution.

    Returns:
        A scalar in nats, at least float32: 0 for equal tokens, and for a single one. Unchanged where either side's
        space is rotated.

    Raises:
        ValueError: unequally many tokens, another direction, or a number that is not above 0.

    Source: Zhang et al. (arXiv 2306.12442), the local preserving loss, as a mean over tokens.
    """
    _check_as_many(student_tokens, teacher_tokens)
    check_positive("graph_temperature", graph_temperature)
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse'; got {direction!r}")
    student = token_graph(student_tokens, k, sigma, normalize) / graph_temperature
    teacher = token_graph(teacher_tokens.detach(), k, sigma, normalize) / graph_temperature
    ours, theirs = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1).to(student.dtype)
    first, second = (ours, theirs) if direction == "reverse" else (theirs, ours)
    return F.kl_div(second, first, reduction="sum", log_target=True) / max(len(ours), 1)


def trg_global_loss(
    student_tokens: Float[Tensor, "ours student_width"],
    teacher_tokens: Float[Tensor, "theirs teacher_width"],
    temperature: float | int = 0.1,
) -> Float[Tensor, ""]:
    """Contrast of every student token with all teacher tokens: cross-entropy of ``cos(s_i, t_j) / temperature``, whose
    right answer is ``j = i``.

    Args:
        student_tokens: ``[tokens, width]``, projected to the teacher's width.
        teacher_tokens: ``[tokens, width]``: the same positions of the same images; detached.
        temperature: above 0.

    Returns:
        A scalar in nats, at least float32; 0 for a single token, ``log(tokens)`` where the temperature is large.

    Raises:
        ValueError: shapes differ, or the temperature is not above 0.

    Source: Zhang et al. (arXiv 2306.12442), the global contrastive loss, as a mean over tokens.
    """
    _check_as_many(student_tokens, teacher_tokens)
    if student_tokens.shape != teacher_tokens.shape:
        raise ValueError(
            f"student tokens must be projected to the teacher's width {teacher_tokens.shape[1]}; "
            f"they have {student_tokens.shape[1]}"
        )
    check_positive("temperature", temperature)
    student, teacher = upcast(student_tokens), upcast(teacher_tokens.detach())
    if not len(student):
        return student.sum()
    with without_autocast(student):
        ours, theirs = (F.normalize(side, dim=1, eps=_SHORTEST) for side in (student, teacher))
        similarities = ours @ theirs.T.to(ours.dtype) / temperature
    return F.cross_entropy(similarities, torch.arange(len(ours), device=ours.device))


def trg_contextual_loss(
    student_tokens: Float[Tensor, "ours positions_here student_width"],
    teacher_tokens: Float[Tensor, "theirs positions_there teacher_width"],
) -> Float[Tensor, ""]:
    """Mean squared difference of the tokens' similarities within each image, ``softmax(F F^T / sqrt(width))`` by rows.

    Args:
        student_tokens: ``[batch, positions, width]``, all tokens of each image, of any width.
        teacher_tokens: ``[batch, positions, width]``; detached.

    Returns:
        A scalar in [0, 1], at least float32: the mean over batch and pairs of positions; unchanged where either side's
        space is rotated. Without rows 0 with a zero gradient.

    Raises:
        ValueError: other numbers of images or of positions.

    Source: Zhang et al. (arXiv 2306.12442), the contextual loss.
    """
    if student_tokens.shape[:2] != teacher_tokens.shape[:2]:
        raise ValueError(
            "both sides need the same images and positions; got student_tokens "
            f"{list(student_tokens.shape)}, teacher_tokens {list(teacher_tokens.shape)}"
        )
    ours, theirs = _context(upcast(student_tokens)), _context(upcast(teacher_tokens.detach()))
    return mean_squared(ours, theirs.to(ours.dtype))


def trg_temperature(step: int, total_steps: int, start: float = 0.5, end: float = 0.1) -> float:
    """The global loss's temperature at a step: linear from ``start`` at step 0 to ``end`` at ``total_steps``.

    High at first, for the coarse structure, low later, for hard negatives. Steps past the end keep ``end``.

    Raises:
        ValueError: ``start`` or ``end`` is not above 0, or there are no steps.

    Source: Zhang et al. (arXiv 2306.12442), the dynamic temperature; the linear form is ours.
    """
    check_positive("start", start)
    check_positive("end", end)
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1; got {total_steps}")
    return start + (end - start) * min(max(step / total_steps, 0.0), 1.0)


def _squared_distances(tokens: Tokens) -> Graph:
    with without_autocast(tokens):
        products = tokens @ tokens.T
    norms = products.diagonal()
    # Rounding can leave a small negative number where two tokens are the same.
    return (norms[:, None] + norms - 2 * products).clamp(min=0)


def _neighbours(distances: Graph, k: int) -> Tensor:
    """Whether i is one of the k nearest of j, at ``[i, j]``; of equally near ones those with the lowest index."""
    count = len(distances)
    k = min(k, count - 1)
    if k < 1:
        return torch.zeros_like(distances, dtype=torch.bool)
    others = distances.clone().fill_diagonal_(math.inf)
    farthest = others.topk(k, dim=0, largest=False).values[-1]
    nearer, equal = others < farthest, others == farthest
    room = k - nearer.sum(0)
    return nearer | (equal & (equal.cumsum(0) <= room))


def _context(tokens: Float[Tensor, "batch positions width"]) -> Float[Tensor, "batch positions positions"]:
    with without_autocast(tokens):
        products = tokens @ tokens.mT
    return F.softmax(products / math.sqrt(tokens.shape[2]), dim=2)


def _check_as_many(
    student_tokens: Float[Tensor, "ours student_width"],
    teacher_tokens: Float[Tensor, "theirs teacher_width"],
) -> None:
    if len(student_tokens) != len(teacher_tokens):
        raise ValueError(
            f"both sides need the same tokens; the student has {len(student_tokens)}, "
            f"the teacher {len(teacher_tokens)}"
        )
