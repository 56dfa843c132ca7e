"""Claims about maps, each decided by comparisons that must all hold.

That a map from 4 x 4 values is smoother than one from 32 x 32, or lies nearer to the middle, is true by construction.
So a map has to beat the controls too: maps of the same coarseness, or of the same place, that know nothing of the
network, or no more than the other map.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.compare import bootstrap_interval


@dataclass(frozen=True)
class Comparison:
    """That one map's measure is higher, or lower, than something else's on the same images.

    Attributes:
        map: whose measure.
        measure: which, as :mod:`analysis.measures` names it.
        than: another map, or a number that it would have by chance.
        higher: whether the claim wants it higher.
    """

    map: str
    measure: str
    than: str | float
    higher: bool = True


@dataclass(frozen=True)
class Claim:
    """A sentence, and the comparisons that must all hold for it; those that data do not allow are left out."""

    sentence: str
    comparisons: tuple[Comparison, ...]


CLAIM_COLUMNS = (
    "claim", "verdict", "map", "measure", "than", "difference", "low", "high", "holds", "num_images", "num_networks"
)  # fmt: skip


def _against_all(measure: str) -> tuple[Comparison, ...]:
    others = ("saliency", "pooled_saliency", "random", "sobel", "gaussian")
    return tuple(Comparison("gradcam", measure, other) for other in others)


CLAIMS = (
    Claim(
        "Saliency is noisy.",
        (
            Comparison("saliency", "high_frequency_share", "gradcam"),
            Comparison("saliency", "high_frequency_share", "sobel"),
        ),
    ),
    Claim(
        "The network looks at the background.",
        (
            Comparison("saliency", "energy_lift", 1.0, higher=False),
            Comparison("gradcam", "energy_lift", 1.0, higher=False),
        ),
    ),
    Claim(
        "Grad-CAM is smoother than saliency.",
        (
            Comparison("gradcam", "total_variation", "saliency", higher=False),
            Comparison("gradcam", "total_variation", "pooled_saliency", higher=False),
            Comparison("gradcam", "total_variation", "random", higher=False),
        ),
    ),
    Claim("Grad-CAM lies on the object more than saliency does.", _against_all("energy_on_object")),
    Claim("Grad-CAM finds its class among others better than saliency does.", _against_all("grid_pointing")),
    Claim("Grad-CAM shows what the network uses better than saliency does.", _against_all("patch_fidelity")),
)


def decide(measures: pd.DataFrame, claims: Sequence[Claim] = CLAIMS) -> pd.DataFrame:
    """Return each claim's comparisons and its verdict.

    A claim is ``supported`` if the 95 % interval of every difference lies on its side of 0, ``not supported`` if that
    of any lies on the other side, else ``undecided``. A claim that no data decide has no rows.

    Args:
        measures: as :func:`analysis.load_measures` gives them; where they are of several networks, each image counts
            with its mean over these.
        claims: what to decide.

    Returns:
        One row a comparison: ``claim``, ``verdict`` (of the whole claim), ``map``, ``measure``, ``than``,
        ``difference`` (mean over images, of the map and what it is compared with), ``low``, ``high`` (paired bootstrap
        over images), ``holds`` (``yes``, ``no``, ``open``), ``num_images``, ``num_networks``.
    """
    rows = []
    values = measures.pivot_table(
        index=["measure", "image"], columns="map", values="value", aggfunc="mean", observed=True
    )
    of_network = [name for name in ("run", "trial_id") if name in measures]
    networks = measures.drop_duplicates(["measure", *of_network])["measure"].value_counts()
    for claim in claims:
        found = []
        for comparison in claim.comparisons:
            of_images = values[values.index.get_level_values("measure") == comparison.measure]
            maps = [name for name in (comparison.map, comparison.than) if isinstance(name, str)]
            if not set(maps) <= set(of_images):
                continue
            than = of_images[comparison.than] if isinstance(comparison.than, str) else comparison.than
            differences = (of_images[comparison.map] - than).to_numpy()
            differences = differences[np.isfinite(differences)]
            if not len(differences):
                continue
            mean, low, high = bootstrap_interval(differences)
            above, below = low > 0, high < 0
            if not comparison.higher:
                above, below = below, above
            found.append(
                {
                    "map": comparison.map,
                    "measure": comparison.measure,
                    "than": str(comparison.than),
                    "difference": mean,
                    "low": low,
                    "high": high,
                    "holds": "yes" if above else "no" if below else "open",
                    "num_images": len(differences),
                    "num_networks": int(networks[comparison.measure]),
                }
            )
        verdicts = {row["holds"] for row in found}
        verdict = "supported" if verdicts == {"yes"} else "not supported" if "no" in verdicts else "undecided"
        rows += [{"claim": claim.sentence, "verdict": verdict, **row} for row in found]
    return pd.DataFrame(rows, columns=list(CLAIM_COLUMNS))
