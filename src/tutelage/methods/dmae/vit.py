"""A plain vision transformer that can be run on its visible patches alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.engine.calling import first_tensor_in
from tutelage.engine.taps import Tapped
from tutelage.engine.tracing import quiet
from tutelage.methods.dmae.functional import gather_tokens

IMAGES, VISIBLE = "pixel_values", "ids_keep"
"""Names of the two inputs."""

_TOLERANCE = 1e-5
"""Largest difference of our forward's last block and the model's own, relative to the largest value."""


@dataclass(frozen=True)
class _Layout:
    """Where a library keeps the parts of a vision transformer, by path below the encoder. Registers, dropout and the
    norm before the blocks may be missing."""

    patch_embed: str
    class_token: str
    positions: str
    blocks: tuple[str, ...]
    registers: str
    dropout: str
    norm: str = ""

    def missing(self, encoder: nn.Module) -> list[str]:
        tensors = (self.class_token, self.positions)
        found = [path for path in tensors if not isinstance(_find(encoder, path), Tensor)]
        if not isinstance(_find(encoder, self.patch_embed), nn.Module):
            found.insert(0, self.patch_embed)
        if not any(isinstance(_find(encoder, path), nn.Module) for path in self.blocks):
            found.append(" or ".join(self.blocks))
        return found


_LAYOUTS = (
    _Layout("patch_embed", "cls_token", "pos_embed", ("blocks",), "reg_token", "pos_drop", "norm_pre"),
    _Layout(
        "embeddings.patch_embeddings",
        "embeddings.cls_token",
        "embeddings.position_embeddings",
        ("layers", "encoder.layer"),
        "embeddings.register_tokens",
        "embeddings.dropout",
    ),
)
"""timm's; transformers'."""


class NotPlainError(ValueError):
    """A model whose patches cannot be left out."""


class MaskedViT(nn.Module):
    """Holds a vision transformer and runs it whole, or on chosen patches.

    ``forward(images)`` is the model's own. With ``ids_keep`` ``[rows, kept]`` patches are embedded, positions added,
    the kept ones gathered in the order of ``ids_keep``, class and register tokens put in front, and the blocks run:
    ``hidden`` is ``[rows, 1 + registers + kept, width]``, before any final norm, and ``pixel_values`` are the images.

    In training nothing is dropped at random but patches: dropout and stochastic depth, where the model has them, stay
    off until it is trained on its own.

    Args:
        name: what messages call it.
        vit: timm's or transformers' model.
        images: a few rows as the model gets them.

    Raises:
        NotPlainError: a part is missing, or there is more to the forward than these parts.
    """

    def __init__(self, name: str, vit: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.name, self.vit = name, vit
        prefix, paths = _layout(name, vit)
        self._prefix, self._paths = prefix, paths
        shelf = next(path for path in paths.blocks if isinstance(_find(vit, prefix + path), nn.Module))
        depth = len(list(vit.get_submodule(prefix + shelf).children()))
        self.blocks = tuple(f"vit.{prefix}{shelf}.{i}" for i in range(depth))
        """Paths of the blocks, shallow to deep."""
        self.patch_size = self._patch_size()
        self.channels, height, width = images.shape[1:]
        self.grid = (height // self.patch_size, width // self.patch_size)
        self.width = int(self._tensor(paths.class_token).shape[-1])
        registers = _find(vit, prefix + paths.registers)
        self.prefix_tokens = 1 + (registers.shape[1] if isinstance(registers, Tensor) else 0)
        self._check(images)

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def positions(self) -> Tensor:
        """Position embeddings ``[1, tokens, width]``; those of the patches stand last."""
        return self._tensor(self._paths.positions)

    def encoder_modules(self) -> list[nn.Module]:
        """Patch embedding, norm before the blocks, blocks: what runs on visible patches."""
        paths = self._paths
        found = [
            _find(self.vit, self._prefix + path) for path in (paths.patch_embed, paths.norm, *paths.blocks)
        ]
        return [module for module in found if isinstance(module, nn.Module)]

    def encoder_parameters(self) -> list[nn.Parameter]:
        """What is trained on visible patches: not the positions, the final norm, nor what stands behind it."""
        registers = _find(self.vit, self._prefix + self._paths.registers)
        tokens = [self._tensor(self._paths.class_token), registers]
        return [token for token in tokens if isinstance(token, nn.Parameter)] + [
            parameter for module in self.encoder_modules() for parameter in module.parameters()
        ]

    def forward(self, pixel_values: Tensor, ids_keep: Tensor | None = None) -> Any:
        if ids_keep is None:
            return self.vit(pixel_values)
        paths = self._paths
        patches = self._module(paths.patch_embed)(pixel_values)
        if patches.dim() == 4:  # timm's models of changing image size flatten later
            patches = patches.flatten(1, 2)
        positions = self.positions
        own = positions.shape[1] - self.patches
        of_prefix, of_patches = positions[:, :own], positions[:, own:]
        front = [self._tensor(paths.class_token)]
        if self.prefix_tokens > 1:
            front.append(self._tensor(paths.registers))
        # In some models registers have no positions, in others the class token has none either.
        missing = self.prefix_tokens - of_prefix.shape[1]
        prefix = torch.cat(front, dim=1) + nn.functional.pad(of_prefix, (0, 0, 0, missing))
        visible = gather_tokens(patches + of_patches, ids_keep)
        tokens = torch.cat([prefix.expand(len(visible), -1, -1).to(visible), visible], dim=1)
        for path in (paths.dropout, paths.norm):
            if isinstance(_find(self.vit, self._prefix + path), nn.Module):
                tokens = self._module(path)(tokens)
        for path in self.blocks:
            tokens = _tensor_of(self.get_submodule(path)(tokens))
        return {"hidden": tokens, IMAGES: pixel_values}

    def train(self, mode: bool = True) -> MaskedViT:
        super().train(mode)
        for module in self.modules():
            if getattr(module, "p", 0) or getattr(module, "drop_prob", 0):
                module.eval()
        return self

    def without_registers(self, tokens: Tensor) -> Tensor:
        """Class and patch tokens of a block's output ``[rows, tokens, width]``."""
        if self.prefix_tokens == 1:
            return tokens
        return torch.cat([tokens[:, :1], tokens[:, self.prefix_tokens :]], dim=1)

    def _module(self, path: str) -> nn.Module:
        return self.vit.get_submodule(self._prefix + path)

    def _tensor(self, path: str) -> Tensor:
        found = _find(self.vit, self._prefix + path)
        assert isinstance(found, Tensor)
        return found

    def _patch_size(self) -> int:
        layers = [
            layer for layer in self._module(self._paths.patch_embed).modules() if isinstance(layer, nn.Conv2d)
        ]
        if len(layers) != 1 or len({*layers[0].kernel_size, *layers[0].stride}) != 1:
            raise NotPlainError(
                f"{self.name} is no plain vision transformer: its patches are not cut by one convolution whose stride "
                "is its (square) size"
            )
        return int(layers[0].kernel_size[0])

    @torch.no_grad()
    def _check(self, images: Tensor) -> None:
        """Our forward over all patches against the model's own: whatever else it does (rotary positions, windows, a
        distillation token) would be left out silently."""
        if self.positions.shape[1] not in (self.patches, self.patches + 1, self.patches + self.prefix_tokens):
            raise NotPlainError(
                f"{self.name} has {self.positions.shape[1]} positions for {self.patches} patches and "
                f"{self.prefix_tokens} class and register tokens; build it for images of this size"
            )
        everything = torch.arange(self.patches, device=images.device).expand(len(images), -1)
        with quiet(self):
            own = Tapped(self)(images, (self.blocks[-1],), False)[f"tap:{self.blocks[-1]}"]
            ours = self(images, everything)["hidden"]
        if own.shape != ours.shape or (own - ours).abs().max() > _TOLERANCE * own.abs().max():
            raise NotPlainError(
                f"{self.name} ({type(self.vit).__name__}) is no plain vision transformer: its blocks do not get just "
                "embedded patches, positions, class and register tokens; take timm's `vit_…` or transformers' ViT"
            )


def check_same_patches(student: MaskedViT, teacher: MaskedViT) -> None:
    """Raise ValueError unless both cut an image into the same patches."""
    if (student.patch_size, student.grid) != (teacher.patch_size, teacher.grid):
        shown = [
            f"{each.name} has patches of side {each.patch_size} ({each.grid[0]}×{each.grid[1]})"
            for each in (student, teacher)
        ]
        raise ValueError(f"both models must cut images into the same patches: {', '.join(shown)}")


def _layout(name: str, vit: nn.Module) -> tuple[str, _Layout]:
    """The path of the encoder, and the layout that fits."""
    encoders = {"": vit}
    base = getattr(
        vit, "base_model_prefix", None
    )  # transformers' classifiers hold the encoder under this name
    if base and isinstance(_find(vit, base), nn.Module):
        encoders[f"{base}."] = _find(vit, base)
    lacks: list[list[str]] = []
    for layout in _LAYOUTS:
        for prefix, encoder in encoders.items():
            gaps = layout.missing(encoder)
            if not gaps:
                return prefix, layout
            lacks.append(gaps)
    fewest = sorted(lacks, key=len)[0]
    raise NotPlainError(
        f"{name} ({type(vit).__name__}) is no plain vision transformer: it has no {', '.join(fewest)}; "
        "take one of timm's `vit_…` or transformers' ViT"
    )


def _find(root: nn.Module, path: str) -> Any:
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _tensor_of(value: Any) -> Tensor:
    found = first_tensor_in(value)
    assert found is not None
    return found
