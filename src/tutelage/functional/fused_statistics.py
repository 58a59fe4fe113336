"""What is measured of tokens without a gradient, in one pass over hidden states and heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from tutelage.functional.analytic import ForwardKL
from tutelage.functional.fused_rows import DenseRows, Found, Rows
from tutelage.functional.fused_taught import dense_side
from tutelage.functional.fused_tokens import Tokens
from tutelage.functional.heads import Head

__all__ = ["token_statistics"]


class TokenStatistics(NamedTuple):
    """Of each token, ``[...]``; 0 (False) where one does not count. What needs a teacher is None without one.

    Attributes:
        nll: ``-log q(target)``, float32 or wider.
        teacher_nll: ``-log p(target)``.
        agreement: bool, whether both hold the same token likeliest.
        acceptance: ``Σ min(p, q)``: the chance that the teacher accepts a token drawn from the student in speculative
            decoding at temperature 1.
        divergence: ``KL(p || q)`` in nats; infinite where only the student excludes an entry.
    """

    nll: Tensor
    teacher_nll: Tensor | None = None
    agreement: Tensor | None = None
    acceptance: Tensor | None = None
    divergence: Tensor | None = None


@torch.no_grad()
def token_statistics(
    student_hidden: Float[Tensor, "*rows width"],
    student_head: Head,
    target: Integer[Tensor, "*rows"],
    teacher: tuple[Tensor, Head] | Tensor | None = None,
    mask: Shaped[Tensor, "*rows"] | None = None,
    *,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> TokenStatistics:
    """Negative log-likelihoods, agreement and acceptance of each token, chunk by chunk; the logits of all tokens are
    never held at once.

    Args:
        student_hidden: ``[..., width]``; row i predicts target i.
        student_head: ``[vocabulary, width]`` with what belongs to it.
        target: ``[...]``, ids of the next tokens; ``ignore_index`` does not count.
        teacher: ``(hidden, Head)``, logits ``[..., vocabulary]``, or none.
        mask: ``[...]``, not zero where a token counts.
        chunk_size: tokens whose logits are made at once; None: by bytes.

    Raises:
        ValueError: shapes, types or vocabularies do not agree.
        TargetError: a target that counts is no id of the vocabulary (looked at on the CPU alone).

    Source of the acceptance: Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding"
    (arXiv 2211.17192), section 3.
    """
    tokens = Tokens(student_hidden, student_head, target, ignore_index, mask)
    work = Rows(tokens.vocabulary, tokens.target, 0.0)
    if teacher is not None:
        work = MeasuredRows(
            *(tokens.vocabulary, tokens.target, 0.0), dense_side(tokens, teacher), ForwardKL(), 1.0, False
        )
    found = tokens.run(work, chunk_size)
    assert found.label is not None
    measured = (found.teacher_label, found.agreement, found.acceptance, found.divergence)
    return TokenStatistics(
        tokens.spread(found.label), *(part if part is None else tokens.spread(part) for part in measured)
    )


class MeasuredRows(DenseRows):
    """Both models' logits are compared; there is no divergence and no gradient."""

    def compared(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Found:
        assert target is not None
        log_q, log_p = self.vocabulary.log_softmax_(student), self.vocabulary.log_softmax_(teacher)
        label, theirs = self.label_of(log_q, target), self.label_of(log_p, target)
        agreement = log_q.argmax(-1) == log_p.argmax(-1)
        p = log_p.exp()
        # An entry without mass adds nothing; one that the student alone excludes makes it infinite.
        divergence = self.vocabulary.dot(p, (log_p - log_q).masked_fill_(p == 0, 0.0))
        acceptance = torch.minimum(log_q, log_p, out=log_q).exp_().sum(-1)
        return Found(label, divergence, theirs, agreement, acceptance)
