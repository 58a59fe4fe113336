"""One loss of language models, in a process of its own: ``python -m benchmarks.llm_worker '{"who": …}'``.

It prints a line of JSON about the first call, then one for each line that it reads, after a further call. Peers run in
an environment that holds them; see `benchmarks.peers`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import keep_freed_memory

CHUNK = 256
"""Rows of "the products alone in chunks"."""


@dataclass(frozen=True)
class Inputs:
    """Hidden states, heads and labels of a size; the labels of every second token may be ``-100``."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    target: Tensor

    @classmethod
    def draw(cls, rows: int, vocabulary: int, width: int, teacher_width: int, masked: bool) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            drawn: Tensor = torch.randn(shape, generator=generator)
            return drawn

        target = torch.randint(vocabulary, (rows,), generator=generator)
        return cls(
            normal(rows, width).requires_grad_(),
            normal(vocabulary, width).mul_(2 / width**0.5).requires_grad_(),
            normal(rows, teacher_width),
            normal(vocabulary, teacher_width).mul_(2 / teacher_width**0.5),
            target.masked_fill(torch.arange(rows) % 2 == 1, -100) if masked else target,
        )

    def logits(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher = self.teacher_hidden @ self.teacher_weight.t()
        return self.hidden @ self.weight.t(), teacher


Loss = Callable[[Inputs, str], Tensor]


def tutelage(of: Inputs, divergence: str) -> Tensor:
    from tutelage.functional import fused_linear_divergence

    given: Tensor = fused_linear_divergence(
        of.hidden, of.weight, of.teacher_hidden, of.teacher_weight, divergence=divergence, target=of.target
    )
    return given


def eager(of: Inputs, divergence: str) -> Tensor:
    """The formula, rows without a label dropped."""
    counts = of.target != -100
    if not counts.all():
        of = Inputs(
            of.hidden[counts], of.weight, of.teacher_hidden[counts], of.teacher_weight, of.target[counts]
        )
    student, teacher = (logits.log_softmax(-1) for logits in of.logits())

    def kl(of: Tensor, against: Tensor) -> Tensor:
        return F.kl_div(against, of, reduction="sum", log_target=True)

    if divergence == "generalized_jsd":
        mixture = torch.logaddexp(student, teacher) - torch.log(torch.tensor(2.0))
        total = (kl(teacher, mixture) + kl(student, mixture)) / 2
    else:
        total = kl(teacher, student) if divergence == "forward_kl" else kl(student, teacher)
    return total / len(student)


BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "generalized_jsd": 0.5}
"""As liger-kernel and TRL spell the divergences."""


def liger(of: Inputs, divergence: str) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[divergence])
    given: Tensor = loss(of.hidden, of.weight, of.teacher_hidden, of.teacher_weight, of.target)
    return given


def torchtune(of: Inputs, divergence: str) -> Tensor:
    """Driven as in its knowledge distillation recipe: logits in eight chunks."""
    from torchtune.modules.loss import ForwardKLWithChunkedOutputLoss, ReverseKLWithChunkedOutputLoss

    made = {"forward_kl": ForwardKLWithChunkedOutputLoss, "reverse_kl": ReverseKLWithChunkedOutputLoss}
    loss = made[divergence]()
    pieces = loss.num_output_chunks
    student = [part @ of.weight.t() for part in of.hidden[None].chunk(pieces, dim=1)]
    with torch.no_grad():
        teacher = [part @ of.teacher_weight.t() for part in of.teacher_hidden[None].chunk(pieces, dim=1)]
    given: Tensor = loss(student, teacher, of.target[None])
    return given


def trl(of: Inputs, divergence: str) -> Tensor:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd import GKDTrainer

    student, teacher = of.logits()
    given: Tensor = GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], labels=of.target[None], beta=BETAS[divergence]
    )
    return given


LOSSES: dict[str, Loss] = {
    "tutelage": tutelage,
    "eager": eager,
    "liger-kernel": liger,
    "torchtune": torchtune,
    "trl": trl,
}


@torch.no_grad()
def products(of: Inputs, rows: int) -> None:
    """What no loss can do without: both models' logits, and two products with something as large in place of the
    gradient, so many rows at a time."""
    hidden, weight, gradient = of.hidden.detach(), of.weight.detach(), torch.empty_like(of.hidden)
    by_head = torch.zeros_like(weight)
    tiles = torch.empty(2, rows, len(weight))
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        student = torch.mm(hidden[part], weight.t(), out=tiles[0, : len(hidden[part])])
        torch.mm(of.teacher_hidden[part], of.teacher_weight.t(), out=tiles[1, : len(hidden[part])])
        torch.mm(student, weight, out=gradient[part])
        by_head.addmm_(student.t(), hidden[part])


def call(of: Inputs, who: str, divergence: str) -> list[float]:
    """Once; the norms of its gradients, if it has any. (Values differ: torchtune's is a cross-entropy.)"""
    if who in ("products", "chunks"):
        products(of, CHUNK if who == "chunks" else len(of.hidden))
        return []
    of.hidden.grad = of.weight.grad = None
    loss = LOSSES[who](of, divergence)
    loss.backward()  # type: ignore[no-untyped-call]
    assert of.hidden.grad is not None
    assert of.weight.grad is not None
    return [float(value) for value in (of.hidden.grad.norm(), of.weight.grad.norm())]


def resident(which: str) -> int:
    """Bytes of this process in memory: ``VmRSS`` now, ``VmHWM`` at most since `forget_peak`."""
    found = re.search(rf"^{which}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(options: dict[str, Any]) -> None:
    who, divergence = options.pop("who"), options.pop("divergence")
    of = Inputs.draw(**options)
    small = Inputs.draw(8, 64, 8, 8, False)
    try:
        call(small, who, divergence)  # what is imported and started stays in memory, and is not the loss's
    except ImportError as error:
        print(json.dumps({"missing": f"{type(error).__name__}: {error}"}), flush=True)
        return
    torch.mm(of.hidden.detach()[:64], of.weight.detach()[:64].t())
    forget_peak()
    before = resident("VmRSS")
    norms = call(of, who, divergence)
    print(json.dumps({"norms": norms, "peak": resident("VmHWM") - before}), flush=True)
    keep_freed_memory()
    for _ in sys.stdin:
        started = time.perf_counter()
        call(of, who, divergence)
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
