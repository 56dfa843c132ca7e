"""Random flips and crops of whole batches, on the tensor's own device."""

from dataclasses import dataclass

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
    """

    flip: Tensor
    top: Tensor
    left: Tensor

    def to(self, device: torch.device) -> "Draws":
        """Return the same draws on another device."""
        return Draws(self.flip.to(device), self.top.to(device), self.left.to(device))

    def batch(self, start: int, stop: int) -> "Draws":
        """Return the draws of images ``start`` to ``stop``."""
        return Draws(self.flip[start:stop], self.top[start:stop], self.left[start:stop])


def draw(num_images: int, augmentation: Augmentation, generator: torch.Generator) -> Draws:
    """Draw flips (probability 1/2) and crop positions (uniform) for ``num_images`` images.

    All three are drawn whatever the augmentation is, so that trials of one seed share what they have in common.
    """
    flip = torch.rand(num_images, generator=generator) < 0.5
    top = torch.randint(0, 2 * CROP_PADDING + 1, (num_images,), generator=generator)
    left = torch.randint(0, 2 * CROP_PADDING + 1, (num_images,), generator=generator)
    if "flip" not in augmentation:
        flip = torch.zeros_like(flip)
    if "crop" not in augmentation:
        top, left = torch.full_like(top, CROP_PADDING), torch.full_like(left, CROP_PADDING)
    return Draws(flip, top, left)


def augment(images: Tensor, draws: Draws) -> Tensor:
    """Crop each image at its position out of its zero-padded self, then mirror it where drawn: one gather.

    Args:
        images: (N, H, W, C), any dtype.
        draws: the N draws, on the same device.

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
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]
