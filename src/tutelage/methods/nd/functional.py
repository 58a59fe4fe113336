"""Class means of a teacher's features, and the loss that pulls a student's features along them."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from tutelage.functional.checks import SoftTargetError, check_class_ids, check_same_shape
from tutelage.functional.classes import ClassSums, class_sums
from tutelage.functional.reductions import upcast

__all__ = ["ClassMeanAccumulator", "class_means", "nd_loss"]

Form = Literal["norm_direction", "direction"]
_SHOWN = 10


class ClassMeanAccumulator:
    """Mean feature of every class, from any number of batches, summed in float64.

    Args:
        num_classes: how many classes there are.

    Attributes:
        total: sums and counts by class, float64; none before the first batch.

    Raises:
        ValueError: fewer than one class.
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1; got {num_classes}")
        self.num_classes = num_classes
        self.total: ClassSums | None = None
        self._dtype = torch.float32

    @torch.no_grad()
    def update(self, features: Float[Tensor, "rows features"], target: Integer[Tensor, " rows"]) -> None:
        """Add rows ``[rows, features]`` with their class ids ``[rows]``.

        Raises:
            ValueError: shapes or ids that do not fit, or another width than before.
        """
        if features.dim() != 2:
            raise ValueError(f"features must be [rows, features]; got shape {list(features.shape)}")
        check_class_ids(target, len(features), self.num_classes)
        found = class_sums(features.double(), target, self.num_classes)
        if self.total is None:
            self._dtype, self.total = upcast(features).dtype, found
            return
        if found.sums.shape != self.total.sums.shape:
            raise ValueError(
                f"features were {self.total.sums.shape[1]} wide before; got shape {list(features.shape)}"
            )
        self.total = self.total.plus(found)

    def result(self) -> Float[Tensor, "classes features"]:
        """The means ``[classes, features]``, in the first batch's type, at least float32.

        Raises:
            ValueError: a class without rows, or with features that are not finite; each is named.
        """
        if self.total is None:
            raise ValueError("no rows: there are no class means")
        empty = torch.nonzero(self.total.counts == 0).flatten().tolist()
        if empty:
            raise ValueError(
                f"{len(empty)} of {self.num_classes} classes have no rows: {_listed(empty)}; every class needs one"
            )
        means = self.total.means
        wrong = torch.nonzero(~means.isfinite().all(1)).flatten().tolist()
        if wrong:
            raise ValueError(f"features are not finite in rows of class {_listed(wrong)}")
        return means.to(self._dtype)


def class_means(
    features: Float[Tensor, "rows features"], target: Integer[Tensor, " rows"], num_classes: int
) -> Float[Tensor, "classes features"]:
    """Mean feature of every class, summed in float64.

    Args:
        features: ``[rows, features]``; detached.
        target: class ids ``[rows]``: labels, not what a teacher predicts.
        num_classes: how many classes there are; each needs a row.

    Returns:
        ``[classes, features]``, at least float32.

    Raises:
        ValueError: a class without rows, features that are not finite, or shapes or ids that do not fit.

    Source: Wang et al., "Improving Knowledge Distillation via Regularizing Feature Norm and Direction"
    (arXiv 2305.17007), section 3.
    """
    accumulator = ClassMeanAccumulator(num_classes)
    accumulator.update(features, target)
    return accumulator.result()


def nd_loss(
    student_features: Float[Tensor, "batch features"],
    teacher_features: Float[Tensor, "batch features"],
    class_means: Float[Tensor, "classes features"],
    target: Integer[Tensor, " batch"],
    weight: float | int = 1.0,
    form: Form = "norm_direction",
) -> Float[Tensor, ""]:
    """``weight · mean (1 - <s, e_y> / max(‖s‖, ‖t‖))``: features as long as the teacher's, along the class mean.

    ``e_y`` is the class mean's direction. A feature shorter than the teacher's is rewarded for growing along it; from
    the teacher's length on only its direction counts. From 0 to 2 times the weight; 0 along the mean, at that length or
    above.

    Args:
        student_features: ``[batch, features]``, the input of the classifier, projected to the teacher's width.
        teacher_features: ``[batch, features]`` of the same rows; detached, only their length is read.
        class_means: ``[classes, features]`` of the teacher's features; detached.
        target: class ids ``[batch]``.
        weight: factor of the loss.
        form: ``direction`` leaves the length out, ``1 - cos(s, e_y)``.

    Returns:
        A scalar, at least float32; a row in which both features are 0 counts 1, without a gradient. Without rows 0
        with a zero gradient.

    Raises:
        TypeError: target holds distributions.
        ValueError: shapes or ids that do not fit, an unknown form, or the mean of a row's class is 0 or not finite
            (values are checked on the CPU only).

    Source: Wang et al., "Improving Knowledge Distillation via Regularizing Feature Norm and Direction"
    (arXiv 2305.17007), equations of ND.
    """
    _check(student_features, teacher_features, class_means, target, form)
    rows, student, mean = len(target), upcast(student_features), _of_rows(class_means, target)
    longest, mean_length = _norm(student), _norm(mean)
    if form == "norm_direction":
        wanted = _norm(upcast(teacher_features.detach()))
        longest = torch.where(longest >= wanted, longest, wanted)
    product, dot = longest * mean_length, (student * mean).sum(-1)
    if not _all_positive(product):
        check_directions(mean_length, target)
        # Divided by 1 where both features are 0, and masked: no NaN flows back through the branch that is not taken.
        some = product > 0
        product, dot = torch.where(some, product, 1.0), torch.where(some, dot, 0.0)
    # The mean of 1 - cosine, and 0 without rows.
    return (weight if rows else 0.0) - (dot / product).sum() * (weight / max(rows, 1))


def check_directions(lengths: Float[Tensor, " rows"], classes: Integer[Tensor, " rows"]) -> None:
    """Raise ValueError where a class mean's length is 0 or not finite; on the CPU only, elsewhere it would wait."""
    if lengths.device.type != "cpu":
        return
    wrong = ~((lengths > 0) & lengths.isfinite())
    if bool(wrong.any()):
        found = sorted(set(classes[wrong].tolist()))
        raise ValueError(f"the class mean of class {_listed(found)} is 0 or not finite: it has no direction")


def _of_rows(means: Tensor, target: Tensor) -> Tensor:
    try:
        return upcast(means.detach()).index_select(0, target)
    except IndexError:
        check_class_ids(target, len(target), len(means))  # names the id
        raise


def _all_positive(lengths: Tensor) -> bool:
    """Whether all lengths are known to be above 0 and finite; elsewhere than on the CPU that would wait."""
    if lengths.device.type == "cpu" and lengths.numel():
        least, most = lengths.detach().aminmax()
        return bool(least > 0) and bool(most < torch.inf)
    return False


def _norm(rows: Float[Tensor, "batch features"]) -> Float[Tensor, " batch"]:
    length: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return length


def _check(student: Tensor, teacher: Tensor, means: Tensor, target: Tensor, form: str) -> None:
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}; got {form!r}")
    check_same_shape(student_features=student, teacher_features=teacher)
    if student.dim() != 2 or means.dim() != 2 or means.shape[1] != student.shape[1]:
        raise ValueError(
            f"features must be [batch, features] and class means [classes, features]; got shapes "
            f"{list(student.shape)} and {list(means.shape)}"
        )
    if target.dim() == 2:
        raise SoftTargetError(
            f"nd_loss needs one class a row; got distributions {list(target.shape)}: switch mixup off, and whatever "
            "else mixes labels (the methods mixup and mixkd)"
        )
    if target.dim() != 1 or len(target) != len(student):
        raise ValueError(f"target must be class ids [{len(student)}]; got shape {list(target.shape)}")
    if target.is_floating_point():
        raise ValueError(f"class ids must be integers; got {target.dtype}")


def _listed(classes: list[int]) -> str:
    more = f" and {len(classes) - _SHOWN} more" if len(classes) > _SHOWN else ""
    return ", ".join(map(str, classes[:_SHOWN])) + more
