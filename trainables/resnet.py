"""ResNet-18 for 32 x 32 images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Standardize channels: ``(x - mean) / std``.

    It is part of the network, so that a checkpoint carries its own statistics and maps of the network's attention are
    taken with respect to the pixels themselves.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with a residual connection (He et al., CVPR 2016, fig. 2)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        # Equal to a 1 x 1 convolution of this stride, which in oneDNN (torch 2.15) corrupts memory for fewer than 16
        # channels in channels_last at odd batch sizes.
        self.stride = stride
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        shortcut = self.shortcut(x[:, :, :: self.stride, :: self.stride])
        return torch.relu(self.bn2(self.conv2(out)) + shortcut)


class ResNet18(nn.Module):
    """ResNet-18 with the stem used on CIFAR: a 3 x 3 stride-1 convolution and no max-pooling.

    ``forward`` is exactly ``head(dropout(global_average_pool(features(x))))``. Grad-CAM in closed form rests on that
    (see :mod:`explain.maps`).

    With 100 classes and width 64 it has 11,220,132 parameters.

    Args:
        num_classes: number of logits.
        width: channels of the first stage; the others have 2, 4 and 8 times as many.
        dropout: dropout probability before the head.
        mean: per-channel mean of pixels in [0, 1] that is subtracted first.
        std: per-channel standard deviation of pixels that is divided by.
    """

    def __init__(
        self,
        num_classes: int = 100,
        width: int = 64,
        dropout: float = 0.0,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.layer1 = nn.Sequential(BasicBlock(width, width, 1), BasicBlock(width, width, 1))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(BasicBlock(2 * width, 4 * width, 2), BasicBlock(4 * width, 4 * width, 1))
        self.layer4 = nn.Sequential(BasicBlock(4 * width, 8 * width, 2), BasicBlock(8 * width, 8 * width, 1))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # He et al., ICCV 2015, eq. 10, over the outputs, as in the residual-network papers.
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """Return the last stage's activations after its ReLU.

        Args:
            x: images (N, 3, H, W), floating, pixels in [0, 1].

        Returns:
            (N, 8 * width, H / 8, W / 8), non-negative.
        """
        x = self.stem(self.normalize(x))
        out: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return out

    def classify(self, features: Tensor) -> Tensor:
        """Return logits (N, num_classes) of what ``features`` returns."""
        pooled = self.dropout(features.mean(dim=(2, 3)))
        # Rounded to the 8 bits of bf16, the largest logits would often be equal, and the first class of them would win.
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.head(pooled.to(self.head.weight.dtype))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, 3, H, W) with pixels in [0, 1]."""
        return self.classify(self.features(x))
