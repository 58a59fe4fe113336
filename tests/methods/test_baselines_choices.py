"""Which taps the baselines choose, and what they say where there is none."""

from __future__ import annotations

import pytest

from tutelage.engine.spec import ModelSpec
from tutelage.engine.tracing import TapInfo
from tutelage.methods.baselines.choices import (
    last_stage,
    one_tap,
    pooled_feature,
    stage_pairs,
    stage_taps,
    warmup,
)


def spec(stages: int, head: str | None = "head") -> ModelSpec:
    paths = tuple(f"layer{number}" for number in range(1, stages + 1))
    infos = tuple(
        TapInfo(path, "Stage", (2, 4, 4), (number + 1) / stages) for number, path in enumerate(paths)
    )
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys((*paths, "stem"), (2, 4, 4))
    return ModelSpec("net", None, 5, head, shapes=shapes, infos=infos, stage_paths=paths)


def test_a_path_wins_over_the_default() -> None:
    assert one_tap(spec(3), "student", "stem", last_stage) == "stem"
    assert one_tap(spec(3), "student", None, last_stage) == "layer3"
    assert one_tap(spec(3), "teacher", None, pooled_feature) == "head:in"


def test_one_tap_is_one() -> None:
    with pytest.raises(
        ValueError, match=r"method.teacher_tap='layer\*' must name one module of net; .*, layer2"
    ):
        one_tap(spec(2), "teacher", "layer*", last_stage)


def test_without_a_classifier_the_option_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"net: no single layer gives its logits; .* with method\.student_tap"
    ):
        pooled_feature(spec(2, head=None), "student")


def test_without_stages_the_option_is_named() -> None:
    with pytest.raises(ValueError, match=r"no stages found in the teacher net; set method\.teacher_taps"):
        stage_taps(spec(0), "teacher", None)
    with pytest.raises(ValueError, match=r"no stages found in the student net; set method\.student_tap "):
        last_stage(spec(0), "student")


def test_stages_are_paired_in_order() -> None:
    both = ("layer1", "layer2")
    assert stage_pairs(spec(2), spec(2), None, None) == (both, both)
    assert stage_pairs(spec(3), spec(2), ("layer1", "stem"), None) == (("layer1", "stem"), both)


def test_unequally_many_stages_are_paired_by_depth() -> None:
    assert stage_pairs(spec(2), spec(4), None, None) == (("layer1", "layer2"), ("layer2", "layer4"))
    assert stage_pairs(spec(4), spec(2), None, None) == (("layer2", "layer4"), ("layer1", "layer2"))


def test_named_taps_must_be_equally_many() -> None:
    with pytest.raises(
        ValueError, match=r"the student has 1 \(layer1\), the teacher 2 \(layer1, layer2\); set"
    ):
        stage_pairs(spec(3), spec(2), ("layer1",), None)


@pytest.mark.parametrize(
    ("epoch", "epochs", "share"), [(0, 0, 1.0), (0, 1, 1.0), (0, 20, 0.05), (25, 20, 1.0)]
)
def test_warmup(epoch: int, epochs: int, share: float) -> None:
    assert warmup(epoch, epochs) == share
