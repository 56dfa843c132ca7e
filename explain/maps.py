"""Saliency and Grad-CAM of a batch in one pass.

For a network that ends in global average pooling (GAP) and a linear head, the logit of class c is

    z_c = b_c + sum_k w_ck (1 / Z) sum_ij A_kij

with the last stage's activations A (K channels, Z = h w positions). The gradient of z_c with respect to A_kij is then
w_ck / Z everywhere, so Grad-CAM (Selvaraju et al., ICCV 2017, eq. 1 and 2) needs no backward pass:

    M_c = (1 / Z) sum_k w_ck A_k,    and    sum_ij M_c + b_c = z_c    (completeness).

For other networks, and for other layers, Grad-CAM takes the gradient at a layer that the caller names.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Score = Literal["logit", "log_prob"]


class ModelError(ValueError):
    """A network that has no map of the kind that was asked for."""


@dataclass(frozen=True)
class Maps:
    """Maps of N images, raw: neither rectified nor scaled, so that magnitudes can be compared.

    Where T classes of each image are explained, ``target``, ``saliency`` and ``cam`` have a dimension T after N.

    Attributes:
        logits: (N, C) float32, or float64 of a float64 network, as the maps.
        target: (N,) int64, the class explained.
        saliency: (N, H, W) float32, at least 0; absolute gradient of the score, maximum over channels.
        cam: (N, h, w) float32 at the resolution of the layer, before the ReLU. In closed form, its sum plus the head's
            bias of the target is the logit.
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
    *,
    layer: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> Maps:
    """Return saliency and Grad-CAM of a batch: one forward pass, and one gradient for each class explained.

    Two images pass a second time, to see that the closed form is exact for the network, and that what it says of one
    does not depend on the others.

    Saliency is |d score / d x|, maximum over channels (Simonyan et al., ICLR workshop 2014, sec. 3.1). Grad-CAM is of
    what ``model.features`` returns, in closed form (see the module's docstring), or of a layer's output.

    The network is explained in eval mode; its mode, gradients and buffers are afterwards as they were, also after an
    exception.

    Args:
        model: without ``layer``, one with ``features(x)`` giving (N, K, h, w), ``head`` an ``nn.Linear``, and
            ``model(x) == head(features(x).mean((2, 3)))`` in eval mode; with ``layer``, any that gives logits (N, C).
        images: (N, 3, H, W) floating, on the model's device, as the model takes them.
        target: (N,) int64 classes to explain, or (N, T) several for each image; by default the predicted ones.
        score: explain the logit of the target, or its log-probability. Logits that differ by a constant give the same
            probabilities but other gradients (Srinivas & Fleuret, ICLR 2021).
        layer: the module whose output (N, K, h, w) Grad-CAM is of, for example ``model.layer4`` of torchvision's
            ResNets. It carries a hook while the model runs.
        dtype: what the network computes in, by autocast; ``torch.float32`` for as it is. By default bfloat16 where the
            hardware multiplies it (see :func:`multiplies_bf16`), or what an autocast around the call says: fast, and
            good for means over many images. For single maps, and to compare them closely, take float32.

    Raises:
        ModelError: if the closed form is not exact for the model, its output or the layer's are not of that kind, or
            what it says of an image depends on its batch.
        ValueError: if shapes do not fit, or a target is no class.
    """
    return _explain(model, images, target, score, layer, dtype, check=True)[0]


def stream(
    model: nn.Module,
    batches: Iterable[Tensor | Sequence[Tensor]],
    targets: Iterable[Tensor | None] | None = None,
    score: Score = "logit",
    *,
    layer: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Maps]:
    """Yield the maps of one batch after the other, for example of a ``DataLoader``, in the memory that one needs.

    Images and targets are moved to the model's device; of a batch that is a tuple or list, the images come first.
    Whether the closed form is exact for the model is seen with the first batch that gives finite logits.

    Args and errors as of :func:`explain`; ``ValueError`` also if there are more batches than targets, or fewer.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    pairs = ((batch, None) for batch in batches) if targets is None else zip(batches, targets, strict=True)
    checked = False
    for batch, target in pairs:
        images = (batch if isinstance(batch, Tensor) else batch[0]).to(device, non_blocking=True)
        chosen = target if target is None else target.to(device, non_blocking=True)
        maps, now = _explain(model, images, chosen, score, layer, dtype, check=not checked)
        checked |= now
        yield maps


def grad_cam(
    model: nn.Module,
    images: Tensor,
    layer: nn.Module | None = None,
    target: Tensor | None = None,
    score: Score = "logit",
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return Grad-CAM alone, before its ReLU: (N, h, w), or (N, T, h, w) for ``target`` (N, T).

    Without ``layer`` that costs a forward pass, and that of two images again, as in :func:`explain`. With it, the
    gradient is taken from the score down to the layer: with alpha_k = mean over positions of d score / d A_k, the map
    is sum_k alpha_k A_k (Selvaraju et al., ICCV 2017, eq. 1 and 2).

    Args and errors as of :func:`explain`.
    """
    _check_arguments(images, target, score, layer)
    dtype = _resolve_dtype(images, dtype)
    with eval_mode(model), _no_autocast(images), torch.inference_mode(False), torch.set_grad_enabled(layer is not None):
        x = _own(images)
        activations, logits = _forward(model, x, layer, dtype, cut=True)
        _check_model(model, x, logits, layer, dtype)
        chosen = _chosen(logits, target)
        if layer is None:
            weights = _head_weights(model, activations, logits, chosen, score)
        else:
            weights = _pooled(_gradients(logits, chosen, score, (activations,)), of=0)
        cam = _weighted_sum(weights, activations)
    return cam if target is not None and target.ndim == 2 else cam[:, 0]


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge maps (N, h, w) to (N, *size), bilinearly, as Grad-CAM is shown."""
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def _explain(
    model: nn.Module,
    images: Tensor,
    target: Tensor | None,
    score: Score,
    layer: nn.Module | None,
    dtype: torch.dtype | None,
    check: bool,
) -> tuple[Maps, bool]:
    """Return maps, and whether the model was checked."""
    _check_arguments(images, target, score, layer)
    dtype = _resolve_dtype(images, dtype)
    with eval_mode(model), _no_autocast(images), torch.inference_mode(False), torch.enable_grad():
        x = _own(images).requires_grad_()
        activations, logits = _forward(model, x, layer, dtype)
        checked = check and _check_model(model, x, logits, layer, dtype)
        chosen = _chosen(logits, target)
        if layer is None:
            gradients = _gradients(logits, chosen, score, (x,))
            weights = _head_weights(model, activations, logits, chosen, score)
        else:
            gradients = _gradients(logits, chosen, score, (x, activations))
            weights = _pooled(gradients, of=1)
        saliency = torch.stack([_at_least_float32(of_x).abs().amax(dim=1) for of_x, *_ in gradients], dim=1)
        saliency.masked_fill_(logits.isnan().any(dim=1)[:, None, None, None], torch.nan)  # which a ReLU hides
        maps = (chosen, saliency, _weighted_sum(weights, activations))
    if target is None or target.ndim == 1:
        maps = (chosen[:, 0], saliency[:, 0], maps[2][:, 0])
    return Maps(logits.detach(), *maps), checked


def _check_arguments(images: Tensor, target: Tensor | None, score: Score, layer: nn.Module | None) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating (N, C, H, W), not {images.dtype} {tuple(images.shape)}")
    if target is not None and (target.ndim not in (1, 2) or len(target) != len(images)):
        n = len(images)
        raise ValueError(f"target must have shape ({n},), or ({n}, T) for T classes each, not {tuple(target.shape)}")
    if target is not None and (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool):
        raise ValueError(f"target must be numbers of classes, int64, not {target.dtype}")
    if layer is not None and not isinstance(layer, nn.Module):
        raise ValueError(f"layer must be a module of the model, not {type(layer).__name__}")
    if score not in get_args(Score):
        raise ValueError(f"score must be one of {get_args(Score)}, not {score!r}")


def _forward(
    model: nn.Module, x: Tensor, layer: nn.Module | None, dtype: torch.dtype | None, cut: bool = False
) -> tuple[Tensor, Tensor]:
    """Return activations (N, K, h, w) and logits (N, C); with ``cut``, gradients reach the layer and go no further."""
    x = x.clone()  # which the network may overwrite
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        if layer is not None:
            with _tap(layer, cut) as outputs:
                logits = _logits(model, x)
            if len(outputs) != 1 or outputs[0].ndim != 4:
                found = f"one of shape {tuple(outputs[0].shape)}" if len(outputs) == 1 else f"{len(outputs)} tensors"
                raise ModelError(f"{type(layer).__name__}: Grad-CAM needs one output (N, K, h, w) a batch, not {found}")
            return outputs[0], logits
        head, features = getattr(model, "head", None), getattr(model, "features", None)
        if not isinstance(head, nn.Linear) or not callable(features):
            raise ModelError(
                f"{type(model).__name__}: closed-form Grad-CAM needs a method features(x) and a linear layer head, "
                "with global average pooling between them; for other networks name a layer, as in layer=model.layer4"
            )
        activations = features(x)
        if not isinstance(activations, Tensor) or activations.ndim != 4:
            found = _described(activations)
            raise ModelError(f"{type(model).__name__}: features(x) must be (N, K, h, w), not {found}; name a layer")
        with _no_autocast(x):  # in bf16 the largest logits would often be equal
            return activations, _at_least_float32(head(activations.mean(dim=(2, 3)).to(head.weight.dtype)))


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(x)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ModelError(f"{type(model).__name__}: it must return logits (N, C), not {_described(logits)}")
    return _at_least_float32(logits)


def _described(output: object) -> str:
    return f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"


@contextlib.contextmanager
def _tap(layer: nn.Module, cut: bool) -> Iterator[list[Tensor]]:
    """Collect a layer's outputs; what follows gets a copy of each, which it may overwrite."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return output
        outputs.append(output.detach().requires_grad_() if cut else output)
        return outputs[-1].clone()

    hook = layer.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        hook.remove()


@torch.no_grad()
def _check_model(
    model: nn.Module, x: Tensor, logits: Tensor, layer: nn.Module | None, dtype: torch.dtype | None
) -> bool:
    """See that the logits (N, C) of images do not depend on their batch, and are what the closed form makes of them.

    Two images are looked at, the first and the last of those with finite logits.

    Returns:
        False if there are none.

    Raises:
        ModelError: if not.
    """
    name = type(model).__name__
    finite = logits.isfinite().all(dim=1).nonzero()[:, 0]
    if not len(finite):
        return False
    some = finite[[0, -1]].unique()
    if layer is None:  # in full precision, where a head that is only a little different shows
        closed = logits[some] if dtype is None else _forward(model, x[some], None, None)[1]
        if not _alike(closed, _logits(model, x[some]), 1e-3):
            raise ModelError(f"{name}: its output is not head(features(x).mean((2, 3))); name a layer")
    if len(x) > 1:
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            alone = _logits(model, x[some[:1]])
        # Sums may be added up in another order.
        if not _alike(logits[some[:1]], alone, 0.01 if dtype is None else 0.1):
            raise ModelError(f"{name}: what it says of an image depends on the batch that the image is in")
    return True


def _alike(logits: Tensor, others: Tensor, tolerance: float) -> bool:
    return torch.allclose(logits, others, rtol=tolerance, atol=tolerance * others.nan_to_num().abs().max().item())


def _own(images: Tensor) -> Tensor:
    """Return images of which a gradient can be taken without a trace in them."""
    return images.clone() if images.is_inference() else images.detach()


def _chosen(logits: Tensor, target: Tensor | None) -> Tensor:
    """Return the classes to explain, (N, T) int64."""
    if target is not None and ((target < 0) | (target >= logits.shape[1])).any():
        raise ValueError(f"target must be from 0 to {logits.shape[1] - 1}, the model's classes")
    chosen = logits.argmax(dim=1) if target is None else target.long().clone()  # one of inference mode is not saved
    return chosen if chosen.ndim == 2 else chosen[:, None]


def _gradients(logits: Tensor, chosen: Tensor, score: Score, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Return for each of T classes the gradients of its score towards the inputs."""
    scores = logits if score == "logit" else F.log_softmax(logits, dim=1)
    totals = scores.gather(1, chosen).sum(dim=0).unbind()
    return [torch.autograd.grad(total, inputs, retain_graph=i + 1 < len(totals)) for i, total in enumerate(totals)]


def _pooled(gradients: list[tuple[Tensor, ...]], of: int) -> Tensor:
    """Return Grad-CAM's weights of the channels, (N, T, K), from gradients towards a layer."""
    return torch.stack([_at_least_float32(towards[of]).mean(dim=(2, 3)) for towards in gradients], dim=1)


@torch.no_grad()
def _head_weights(model: Any, activations: Tensor, logits: Tensor, chosen: Tensor, score: Score) -> Tensor:
    """Return Grad-CAM's weights of the channels, (N, T, K), in closed form."""
    of_class = _at_least_float32(model.head.weight)
    weights = of_class[chosen]
    if score == "log_prob":
        weights = weights - (logits.softmax(dim=1) @ of_class)[:, None]
    return weights / activations.shape[2:].numel()


def _weighted_sum(weights: Tensor, activations: Tensor) -> Tensor:
    return torch.einsum("ntk,nkhw->nthw", weights, _at_least_float32(activations.detach()))


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether the hardware multiplies bfloat16: CUDA from Ampere on, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    # The public torch.cpu.get_capabilities() is newer than the oldest torch that is supported.
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _resolve_dtype(images: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
    """Return what to autocast to, None for nothing."""
    device = images.device
    if dtype is None and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    elif dtype is None and images.dtype == torch.float32 and multiplies_bf16(device):
        dtype = torch.bfloat16
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def _no_autocast(images: Tensor) -> torch.autocast:
    return torch.autocast(images.device.type, enabled=False)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Have a network in eval mode, and each of its modules afterwards in the mode it was in."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True
