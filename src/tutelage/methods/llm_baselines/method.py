"""Divergences of next-token distributions as methods: each beside the label loss, fused with the heads or plain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tutelage.engine.method import Method, Paper
from tutelage.engine.needs import Needs
from tutelage.engine.types import Batch, Outputs, Terms
from tutelage.recipe.config import MethodConfig, Range
from tutelage.tasks.token_losses import divergence_terms

if TYPE_CHECKING:
    from tutelage.engine.step import Step

FAMILY = "white-box LLM"
TASKS = ("language-model", "token-classification", "classification")


class DivergenceConfig(MethodConfig):
    """What all of these share; defaults are those of DistiLLM's runs: no label loss beside the divergence."""

    label_weight: float = Field(0.0, ge=0, description="Weight of the label loss.")
    loss_weight: float = Field(1.0, ge=0, description="Weight of the divergence from the teacher.")
    temperature: float = Field(1.0, gt=0, le=1000, description="Softens both sides; its square is no factor.")
    fused: bool = Field(
        True, description="From hidden states and heads, chunk by chunk; false: from logits, made whole."
    )

    @property
    def options(self) -> dict[str, Any]:
        """What the divergence itself takes."""
        return {}

    @classmethod
    def search(cls) -> dict[str, Range]:
        return super().search() | {"temperature": Range(0.5, 4.0)}


class DivergenceMethod(Method):
    """The mean over tokens of one divergence between the teacher's and the student's distribution."""

    Config: ClassVar[type[MethodConfig]] = DivergenceConfig
    divergence: ClassVar[str]
    needs = Needs(logits=("dense", "topk"), scale="log_probs", fields=("target",), tasks=TASKS)
    config: DivergenceConfig

    def objective(self, student: Outputs, teacher: Outputs | None, batch: Batch, ctx: Step) -> Terms:
        assert teacher is not None
        config = self.config
        return divergence_terms(
            self.divergence,
            student,
            teacher,
            batch,
            ctx,
            options=config.options,
            label_weight=config.label_weight,
            loss_weight=config.loss_weight,
            temperature=config.temperature,
            fused=config.fused,
            alone=self.alone,
        )


class ForwardKL(DivergenceMethod):
    """``KL(p || q)``: the student spreads over all that the teacher holds possible."""

    divergence = "forward_kl"
    needs = Needs(logits=("dense", "topk", "sampled"), scale="log_probs", fields=("target",), tasks=TASKS)
    paper = Paper(
        title="Distilling the Knowledge in a Neural Network, token by token",
        venue="preprint",
        year=2015,
        arxiv="1503.02531",
        claim="A student of the forward KL covers all modes of the teacher's distribution.",
        card="llm_baselines",
        family=FAMILY,
    )


class ReverseKL(DivergenceMethod):
    """``KL(q || p)``: the student keeps to where the teacher is most certain."""

    divergence = "reverse_kl"
    paper = Paper(
        title="MiniLLM: Knowledge Distillation of Large Language Models (its divergence, on the data's text)",
        venue="ICLR",
        year=2024,
        arxiv="2306.08543",
        claim="A student of the reverse KL seeks the teacher's modes: its own text is likelier under the teacher.",
        card="llm_baselines",
        family=FAMILY,
    )


class SkewConfig(DivergenceConfig):
    """Options of skl and srkl; the default is DistiLLM's."""

    skew: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of the front distribution in the mixture that it is compared with.",
    )

    @property
    def options(self) -> dict[str, Any]:
        return {"skew": self.skew}


class SkewedForwardKL(DivergenceMethod):
    """``KL(p || skew p + (1 - skew) q)``."""

    Config = SkewConfig
    divergence = "skewed_forward_kl"
    paper = Paper(
        title="DistiLLM: Towards Streamlined Distillation for Large Language Models (skew KL)",
        venue="ICML",
        year=2024,
        arxiv="2402.03898",
        claim="A skewed KL learns more steadily than the plain one, and the student is better for it.",
        card="llm_baselines",
        family=FAMILY,
    )


class SkewedReverseKL(DivergenceMethod):
    """``KL(q || (1 - skew) p + skew q)``."""

    Config = SkewConfig
    divergence = "skewed_reverse_kl"
    paper = Paper(
        title="DistiLLM: Towards Streamlined Distillation for Large Language Models (skew reverse KL)",
        venue="ICML",
        year=2024,
        arxiv="2402.03898",
        claim="A skewed reverse KL learns more steadily than the plain one, and the student is better for it.",
        card="llm_baselines",
        family=FAMILY,
    )


class JSDConfig(DivergenceConfig):
    """Options of jsd; the default is that of TRL's GKD trainer."""

    beta: float = Field(
        0.5, ge=0, le=1, description="The teacher's share of the mixture; 0 is the forward KL, 1 the reverse."
    )

    @property
    def options(self) -> dict[str, Any]:
        return {"beta": self.beta}


class GeneralizedJSD(DivergenceMethod):
    """``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q``."""

    Config = JSDConfig
    divergence = "generalized_jsd"
    paper = Paper(
        title="On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes (generalised JSD)",
        venue="ICLR",
        year=2024,
        arxiv="2306.13649",
        claim="Between forward and reverse KL, a generalised Jensen-Shannon divergence trades cover against quality.",
        card="llm_baselines",
        family=FAMILY,
    )


class AKLConfig(DivergenceConfig):
    """Options of akl; the default is the official one."""

    mu: float = Field(0.5, gt=0, lt=1, description="Mass of the teacher's distribution that is its head.")

    @property
    def options(self) -> dict[str, Any]:
        return {"mu": self.mu}


class AdaptiveKL(DivergenceMethod):
    """Forward and reverse KL, each token's weighed by where the student is further off: in the head of the teacher's
    distribution, or in its tail."""

    Config = AKLConfig
    divergence = "adaptive_kl"
    paper = Paper(
        title="Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models (AKL)",
        venue="COLING",
        year=2025,
        arxiv="2404.02657",
        claim="Forward KL learns the head first and reverse KL the tail; weighed by the gaps, both are learnt sooner.",
        card="llm_baselines",
        family=FAMILY,
    )


class TotalVariation(DivergenceMethod):
    """Half the absolute difference of the distributions: the share of drafts that the teacher would not accept."""

    divergence = "total_variation"
    paper = Paper(
        title="f-Divergence Minimization for Sequence-Level Knowledge Distillation (total variation)",
        venue="ACL",
        year=2023,
        arxiv="2307.15190",
        claim="Total variation, symmetric and bounded, neither averages over modes nor collapses onto one.",
        card="llm_baselines",
        family=FAMILY,
    )
