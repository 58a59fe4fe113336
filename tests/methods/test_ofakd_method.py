"""ofakd as a method: which exits, its terms, and training across families from timm names alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from tutelage.data import Data, TensorSource
from tutelage.data.opening import describe_rows
from tutelage.engine.spec import ModelSpec
from tutelage.engine.taps import Tapped, outputs_of
from tutelage.engine.types import Batch, Outputs, Term
from tutelage.functional import ofakd_loss
from tutelage.methods.baselines.method import FitNet
from tutelage.methods.ofakd.branches import ConvBranch, TokenBranch
from tutelage.methods.ofakd.method import OFAKD
from tutelage.methods.ofakd.stages import find_stages, pooled_width
from tutelage.models import build_model
from tutelage.runs import check, distill

ROWS, CLASSES = 6, 3


class Context:
    """What the objective uses of a step."""

    def label_loss(self, outputs: Outputs, batch: Batch) -> Term:
        rows = slice(None) if batch.mask is None else batch.mask.bool()
        return Term(F.cross_entropy(outputs.logits[rows], batch.target[rows]))  # type: ignore[index]


CONTEXT: Any = Context()


def spec(model: nn.Module, size: int = 32, channels: int = 3) -> ModelSpec:
    return ModelSpec.of("student", model, torch.rand(2, channels, size, size))


def vit(depth: int = 2, **options: Any) -> Any:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, depth=depth, **small | options)


def cnn(name: str = "digits:cnn-4-6-8", size: int = 32) -> nn.Module:
    return build_model(name, outputs=CLASSES, input_shape=(3, size, size)).module


def built(student: nn.Module, teacher: nn.Module, size: int = 32, **options: Any) -> Any:
    method = OFAKD(OFAKD.Config(name="ofakd", **options))
    method.build(spec(teacher, size), spec(student, size), Batch(torch.zeros(2, 1)))
    return method


@pytest.mark.parametrize(
    ("blocks", "wanted"),
    [
        (12, [2, 4, 10, 12]),
        (24, [4, 8, 20, 24]),
        (8, [1, 3, 7, 8]),
        (5, [1, 2, 4, 5]),
        (4, [1, 2, 3, 4]),
        (2, [1, 2]),
    ],
)
def test_blocks_of_one_grid_are_cut_by_their_share_of_the_depth(blocks: int, wanted: list[int]) -> None:
    assert find_stages(spec(vit(blocks))) == tuple(f"blocks.{number - 1}" for number in wanted)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
        ("test_resnet", ["layer1", "layer2", "layer3", "layer4"]),  # its stem is a stage of its own
        ("efficientnet_b0", ["blocks.1", "blocks.2", "blocks.4", "blocks.6"]),
        ("convnext_atto", ["stages.0", "stages.1", "stages.2", "stages.3"]),
    ],
)
def test_the_last_four_resolutions(name: str, wanted: list[str]) -> None:
    assert list(find_stages(spec(timm.create_model(name, num_classes=CLASSES), 64))) == wanted


def test_a_convolutional_student_gets_an_exit_at_every_stage() -> None:
    method = built(cnn(), vit())
    assert method.exit_taps == ["layer1", "layer2", "layer3"]
    assert [type(branch) for branch in method.branches] == [ConvBranch] * 3
    # Width: the larger of both models' pooled features, here the teacher's.
    assert [branch.head.in_features for branch in method.branches] == [16] * 3
    assert [len(branch.body) for branch in method.branches[:2]] == [2, 1]
    assert isinstance(method.branches[2].body, nn.Conv2d)
    assert [b.head.in_features for b in built(cnn("digits:cnn-4-6-32"), vit()).branches] == [32] * 3


@pytest.mark.parametrize(("prefix", "options"), [(1, {}), (0, {"class_token": False, "global_pool": "avg"})])
def test_a_token_student_gets_an_exit_at_every_cut(prefix: int, options: dict[str, Any]) -> None:
    method = built(vit(12, **options), cnn("digits:cnn-4-64"))
    assert method.exit_taps == ["blocks.1", "blocks.3", "blocks.9", "blocks.11"]
    assert [len(branch.blocks) for branch in method.branches] == [3, 2, 1, 1]
    assert [branch.class_tokens for branch in method.branches] == [prefix] * 4
    assert [branch.head.in_features for branch in method.branches] == [16] * 4  # the student's width alone


def test_a_hierarchical_student_with_channels_last_is_read_as_tokens() -> None:
    small = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}
    student = timm.create_model("swin_tiny_patch4_window7_224", num_classes=CLASSES, **small)
    method = built(student, cnn())
    assert [type(branch) for branch in method.branches] == [TokenBranch] * 2
    assert [layout.grid for layout in method.layouts] == [(8, 8), (4, 4)]
    assert method.branches[0].widen.out_features == 32
    terms = step(method, student, torch.rand(ROWS, 3, 32, 32))
    assert all(term.mean.isfinite() for term in terms.values())


def test_stages_by_number_and_taps_by_path() -> None:
    student = timm.create_model("test_resnet", num_classes=CLASSES)

    def exits(**options: Any) -> list[tuple[str, int]]:
        method = OFAKD(OFAKD.Config(name="ofakd", **options))
        return [(place.tap, place.later) for place in method._exits(spec(student, 64))]

    assert exits() == [("layer1", 3), ("layer2", 2), ("layer3", 1), ("layer4", 0)]
    assert exits(stages=(4, 2, 2)) == [("layer2", 2), ("layer4", 0)]
    # A tap inside a stage counts to it, one before the first stage to that, one after the last to the last.
    assert exits(taps=("conv1", "layer2.0", "layer3")) == [("conv1", 3), ("layer2.0", 2), ("layer3", 1)]
    assert exits(taps=("layer4.0:in",)) == [("layer4.0:in", 0)]


def step(
    method: OFAKD, student: nn.Module, inputs: Tensor, mask: Tensor | None = None, soft: bool = False
) -> dict[str, Term]:
    target = torch.arange(ROWS) % CLASSES
    given: Tensor = 0.9 * F.one_hot(target, CLASSES) + 0.1 / CLASSES if soft else target
    taps = tuple(method.exit_taps)
    outputs = outputs_of(Tapped(student)(inputs, taps))
    teacher = Outputs(torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(1)))
    return method.objective(outputs, teacher, Batch(inputs, given, mask=mask), CONTEXT)


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "distributions"])
@pytest.mark.parametrize("mask", [None, torch.tensor([1, 1, 0, 0, 1, 0])], ids=["all", "masked"])
def test_terms_carry_their_weights(mask: Tensor | None, soft: bool, form: Any) -> None:
    torch.manual_seed(0)
    student, weights = cnn(), {"logit_weight": 2.0, "branch_weight": 0.25}
    label_weight = 0.0 if form == "paper" else 0.5
    gammas = (1.0, 1.5, 2.0, 3.0)
    options: dict[str, Any] = weights | {
        "label_weight": label_weight,
        "gamma": gammas,
        "temperature": 2.0,
        "form": form,
    }
    method = built(student, vit(), **options)
    inputs = torch.rand(ROWS, 3, 32, 32)
    student.eval()
    method.eval()
    terms = step(method, student, inputs, mask, soft)
    rows = slice(None) if mask is None else mask.bool()
    outputs = outputs_of(Tapped(student)(inputs, tuple(method.exit_taps)))
    exits = [
        branch(outputs.features[tap])[rows]
        for tap, branch in zip(method.exit_taps, method.branches, strict=True)
    ]
    teacher = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(1))[rows]
    ids = torch.arange(ROWS) % CLASSES
    target = (0.9 * F.one_hot(ids, CLASSES) + 0.1 / CLASSES if soft else ids)[rows]
    wanted = ofakd_loss(
        outputs.logits[rows], exits, teacher, target, gammas, 2.0, label_weight, 2.0, 0.25, form
    )  # fmt: skip
    torch.testing.assert_close(
        {name: term.mean for name, term in terms.items()},
        {"label": wanted.label, "logits": wanted.logits, "branches": wanted.branches},
    )


def test_exits_train_the_trunk_below_them_and_themselves() -> None:
    torch.manual_seed(0)
    student = cnn()
    method = built(student, vit(), stages=(2,))
    step(method, student, torch.rand(ROWS, 3, 32, 32))["branches"].mean.backward()  # type: ignore[no-untyped-call]
    reached = {name.split(".")[0] for name, p in student.named_parameters() if p.grad is not None}
    assert reached == {"layer1", "layer2"}
    assert all(parameter.grad is not None for parameter in method.parameters())


def test_no_rows_that_count_leave_zero_terms_with_a_gradient() -> None:
    student = cnn()
    method = built(student, vit())
    terms = step(method, student, torch.rand(ROWS, 3, 32, 32), torch.zeros(ROWS))
    torch.stack([terms["logits"].mean, terms["branches"].mean]).sum().backward()  # type: ignore[no-untyped-call]
    assert terms["logits"].mean == terms["branches"].mean == 0
    assert all(parameter.grad is not None for parameter in method.parameters())


def test_a_teacher_of_stored_logits_lets_the_student_set_the_width() -> None:
    method: Any = OFAKD(OFAKD.Config(name="ofakd"))
    method.build(ModelSpec("store", None, CLASSES, None), spec(cnn()), Batch(torch.zeros(2, 1)))
    assert {branch.head.in_features for branch in method.branches} == {8}
    assert pooled_width(ModelSpec("store", None, CLASSES, None)) is None


def test_a_student_without_one_classifier_has_the_width_of_its_last_stage() -> None:
    distilled = timm.create_model(
        "deit_tiny_distilled_patch16_224", num_classes=CLASSES, img_size=32, embed_dim=16, depth=2, num_heads=2
    )  # fmt: skip
    found = spec(distilled)
    assert found.head is None
    assert pooled_width(found) is None
    branches = built(distilled, cnn(), stages=(1,)).branches
    assert [(branch.class_tokens, branch.head.in_features) for branch in branches] == [(2, 2 * 16)]


def test_what_the_exits_cost_is_told_apart() -> None:
    method = built(cnn(size=32), vit())
    (table,) = method.tables().values()
    assert table.columns == ["tap", "layout", "parameters", "flops"]
    assert [row[:2] for row in table.rows] == [[f"layer{i}", "channels_first"] for i in (1, 2, 3)]
    counted = [sum(p.numel() for p in branch.parameters()) for branch in method.branches]
    assert [row[2] for row in table.rows] == counted
    last = 2 * (8 * 16 * 8 * 8 + 16 * CLASSES)  # a 1x1 convolution on 8x8, and the head
    assert table.rows[2][3] == last


def test_options_that_do_not_fit() -> None:
    with pytest.raises(ValidationError, match=r"form=paper holds the label's loss: set label_weight to 0"):
        OFAKD.Config(name="ofakd", form="paper")
    with pytest.raises(ValidationError, match=r"give `stages` or `taps`, not both"):
        OFAKD.Config(name="ofakd", stages=(1,), taps=("layer1",))
    for bad in ({"gamma": 0.0}, {"gamma": (1.0, -1.0)}, {"stages": ()}, {"stages": (5,)}, {"heads": 0}):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            OFAKD.Config(name="ofakd", **bad)
    with pytest.raises(ValueError, match=r"gamma must be one number, or 4: .* got 2"):
        built(cnn(), vit(), gamma=(1.0, 2.0))
    with pytest.raises(
        ValueError, match=r"method.stages=\[4\]: the student has 3 stage\(s\): layer1, layer2, layer3"
    ):
        built(cnn(), vit(), stages=(4,))
    with pytest.raises(ValueError, match=r"'layer1' gives a vector of 8 values"):
        built(cnn("digits:mlp-8"), vit())
    with pytest.raises(ValueError, match=r"the student shows no stages; set method.taps"):
        built(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, CLASSES)), vit())
    with pytest.raises(ValueError, match=r"the number of classes of net is not known"):
        OFAKD(OFAKD.Config(name="ofakd")).build(
            spec(vit()), ModelSpec("net", None, None, None), Batch(torch.zeros(2, 1))
        )


def images(size: int, rows: int = 16) -> Data:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (rows, 3, size, size), generator=generator, dtype=torch.uint8)
    source = TensorSource(pixels, torch.arange(rows) % CLASSES)
    return Data(source, None, source, describe_rows(source, CLASSES), {"path": "images"})


def recipe(
    teacher: dict[str, Any], student: dict[str, Any], method: Any = "ofakd", **train: Any
) -> dict[str, Any]:
    return {
        "data": {"path": "images"},
        "teacher": teacher,
        "student": student,
        "method": method,
        "train": {"steps": 1, "batch_size": 8, "device": "cpu", "threads": 1} | train,
        "output": {"report": False},
    }


VIT = {"model": "timm:test_vit"}
MIXER = {"model": "timm:mixer_s32_224"}
CNN = {"model": "timm:test_resnet"}


@pytest.mark.parametrize("method", ["ofakd", {"name": "fitnet", "hint_layer": 3}], ids=["ofakd", "fitnet"])
@pytest.mark.parametrize(
    ("teacher", "student"), [(VIT, CNN), (MIXER, CNN), (CNN, VIT)], ids=["vit-cnn", "mixer-cnn", "cnn-vit"]
)
def test_families_train_from_timm_names_alone(
    teacher: dict[str, Any], student: dict[str, Any], method: Any, tmp_path: Path
) -> None:
    result = distill(
        recipe(teacher, student, method), data=images(64), folder=tmp_path / "run", progress=False
    ).result
    assert result["status"] == "done"
    if method == "ofakd":
        assert len(result["tables"]["exits"]["rows"]) == 4
        shipped = build_model(student["model"], outputs=CLASSES, input_shape=(3, 64, 64)).module
        assert result["student"]["parameters"] == sum(p.numel() for p in shipped.parameters())


def test_one_row_on_a_one_pixel_map_is_refused_before_the_first_step() -> None:
    values = recipe({"model": "digits:mlp-8"}, {"model": "timm:test_convnext"}, batch_size=1)
    with pytest.raises(ValueError, match=r"cannot train on 1 row\(s\).*use at least 2 rows a micro-batch"):
        check(values, data=images(32))


def test_fitnet_reads_tokens_as_the_map_of_their_patches() -> None:
    student, teacher = cnn("digits:cnn-4-6-8"), vit(2)
    method = FitNet(FitNet.Config(name="fitnet", hint_layer=2))
    specs = spec(teacher), spec(student)
    taps = method.taps(*specs)
    method.build(*specs, Batch(torch.zeros(2, 1)))
    inputs = torch.rand(ROWS, 3, 32, 32)
    ours, theirs = (
        outputs_of(Tapped(model)(inputs, wanted))
        for model, wanted in ((student, taps.student), (teacher, taps.teacher))
    )
    tokens = theirs.features["blocks.1"]
    projected = method.regressor(ours.features["layer2"])
    assert projected.shape == (ROWS, 16, 4, 4)
    wanted = F.mse_loss(projected, tokens[:, 1:].mT.reshape(ROWS, 16, 4, 4).detach())
    got = method.objective(ours, theirs, Batch(inputs, torch.arange(ROWS) % CLASSES), CONTEXT)["hint"]
    torch.testing.assert_close(got.mean, 100 * wanted)
