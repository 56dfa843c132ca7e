"""Random flips, crops and cutout of whole batches, and mixtures of their images, on the tensor's own device."""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.settings import Mixing, TrialSettings

CROP_PADDING = 4  # pixels a side: He et al., CVPR 2016, sec. 4.2


@dataclass(frozen=True)
class Draws:
    """What chance decides for each of N images.

    Attributes:
        flip: (N,) bool; whether the image is mirrored left to right.
        top: (N,) int64; first row of the crop in the padded image, 0 to 2 * CROP_PADDING.
        left: (N,) int64; first column of the crop in the padded image.
        cutout_row: (N,) int64; row of the centre of the square that is cut out.
        cutout_column: (N,) int64; its column.
    """

    flip: Tensor
    top: Tensor
    left: Tensor
    cutout_row: Tensor
    cutout_column: Tensor

    def to(self, device: torch.device) -> "Draws":
        """Return the same draws on another device."""
        return Draws(*(getattr(self, field.name).to(device) for field in fields(self)))

    def batch(self, start: int, stop: int) -> "Draws":
        """Return the draws of images ``start`` to ``stop``."""
        return Draws(*(getattr(self, field.name)[start:stop] for field in fields(self)))


def draw(order: Tensor, size: int, epoch: int, settings: TrialSettings, generator: torch.Generator) -> Draws:
    """Draw what happens to the images of an epoch.

    All is drawn whatever the settings are, so that trials of one seed share what they have in common. Crop positions
    and centres of cutout (DeVries & Taylor, 2017) are uniform. Flips have probability 1/2, or with ``alternating``
    flips each image is mirrored in every second epoch, half of them in the first (Jordan, 2024, airbench, sec. 3.6).

    Args:
        order: (N,) int64; which image stands at each place of the epoch.
        size: pixels a side of the images.
        epoch: the epoch, from 1.
        settings: the trial's settings.
        generator: the epoch's randomness.
    """
    n = len(order)
    flip = torch.rand(n, generator=generator) < 0.5
    top, left = (torch.randint(0, 2 * CROP_PADDING + 1, (n,), generator=generator) for _ in range(2))
    row, column = (torch.randint(0, size, (n,), generator=generator) for _ in range(2))
    if "flip" not in settings.augmentation:
        flip = torch.zeros_like(flip)
    elif settings.flip == "alternating":
        first = torch.rand(n, generator=torch.Generator().manual_seed(settings.seed)) < 0.5
        flip = first[order] ^ (epoch % 2 == 0)
    if "crop" not in settings.augmentation:
        top, left = torch.full_like(top, CROP_PADDING), torch.full_like(left, CROP_PADDING)
    return Draws(flip, top, left, row, column)


def augment(images: Tensor, draws: Draws, cutout: int = 0) -> Tensor:
    """Crop each image at its position out of its zero-padded self and mirror it where drawn, in one gather; cut out.

    Args:
        images: (N, H, W, C), any dtype.
        draws: the N draws, on the same device.
        cutout: side of the square that is set to zero; the part of it outside the image is lost.

    Returns:
        A new tensor of the same shape, dtype and device.
    """
    n, height, width, _ = images.shape
    device = images.device
    padded = F.pad(images, (0, 0, CROP_PADDING, CROP_PADDING, CROP_PADDING, CROP_PADDING))
    rows = draws.top[:, None] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(n, width)
    columns = draws.left[:, None] + torch.where(draws.flip[:, None], width - 1 - columns, columns)
    index = torch.arange(n, device=device)
    result = padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]
    if cutout:
        inside_rows = _inside(draws.cutout_row, cutout, height)
        inside_columns = _inside(draws.cutout_column, cutout, width)
        result.masked_fill_((inside_rows[:, :, None] & inside_columns[:, None, :])[..., None], 0)
    return result


def _inside(centre: Tensor, side: int, length: int) -> Tensor:
    """Return (N, length) bool: the positions that a stretch of ``side`` pixels around each centre covers."""
    distance = torch.arange(length, device=centre.device) - (centre[:, None] - side // 2)
    return (distance >= 0) & (distance < side)


def mix(images: Tensor, mixing: Mixing, generator: torch.Generator) -> tuple[Tensor, float]:
    """Mix each image of a batch with one other, the one as far from the end as it is from the start.

    ``mixup`` (Zhang et al., ICLR 2018) blends the two; ``cutmix`` (Yun et al., ICCV 2019) pastes a rectangle of the
    other, of uniform position. The share of the image's own is uniform in [0, 1] (Beta(1, 1), both papers' value for
    CIFAR), one draw a batch.

    Args:
        images: (N, C, H, W), floating.
        mixing: ``none`` changes nothing.
        generator: the randomness, on the CPU.

    Returns:
        The mixed images, and the share of each image's own label in its target; the other's label has the rest.
    """
    if mixing == "none":
        return images, 1.0
    share, row, column = torch.rand(3, generator=generator).tolist()
    if mixing == "mixup":
        return images.flip(0).lerp_(images, share), share
    height, width = images.shape[2:]
    side = math.sqrt(1 - share) / 2
    top, bottom = (min(max(round((row + s) * height), 0), height) for s in (-side, side))
    left, right = (min(max(round((column + s) * width), 0), width) for s in (-side, side))
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
