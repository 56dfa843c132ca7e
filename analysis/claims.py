"""Claims, each decided by comparisons that must all hold. To add one, add it to CLAIMS.

That a map from 4 x 4 values is smoother than one from 32 x 32, or lies nearer to the middle, is true by construction.
So a claim about maps has to hold against controls too: maps of the same coarseness, or of the same place, that know
nothing of the network, or no more than the other map.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.compare import at_epoch, best_configuration, best_over_seeds, common_epoch, confirmed
from analysis.intervals import bootstrap_interval, paired_over_seeds
from analysis.measures import CONTROLS
from analysis.remote import local_run
from analysis.study_file import RunError
from analysis.trials import MEASURE_OF_MAPS, check_comparable

MIN_IMAGES = 20  # of fewer, an interval says too little
MIN_IMAGES_OF_SHARE = 100  # none of 20 images below 1 does not exclude one in ten
COMPUTED = ("test_accuracy", "num_test_images")  # columns of explained trials alone, as the measures of maps are
MARGIN = 0.01  # accuracy that is gained or lost without anybody caring
CLAIM_COLUMNS = {
    "claim": "str",
    "verdict": "str",
    "of": "str",
    "measure": "str",
    "than": "str",
    "below": "float64",
    "by": "float64",
    "control": "bool",
    "difference": "float64",
    "low": "float64",
    "high": "float64",
    "holds": "str",
    "n": "Int64",
    "unit": "str",
    "num_networks": "Int64",
    "epoch": "Int64",
    "reason": "str",
}


@dataclass(frozen=True)
class MapComparison:
    """That one map's measure is higher than something else's on the same images, or more often below a value.

    Attributes:
        of: a map.
        measure: of maps, as :mod:`analysis.measures` names it.
        than: another map, or a number.
        below: if given, not the measure is compared but the share of images on which it is below this.
        control: whether ``than`` is a control, or a rival that the claim itself speaks of.
    """

    of: str
    measure: str
    than: str | float
    below: float | None = None
    control: bool = False


@dataclass(frozen=True)
class TrialComparison:
    """That trials of one kind have more of something than those of another, by more than some amount.

    Each kind is represented by its best configuration in validation accuracy, trained for as many epochs as the other.
    They are paired by seed; see :func:`analysis.compare.best_over_seeds`.

    Attributes:
        of: the trials, by a name of ``KINDS`` or a query over the columns of :func:`analysis.load_trials`.
        measure: one of these columns.
        than: the other trials, likewise.
        by: what the difference must exceed; below 0, that it is no worse.
        control: whether ``than`` is a control, or a rival that the claim itself speaks of.
    """

    of: str
    measure: str
    than: str
    by: float = 0.0
    control: bool = False


@dataclass(frozen=True)
class Claim:
    """A sentence, and the comparisons that must all hold for it."""

    sentence: str
    comparisons: tuple[MapComparison | TrialComparison, ...]


def _more_than_saliency(*measures: str) -> tuple[MapComparison, ...]:
    rivals = [MapComparison("gradcam", measure, "saliency") for measure in measures]
    return (*rivals, *(MapComparison("gradcam", m, other, control=True) for m in measures for other in CONTROLS))


_NOTEBOOKS = "optimizer == 'sgd' and lr == 0.001 and setup == 'augmentation' and augmentation == 'flip+crop'"
_BARE = "augmentation == 'none' and cutout == 0"
# The kinds of trials that claims are about, as queries. A study without setups varies the augmentation alone.
KINDS = {
    "plain training": f"setup in ('plain', 'augmentation') and {_BARE}",
    "augmentation": "setup == 'augmentation' and augmentation == 'flip+crop' and cutout == 0",
    "saliency training": f"setup == 'saliency' and {_BARE}",
    "Grad-CAM training": f"setup == 'gradcam' and {_BARE}",
    "SGD with 0.001 and augmentation": _NOTEBOOKS,
    "the best other configuration": f"not ({_NOTEBOOKS})",
}
CLAIMS = (
    Claim(
        "Augmentation improves generalization.", (TrialComparison("augmentation", "val_accuracy", "plain training"),)
    ),
    Claim(
        "Augmentation reduces overfitting.", (TrialComparison("plain training", "generalization_gap", "augmentation"),)
    ),
    Claim(  # by a point
        "Saliency training does not improve accuracy.",
        (TrialComparison("plain training", "val_accuracy", "saliency training", by=-MARGIN),),
    ),
    Claim(
        "Grad-CAM training lies between saliency training and augmentation in accuracy.",
        (
            TrialComparison("Grad-CAM training", "val_accuracy", "saliency training"),
            TrialComparison("augmentation", "val_accuracy", "Grad-CAM training"),
        ),
    ),
    Claim(
        "SGD with learning rate 0.001 and augmentation is the best configuration.",
        (TrialComparison("SGD with 0.001 and augmentation", "val_accuracy", "the best other configuration"),),
    ),
    Claim(
        "Saliency is noisier than Grad-CAM.",
        (
            *(MapComparison("saliency", m, "gradcam") for m in ("high_frequency_share", "max_sensitivity")),
            # At equal resolution and with equal values too, and more than the edges of the picture make it.
            *(
                MapComparison("pooled_saliency", m, "gradcam", control=True)
                for m in ("high_frequency_share", "max_sensitivity")
            ),
            MapComparison("random", "high_frequency_share", "gradcam", control=True),
            *(MapComparison("saliency", "high_frequency_share", m, control=True) for m in ("sobel", "gaussian")),
        ),
    ),
    Claim(
        # Less on the object than its area, in more than one case of ten, and more often than what knows no network.
        "In several cases saliency lies on the background.",
        (
            MapComparison("saliency", "energy_lift", 0.1, below=1.0),
            *(MapComparison("saliency", "energy_lift", other, below=1.0, control=True) for other in CONTROLS),
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


def decide(
    measures: pd.DataFrame | None = None,
    trials: pd.DataFrame | None = None,
    epochs: pd.DataFrame | None = None,
    claims: Sequence[Claim] = CLAIMS,
) -> pd.DataFrame:
    """Return each claim's comparisons and its verdict.

    A comparison holds if the 95 % interval of its difference lies above 0 (or ``by``), and does not if it lies below. A
    claim is

    - ``supported`` if all its comparisons hold,
    - ``not supported`` if any does not, or if only those with controls are open: it beats the rival and nothing else,
    - ``undecided`` if one with a rival is open, or if what was measured holds but a control was not measured, or on
      too few images, or of one seed,
    - ``no data`` if no comparison with a rival could be made.

    Args:
        measures: as :func:`analysis.load_measures` gives them, of one data set; where they are of several networks,
            each image counts with its mean over these.
        trials: as :func:`analysis.load_trials` gives them, of runs over the same images.
        epochs: as :func:`analysis.load_epochs` gives them; where early stopping left a kind of trials without a
            configuration that was trained to the end, it is compared at the last epoch that all of both kinds reached.
        claims: what to decide.

    Returns:
        One row a comparison: ``claim``, ``verdict`` (of the whole claim), ``of``, ``measure``, ``than``, ``below``,
        ``by``, ``control``, ``difference`` (mean, of ``of`` minus ``than``), ``low``, ``high`` (over images by the
        paired bootstrap, over seeds by Student's t), ``holds`` (``yes``, ``no``, ``open``), ``n`` and ``unit``
        (``images``, which in grid pointing stand for the grids that they come first in, or ``seeds``),
        ``num_networks``, ``epoch`` (at which trials were compared, if before their end), ``reason`` (why it could not
        be made, or is open whatever the numbers are).

    Raises:
        RunError: if a claim asks for what is no column, or the trials are of runs that cannot stand beside each other.
    """
    if trials is not None and "run" in trials and trials["run"].nunique() > 1:
        check_comparable([local_run(run) for run in trials["run"].unique()], same_epochs=True)
    index = ["measure", "image"]
    values = pd.DataFrame(index=pd.MultiIndex.from_arrays([[], []], names=index))
    if measures is not None:
        index = [*(name for name in ("run", "trial_id") if name in measures), *index]
        values = measures.pivot_table(index=index, columns="map", values="value", aggfunc="mean", observed=True)
    speaking = confirmed(trials) if trials is not None else pd.DataFrame()
    rows = []
    for claim in claims:
        found = []
        for comparison in claim.comparisons:
            if isinstance(comparison, MapComparison):
                made = {"below": comparison.below, **_compare_maps(comparison, values)}
            else:
                made = {"by": comparison.by, **_compare_trials(comparison, speaking, epochs)}
            shown = {name: str(getattr(comparison, name)) for name in ("of", "measure", "than")}
            found.append({"control": comparison.control, **shown, "holds": "open", **made})
        known = [row for row in found if "n" in row and not (row["control"] and row.get("reason"))]
        of_all, of_rivals = ({row["holds"] for row in known if not (rivals and row["control"])} for rivals in (0, 1))
        if not of_rivals:
            verdict = "no data"
        elif "no" in of_all or (of_rivals == {"yes"} and "open" in of_all):
            verdict = "not supported"
        else:
            verdict = "supported" if of_all == {"yes"} and len(known) == len(found) else "undecided"
        rows += [{"claim": claim.sentence, "verdict": verdict, **row} for row in found]
    return pd.DataFrame(rows, columns=list(CLAIM_COLUMNS)).astype(CLAIM_COLUMNS)


def _compare_maps(comparison: MapComparison, values: pd.DataFrame) -> dict[str, Any]:
    """Return what came of a comparison of maps, or the reason why nothing did."""
    maps = [name for name in (comparison.of, comparison.than) if isinstance(name, str)]
    of_measure = values[values.index.get_level_values("measure") == comparison.measure]
    known = of_measure[np.isfinite(of_measure[maps]).all(axis=1)] if set(maps) <= set(values) else of_measure.head(0)
    if known.empty:
        of = "" if of_measure.empty else f" of {' and '.join(maps)}"
        return {"reason": f"{comparison.measure}{of} was not measured, or is not kept here"}
    compared = known[maps] if comparison.below is None else (known[maps] < comparison.below) * 1.0
    theirs: Any = compared[comparison.than] if isinstance(comparison.than, str) else comparison.than
    differences: pd.Series = compared[comparison.of] - theirs
    of_images = differences.groupby(level="image").mean().to_numpy()
    mean, low, high = bootstrap_interval(of_images)
    asked = MIN_IMAGES if comparison.below is None else MIN_IMAGES_OF_SHARE
    made = {
        "difference": mean,
        "low": low,
        "high": high,
        "n": len(of_images),
        "unit": "images",
        "num_networks": len({key[:-1] for key in known.index}),
    }
    if len(of_images) < asked:
        return {**made, "reason": f"{len(of_images)} images, of {asked} that it takes"}
    return {**made, "holds": "yes" if low > 0 else "no" if high < 0 else "open"}


def _compare_trials(comparison: TrialComparison, trials: pd.DataFrame, epochs: pd.DataFrame | None) -> dict[str, Any]:
    """Return what came of a comparison of trials, or the reason why nothing did."""
    if trials.empty:
        return {"reason": "no trials were given"}
    sides = []
    names = (comparison.of, comparison.than)
    for name in names:
        query = KINDS.get(name, name)
        try:
            chosen = trials.query(query)
        except Exception as error:  # whatever the expression makes pandas, numexpr or Python raise
            raise RunError(f"claim over {query!r}: {error}; columns are {', '.join(trials.columns)}") from error
        if not chosen["val_accuracy"].notna().any():
            return {"reason": f"no trial with an epoch is of the kind {name}"}
        sides.append(chosen)
    measure = comparison.measure
    if measure not in trials and measure not in COMPUTED and not MEASURE_OF_MAPS.fullmatch(measure):
        raise RunError(f"claim over {measure!r}: no such column; columns are {', '.join(trials.columns)}")
    budgets = set.intersection(*(set(side["max_epochs"]) for side in sides))
    if not budgets:
        return {"reason": "the trials were to last for different numbers of epochs"}
    sides = [side[side["max_epochs"] == max(budgets)] for side in sides]
    epoch = None
    if silent := _without_configuration(names, sides):
        reached = [common_epoch(side) for side in sides]
        if epochs is None or None in reached:
            more = ", and no epochs were given" if epochs is None else ""
            return {
                "reason": f"no configuration of the kind {silent[0]} was trained to the end with all its seeds{more}"
            }
        epoch = min(filter(None, reached))
        sides = [at_epoch(side, epochs, epoch) for side in sides]
        if silent := _without_configuration(names, sides):
            return {"reason": f"no configuration of the kind {silent[0]} reached epoch {epoch} with all its seeds"}
    if any(measure not in side for side in sides):
        return {"reason": f"{measure} is not known of trials that can be compared"}
    best = [best_over_seeds(side, measure) for side in sides]
    if any(values.isna().all() for values in best):
        return {"reason": f"{measure} is not known of trials that can be compared"}
    mean, low, high, n = paired_over_seeds(*best)
    holds = "yes" if low > comparison.by else "no" if high < comparison.by else "open"
    reason = "one seed" if math.isnan(low) else None
    made = {"difference": mean, "low": low, "high": high, "holds": holds, "n": n, "unit": "seeds", "reason": reason}
    return {**made, "num_networks": sum(map(len, best)), "epoch": epoch}


def _without_configuration(names: Sequence[str], sides: Sequence[pd.DataFrame]) -> list[str]:
    """Return the kinds of trials for which no configuration speaks."""
    return [name for name, side in zip(names, sides, strict=True) if best_configuration(side).empty]
