"""Visual Attention Consistency: the Grad-CAM of a mirrored image is the mirrored Grad-CAM."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.resnet import ResNet18


def attention_consistency_loss(
    model: ResNet18, x: Tensor, y: Tensor, label_smoothing: float = 0.0, *, weight: float = 1.0
) -> Tensor:
    """Return the loss, (), of Visual Attention Consistency (Guo et al., CVPR 2019).

        CE(f(x), y) + CE(f(flip x), y) + weight MSE(M_y(x), flip M_y(flip x)),    M_y = (1 / Z) sum_k w_yk A_k

    M_y is the Grad-CAM of the label over Z positions, in closed form (see :mod:`explain.maps`), so no gradient is taken
    of a gradient. Published are several labels an image, and maps without 1 / Z, of which the squares at Z = 16 are 256
    times as large: at the learning rates of SGD on CIFAR that diverges.

    A step costs 6 forward passes: the mirrored images go through the network beside the others.

    Args:
        model: in train mode.
        x: (N, 3, H, W) images.
        y: (N,) int64 labels.
        label_smoothing: of the cross-entropies.
        weight: of the maps' consistency; 0 is the control, with the same two cross-entropies.
    """
    features = model.features(torch.cat([x, x.flip(3)]))
    logits = model.classify(features).float()
    loss = F.cross_entropy(logits, y.repeat(2), label_smoothing=label_smoothing, reduction="sum") / len(y)
    if weight:
        of_label = model.head.weight[y.repeat(2)][:, :, None, None] / features.shape[2:].numel()
        maps, mirrored = (features.float() * of_label).sum(dim=1).chunk(2)
        loss = loss + weight * F.mse_loss(mirrored.flip(2), maps)
    return loss
