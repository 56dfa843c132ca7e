"""Maps that know nothing of the network, or less than it: what a claim about a map must beat.

A coarse map is smooth, and lies near the middle, whatever it shows; a map that is zero at most places lies on few of
them. So two controls of Grad-CAM are as coarse as it is and have its own values: they differ in the places alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from explain.maps import upsample


def rearranged(cam: Tensor, order: Tensor) -> Tensor:
    """Return the values of each map at other places: the highest where ``order`` is highest, and so on.

    With ``order=torch.rand(cam.shape)`` it is a random map, of the values of ``cam``.

    Args:
        cam: (N, h, w).
        order: (N, h, w).

    Returns:
        (N, h, w).
    """
    places = order.flatten(1).argsort(dim=1, stable=True)
    return torch.empty_like(cam).flatten(1).scatter_(1, places, cam.flatten(1).sort(dim=1).values).view_as(cam)


def pooled(maps: Tensor, cam: Tensor) -> Tensor:
    """Return what Grad-CAM would be if it knew the places from another map: that one's averages in each of its cells.

    Args:
        maps: (N, H, W), a saliency map.
        cam: (N, h, w), Grad-CAM after its ReLU.

    Returns:
        (N, H, W): ``cam`` :func:`rearranged` in the order of the averages, enlarged as Grad-CAM is shown.
    """
    order = F.adaptive_avg_pool2d(maps[:, None], (cam.shape[1], cam.shape[2]))[:, 0]
    return upsample(rearranged(cam, order), (maps.shape[1], maps.shape[2]))


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
