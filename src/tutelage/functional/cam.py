"""Where in an image a network's features are strongest."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tutelage.functional.reductions import upcast

__all__ = ["eigen_cam"]


def eigen_cam(
    features: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch height width"]:
    """A map of each image: its features projected on their first principal direction over channels.

    The features are not centred. A direction has no sign of its own: it is turned so that the map's sum is not
    negative, and what is negative then is 0. Every map is scaled to a largest value of 1; features of 0 give 0.

    Args:
        features: ``[batch, channels, height, width]``; detached.

    Returns:
        ``[batch, height, width]`` in [0, 1], at least float32.

    Raises:
        ValueError: the features are no maps.

    Source: Muhammad, Yeasin, "Eigen-CAM: Class Activation Map using Principal Components" (arXiv 2008.00299).
    """
    if features.dim() != 4 or (not features[:1].numel() and len(features)):
        raise ValueError(
            f"features must be maps [batch, channels, height, width]; got {list(features.shape)}"
        )
    positions = upcast(features.detach()).flatten(2).transpose(1, 2)
    first = torch.linalg.svd(positions, full_matrices=False).Vh[:, 0]
    found = torch.einsum("npc,nc->np", positions, first)
    turned = torch.where(found.sum(1, keepdim=True) < 0, -found, found).clamp(min=0)
    scaled = turned / turned.amax(1, keepdim=True).clamp(min=torch.finfo(turned.dtype).tiny)
    return scaled.view(len(features), *features.shape[2:])
