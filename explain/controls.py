"""Maps that know nothing of the network, or less than it: what a claim about a map must beat.

A coarse map is smooth, and lies near the middle, whatever it shows; so does much of what pictures show.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from explain.maps import upsample


def pooled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps (N, H, W) averaged to the resolution ``size`` of a Grad-CAM and enlarged again as that is shown.

    What Grad-CAM has ahead of a saliency map of the same coarseness is its own merit.
    """
    return upsample(F.adaptive_avg_pool2d(maps[:, None], size)[:, 0], (maps.shape[1], maps.shape[2]))


def random_maps(num_maps: int, size: tuple[int, int], shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Return (N, *shape) maps of noise in [0, 1) at the resolution ``size``, enlarged as Grad-CAM is; on the CPU."""
    noise = torch.rand((num_maps, *size), generator=torch.Generator().manual_seed(seed))
    return upsample(noise, shape)


def sobel(images: Tensor) -> Tensor:
    """Return where images (N, C, H, W) have edges: the length of the Sobel gradient of their mean over channels.

    Returns:
        (N, H, W), at least 0.
    """
    kernel = torch.tensor(
        [[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]], device=images.device, dtype=images.dtype
    )
    grey = F.pad(images.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across, down = F.conv2d(grey, torch.stack([kernel, kernel.T])[:, None]).unbind(dim=1)
    return (across.square() + down.square()).sqrt()


def centred_gaussian(num_maps: int, shape: tuple[int, int], sigma: float = 0.25) -> Tensor:
    """Return (N, *shape) bells in the middle of the image, ``sigma`` of a side wide: where photographers put things."""
    rows, columns = (((torch.arange(n) + 0.5) / n - 0.5).div(sigma).square() for n in shape)
    return (-(rows[:, None] + columns) / 2).exp().expand(num_maps, *shape)
