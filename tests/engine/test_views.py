"""Views: pixels are a pure function of (seed, view, row), and each change does what it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tutelage.engine.types import Batch
from tutelage.engine.views import Views, to_float
from tutelage.recipe.schema import DataConfig, ViewConfig

NAMES = ["crop", "flip", "noise", "resized_crop", "color_jitter", "erase"]


def images(rows: int = 40, channels: int = 3, side: int = 12, *, dtype: torch.dtype = torch.uint8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (rows, channels, side, side + 1), dtype=torch.uint8, generator=generator)
    return pixels if dtype == torch.uint8 else pixels.to(dtype) / 255


def batch(pixels: Tensor) -> Batch:
    return Batch(inputs=pixels, index=torch.arange(len(pixels)) * 31 + 5)


def views(*names: str, seed: int = 0, **options: object) -> Views:
    return Views([ViewConfig(name=name, **options) for name in names], seed)


def numbers(rows: int, view: int = 1) -> Tensor:
    return torch.full((rows,), view)


def changed(pixels: Tensor, *names: str, view: int = 1, **options: object) -> Tensor:
    return views(*names, **options)(batch(pixels), numbers(len(pixels), view)).inputs


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=4),
    rows=st.lists(st.integers(0, 39), min_size=1, max_size=40),
    channels=st.sampled_from([1, 3]),
    shift=st.integers(0, 5),
)
def test_pixels_do_not_depend_on_the_batch(names, rows, channels, shift):
    whole, view = batch(images(channels=channels)), torch.arange(40) % 3 + shift
    change = views(*names)
    everything = change(whole, view).inputs
    part = change(whole.select(torch.tensor(rows)), view[rows]).inputs
    assert torch.equal(part, everything[rows])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_alone_is_the_row_in_a_large_batch(name, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = batch(images(300, side=32))
        everything = views(name)(whole, numbers(300)).inputs
        for row in (0, 150, 299):
            alone = views(name)(whole.select(slice(row, row + 1)), numbers(1)).inputs
            assert torch.equal(alone[0], everything[row])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_view_and_seed_give_another_change_and_the_input_stays(name):
    pixels = images()
    kept = pixels.clone()
    first = changed(pixels, name)
    assert first.shape == pixels.shape
    assert first.dtype == torch.float32
    assert torch.equal(changed(pixels, name), first)
    assert not torch.equal(changed(pixels, name, view=2), first)
    assert not torch.equal(views(name, seed=1)(batch(pixels), numbers(40)).inputs, first)
    assert torch.equal(pixels, kept)


def test_two_views_of_one_kind_draw_apart():
    twice = changed(images(dtype=torch.float32) * 0, "noise", "noise", strength=0.1)
    assert float(twice.std()) == pytest.approx(0.1 * 2**0.5, rel=0.02)


def test_drawn_ahead_gives_the_same_pixels():
    change, rows, view = views(*NAMES), batch(images()), numbers(40)
    draws = change.draw(rows, view)
    assert torch.equal(change(rows, view, draws).inputs, change(rows, view).inputs)


def test_no_views_only_turn_bytes_into_floats():
    out = Views((), 0)(batch(images()), numbers(40))
    assert torch.equal(out.inputs, images().float() / 255)
    assert torch.equal(out.view, numbers(40))
    wide = torch.rand(3, 5, dtype=torch.float64)
    assert to_float(Batch(inputs=wide)).inputs is wide


def test_to_float_reaches_named_and_teacher_inputs():
    pixels = images(2)
    out = to_float(Batch(inputs={"pixels": pixels, "ids": torch.arange(2)}, teacher_inputs=pixels))
    assert torch.equal(out.inputs["pixels"], pixels / 255)
    assert out.inputs["ids"].dtype == torch.int64
    assert torch.equal(out.teacher_inputs, pixels / 255)


def test_crop_shifts_the_reflected_image():
    pixels = images(dtype=torch.float32)
    out = changed(pixels, "crop", padding=3)
    padded = torch.nn.functional.pad(pixels, (3, 3, 3, 3), mode="reflect")
    shifts = set()
    for row in range(40):
        found = [
            (y, x)
            for y in range(7)
            for x in range(7)
            if torch.equal(padded[row, :, y : y + 12, x : x + 13], out[row])
        ]
        assert len(found) == 1
        shifts.add(found[0])
    assert len(shifts) > 20


def test_crop_without_padding_changes_nothing():
    assert torch.equal(changed(images(), "crop", padding=0), images() / 255)


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_flip_mirrors_a_share_of_the_rows(probability, share):
    pixels = images(1000, 1, 4, dtype=torch.float32)
    out = changed(pixels, "flip", probability=probability)
    flipped = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(out, pixels, strict=True)])
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(out, pixels, strict=True)])
    assert bool((flipped ^ kept).all())
    assert float(flipped.float().mean()) == pytest.approx(share, abs=0.05)


def test_noise_has_its_deviation_and_takes_rows_that_are_no_images():
    vectors = torch.zeros(500, 30)
    out = changed(vectors, "noise", strength=0.2)
    assert float(out.std()) == pytest.approx(0.2, rel=0.03)
    assert float(out.mean()) == pytest.approx(0, abs=0.01)


def test_resized_crop_of_the_whole_image_is_the_image():
    square = torch.rand(6, 3, 9, 9)
    whole = changed(square, "resized_crop", scale=(1.0, 1.0))
    # The ratio still varies: only rows whose box is the image itself stay as they are; a constant image always does.
    assert whole.shape == square.shape
    flat = torch.full((6, 3, 9, 9), 0.25)
    assert torch.allclose(changed(flat, "resized_crop", scale=(0.1, 1.0)), flat)


def test_resized_crop_samples_a_rectangle_bilinearly():
    ramp_x = torch.arange(16.0).expand(200, 1, 16, 16) / 16
    out = changed(ramp_x, "resized_crop", scale=(0.25, 0.25))
    slope = (out[:, 0, 8, 9] - out[:, 0, 8, 6]) / 3 * 16  # source pixels a pixel: box width / 16
    height = changed(ramp_x.transpose(2, 3), "resized_crop", scale=(0.25, 0.25))
    slope_down = (height[:, 0, 9, 8] - height[:, 0, 6, 8]) / 3 * 16
    assert torch.allclose(slope * slope_down, torch.full((200,), 0.25), rtol=1e-3)
    ratio = slope / slope_down
    assert 0.75 - 1e-3 <= float(ratio.min()) < 0.8
    assert 1.25 < float(ratio.max()) <= 4 / 3 + 1e-3


def test_color_jitter_scales_brightness_contrast_and_saturation():
    grey = torch.full((300, 3, 4, 4), 0.5)
    out = changed(grey, "color_jitter", strength=0.2)
    assert torch.allclose(
        out, out[:, :1, :1, :1].expand_as(out), atol=1e-6
    )  # a flat grey has neither contrast nor hue
    factors = out[:, 0, 0, 0] / 0.5
    assert 0.8 - 1e-5 <= float(factors.min()) < 0.83
    assert 1.17 < float(factors.max()) <= 1.2 + 1e-5
    colours = changed(images(), "color_jitter", strength=1.0)
    assert 0 <= float(colours.min()) <= float(colours.max()) <= 1
    assert torch.equal(changed(images(), "color_jitter", strength=0.0), images() / 255)


def test_erase_fills_a_rectangle_of_the_asked_share():
    black = torch.zeros(400, 1, 32, 32)
    out = changed(black, "erase", probability=1.0, scale=(0.2, 0.2))
    touched = (out != 0)[:, 0].float()
    assert float(touched.mean()) == pytest.approx(0.2, abs=0.02)
    rows, columns = touched.amax(2), touched.amax(1)
    box = rows[:, :, None] * columns[:, None, :]
    assert float((box - touched).abs().mean()) < 1e-3  # a rectangle, but for pixels that were drawn as 0
    rare = changed(black, "erase", probability=0.25, scale=(0.2, 0.2))
    assert float((rare != 0).flatten(1).any(1).float().mean()) == pytest.approx(0.25, abs=0.07)


def test_a_crop_wider_than_the_image_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"12 pixels.*12×13.*at most 11"):
        changed(images(), "crop", padding=12)


def test_rows_that_are_no_images_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'flip' needs images.*\[4, 7\]"):
        changed(torch.zeros(4, 7), "flip")
    with pytest.raises(ValueError, match="named tensors"):
        views("flip")(Batch(inputs={"ids": torch.zeros(2, 3)}, index=torch.arange(2)), numbers(2))
    with pytest.raises(ValueError, match="row index"):
        views("flip")(Batch(inputs=images()), numbers(40))


def test_views_come_in_turn() -> None:
    """A new one every epoch, or so many distinct ones; without random changes there is one."""
    config = DataConfig(path="digits", views=(ViewConfig(name="flip"),))
    endless = Views.of(config, seed=3)
    assert (endless.seed, endless.numbers(0, 1), endless.numbers(7, 2)) == (3, [0], [14, 15])
    assert endless.needed(epochs=8, count=2) == 16
    turning = Views.of(config.model_copy(update={"distinct_views": 3, "view_seed": 0}), seed=9)
    assert turning.seed == 0
    assert [turning.numbers(epoch, 2) for epoch in range(4)] == [[0, 1], [2, 0], [1, 2], [0, 1]]
    assert (turning.needed(epochs=8, count=2), turning.needed(epochs=1, count=2)) == (3, 2)
    still = Views.of(config.model_copy(update={"views": ()}), seed=0)
    assert (still.numbers(5, 2), still.needed(epochs=8, count=2)) == ([0, 0], 1)
