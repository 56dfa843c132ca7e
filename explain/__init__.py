"""Maps of what a network looks at, measures of them, and pictures. Works on any torch model, and knows no trials."""

from explain.controls import centred_gaussian, pooled, rearranged, sobel
from explain.grid import choose_grids, grid_pointing, tile
from explain.maps import Maps, ModelError, explain, grad_cam, stream, upsample
from explain.measures import (
    energy_lift,
    energy_on_object,
    entropy,
    gini,
    high_frequency_share,
    pointing_game,
    rank_accuracy,
    rank_correlation,
    total_variation,
)
from explain.perturb import deletion, insertion, max_sensitivity, patch_drops, patch_fidelity, randomisation_check
from explain.render import heatmap, overlay, save_explanation

__all__ = [
    "Maps",
    "ModelError",
    "centred_gaussian",
    "choose_grids",
    "deletion",
    "energy_lift",
    "energy_on_object",
    "entropy",
    "explain",
    "gini",
    "grad_cam",
    "grid_pointing",
    "heatmap",
    "high_frequency_share",
    "insertion",
    "max_sensitivity",
    "overlay",
    "patch_drops",
    "patch_fidelity",
    "pointing_game",
    "pooled",
    "randomisation_check",
    "rank_accuracy",
    "rank_correlation",
    "rearranged",
    "save_explanation",
    "sobel",
    "stream",
    "tile",
    "total_variation",
    "upsample",
]
