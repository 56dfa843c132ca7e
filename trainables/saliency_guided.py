"""Saliency Guided Training: predictions that do not change when the pixels of lowest gradient are replaced."""

import torch
import torch.nn.functional as F
from torch import Tensor

from explain.maps import eval_mode
from trainables.resnet import ResNet18

MASKED_SHARE = 0.5  # of the pixels; with the weight 1 of the divergence as published for images


def saliency_guided_loss(
    model: ResNet18, x: Tensor, y: Tensor, label_smoothing: float = 0.0, *, random_mask: bool = False
) -> Tensor:
    """Return the loss, (), of Saliency Guided Training (Ismail et al., NeurIPS 2021, alg. 1).

        CE(f(x), y) + KL(f(x) || f(x~))

    In x~ the half of the pixels with the lowest gradient of the label's logit, taken in eval mode, is replaced by
    uniform noise between the least and the greatest value of the image's channel. A pixel's gradient is the largest
    over its channels in absolute value; published is the mean over channels, in which signs cancel.

    A step costs about 8 forward passes: one forward and one gradient towards the pixels, and two of forward and
    backward. The control costs 6.

    Args:
        model: in train mode; its mode is left as it was.
        x: (N, 3, H, W) images.
        y: (N,) int64 labels.
        label_smoothing: of the cross-entropy.
        random_mask: the control: which pixels are replaced is chance.
    """
    pixels = x.shape[2] * x.shape[3]
    order = torch.rand(len(x), pixels, device=x.device) if random_mask else _saliency(model, x, y).flatten(1)
    lowest = order.argsort(dim=1, stable=True)[:, : int(MASKED_SHARE * pixels)]
    masked = torch.zeros_like(order, dtype=torch.bool).scatter_(1, lowest, True).view(-1, 1, *x.shape[2:])
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    changed = torch.where(masked, low + (high - low) * torch.rand_like(x), x)
    logits, of_changed = model(x).float(), model(changed).float()
    divergence = F.kl_div(of_changed.log_softmax(1), logits.log_softmax(1), reduction="batchmean", log_target=True)
    return F.cross_entropy(logits, y, label_smoothing=label_smoothing) + divergence


def _saliency(model: ResNet18, x: Tensor, y: Tensor) -> Tensor:
    """Return |gradient of the label's logit|, the maximum over channels, (N, H, W)."""
    with eval_mode(model):
        pixels = x.detach().requires_grad_()
        score = model(pixels).gather(1, y[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, pixels)
    return gradient.abs().amax(dim=1)
