"""What one network's maps show in numbers, image by image, beside maps that know less than it.

Each measure is taken of the network's own maps, ``saliency`` and ``gradcam``, and of the controls: ``pooled_saliency``
and ``random`` (Grad-CAM's own values in the order of pooled saliency, and in any), ``sobel`` (edges of the image) and
``gaussian`` (the middle of the image). Grad-CAM is taken after its ReLU, and everything at the resolution of the
network's input. Max-sensitivity and likeness to an untrained network's maps are taken only of maps that ask one.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from explain import controls, grid, measures, perturb
from explain.maps import Maps, explain, upsample

OWN = ("saliency", "gradcam")
CONTROLS = ("pooled_saliency", "random", "sobel", "gaussian")
DTYPES = {"map": "category", "measure": "category", "image": "int64", "value": "float32"}
NUM_ASKED = 100  # images for which the network is asked again and again
NUM_GRIDS = 100
STEPS = 8  # of deletion and insertion
SHAPE: dict[str, Callable[[Tensor], Tensor]] = {
    "gini": measures.gini,
    "entropy": measures.entropy,
    "total_variation": measures.total_variation,
    "high_frequency_share": measures.high_frequency_share,
}
ON_OBJECT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "energy_on_object": measures.energy_on_object,
    "energy_lift": measures.energy_lift,
    "pointing_game": measures.pointing_game,
    "rank_accuracy": measures.rank_accuracy,
}


def with_controls(images: Tensor, saliency: Tensor, cam: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Return the maps that are compared, all (N, H, W) and at least 0, by name.

    Args:
        images: (N, 3, H, W) as the network takes them.
        saliency: (N, H, W).
        cam: (N, h, w), before its ReLU.
        noise: (N, h, w), the order of the random maps.
    """
    shape, coarse = (images.shape[2], images.shape[3]), cam.relu()
    return {
        "saliency": saliency,
        "gradcam": upsample(coarse, shape),
        "pooled_saliency": controls.pooled(saliency, coarse),
        "random": upsample(controls.rearranged(coarse, noise.to(coarse.device)), shape),
        "sobel": controls.sobel(images),
        "gaussian": controls.centred_gaussian(len(images), shape).to(images.device),
    }


class _Table:
    """Values by map, measure and image."""

    def __init__(self) -> None:
        self._parts: list[pd.DataFrame] = []

    def add(self, name: str, measure: str, indices: NDArray[np.int64], values: Tensor) -> None:
        column = {"map": name, "measure": measure, "image": indices, "value": values.float().cpu().numpy()}
        self._parts.append(pd.DataFrame(column))

    def frame(self) -> pd.DataFrame:
        whole = pd.concat(self._parts, ignore_index=True)
        return whole.astype(DTYPES)


def measure_maps(
    model: nn.Module,
    to_input: Callable[[NDArray[np.int64]], Tensor],
    indices: NDArray[np.int64],
    maps: Maps,
    masks: NDArray[np.bool_] | None,
    grids: NDArray[np.int64],
    labels: NDArray[np.int64],
    batch: int = 250,
) -> pd.DataFrame:
    """Return measures of a network's maps of test images.

    Args:
        model: the network.
        to_input: gives the network's input (N, 3, H, W) of test images.
        indices: (M,) the test images that have maps.
        maps: theirs, on any device.
        masks: (M, H', W') True on the object; None where it is not known.
        grids: (G, n * n) test images, see :func:`explain.grid.choose_grids`.
        labels: (N,) of all test images.
        batch: images at a time.

    Returns:
        One row for each map, measure and image: ``map``, ``measure``, ``image`` (index of the test image), ``value``
        (NaN where the measure is not defined). Of the grid pointing game there is one value a grid, the mean over its
        cells, with the image in its first; a map that is nowhere positive counts as chance.
    """
    table = _Table()
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(maps.cam.shape, generator=generator)
    for start in range(0, len(indices), batch):
        part = slice(start, start + batch)
        x = to_input(indices[part])
        compared = with_controls(x, maps.saliency[part].to(x.device), maps.cam[part].to(x.device), noise[part])
        on_object = None if masks is None else _resized(torch.from_numpy(masks[part]).to(x.device), x.shape[2])
        for name, heat in compared.items():
            for measure, shape_of in SHAPE.items():
                table.add(name, measure, indices[part], shape_of(heat))
            if on_object is not None:
                for measure, score in ON_OBJECT.items():
                    table.add(name, measure, indices[part], score(heat, on_object))
            if name != "gradcam":
                agreement = measures.rank_correlation(heat, compared["gradcam"])
                table.add(name, "agreement_with_gradcam", indices[part], agreement)
    asked = np.sort(np.random.default_rng(1).permutation(len(indices))[:NUM_ASKED])
    _ask(table, model, to_input, indices, maps, noise, asked)
    step = max(1, batch // grids.shape[1])
    for start in range(0, len(grids), step):
        _play_grids(table, model, to_input, grids[start : start + step], labels, generator)
    return table.frame()


def _ask(
    table: _Table,
    model: nn.Module,
    to_input: Callable[[NDArray[np.int64]], Tensor],
    indices: NDArray[np.int64],
    maps: Maps,
    noise: Tensor,
    asked: NDArray[np.int64],
) -> None:
    """Add the measures for which the network is asked again."""
    chosen, images = torch.from_numpy(asked).to(maps.target.device), indices[asked]
    x = to_input(images)
    target = maps.target[chosen].to(x.device)
    noise = noise[torch.from_numpy(asked)]
    compared = with_controls(x, maps.saliency[chosen].to(x.device), maps.cam[chosen].to(x.device), noise)
    patch = next((x.shape[2] // n for n in (4, 5, 3, 6, 2) if x.shape[2] % n == 0), None)
    drops = perturb.patch_drops(model, x, target, patch) if patch else None
    for name, heat in compared.items():
        table.add(name, "deletion", images, perturb.deletion(model, x, heat, target, STEPS))
        table.add(name, "insertion", images, perturb.insertion(model, x, heat, target, STEPS))
        if drops is not None:
            table.add(name, "patch_fidelity", images, perturb.patch_fidelity(heat, drops))

    drawn = ("saliency", "gradcam", "pooled_saliency")  # the others ask no network

    def redrawn(network: nn.Module, pixels: Tensor) -> Tensor:
        again = explain(network, pixels, target, dtype=torch.float32)  # the noise of bf16 is larger than what is added
        maps_again = with_controls(pixels, again.saliency, again.cam, noise)
        return torch.cat([maps_again[name] for name in drawn])

    sensitivity = perturb.max_sensitivity(lambda pixels: redrawn(model, pixels), x)
    *_, forgotten = perturb.randomisation_check(model, lambda network: redrawn(network, x)).values()
    for name, sensitive, alike in zip(drawn, sensitivity.split(len(x)), forgotten.split(len(x)), strict=True):
        table.add(name, "max_sensitivity", images, sensitive)
        table.add(name, "likeness_untrained", images, alike)


def _play_grids(
    table: _Table,
    model: nn.Module,
    to_input: Callable[[NDArray[np.int64]], Tensor],
    grids: NDArray[np.int64],
    labels: NDArray[np.int64],
    generator: torch.Generator,
) -> None:
    count, cells = grids.shape
    pixels = to_input(grids.flatten())
    tiled = grid.tile(pixels, torch.arange(count * cells, device=pixels.device).view(count, cells))
    target = torch.from_numpy(labels[grids]).to(pixels.device)
    found = explain(model, tiled, target, dtype=torch.float32)
    repeated = tiled.repeat_interleave(cells, dim=0)
    cam = found.cam.flatten(0, 1)
    compared = with_controls(repeated, found.saliency.flatten(0, 1), cam, torch.rand(cam.shape, generator=generator))
    for name, heat in compared.items():
        share = grid.grid_pointing(heat.view(count, cells, *heat.shape[1:]))
        # A map that is nowhere positive has found nothing. The cells of a grid are no independent observations.
        table.add(name, "grid_pointing", grids[:, 0], share.nan_to_num(1 / cells).mean(dim=1))


def _resized(masks: Tensor, size: int) -> Tensor:
    """Return masks (N, H, W) at another resolution: True where at least half of a pixel was."""
    if masks.shape[1] == size:
        return masks
    return F.interpolate(masks[:, None].float(), size=(size, size), mode="area")[:, 0] >= 0.5
