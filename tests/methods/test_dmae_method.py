"""Pre-training as a method: the authors' whole step, masks, early stop, what is trained, one process and two."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support import Losses, Rows, train_config
from tutelage.engine.loop import Trainer
from tutelage.engine.runtime import Runtime
from tutelage.engine.spec import ModelSpec
from tutelage.engine.taps import Tapped, outputs_of
from tutelage.engine.types import Batch
from tutelage.functional import dmae_loss, mask_indices
from tutelage.methods.dmae.config import DMAEConfig, MAEConfig
from tutelage.methods.dmae.cost import COLUMNS, StepCost
from tutelage.methods.dmae.decoder import Decoder, sincos_positions
from tutelage.methods.dmae.method import ORDER, Pretraining, masked
from tutelage.methods.dmae.noise import patch_noise
from tutelage.methods.dmae.vit import IMAGES, VISIBLE, MaskedViT
from tutelage.models import build_model
from tutelage.recipe.schema import ModelConfig
from tutelage.tasks import build_task
from tutelage.teachers.local import LocalTeacher

GOLDEN = Path(__file__).parent.parent / "golden" / "dmae"
DECODER: dict[str, Any] = {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}


def vit(width: int = 16, depth: int = 4, size: int = 16, seed: int = 0, **options: Any) -> nn.Module:
    sizes = {
        "patch_size": 4,
        "embed_dim": width,
        "depth": depth,
        "num_heads": 2,
        "img_size": size,
        "mlp_ratio": 2,
    }
    config = ModelConfig(model="timm:vit_tiny_patch16_224", options=sizes | options)
    return build_model(config, outputs=4, input_shape=(3, size, size), seed=seed).module


def pictures(count: int = 24, size: int = 16) -> Rows:
    generator = torch.Generator().manual_seed(0)
    return Rows(
        torch.rand(count, 3, size, size, generator=generator), torch.randint(4, (count,), generator=generator)
    )


def teacher(size: int = 16, width: int = 12, depth: int = 4) -> LocalTeacher:
    images = pictures(2, size).inputs
    return LocalTeacher(
        "teacher", MaskedViT("the teacher", vit(width, depth, size, seed=1), images), images
    ).freeze()


def student(size: int = 16, width: int = 8) -> MaskedViT:
    model = MaskedViT("the student", vit(width, size=size), pictures(2, size).inputs)
    trained = {id(parameter) for parameter in model.encoder_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return model


def options(**changes: Any) -> DMAEConfig:
    return DMAEConfig(name="dmae", **DECODER | changes)


def trainer(
    sharding: str = "ddp", size: int = 16, aligned: bool = True, *, train: Any = None, **changes: Any
) -> Trainer:
    config = options(**changes) if aligned else MAEConfig(name="mae", **DECODER | changes)
    return Trainer(
        Runtime("cpu", sharding=sharding),  # type: ignore[arg-type]
        student(size),
        Pretraining(config, seed=3, aligned=aligned),
        build_task("classification", 4),
        pictures(size=size),
        train_config(**train or {}),
        teachers={"teacher": teacher(size)} if aligned else {},
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
    )


# --- the authors' whole step


def load(module: nn.Module, data: dict[str, Tensor], prefix: str, names: dict[str, str]) -> None:
    """Weights under the official names into ours; every parameter and buffer of ours must be there."""
    state = {}
    for ours in module.state_dict():
        theirs = next(
            (new + ours.removeprefix(old) for old, new in names.items() if ours.startswith(old)), ours
        )
        state[ours] = data[prefix + theirs]
    module.load_state_dict(state)


def test_the_whole_step_is_the_authors() -> None:
    with np.load(GOLDEN / "full_step.npz") as found:
        data = {name: torch.from_numpy(np.asarray(found[name])) for name in found}
    images = data["in_images"]
    models: dict[str, nn.Module] = {}
    for who, width in (("student", 8), ("teacher", 12)):
        models[who] = vit(width, num_classes=0)
        load(models[who], data, f"in_{who}.", {})
    held = {who: MaskedViT(who, model, images) for who, model in models.items()}
    theirs = LocalTeacher("teacher", held["teacher"], images).freeze()
    method = Pretraining(options(), seed=0, aligned=True)
    spec = ModelSpec.of("student", held["student"], images)
    taps = method.taps(theirs.spec, spec)
    assert taps.teacher == ("vit.blocks.2",)  # three quarters of the depth
    method.build(theirs.spec, spec, Batch(images))
    method.decoder = decoder = Decoder(8, (4, 4), 48, width=8, depth=1, heads=2, mlp_ratio=2)
    load(
        decoder,
        data,
        "in_student.",
        {"encoder_norm": "norm", "embed": "decoder_embed", "blocks": "decoder_blocks", "norm": "decoder_norm",
         "predict": "decoder_pred"},
    )  # fmt: skip
    load(method.heads, data, "in_student.aligned_feature_projection_heads.", {})
    torch.testing.assert_close(decoder.positions, data["in_student.decoder_pos_embed"])
    torch.testing.assert_close(sincos_positions((4, 4), 12), data["in_teacher.pos_embed"])

    batch = Batch({IMAGES: images, VISIBLE: data["in_ids_keep"]}, columns={ORDER: data["in_ids_restore"]})
    knowledge = theirs.outputs(batch, taps.teacher, logits=False)
    close: Any = {"rtol": 2e-4, "atol": 2e-6}
    torch.testing.assert_close(knowledge.feature(), data["out_teacher_block2"], **close)
    ours = outputs_of(Tapped(held["student"])(batch.inputs, taps.student))
    torch.testing.assert_close(decoder(ours.hidden, data["in_ids_restore"]), data["out_pred"], **close)
    loss = method.losses(ours, knowledge, batch)
    for value, name in zip(loss, ("total", "recon", "align"), strict=True):
        torch.testing.assert_close(value, data[f"out_{name}"], **close)
    loss.total.backward()  # type: ignore[no-untyped-call]
    gradients = dict(models["student"].named_parameters()) | {
        "aligned_feature_projection_heads.0.weight": method.heads[0].weight,
        "decoder_pred.weight": decoder.predict.weight,
        "mask_token": decoder.mask_token,
    }
    checked = [name for name in data if name.startswith("grad_student.")]
    assert len(checked) == 7
    for name in checked:
        torch.testing.assert_close(gradients[name.removeprefix("grad_student.")].grad, data[name], **close)


# --- masks


def drawn(index: list[int], view: int = 0, seed: int = 3) -> Tensor:
    rows = torch.tensor(index)
    return patch_noise(rows, torch.full_like(rows, view), seed, 16)


def test_masks_are_a_function_of_seed_view_and_row() -> None:
    whole = drawn([5, 900, 7, 12])
    assert torch.equal(drawn([12, 5]), whole[[3, 0]])
    assert len({tuple(row) for row in whole.tolist()}) == 4
    others = torch.stack([whole, drawn([5, 900, 7, 12], view=1), drawn([5, 900, 7, 12], seed=4)])
    assert len(set(others.flatten().tolist())) == others.numel()


def test_masks_are_uniform() -> None:
    noise = drawn(list(range(20_000)))
    assert ((noise >= 0) & (noise < 1)).all()
    visible = ~mask_indices(noise, 0.75).mask
    share = visible.double().mean(0)
    assert float((share - 0.25).abs().max()) < 5 * (0.25 * 0.75 / 20_000) ** 0.5
    pairs = torch.corrcoef(noise.double().T) - torch.eye(16)
    assert float(pairs.abs().max()) < 5 / 20_000**0.5
    bins = torch.histc(noise.flatten(), 20, 0, 1)
    assert float(((bins - 16_000) ** 2 / 16_000).sum()) < 50  # chi-squared, 19 degrees of freedom


def test_the_batch_that_both_models_get() -> None:
    source = pictures()
    run: Any = trainer()
    batch = Batch(source.inputs[:4], index=torch.arange(4), view=torch.zeros(4, dtype=torch.int64))
    got = run.method.transform(batch, None)
    assert isinstance(got.inputs, dict)
    assert got.inputs[IMAGES] is batch.inputs
    assert got.inputs[VISIBLE].shape == (4, 4)
    assert torch.equal(
        (got.columns[ORDER] < 4).nonzero()[:, 1].reshape(4, 4), got.inputs[VISIBLE].sort(1).values
    )


# --- what runs, and what is trained


def test_the_teacher_stops_at_its_tap_and_sees_visible_patches_alone() -> None:
    run: Any = trainer()
    seen: list[tuple[int, int]] = []
    held: Any = run.setup.teachers["teacher"].spec.module
    for i, block in enumerate(held.vit.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: seen.append((i, out.shape[1])))
    run.run(1)
    assert seen == [(0, 5), (1, 5), (2, 5)]


def test_student_decoder_and_head_learn_and_nothing_else() -> None:
    run: Any = trainer(train={"optimizer": {"name": "sgd", "lr": 0.5}})
    before = {name: value.clone() for name, value in run.whole.named_parameters()}
    frozen = {n: v.clone() for n, v in run.setup.teachers["teacher"].module.state_dict().items()}
    run.fit()
    moved = {name for name, value in run.whole.named_parameters() if not torch.equal(value, before[name])}
    still = {name.removeprefix("student.model.vit.") for name in before.keys() - moved}
    assert still == {"pos_embed", "norm.weight", "norm.bias", "head.weight", "head.bias"}
    for name, value in run.setup.teachers["teacher"].module.state_dict().items():
        assert torch.equal(value, frozen[name])
    assert run.finished().state_dict().keys() == student().state_dict().keys()


def test_alignment_alone_runs_no_decoder_and_stops_at_the_tap() -> None:
    run: Any = trainer(reconstruct=False)
    losses = Losses()
    run.events.add(losses)
    run.fit()
    assert losses.steps[0].keys() == {"alignment"}
    assert not [name for name, _ in run.method.named_parameters() if name.startswith("decoder")]


def test_without_a_teacher_it_is_a_masked_autoencoder() -> None:
    run: Any = trainer(aligned=False)
    losses = Losses()
    run.events.add(losses)
    run.fit()
    assert losses.steps[0].keys() == {"reconstruction"}


@pytest.mark.parametrize(
    "changes",
    [
        {"projection": "mlp"},
        {"kind": "l2"},
        {"student_blocks": (1, 3), "teacher_blocks": (0, 2)},
        {"norm_pix": True},
    ],
)
def test_every_option_runs(changes: dict[str, Any]) -> None:
    run: Any = trainer(**changes)
    run.fit()
    assert len(run.method.heads) == len(changes.get("student_blocks", (0,)))


def test_beta_weighs_the_alignment() -> None:
    found = [trainer(beta=beta).dry_step() for beta in (1.0, 4.0)]
    assert found[1]["alignment"] == pytest.approx(4 * found[0]["alignment"], rel=1e-6)
    assert found[1]["reconstruction"] == found[0]["reconstruction"]
    images = torch.rand(1)
    assert dmae_loss(images[0], [images[0]]).total == 2 * images[0]


def test_rows_that_do_not_count_change_nothing() -> None:
    run: Any = trainer()
    run.method.eval()
    held = run.student.eval()
    source = pictures()

    def loss(count: int, mask: Tensor | None) -> Any:
        batch = Batch(source.inputs[:count], index=torch.arange(count), mask=mask)
        batch = run.method.transform(batch, None)
        taps = run.setup.taps
        theirs = run.setup.teachers["teacher"].outputs(batch, taps.teachers["teacher"], logits=False)
        return run.method.losses(outputs_of(held(batch.inputs, taps.student)), theirs, batch)

    for with_mask, without in zip(loss(6, torch.tensor([1, 1, 1, 0, 0, 0])), loss(3, None), strict=True):
        torch.testing.assert_close(with_mask, without)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 0.98}, "0 of 16 patches visible"),
        ({"student_blocks": (4,), "teacher_blocks": (0,)}, "the student has blocks 0 to 3; got 4"),
        ({"projection": None}, r"widths are 8 \(the student\) and 12 \(the teacher\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(**changes)


def test_equal_widths_need_no_head() -> None:
    images = pictures(2).inputs
    run: Any = Trainer(
        Runtime("cpu"),
        student(width=12),
        Pretraining(options(projection=None), seed=0, aligned=True),
        build_task("classification", 4),
        pictures(),
        train_config(),
        teachers={"teacher": teacher()},
    )
    run.fit()
    assert not list(run.method.heads.parameters())
    assert run.student.model.patches == 16
    assert images.shape[2] == 16


# --- one process and two


def figures(sharding: str = "ddp") -> list[dict[str, float]]:
    run: Any = trainer(sharding, train={"accumulate": 2})
    losses = Losses()
    run.events.add(losses)
    run.fit()
    return list(losses.steps)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_give_the_losses_of_one(sharding: str, pair: Any) -> None:
    alone = figures()
    for found in pair.run(figures, sharding):
        for ours, theirs in zip(alone, found, strict=True):
            assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-6)


# --- 95 % masking, and what a step costs


def test_three_visible_patches_of_64_train() -> None:
    """CIFAR-10's size with patches of 4: int(64 · (1 − 0.95)) = 3."""
    run: Any = trainer(size=32, mask_ratio=0.95)
    batch = Batch(pictures(8, 32).inputs, index=torch.arange(8))
    assert run.method.transform(batch, None).inputs[VISIBLE].shape == (8, 3)
    losses = Losses()
    run.events.add(losses)
    run.fit()
    assert all(np.isfinite(value) for step in losses.steps for value in step.values())


def cost(ratios: tuple[float, ...], size: int = 32) -> list[dict[str, Any]]:
    images = pictures(4, size).inputs
    ours = MaskedViT("the student", vit(16, 8, size), images)
    wide = MaskedViT("the teacher", vit(64, 8, size, seed=1), images)
    theirs = LocalTeacher("teacher", wide, images).freeze()
    method = Pretraining(options(), seed=0, aligned=True)
    found = StepCost(ours, theirs, method, images, Runtime("cpu"), None, None).table(ratios)
    assert found.columns == COLUMNS
    return [dict(zip(COLUMNS, row, strict=True)) for row in found.rows]


def test_cost_falls_with_the_mask_ratio() -> None:
    rows = cost((0.0, 0.5, 0.75, 0.9, 0.95, 0.99))
    assert [row["visible_patches"] for row in rows] == [64, 32, 16, 6, 3]  # 0.99 leaves none, and has no row
    assert all(a["gflops_a_row"] > b["gflops_a_row"] for a, b in pairwise(rows))
    assert rows[2]["times_fewer_flops"] >= 3
    # the card's check: at most 0.35 of a whole forward at a ratio of 0.75, stopped at three quarters of the depth
    assert rows[2]["teacher_share"] <= 0.35
    assert rows[0]["teacher_share"] == pytest.approx(0.75, abs=0.02)
    assert all(row["ms_a_row"] > 0 for row in rows)


def test_operations_are_those_of_the_equations() -> None:
    """The teacher's forward on visible patches, counted by hand: 6 of 8 blocks, 16 + 1 tokens of width 64."""
    row = cost((0.75,))[0]
    width, tokens, blocks = 64, 17, 6

    def forward(tokens: int, blocks: int) -> float:
        embed = 2 * 64 * (3 * 16) * width
        linear = 2 * tokens * width * (3 * width + width + 2 * (2 * width))
        attention = 2 * 2 * tokens * tokens * width
        return embed + blocks * (linear + attention)

    head = 2 * width * 4
    assert row["teacher_share"] == pytest.approx(forward(tokens, blocks) / (forward(65, 8) + head), rel=1e-6)


def test_masking_is_that_of_the_ratio() -> None:
    batch = masked(Batch(torch.rand(2, 3, 16, 16)), torch.rand(2, 16), 0.5)
    assert isinstance(batch.inputs, dict)
    assert batch.inputs[VISIBLE].shape == (2, 8)
