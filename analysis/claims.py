"""Claims about maps, each decided by comparisons that must all hold.

That a map from 4 x 4 values is smoother than one from 32 x 32, or lies nearer to the middle, is true by construction.
So a claim has to hold against controls too: maps of the same coarseness, or of the same place, that know nothing of the
network, or no more than the other map.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.compare import bootstrap_interval
from analysis.measures import CONTROLS

MIN_IMAGES = 20  # of fewer, an interval says too little
MIN_IMAGES_OF_SHARE = 100  # none of 20 images below 1 does not exclude one in ten
CLAIM_COLUMNS = {
    "claim": "str",
    "verdict": "str",
    "map": "str",
    "measure": "str",
    "than": "str",
    "below": "float64",
    "control": "bool",
    "difference": "float64",
    "low": "float64",
    "high": "float64",
    "holds": "str",
    "num_images": "int64",
    "num_networks": "int64",
}


@dataclass(frozen=True)
class Comparison:
    """That one map's measure is higher than something else's on the same images, or more often below a value.

    Attributes:
        map: whose measure.
        measure: which, as :mod:`analysis.measures` names it.
        than: another map, or a number.
        below: if given, not the measure is compared but the share of images on which it is below this.
        control: whether ``than`` is a control, or a rival that the claim itself speaks of.
    """

    map: str
    measure: str
    than: str | float
    below: float | None = None
    control: bool = False


@dataclass(frozen=True)
class Claim:
    """A sentence, and the comparisons that must all hold for it."""

    sentence: str
    comparisons: tuple[Comparison, ...]


def _more_than_saliency(*measures: str) -> tuple[Comparison, ...]:
    rivals = [Comparison("gradcam", measure, "saliency") for measure in measures]
    return (*rivals, *(Comparison("gradcam", m, other, control=True) for m in measures for other in CONTROLS))


CLAIMS = (
    Claim(
        "Saliency is noisier than Grad-CAM.",
        (
            *(Comparison("saliency", m, "gradcam") for m in ("high_frequency_share", "max_sensitivity")),
            # At equal resolution and with equal values too, and more than the edges of the picture make it.
            *(
                Comparison("pooled_saliency", m, "gradcam", control=True)
                for m in ("high_frequency_share", "max_sensitivity")
            ),
            Comparison("random", "high_frequency_share", "gradcam", control=True),
            *(Comparison("saliency", "high_frequency_share", m, control=True) for m in ("sobel", "gaussian")),
        ),
    ),
    Claim(
        # Less on the object than its area, in more than one case of ten, and more often than what knows no network.
        "In several cases saliency lies on the background.",
        (
            Comparison("saliency", "energy_lift", 0.1, below=1.0),
            *(Comparison("saliency", "energy_lift", other, below=1.0, control=True) for other in CONTROLS),
        ),
    ),
    Claim(
        "Grad-CAM lies on the object more than saliency does.", _more_than_saliency("energy_on_object", "rank_accuracy")
    ),
    Claim(
        "Grad-CAM points to what the network uses more than saliency does.",
        _more_than_saliency("grid_pointing", "patch_fidelity"),
    ),
)


def decide(measures: pd.DataFrame, claims: Sequence[Claim] = CLAIMS) -> pd.DataFrame:
    """Return each claim's comparisons and its verdict.

    A comparison holds if the 95 % interval of its difference lies above 0, and does not if it lies below. A claim is

    - ``supported`` if all its comparisons hold,
    - ``not supported`` if any does not, or if only those with controls are open: it beats the rival and nothing else,
    - ``undecided`` if one with a rival is open, or if what was measured holds but a control was not measured, or on
      too few images.

    A claim whose rivals were not measured has no rows.

    Args:
        measures: as :func:`analysis.load_measures` gives them, of one data set; where they are of several networks,
            each image counts with its mean over these.
        claims: what to decide.

    Returns:
        One row a comparison: ``claim``, ``verdict`` (of the whole claim), ``map``, ``measure``, ``than``, ``below``,
        ``control``, ``difference`` (mean over images, of the map and what it is compared with), ``low``, ``high``
        (paired bootstrap over images), ``holds`` (``yes``, ``no``, ``open``), ``num_images``, ``num_networks``.
    """
    index = [*(name for name in ("run", "trial_id") if name in measures), "measure", "image"]
    values = measures.pivot_table(index=index, columns="map", values="value", aggfunc="mean", observed=True)
    rows = []
    for claim in claims:
        compared = [(comparison, _compare(comparison, values)) for comparison in claim.comparisons]
        found = [{"control": comparison.control, **row} for comparison, row in compared if row]
        if all(row["control"] for row in found):
            continue
        known = [row for row in found if not row["control"] or row["num_images"] >= MIN_IMAGES]
        of_all, of_rivals = ({row["holds"] for row in known if not (rivals and row["control"])} for rivals in (0, 1))
        if "no" in of_all or (of_rivals == {"yes"} and "open" in of_all):
            verdict = "not supported"
        else:
            verdict = "supported" if of_all == {"yes"} and len(known) == len(compared) else "undecided"
        rows += [{"claim": claim.sentence, "verdict": verdict, **row} for row in found]
    return pd.DataFrame(rows, columns=list(CLAIM_COLUMNS)).astype(CLAIM_COLUMNS)


def _compare(comparison: Comparison, values: pd.DataFrame) -> dict[str, Any]:
    """Return the row of a comparison; nothing if what it compares was not measured."""
    maps = [name for name in (comparison.map, comparison.than) if isinstance(name, str)]
    if not set(maps) <= set(values):
        return {}
    of_measure = values[values.index.get_level_values("measure") == comparison.measure]
    known = of_measure[np.isfinite(of_measure[maps]).all(axis=1)]
    networks = {key[:-1] for key in known.index}
    if known.empty:
        return {}
    compared = known[maps] if comparison.below is None else (known[maps] < comparison.below) * 1.0
    theirs: Any = compared[comparison.than] if isinstance(comparison.than, str) else comparison.than
    differences: pd.Series = compared[comparison.map] - theirs
    of_images = differences.groupby(level="image").mean().to_numpy()
    mean, low, high = bootstrap_interval(of_images)
    enough = len(of_images) >= (MIN_IMAGES if comparison.below is None else MIN_IMAGES_OF_SHARE)
    return {
        "map": comparison.map,
        "measure": comparison.measure,
        "than": str(comparison.than),
        "below": comparison.below,
        "difference": mean,
        "low": low,
        "high": high,
        "holds": "yes" if low > 0 and enough else "no" if high < 0 and enough else "open",
        "num_images": len(of_images),
        "num_networks": len(networks),
    }
