"""Random flips, crops and cutout of whole batches, on the tensor's own device."""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.settings import Augmentation

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


def draw(n: int, size: int, augmentation: Augmentation, generator: torch.Generator) -> Draws:
    """Draw what happens to the images of an epoch.

    All is drawn whatever the augmentation is, so that trials of one seed share what they have in common. Flips have
    probability 1/2; crop positions and centres of cutout (DeVries & Taylor, 2017) are uniform.

    Args:
        n: images of the epoch.
        size: pixels a side of the images.
        augmentation: what it leaves out is drawn all the same, and then neutral.
        generator: the epoch's randomness.
    """
    flip = torch.rand(n, generator=generator) < 0.5
    top, left = (torch.randint(0, 2 * CROP_PADDING + 1, (n,), generator=generator) for _ in range(2))
    row, column = (torch.randint(0, size, (n,), generator=generator) for _ in range(2))
    if "flip" not in augmentation:
        flip = torch.zeros_like(flip)
    if "crop" not in augmentation:
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
