"""Measures that ask the network: what becomes of the score, or of the map, when image or network are changed?

Images are (N, 3, H, W) floating as the model takes them; black is 0. The model is asked in eval mode, without
gradients, and left as it was.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explain.maps import eval_mode
from explain.measures import rank_correlation


def deletion(model: nn.Module, images: Tensor, maps: Tensor, target: Tensor, steps: int = 32) -> Tensor:
    """Return the area under the target's probability while pixels turn black, those highest in the map first.

    Petsiuk et al., RISE, BMVC 2018, sec. 3.3; low is good. Half-black images are unlike any that the network was
    trained on, and the curve rewards some shapes of maps for their shape: compare with controls.

    Args:
        model, images: see the module's docstring.
        maps: (N, H, W); of equal values the ones further up and left come first.
        target: (N,) int64 classes.
        steps: of equally many pixels; there is one forward pass more.

    Returns:
        (N,) in [0, 1].
    """
    return _area(model, images, torch.zeros_like(images), maps, target, steps)


def insertion(model: nn.Module, images: Tensor, maps: Tensor, target: Tensor, steps: int = 32) -> Tensor:
    """Return the area under the target's probability while a blurred image gets its pixels back, the highest first.

    Petsiuk et al., RISE, BMVC 2018, sec. 3.3; high is good. The blur is :func:`blurred`. Otherwise as :func:`deletion`.
    """
    return _area(model, blurred(images), images, maps, target, steps)


def blurred(images: Tensor, sigma: float = 5.0) -> Tensor:
    """Return images (N, C, H, W) under a Gaussian of ``sigma`` pixels, mirrored at the borders."""
    reach = min(round(3 * sigma), *(side - 1 for side in images.shape[2:]))
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    bell = (-(offsets / sigma).square() / 2).exp()
    kernel = (bell / bell.sum()).expand(images.shape[1], 1, 1, -1)
    across = F.conv2d(F.pad(images, (reach,) * 4, mode="reflect"), kernel, groups=images.shape[1])
    return F.conv2d(across, kernel.transpose(2, 3), groups=images.shape[1])


def patch_drops(model: nn.Module, images: Tensor, target: Tensor, patch: int) -> Tensor:
    """Return how much the target's logit falls when one square patch is black, for each patch, row by row.

    Args:
        model, images: see the module's docstring.
        target: (N,) int64 classes.
        patch: pixels a side, a divisor of H and W. There are H W / patch^2 patches, and one forward pass more.

    Returns:
        (N, patches).

    Raises:
        ValueError: if patches do not fill the images.
    """
    height, width = images.shape[2:]
    if height % patch or width % patch:
        raise ValueError(f"patches of {patch} pixels do not fill images of {height} x {width}")
    with torch.no_grad(), eval_mode(model):
        whole, drops = _logit(model, images, target), []
        for top in range(0, height, patch):
            for left in range(0, width, patch):
                without = images.clone()
                without[:, :, top : top + patch, left : left + patch] = 0
                drops.append(whole - _logit(model, without, target))
    return torch.stack(drops, dim=1)


def patch_fidelity(maps: Tensor, drops: Tensor) -> Tensor:
    """Return the rank correlation of a map's sums over patches with what these patches are worth to the network.

    The single-deletion score of Hesse et al. (IDSDS, NeurIPS 2024), who also train the network on images with patches
    deleted. The network need not be asked again for another map.

    Args:
        maps: (N, H, W).
        drops: (N, patches), of :func:`patch_drops`.

    Returns:
        (N,) in [-1, 1]; NaN where one of the two is the same for all patches.
    """
    patch = round((maps.shape[1] * maps.shape[2] / drops.shape[1]) ** 0.5)
    return rank_correlation(F.avg_pool2d(maps[:, None].float(), patch).flatten(1), drops)


def max_sensitivity(
    make_maps: Callable[[Tensor], Tensor], images: Tensor, radius: float = 0.02, draws: int = 10, seed: int = 0
) -> Tensor:
    """Return the largest relative change of a map under small uniform noise on the image.

    max over draws of ||map(x + noise) - map(x)|| / ||map(x)||, the noise of each value in [-radius, radius]: Yeh et
    al., On the (in)fidelity and sensitivity of explanations, NeurIPS 2019, there without the quotient. All images get
    the same noise, so that what is measured of one does not depend on its batch.

    Args:
        make_maps: gives maps (N, H, W) of images; of the same classes each time, or it measures more than the maps, and
            in float32 (``explain(..., dtype=torch.float32)``), or it measures bfloat16's rounding too.
        images: see the module's docstring.
        radius: in units of the pixel values.
        draws: of the noise; maps are made once more often.
        seed: of the noise.

    Returns:
        (N,), at least 0; NaN or infinite for a map that is zero everywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    before = make_maps(images)
    length = before.flatten(1).norm(dim=1)
    worst = torch.zeros_like(length)
    for _ in range(draws):
        noise = (2 * torch.rand(images.shape[1:], generator=generator) - 1).mul_(radius).to(images)
        worst = torch.maximum(worst, (make_maps(images + noise) - before).flatten(1).norm(dim=1) / length)
    return worst


def randomisation_check(model: nn.Module, make_maps: Callable[[nn.Module], Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Return how alike maps stay while a network forgets what it has learned, part by part from the top.

    The cascading randomisation of Adebayo et al. (Sanity checks for saliency maps, NeurIPS 2018, sec. 4.1): a map that
    does not change does not show what was learned. Passing says little; failing says much.

    The new parameters are those that torch gives such layers by itself; batch norm forgets its statistics too.

    Args:
        model: its direct children are the parts, defined in the order of the forward pass; it is copied, not changed.
        make_maps: gives maps (N, H, W) of one and the same images by a network.
        seed: of the new parameters.

    Returns:
        For each part, from the last on, Spearman's rank correlation (N,) of the maps with the first, after it and all
        parts above it were initialized anew.

    Raises:
        ValueError: if the model has parameters that no layer's ``reset_parameters`` initializes.
    """
    network = copy.deepcopy(model)
    layers = [module for module in network.modules() if hasattr(module, "reset_parameters")]
    own = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
    kept = [name for name, parameter in network.named_parameters() if id(parameter) not in own]
    if kept:
        raise ValueError(f"{type(model).__name__}: cannot initialize {', '.join(kept)} anew")
    before = make_maps(network).flatten(1)
    similarity = {}
    devices = {parameter.device for parameter in network.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for name, part in reversed(list(network.named_children())):
            below: list[Any] = [module for module in part.modules() if hasattr(module, "reset_parameters")]
            for layer in below:
                layer.reset_parameters()
            if below:
                similarity[name] = rank_correlation(make_maps(network).flatten(1), before)
    return similarity


def _area(model: nn.Module, begin: Tensor, end: Tensor, maps: Tensor, target: Tensor, steps: int) -> Tensor:
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    curve = []
    with torch.no_grad(), eval_mode(model):
        for step in range(steps + 1):
            changed = (place < round(step * order.shape[1] / steps)).view_as(maps)[:, None]
            probabilities = model(torch.where(changed, end, begin)).float().softmax(dim=1)
            curve.append(probabilities.gather(1, target[:, None])[:, 0])
    return torch.trapezoid(torch.stack(curve), dx=1 / steps, dim=0)


def _logit(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    return model(images).float().gather(1, target[:, None])[:, 0]
