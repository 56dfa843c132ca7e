"""The grid pointing game: does a map find its class among others? It needs no masks (Rao et al., CVPR 2022, sec. 3.1).

Images of different classes are tiled into one input, which a network with global average pooling takes unchanged. Of
the map of each image's class, the share that lies in that image's own cell is measured; by chance it is 1 / n^2.

    grids = choose_grids(logits, labels)
    maps = explain(model, tile(images, grids), labels[grids])
    grid_pointing(maps.saliency), grid_pointing(maps.cam.relu())
"""

import torch
from torch import Tensor


def choose_grids(logits: Tensor, labels: Tensor, n: int = 2) -> Tensor:
    """Return which images to tile: those classified right, most confidently first, of different classes within a grid.

    Args:
        logits: (N, C) of the images.
        labels: (N,) int64.
        n: images a side of a grid.

    Returns:
        (G, n * n) int64 indices, the most confident grid first; no image stands in two grids.
    """
    confidence, predicted = logits.float().softmax(dim=1).max(dim=1)
    order = confidence.argsort(descending=True, stable=True)
    order = order[(predicted == labels)[order]]
    # The r-th most confident image of its class goes into the r-th layer, within which all classes differ.
    classes = labels[order]
    by_class = classes.argsort(stable=True)
    counts = classes.bincount()
    firsts = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[by_class] = torch.arange(len(order), device=order.device) - firsts[classes[by_class]]
    grids = []
    for layer in range(int(counts.max()) if len(order) else 0):
        members = order[rank == layer]
        whole = len(members) // (n * n)
        grids.append(members[: whole * n * n].view(whole, n * n))
    chosen = torch.cat(grids) if grids else order.view(0, n * n)
    return chosen[confidence[chosen].mean(dim=1).argsort(descending=True, stable=True)]


def tile(images: Tensor, grids: Tensor) -> Tensor:
    """Return images (G, C, n H, n W) of grids (G, n * n) of images (N, C, H, W), row by row."""
    n, (channels, height, width) = round(grids.shape[1] ** 0.5), images.shape[1:]
    cells = images[grids.flatten()].view(len(grids), n, n, channels, height, width)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(len(grids), channels, n * height, n * width)


def grid_pointing(maps: Tensor) -> Tensor:
    """Return the share of each map's positive part that lies in its own cell.

    Args:
        maps: (G, n * n, H, W), of the classes of the n * n cells, row by row; H and W multiples of n.

    Returns:
        (G, n * n) in [0, 1], 1 / n^2 by chance; NaN for a map that is nowhere positive.

    Raises:
        ValueError: if there are not n * n maps, or cells have no whole number of pixels.
    """
    count, cells, height, width = maps.shape
    n = round(cells**0.5)
    if n * n != cells or height % n or width % n:
        raise ValueError(f"maps must be (G, n * n, H, W) with H and W multiples of n, not {tuple(maps.shape)}")
    positive = maps.clamp(min=0).view(count, cells, n, height // n, n, width // n).sum(dim=(3, 5)).flatten(2)
    return positive.diagonal(dim1=1, dim2=2) / positive.sum(dim=2)
