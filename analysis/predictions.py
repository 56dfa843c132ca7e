"""What explained networks predict of the test images: by class, by confidence, and what they confuse."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.explanations import Explanation, read_explained
from analysis.intervals import bootstrap_interval, wilson_interval
from analysis.remote import RunPath
from analysis.study_file import read_study
from analysis.trials import over_runs
from trainables.data import ImageData

NUM_BINS = 15


def load_predictions(runs: RunPath | Iterable[RunPath]) -> pd.DataFrame:
    """Return what each explained trial's network says of each test image.

    Args:
        runs: a run directory, or several; then a column ``run`` comes first.

    Returns:
        A DataFrame with ``trial_id``, ``image`` (its number), ``label`` and ``predicted`` (categories: the class
        names), ``confidence`` (softmax of the predicted class's logit) and ``correct``; where classes have
        superclasses also ``superclass`` and ``predicted_superclass``. No rows if no trial was explained.

    Raises:
        RunError: if a directory is no run.

    Warns:
        UnreadableExplanation: of each trial whose file cannot be read; it has no rows.
    """
    return over_runs(runs, _prediction_table)


def _prediction_table(run: Path) -> pd.DataFrame:
    data = read_study(run)["data"]
    kinds = _kinds(data["class_names"], data.get("superclass_names") or [], data.get("superclasses") or [])
    size = len(data["class_names"])

    def read(file: Path, trial_id: str) -> pd.DataFrame:
        with np.load(file, allow_pickle=False) as arrays:
            logits, labels = arrays["logits"], arrays["labels"]
        if logits.shape != (len(labels), size) or not set(labels.tolist()) <= set(range(size)):
            raise ValueError(f"is not of {size} classes")
        return _table(logits, labels, trial_id, *kinds)

    nothing = _table(np.empty((0, size)), np.empty(0, dtype=np.int64), "", *kinds)
    return pd.concat([nothing, *read_explained(run, "arrays.npz", read)], ignore_index=True)


def _kinds(
    class_names: Sequence[str], superclass_names: Sequence[str], superclasses: Sequence[int]
) -> tuple[pd.CategoricalDtype, pd.CategoricalDtype, np.ndarray]:
    """Return the categories of classes and of superclasses, and each class's superclass."""
    classes, kinds = (pd.CategoricalDtype([str(name) for name in names]) for names in (class_names, superclass_names))
    return classes, kinds, np.asarray(superclasses, dtype=np.int64)


def _table(
    logits: np.ndarray,
    labels: np.ndarray,
    trial_id: str,
    classes: pd.CategoricalDtype,
    superclasses: pd.CategoricalDtype,
    of_class: np.ndarray,
) -> pd.DataFrame:
    predicted = logits.argmax(axis=1)
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True, initial=-np.inf)
    confidence = 1 / np.exp(shifted).sum(axis=1)
    table = {
        "trial_id": pd.Series([trial_id] * len(labels), dtype="str"),
        "image": np.arange(len(labels)),
        "label": pd.Categorical.from_codes(labels, dtype=classes),
        "predicted": pd.Categorical.from_codes(predicted, dtype=classes),
        "confidence": confidence,
        "correct": predicted == labels,
    }
    if len(of_class):
        table["superclass"] = pd.Categorical.from_codes(of_class[labels], dtype=superclasses)
        table["predicted_superclass"] = pd.Categorical.from_codes(of_class[predicted], dtype=superclasses)
    return pd.DataFrame(table)


def predictions_of(explanations: Sequence[Explanation], data: ImageData) -> pd.DataFrame:
    """Return what :func:`load_predictions` does, of networks that are at hand."""
    kinds = _kinds(data.class_names, data.superclass_names, data.superclasses)
    return pd.concat([_table(e.logits, e.labels, e.trial_id, *kinds) for e in explanations], ignore_index=True)


def class_accuracy(predictions: pd.DataFrame, by: str = "label") -> pd.DataFrame:
    """Return accuracy class by class, the least first.

    Args:
        predictions: as :func:`load_predictions` gives them; of several networks, each image counts with its mean.
        by: ``label``, or ``superclass``.

    Returns:
        ``by``, ``accuracy`` with ``low`` and ``high`` (95 % over images: Wilson's of one network, the bootstrap's of
        several), ``num_images``, ``num_networks``; of superclasses also ``within``, the share of images whose
        superclass is predicted, whatever the class.
    """
    networks = _networks(predictions)
    measures = {"accuracy": predictions["correct"]}
    if by == "superclass":
        measures["within"] = predictions["superclass"] == predictions["predicted_superclass"]
    rows = []
    for name, group in predictions.assign(**measures).groupby(by, observed=True):
        of_images = group.groupby("image")[list(measures)].mean()
        if networks == 1:
            mean = float(of_images["accuracy"].mean())
            low, high = wilson_interval(mean, len(of_images))
        else:
            mean, low, high = bootstrap_interval(of_images["accuracy"].to_numpy())
        more = {"within": float(of_images["within"].mean())} if "within" in measures else {}
        counts = {"num_images": len(of_images), "num_networks": networks}
        rows.append({by: name, "accuracy": mean, "low": low, "high": high, **more, **counts})
    within = ["within"] if by == "superclass" else []
    table = pd.DataFrame(rows, columns=[by, "accuracy", "low", "high", *within, "num_images", "num_networks"])
    return table.astype({by: predictions[by].dtype}).sort_values("accuracy", kind="stable", ignore_index=True)


def calibration(predictions: pd.DataFrame, num_bins: int = NUM_BINS) -> pd.DataFrame:
    """Return whether networks are right as often as they are confident (Guo et al., ICML 2017).

    Args:
        predictions: as :func:`load_predictions` gives them; those of several networks are taken together.
        num_bins: bins of equal width in confidence.

    Returns:
        One row a bin that has predictions: ``low``, ``high`` (its edges), ``confidence`` and ``accuracy`` (means in
        it), ``num_predictions``, and in every row ``expected_calibration_error``: the mean over predictions of the
        distance between the two.
    """
    bins = np.minimum((predictions["confidence"].to_numpy() * num_bins).astype(np.int64), num_bins - 1)
    found = predictions.groupby(bins).agg(
        confidence=("confidence", "mean"), accuracy=("correct", "mean"), num_predictions=("correct", "size")
    )
    error = ((found["accuracy"] - found["confidence"]).abs() * found["num_predictions"]).sum()
    edges = {"low": found.index / num_bins, "high": (found.index + 1) / num_bins}
    table = pd.DataFrame(edges | {name: found[name].to_numpy() for name in found})
    return table.assign(expected_calibration_error=error / max(1, len(predictions)))


def confusion(predictions: pd.DataFrame, by: str = "label") -> pd.DataFrame:
    """Return which share of each class's images is predicted as which class: rows are the truth, and add up to 1.

    Args:
        predictions: as :func:`load_predictions` gives them; those of several networks are taken together.
        by: ``label``, or ``superclass``.
    """
    predicted = "predicted" if by == "label" else "predicted_superclass"
    counts = pd.crosstab(predictions[by], predictions[predicted], dropna=False)
    return counts.div(counts.sum(axis=1).clip(lower=1), axis=0)


def confused_pairs(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return which classes are taken for which other ones, the most frequent first.

    Args:
        predictions: as :func:`load_predictions` gives them; those of several networks are taken together.

    Returns:
        ``label``, ``predicted``, ``share`` (of the label's images; mean over networks), ``back`` (share of the
        predicted class's images that are taken for ``label``), ``num_images`` (of the label), ``num_networks``; where
        classes have superclasses also ``same_superclass``.
    """
    networks = _networks(predictions)
    wrong = predictions[~predictions["correct"]]
    table = wrong.groupby(["label", "predicted"], observed=True).size().reset_index(name="share")
    total = predictions["label"].value_counts().astype("float64")
    table["share"] /= table["label"].map(total).astype("float64")
    turned = table.rename(columns={"label": "predicted", "predicted": "label", "share": "back"})
    table = table.merge(turned, on=["label", "predicted"], how="left").fillna({"back": 0.0})
    table["num_images"] = (table["label"].map(total).astype("float64") / max(1, networks)).astype("int64")
    table["num_networks"] = networks
    if "superclass" in predictions:
        same = wrong["superclass"] == wrong["predicted_superclass"]
        table["same_superclass"] = same.groupby([wrong["label"], wrong["predicted"]], observed=True).all().to_numpy()
    return table.sort_values("share", ascending=False, kind="stable", ignore_index=True)


def _networks(predictions: pd.DataFrame) -> int:
    keys = [name for name in ("run", "trial_id") if name in predictions]
    return len(predictions[keys].drop_duplicates())
