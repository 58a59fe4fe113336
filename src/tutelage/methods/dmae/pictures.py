"""What a masked autoencoder sees of an image, and what it makes of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tutelage.data.pictures import png_uri
from tutelage.engine.taps import Tapped, outputs_of
from tutelage.engine.types import Batch, Table
from tutelage.methods.dmae.functional import patchify, unpatchify
from tutelage.methods.dmae.method import ORDER, Pretraining, masked
from tutelage.methods.dmae.noise import patch_noise
from tutelage.methods.dmae.vit import IMAGES, MaskedViT

_GREY = 0.5
_LEAST_SIDE = 64
_EPS = 1e-6


@torch.no_grad()
def reconstructions(
    encoder: MaskedViT,
    method: Pretraining,
    batch: Batch,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Table:
    """Pictures of rows: the image, its visible patches, and these with the predicted ones between them. Where patches
    were normalised, predictions get mean and variance of the true patch back.

    Args:
        batch: images in [0, 1] with one or three channels.
        mean, std: the student's normalisation.
    """
    images = batch.inputs
    assert isinstance(images, Tensor)
    places = torch.arange(len(images), device=images.device)
    noise = patch_noise(places, torch.zeros_like(places), method.seed, encoder.patches)
    given = masked(batch, noise, method.config.mask_ratio)
    held = Tapped(encoder, mean=mean, std=std).to(images.device).eval()
    outputs = outputs_of(held(given.inputs))
    hidden = encoder.without_registers(outputs.hidden)  # type: ignore[arg-type]
    order = given.columns[ORDER]
    patches = patchify(outputs.extra[IMAGES], encoder.patch_size)
    predicted = method.eval().decoder(hidden, order).float()
    if method.config.norm_pix:
        variance, middle = torch.var_mean(patches, dim=2, keepdim=True)
        predicted = predicted * (variance + _EPS).sqrt() + middle
    unseen = (order >= hidden.shape[1] - 1)[..., None]
    made = _images(encoder, torch.where(unseen, predicted, patches))
    if held.mean is not None and held.std is not None:
        made = made * held.std.view(-1, 1, 1) + held.mean.view(-1, 1, 1)
    seen = _images(encoder, torch.where(unseen, _GREY, patchify(images, encoder.patch_size)))
    names = range(len(images)) if batch.index is None else batch.index.tolist()
    rows = [
        [name, *(png_uri(picture, least_side=_LEAST_SIDE) for picture in pictures)]
        for name, *pictures in zip(names, images, seen, made, strict=True)
    ]
    return Table(["row", "image", "visible", "reconstruction"], rows)


def _images(encoder: MaskedViT, patches: Tensor) -> Tensor:
    return unpatchify(patches, encoder.patch_size, channels=encoder.channels, grid=encoder.grid)
