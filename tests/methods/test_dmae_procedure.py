"""dmae and mae from end to end: stages, what ships, figures, teachers, and what is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.data import Data, TensorSource, describe_rows, open_data
from tutelage.data.splits import positions_in_order
from tutelage.engine.needs import PairingError
from tutelage.methods.dmae.config import FinetuneConfig, MAEConfig
from tutelage.models import build_model
from tutelage.recipe import RecipeError, load_recipe
from tutelage.runs import RunResult, check, distill

COST = "cost of a step by mask ratio"


def vit(width: int = 16, depth: int = 2, **options: Any) -> dict[str, Any]:
    sizes = {"patch_size": 2, "embed_dim": width, "depth": depth, "num_heads": 2, "global_pool": "avg"}
    return {"model": "timm:vit_tiny_patch16_224", "options": sizes | options}


def recipe(name: str = "dmae", **changes: Any) -> dict[str, Any]:
    options = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "finetune": {"steps": 6}}
    found: dict[str, Any] = {
        "data": {"path": "digits", "limit": 96, "validation": None, "test": 200},
        "student": vit(),
        "method": {"name": name, **options, **changes.pop("method", {})},
        "train": {
            "steps": 6,
            "batch_size": 32,
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "device": "cpu",
            "threads": 1,
        },
        "output": {"report": False},
    }
    if name == "dmae":
        found["teacher"] = vit(24)
    return found | changes


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    made = recipe(method={"probe": True, "labels": 64}, output={"report": True})
    return distill(made, folder=tmp_path_factory.mktemp("dmae") / "run", progress=False)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A masked autoencoder that no label has trained."""
    made = recipe("mae", student=vit(24), method={"finetune": None})
    return distill(made, folder=tmp_path_factory.mktemp("mae") / "run", progress=False)


def test_metrics_and_tables(done: RunResult) -> None:
    assert {"accuracy", "probe_accuracy"} <= done.result["test"].keys()
    cost = done.result["tables"][COST]
    rows = [dict(zip(cost["columns"], row, strict=True)) for row in cost["rows"]]
    assert [row["mask_ratio"] for row in rows] == [0.0, 0.5, 0.75, 0.9]  # 0.95 leaves none of 16 patches
    assert [row["visible_patches"] for row in rows] == [16, 8, 4, 1]
    assert (done.folder / "stages" / "pretrain" / "metrics.jsonl").exists()
    assert (done.folder / "stages" / "finetune" / "metrics.jsonl").exists()


def test_the_report_shows_pictures_and_the_cost(done: RunResult) -> None:
    rows = done.result["tables"]["reconstructions"]["rows"]
    assert len(rows) == 6
    assert all(cell.startswith("data:image/png;base64,") for row in rows for cell in row[1:])
    assert len({cell for row in rows for cell in row[1:]}) == 18
    page = (done.folder / "report.html").read_text(encoding="utf-8")
    assert rows[0][3] in page
    assert "times fewer flops" in page.lower()


def test_pre_training_alone_leaves_a_head_that_is_as_it_was_built(teacher: RunResult) -> None:
    assert teacher.result["test"] in ({}, None)
    fresh = build_model(
        load_recipe(teacher.folder / "recipe.yaml").student, outputs=10, input_shape=(1, 8, 8)
    ).module
    for name, value in teacher.student.state_dict().items():
        if name.startswith("fc_norm"):
            assert torch.equal(value, fresh.state_dict()[name])
    assert torch.equal(
        teacher.student.get_parameter("pos_embed")[:, 0], torch.zeros(1, 24)
    )  # fixed all along
    assert not (teacher.folder / "stages" / "finetune").exists()


def test_a_masked_autoencoder_is_a_teacher(teacher: RunResult, tmp_path: Path) -> None:
    found = distill(
        recipe(teacher={"run": str(teacher.folder)}), folder=tmp_path / "run", progress=False
    ).result
    assert found["status"] == "done"
    assert found["teachers"]["teacher"]["parameters"] == sum(p.numel() for p in teacher.student.parameters())


def test_a_teacher_without_classes_serves(tmp_path: Path) -> None:
    """As the hub's masked autoencoders are: no head, so their outputs fit no data."""
    found = recipe(teacher=vit(24, num_classes=0))
    assert check(found)["method"] == "dmae"
    with pytest.raises(PairingError, match="gives 24 outputs, the data has 10"):
        check(found | {"method": {"name": "fitnet"}})


def test_labels_are_the_rows_that_a_limit_keeps() -> None:
    base = {"path": "digits", "validation": 50, "test": 200, "seed": 3}
    whole, limited = (
        open_data(load_recipe(recipe(data=base | more)).data, "classification").train
        for more in ({}, {"limit": 70})
    )
    ids = whole.fetch(range(len(whole))).index
    assert ids is not None
    chosen = positions_in_order(ids.numpy(), 3, "train")[:70]
    assert set(ids[chosen].tolist()) == set(limited.fetch(range(70)).index.tolist())  # type: ignore[union-attr]


def test_pre_training_reads_no_labels(tmp_path: Path) -> None:
    images = torch.rand(64, 1, 8, 8)
    source = TensorSource(images)
    data = Data(source, None, None, describe_rows(source, 10), {"path": "mine"})
    found = distill(
        recipe("mae", method={"finetune": None}), folder=tmp_path / "run", progress=False, data=data
    )
    assert found.result["status"] == "done"
    with pytest.raises(PairingError, match="needs `target`"):
        distill(recipe("mae"), folder=tmp_path / "other", progress=False, data=data)


def test_views_of_fine_tuning_change_that_stage_alone(tmp_path: Path) -> None:
    found = []
    for views in (None, [{"name": "noise", "strength": 1.0}]):
        made = recipe("mae", method={"finetune": {"steps": 2, "views": views}})
        place = distill(made, folder=tmp_path / str(bool(views)), progress=False).folder / "stages"
        found.append(
            {name: (place / name / "metrics.jsonl").read_text() for name in ("pretrain", "finetune")}
        )
    losses = [
        {name: [json.loads(line)["loss"] for line in text.splitlines()] for name, text in each.items()}
        for each in found
    ]
    assert losses[0]["pretrain"] == losses[1]["pretrain"]
    assert losses[0]["finetune"] != losses[1]["finetune"]


def test_a_transformer_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import ViTConfig, ViTForImageClassification

    settings = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8,
        patch_size=2, num_channels=1,
    )  # fmt: skip
    ViTForImageClassification(settings).save_pretrained(tmp_path / "vit")
    model = {"model": f"hf:{tmp_path / 'vit'}"}
    assert check(recipe(student=model))["dry_terms"] == {}
    assert check(recipe(teacher=model))["method"] == "dmae"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student": {"model": "digits:cnn-4-6"}}, ValueError, "the student .* has no patch_embed"),
        ({"teacher": {"model": "digits:cnn-4-6"}}, ValueError, "the teacher .* has no patch_embed"),
        ({"teacher": vit(24, patch_size=4)}, ValueError, "the student has patches of side 2 .* of side 4"),
        ({"method": {"mask_ratio": 0.95}}, ValueError, "0 of 16 patches visible"),
        ({"method": {"labels": 97}}, ValueError, "method.labels is 97, but there are 96 training rows"),
        ({"method": {"labels": 20}}, ValueError, "batch_size is 32, but an epoch has 20 rows"),
        ({"method": {"projection": None}}, ValueError, "widths are 16 .* and 24"),
        ({"method": {"student_blocks": [2], "teacher_blocks": [0]}}, ValueError, "blocks 0 to 1; got 2"),
        ({"student": vit(18)}, ValueError, "multiple of 4; got 18"),
        ({"teacher": {"a": vit(24), "b": vit(24)}}, ValueError, "takes one teacher"),
        (
            {"method": {"probe": True}, "data": {"path": "digits", "validation": None}},
            ValueError,
            "needs classes and data.test",
        ),
        ({"method": {"mask_ratio": 1.0}}, RecipeError, "mask_ratio"),
        ({"method": {"decoder_heads": 3}}, RecipeError, "decoder_width 16 does not divide"),
        ({"method": {"student_blocks": [0]}}, RecipeError, "student_blocks and teacher_blocks together"),
        ({"method": {"finetune": {"steps": 1, "epochs": 1}}}, RecipeError, "epochs or steps, not both"),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_written(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        distill(recipe(**changes), folder=tmp_path / "run", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_cards_defaults() -> None:
    config = MAEConfig(name="mae")
    assert (config.mask_ratio, config.norm_pix) == (0.75, False)
    assert (config.decoder_width, config.decoder_depth, config.decoder_heads) == (512, 8, 16)
    assert FinetuneConfig().length == {"epochs": 100, "steps": None}
    assert FinetuneConfig(steps=5).length == {"epochs": None, "steps": 5}
    assert FinetuneConfig().optimizer.layer_decay == 0.75


def test_95_percent_of_cifar10(data_root: Path, tmp_path: Path) -> None:
    """The real images in patches of 4: three of 64 are visible."""
    made = recipe(
        data={
            "path": str(data_root / "cifar10"), "image": "img", "target": "label", "limit": 64, "validation": None,
            "evaluation_limit": 32,
        },
        student=vit(16, patch_size=4),
        teacher=vit(64, 6, patch_size=4),
        method={"mask_ratio": 0.95},
    )  # fmt: skip
    found = distill(made, folder=tmp_path / "run", progress=False).result
    table = found["tables"][COST]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    assert rows[-1]["visible_patches"] == 3
    assert rows[-1]["times_fewer_flops"] > 3
    assert 0 <= found["test"]["accuracy"] <= 1
