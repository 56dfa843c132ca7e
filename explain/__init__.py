"""Maps of what a network looks at, and measures of them. Pure torch: works on any model, knows no trials."""

from explain.maps import Maps, ModelError, explain, upsample
from explain.measures import energy_on_object
from explain.render import heatmap, overlay, save_explanation

__all__ = [
    "Maps",
    "ModelError",
    "energy_on_object",
    "explain",
    "heatmap",
    "overlay",
    "save_explanation",
    "upsample",
]
