"""Maps of both models' stages, in pairs; and where a stage's map is before its last activation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tutelage.engine.layout import layout_of
from tutelage.engine.method import Method
from tutelage.engine.needs import Needs
from tutelage.engine.patterns import INPUT
from tutelage.engine.spec import ModelSpec
from tutelage.engine.types import Batch, Taps
from tutelage.functional.maps import as_map
from tutelage.methods.baselines.choices import StageTapsConfig, stage_pairs

_ACTIVATIONS = re.compile(
    r"(Leaky|P|R)?ReLU6?|[CS]?ELU|(Quick)?GELU(Tanh)?|SiLU|Swish|Mish|Hard([Ss]wish|tanh|Mish)|Softplus"
)
"""Classes of torch and timm."""


class StageMaps:
    """Turns a model's tapped features into maps ``[batch, channels, height, width]``, shallow to deep.

    Tokens become the map of their patches, without class tokens; a vector is a map of one position.

    Attributes:
        shapes: ``(channels, height, width)`` of each.

    Raises:
        TapError, ValueError: a tap gives nothing that is a map, tokens or a vector.
    """

    def __init__(self, spec: ModelSpec, paths: Sequence[str]) -> None:
        self.layouts = [(path, layout_of(spec, path)) for path in paths]
        self.shapes = [(layout.channels, *layout.grid) for _, layout in self.layouts]

    def __call__(self, features: Mapping[str, Any]) -> list[Tensor]:
        return [as_map(layout.to_map(features[path])) for path, layout in self.layouts]


class StageMethod(Method):
    """Base of the methods that compare the maps of all stages, in pairs."""

    needs = Needs(
        logits=(),
        teacher_taps=True,
        fields=("target",),
        tasks=("classification", "multilabel", "regression"),
    )
    config: StageTapsConfig

    def taps(self, teacher: ModelSpec | None, student: ModelSpec) -> Taps:
        assert teacher is not None
        ours, theirs = stage_pairs(student, teacher, self.config.student_taps, self.config.teacher_taps)
        return Taps(student=ours, teacher=theirs, teacher_logits=False)

    def build(self, teacher: ModelSpec | None, student: ModelSpec, example: Batch) -> None:
        assert teacher is not None
        taps = self.taps(teacher, student)
        self.student_maps = StageMaps(student, taps.student)
        self.teacher_maps = StageMaps(teacher, taps.teacher)


def before_last_activation(spec: ModelSpec, stage: str) -> str | None:
    """The tap of what a stage's last activation takes, where that activation is the last of its modules to run.

    None where it is not: a stage without an activation at its end (inverted residuals, pre-activation blocks), with one
    that is a function call, or with a module that also runs before (its first run is what a tap sees).
    """
    ran = [info for info in spec.infos if info.path == stage or info.path.startswith(f"{stage}.")]
    leaves = [info for info in ran if not any(other.path.startswith(f"{info.path}.") for other in ran)]
    if not leaves or not _ACTIVATIONS.fullmatch(leaves[-1].kind) or leaves[-1].shape != spec.shape(stage):
        return None
    return leaves[-1].path + INPUT
