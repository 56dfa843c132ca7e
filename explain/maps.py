"""Saliency and Grad-CAM of a batch in one pass.

For a network that ends in global average pooling (GAP) and a linear head, the logit of class c is

    z_c = b_c + sum_k w_ck (1 / Z) sum_ij A_kij

with the last stage's activations A (K channels, Z = h w positions). The gradient of z_c with respect to A_kij is then
w_ck / Z everywhere, so Grad-CAM (Selvaraju et al., ICCV 2017, eq. 1 and 2) needs no backward pass:

    M_c = (1 / Z) sum_k w_ck A_k,    and    sum_ij M_c + b_c = z_c    (completeness).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Score = Literal["logit", "log_prob"]


class ModelError(ValueError):
    """A network for which the closed form of Grad-CAM is not exact."""


@dataclass(frozen=True)
class Maps:
    """Maps of N images, raw: neither rectified nor scaled, so that magnitudes can be compared.

    Attributes:
        logits: (N, C) float32, or float64 of a float64 network, as the maps.
        target: (N,) int64, the class explained.
        saliency: (N, H, W) float32, at least 0; absolute gradient of the score, maximum over channels.
        cam: (N, h, w) float32 at the resolution of the last stage, before the ReLU. Its sum plus the head's bias of the
            target is the logit.
    """

    logits: Tensor
    target: Tensor
    saliency: Tensor
    cam: Tensor


def explain(
    model: nn.Module,
    images: Tensor,
    target: Tensor | None = None,
    score: Score = "logit",
    dtype: torch.dtype | None = None,
) -> Maps:
    """Return saliency and Grad-CAM of a batch: one forward pass and one gradient towards the input.

    Saliency is |d score / d x|, maximum over channels (Simonyan et al., ICLR workshop 2014, sec. 3.1). Grad-CAM is of
    what ``model.features`` returns, in closed form (see the module's docstring).

    The network is explained in eval mode; its mode, gradients and buffers are afterwards as they were, also after an
    exception.

    Args:
        model: with ``features(x)`` giving (N, K, h, w), ``head`` an ``nn.Linear``, and
            ``model(x) == head(features(x).mean((2, 3)))`` in eval mode.
        images: (N, 3, H, W) floating, on the model's device, as the model takes them.
        target: (N,) int64 classes to explain; by default the predicted ones.
        score: explain the logit of the target, or its log-probability. Logits that differ by a constant give the same
            probabilities but other gradients (Srinivas & Fleuret, ICLR 2021).
        dtype: run under autocast to this type, for example ``torch.bfloat16``.

    Raises:
        ModelError: if the model has no such head, or its output is not the head of its pooled features.
        ValueError: if shapes do not fit.
    """
    head = getattr(model, "head", None)
    features = getattr(model, "features", None)
    if not isinstance(head, nn.Linear) or not callable(features):
        raise ModelError(
            f"{type(model).__name__}: closed-form Grad-CAM needs a method features(x) and a linear layer head, "
            "with global average pooling between them"
        )
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating (N, C, H, W), not {images.dtype} {tuple(images.shape)}")
    if target is not None and target.shape != images.shape[:1]:
        raise ValueError(f"target must have shape ({len(images)},), not {tuple(target.shape)}")
    if score not in get_args(Score):
        raise ValueError(f"score must be one of {get_args(Score)}, not {score!r}")
    autocast = torch.autocast(images.device.type, dtype, enabled=dtype is not None)
    with _eval_mode(model), torch.enable_grad():
        x = images.detach().requires_grad_()
        with autocast:
            activations = features(x)
            logits = _at_least_float32(head(activations.mean(dim=(2, 3))))
            with torch.no_grad():
                expected = _at_least_float32(model(images[:1]))
        # Loose enough for sums that depend on the batch; another head differs by more.
        tolerance = 0.01 if activations.dtype in (torch.float32, torch.float64) else 0.1
        if not torch.allclose(
            expected, logits[:1].detach(), rtol=tolerance, atol=tolerance * expected.std().item() + 1e-5
        ):
            raise ModelError(f"{type(model).__name__}: its output is not head(features(x).mean((2, 3)))")
        chosen = logits.argmax(1) if target is None else target
        scores = logits if score == "logit" else F.log_softmax(logits, dim=1)
        (gradient,) = torch.autograd.grad(scores.gather(1, chosen[:, None]).sum(), x)
    with torch.no_grad():
        weights = _at_least_float32(head.weight)[chosen]
        if score == "log_prob":
            weights = weights - logits.softmax(1) @ _at_least_float32(head.weight)
        positions = activations.shape[2] * activations.shape[3]
        cam = torch.einsum("nk,nkhw->nhw", weights, _at_least_float32(activations.detach())) / positions
    return Maps(logits.detach(), chosen.detach(), _at_least_float32(gradient).abs().amax(dim=1), cam)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge maps (N, h, w) to (N, *size), bilinearly, as Grad-CAM is shown."""
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True
