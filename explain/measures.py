"""Numbers that say what a map shows."""

import torch
from torch import Tensor


def energy_on_object(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the share of each map's sum that lies on the object (the energy-based pointing game).

    sum of map inside the mask / sum of map (Wang et al., Score-CAM, CVPR workshop 2020, sec. 4.3). A map that points
    nowhere in particular scores the share of the image that the object covers, ``masks.mean((1, 2))``.

    Args:
        maps: (N, H, W), at least 0.
        masks: (N, H, W) bool, True on the object.

    Returns:
        (N,) in [0, 1]; NaN for a map that is zero everywhere.

    Raises:
        ValueError: if shapes differ or a map has negative values.
    """
    if maps.shape != masks.shape:
        raise ValueError(f"maps {tuple(maps.shape)} and masks {tuple(masks.shape)} must have the same shape")
    if (maps < 0).any():
        raise ValueError("maps must not be negative; take Grad-CAM after its ReLU")
    maps = maps.to(torch.float64)
    return (maps * masks).sum(dim=(1, 2)) / maps.sum(dim=(1, 2))
