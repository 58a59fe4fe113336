"""Options of mcmi."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tutelage.recipe.config import MethodConfig, Range, Scalar
from tutelage.recipe.parts import ClassId, Share
from tutelage.recipe.schema import OptimizerConfig, ScheduleConfig


class MCMIConfig(MethodConfig):
    """Options of mcmi; defaults are those of its CIFAR-100 runs."""

    cmi_weight: float = Field(
        0.15,
        ge=0,
        description="Weight of the conditional mutual information that the teacher's tuning raises.",
    )
    epochs: int = Field(
        20, ge=0, description="Epochs of the teacher's tuning; 0: the teacher stays as it is."
    )
    batch_size: int = Field(64, ge=1, description="Rows of a step of the teacher's tuning.")
    optimizer: OptimizerConfig = Field(
        OptimizerConfig(name="sgd", lr=0.05, momentum=0.9, weight_decay=5e-4),
        description="Of the teacher's tuning; its rate is half of that the teacher was trained with.",
    )
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="The tuning's learning rate.")
    centroids: Literal["fixed", "epoch", "ema"] = Field(
        "fixed",
        description="When the mean answers by class follow the teacher: never, every epoch, or every step.",
    )
    ema_decay: float = Field(0.9999, ge=0, le=1, description="ema: what stays of the means in a step.")
    ema_samples: int = Field(8, ge=1, description="ema: rows of every class that a step looks at.")
    release_mode: bool = Field(
        False, description="Take the first means in train mode on augmented rows, as the authors' code does."
    )
    largest_drop: float = Field(
        0.02,
        ge=0,
        le=1,
        description="Training accuracy that the tuning may lose: below, it ends, and the last epoch above counts.",
    )
    student_method: str = Field(
        "kd", min_length=1, description="Catalogue name of what the student learns by."
    )
    student_options: dict[str, Scalar | tuple[float, ...]] = Field({}, description="Options of that method.")
    fraction: Share | None = Field(
        None, description="Share of every class's rows that the student sees; left out: all."
    )
    omit: tuple[ClassId, ...] = Field((), description="Classes whose rows the student never sees.")
    pictures: int = Field(6, ge=0, le=100, description="Test images whose Eigen-CAM maps are shown.")

    @classmethod
    def search(cls) -> dict[str, Range]:
        return {"cmi_weight": Range(0.05, 0.5)}
