"""What a trial minimizes, by its setup."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from trainables.attention_consistency import attention_consistency_loss
from trainables.resnet import ResNet18
from trainables.saliency_guided import saliency_guided_loss
from trainables.settings import Setup

Loss = Callable[[ResNet18, Tensor, Tensor, float], Tensor]


def cross_entropy(model: ResNet18, x: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy, (), of images (N, 3, H, W) with labels (N,)."""
    return F.cross_entropy(model(x).float(), y, label_smoothing=label_smoothing)


LOSSES: dict[Setup, Loss] = {
    "plain": cross_entropy,
    "augmentation": cross_entropy,
    "saliency": saliency_guided_loss,
    "saliency_control": partial(saliency_guided_loss, random_mask=True),
    "gradcam": attention_consistency_loss,
    "gradcam_control": partial(attention_consistency_loss, weight=0.0),
}
# Arithmetic of a step in forward passes over its batch: a backward pass costs two, a gradient towards the pixels one.
FORWARDS: dict[Setup, int] = {
    "plain": 3,
    "augmentation": 3,
    "saliency": 8,
    "saliency_control": 6,
    "gradcam": 6,
    "gradcam_control": 6,
}


def epochs_of_equal_compute(setup: Setup, max_epochs: int) -> int:
    """Return how many epochs of a setup cost what ``max_epochs`` of plain training cost, rounded, at least 1."""
    return max(1, round(max_epochs * FORWARDS["plain"] / FORWARDS[setup]))
