"""Numbers that say what maps show. Each takes maps (N, H, W) of any positive scale and returns one number a map, (N,).

Maps are taken raw, not stretched to [0, 1]: that would move the energy of all but the smallest value. A map that is
zero everywhere, or has NaN or infinite values, says nothing, and every measure of it is NaN; so is every measure that
asks for an object where there is none.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def energy_on_object(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the share of each map's sum that lies on the object (the energy-based pointing game).

    sum of map inside the mask / sum of map (Wang et al., Score-CAM, CVPR workshop 2020, sec. 4.3). A map that points
    nowhere in particular scores the share of the image that the object covers, ``masks.mean((1, 2))``.

    Args:
        maps: (N, H, W), at least 0.
        masks: (N, H, W) bool, True on the object.

    Returns:
        (N,) in [0, 1].

    Raises:
        ValueError: if shapes differ, a map has negative values or masks are not bool.
    """
    maps = _checked(maps, masks)
    return _known((maps * masks).sum(dim=(1, 2)) / maps.sum(dim=(1, 2)), maps, masks)


def energy_lift(maps: Tensor, masks: Tensor) -> Tensor:
    """Return energy on the object over the share of the image that it covers: 1 for a map that points nowhere.

    Args and errors as of :func:`energy_on_object`.

    Returns:
        (N,), at least 0, at most H W / pixels of the mask.
    """
    return energy_on_object(maps, masks) / masks.float().mean(dim=(1, 2))


def pointing_game(maps: Tensor, masks: Tensor, tolerance: int = 0) -> Tensor:
    """Return whether each map's maximum lies on the object; of equal maxima, the share that does.

    Zhang et al., Top-down neural attention by excitation backprop, ECCV 2016, sec. 4.1.

    Args:
        maps, masks: see :func:`energy_on_object`.
        tolerance: the mask is widened by so many pixels on all sides.

    Returns:
        (N,) in [0, 1].
    """
    maps = _checked(maps, masks)
    if tolerance:
        wide = F.max_pool2d(masks[:, None].float(), 2 * tolerance + 1, stride=1, padding=tolerance)
        masks = wide[:, 0] > 0
    highest = maps == maps.amax(dim=(1, 2), keepdim=True)
    return _known((highest & masks).sum(dim=(1, 2)) / highest.sum(dim=(1, 2)), maps, masks)


def rank_accuracy(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the share of the K highest pixels that lie on the object of K pixels; equals at the limit count in part.

    Relevance rank accuracy (Arras et al., CLEVR-XAI, Information Fusion 2022, sec. 3.3).

    Args:
        maps, masks: see :func:`energy_on_object`.

    Returns:
        (N,) in [0, 1].
    """
    values, inside = _checked(maps, masks).flatten(1), masks.flatten(1)
    size = inside.sum(dim=1, keepdim=True)
    limit = values.sort(dim=1, descending=True).values.gather(1, (size - 1).clamp(min=0))
    above, equal = values > limit, values == limit
    share = (size - above.sum(dim=1, keepdim=True)) / equal.sum(dim=1, keepdim=True)
    hits = (above & inside).sum(dim=1) + share[:, 0] * (equal & inside).sum(dim=1)
    return _known(hits / size[:, 0], maps, masks)


def gini(maps: Tensor) -> Tensor:
    """Return the Gini index of each map: how few pixels it rests on (Hurley & Rickard, IEEE TIT 2009, eq. 1).

    Returns:
        (N,) from 0 (all pixels alike) to 1 - 1 / (H W) (one pixel).
    """
    values = _checked(maps).flatten(1).sort(dim=1).values
    n = values.shape[1]
    weights = (2 * torch.arange(n, device=maps.device, dtype=values.dtype) + 1 - n) / n
    return (values * weights).sum(dim=1) / values.sum(dim=1)


def entropy(maps: Tensor) -> Tensor:
    """Return the Shannon entropy of each map as a distribution over pixels, over that of the uniform one.

    Returns:
        (N,) from 0 (one pixel) to 1 (all pixels alike).
    """
    values = _checked(maps).flatten(1)
    shares = values / values.sum(dim=1, keepdim=True)
    return torch.special.entr(shares).sum(dim=1) / math.log(values.shape[1])


def total_variation(maps: Tensor) -> Tensor:
    """Return how much neighbours differ, over the map's mean: mean |difference| to the right plus mean to below.

    The anisotropic total variation (Rudin, Osher & Fatemi, Physica D 1992), free of the map's scale. Smooth by
    construction is not smooth by insight: compare with :func:`explain.controls.pooled`.

    Returns:
        (N,), at least 0.
    """
    maps = _checked(maps)
    across, down = maps.diff(dim=2).abs().mean(dim=(1, 2)), maps.diff(dim=1).abs().mean(dim=(1, 2))
    return (across + down) / maps.mean(dim=(1, 2))


def high_frequency_share(maps: Tensor, above: float = 0.25) -> Tensor:
    """Return the share of the power of each map, without its mean, at frequencies above so many cycles a pixel.

    Returns:
        (N,) in [0, 1]; NaN for a map of one value.
    """
    maps = _checked(maps)
    maps = maps / maps.amax(dim=(1, 2), keepdim=True)  # squares of very small or large values are no numbers
    power = torch.fft.fft2(maps - maps.mean(dim=(1, 2), keepdim=True)).abs().square()
    rows, columns = (torch.fft.fftfreq(n, device=maps.device) for n in maps.shape[1:])
    high = (rows[:, None].square() + columns.square()).sqrt() > above
    return (power * high).sum(dim=(1, 2)) / power.sum(dim=(1, 2))


def rank_correlation(maps: Tensor, others: Tensor) -> Tensor:
    """Return how far two maps of the same image agree on the order of pixels: Spearman's, ties averaged.

    Args:
        maps, others: (N, ...), real, of the same shape.

    Returns:
        (N,) in [-1, 1]; NaN where one of the two is constant or has NaN.
    """
    if maps.shape != others.shape:
        raise ValueError(f"maps {tuple(maps.shape)} and {tuple(others.shape)} must have the same shape")
    a, b = (_ranks(m.flatten(1)) for m in (maps, others))
    a, b = (r - (r.shape[1] + 1) / 2 for r in (a, b))
    known = ~(maps.isnan() | others.isnan()).flatten(1).any(dim=1)
    return ((a * b).sum(dim=1) / (a.square().sum(dim=1) * b.square().sum(dim=1)).sqrt()).where(known, math.nan)


def _ranks(values: Tensor) -> Tensor:
    """Return ranks (N, M) from 1, of equal values the mean of theirs."""
    values = values.contiguous()
    ordered = values.sort(dim=1).values
    below, up_to = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    return (below + up_to + 1) / 2


def _known(result: Tensor, maps: Tensor, masks: Tensor) -> Tensor:
    """Return a result (N,), NaN where the map shows nothing or there is no object."""
    flat = maps.flatten(1)
    return result.where((flat != 0).any(dim=1) & flat.isfinite().all(dim=1) & masks.flatten(1).any(dim=1), math.nan)


def _checked(maps: Tensor, masks: Tensor | None = None) -> Tensor:
    """Return maps as float32 at least.

    Raises:
        ValueError: if they are not (N, H, W), have another shape than the masks, or negative values; if masks are not
            bool.
    """
    if maps.ndim != 3:
        raise ValueError(f"maps must be (N, H, W), not {tuple(maps.shape)}")
    if masks is not None and maps.shape != masks.shape:
        raise ValueError(f"maps {tuple(maps.shape)} and masks {tuple(masks.shape)} must have the same shape")
    if masks is not None and masks.dtype != torch.bool:
        raise ValueError(f"masks must be bool, not {masks.dtype}")
    if (maps < 0).any():
        raise ValueError("maps must not be negative; take Grad-CAM after its ReLU")
    return maps.to(torch.promote_types(maps.dtype, torch.float32))
