"""Comparisons of trials: DataFrame in, DataFrame out."""

import functools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.trials import HYPERPARAMETERS, varied

Z95 = 1.959964  # 97.5 % quantile of the normal distribution
# 97.5 % quantiles of Student's t distribution with 1 to 10 degrees of freedom (any table of it).
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def wilson_interval(accuracy: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share observed on n images (Wilson, JASA 1927).

    It covers the chance in which images were drawn, not the chance in training: for that, repeat with other seeds.
    """
    if n <= 0 or not math.isfinite(accuracy):
        return math.nan, math.nan
    centre = (accuracy + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(accuracy * (1 - accuracy) / n + Z95**2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _t95(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    # Fisher's expansion about the normal quantile, exact to three digits beyond the table.
    return Z95 + (Z95**3 + Z95) / (4 * freedom) + (5 * Z95**5 + 16 * Z95**3 + 3 * Z95) / (96 * freedom**2)


def _finite(values: Sequence[float] | NDArray[np.floating]) -> tuple[NDArray[np.float64], float]:
    """Return those values that are numbers, and their mean; NaN of none."""
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    return finite, float(finite.mean()) if len(finite) else math.nan


def mean_interval(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float, float]:
    """Return mean and 95 % interval of independent values, by Student's t; NaN limits for fewer than two."""
    finite, mean = _finite(values)
    if len(finite) < 2:
        return mean, math.nan, math.nan
    half = _t95(len(finite) - 1) * float(finite.std(ddof=1)) / math.sqrt(len(finite))
    return mean, mean - half, mean + half


def bootstrap_interval(values: NDArray[np.floating]) -> tuple[float, float, float]:
    """Return mean and 95 % interval of values of independent images, by the percentile bootstrap; NaN is left out.

    2,000 resamples, seeded (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13). Given differences of
    two maps of the same images, it is the paired bootstrap.
    """
    finite, mean = _finite(values)
    if len(finite) < 2:
        return mean, math.nan, math.nan
    low, high = np.quantile(_resamples(len(finite)) @ finite / len(finite), (0.025, 0.975))
    return mean, float(low), float(high)


@functools.lru_cache(maxsize=4)
def _resamples(n: int) -> NDArray[np.float64]:
    """Return how often each of n values is drawn in each resample, (2000, n)."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=2000).astype(np.float64)


def paired_difference(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Return the difference in accuracy of two networks on the same images, with its 95 % interval.

    Args:
        a: (N,) bool, whether the first network is right on each image.
        b: (N,) bool, the second on the same images.
    """
    return mean_interval(a.astype(np.float64) - b.astype(np.float64))


def difference_of_means(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Return the difference of two groups' means with its 95 % interval (Welch, Biometrika 1947).

    The degrees of freedom are those of the smaller group, which errs on the wide side. NaN limits where a group has
    fewer than two values.
    """
    difference = float(np.mean(a) - np.mean(b))
    freedom = min(len(a), len(b)) - 1
    if freedom < 1:
        return difference, math.nan, math.nan
    half = _t95(freedom) * math.sqrt(np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b))
    return difference, difference - half, difference + half


def recipe_columns(trials: pd.DataFrame) -> list[str]:
    """Return the hyperparameters that make up a recipe: those that vary and are kinds, not amounts.

    Amounts (``lr``, ``weight_decay``, ...) are tuned within a recipe. Where only amounts vary, they are the recipe.
    """
    names = [name for name in varied(trials) if name != "seed"]
    kinds = [
        name
        for name in names
        if not pd.api.types.is_numeric_dtype(trials[name]) or pd.api.types.is_bool_dtype(trials[name])
    ]
    return kinds or names


def recipe_name(row: pd.Series, columns: Sequence[str]) -> str:
    """Return a recipe in words, for example ``sgd · flip+crop``."""
    words = []
    for name in columns:
        value = row[name]
        plain = isinstance(value, str) and value != "none" and not value[0].isdigit()
        words.append(str(value) if plain else f"no {name}" if value == "none" else f"{name} {value}")
    return " · ".join(words) or "the one recipe"


def amount_columns(trials: pd.DataFrame) -> list[str]:
    """Return the hyperparameters that vary within a recipe, without the seed."""
    columns = recipe_columns(trials)
    return [name for name in varied(trials) if name not in columns and name != "seed"]


def compare_recipes(trials: pd.DataFrame, num_val_images: int) -> pd.DataFrame:
    """Return each recipe's best configuration, best recipe first.

    Configurations are compared by validation accuracy, averaged over seeds. A configuration counts as whole if all its
    seeds were trained to the end: of one that ASHA thinned out, only the lucky seeds would be left. A recipe is
    represented by one that is not whole only if it has no other, is then marked ``censored`` and stands after the
    others.

    Args:
        trials: as :func:`analysis.load_trials` gives them.
        num_val_images: images behind each validation accuracy.

    Returns:
        One row a recipe: ``recipe``, the recipe's columns and the varied amounts, ``trial_ids``, ``num_seeds`` (with a
        result), ``num_seeds_asked``, ``num_trials`` (of the recipe), ``censored``, ``epochs``, ``val_accuracy`` with
        ``val_low`` and ``val_high`` (95 %: over seeds where there are several, else over images), ``train_accuracy``,
        ``generalization_gap``.
    """
    columns, amounts = recipe_columns(trials), amount_columns(trials)
    rows = []
    for _, group in trials.groupby(columns, observed=True, sort=False) if columns else [((), trials)]:
        candidates = []
        for _, asked in group.groupby([*amounts, "max_epochs"], observed=True, sort=False):
            completed = asked["status"] == "completed"
            seen = asked[asked["val_accuracy"].notna() & (completed | (not completed.any()))]
            if len(seen):
                whole = bool(completed.all())
                candidates.append((whole, float(seen["val_accuracy"].mean()), asked, seen))
        if not candidates:
            continue
        whole, _, asked, best = max(candidates, key=lambda candidate: candidate[:2])
        by_seed = best.groupby("seed")["val_accuracy"].mean()
        mean, low, high = mean_interval(by_seed.to_numpy())
        low, high = (max(0.0, low), min(1.0, high)) if len(by_seed) > 1 else wilson_interval(mean, num_val_images)
        first = best.iloc[0]
        rows.append(
            {
                "recipe": recipe_name(first, columns),
                **{name: first[name] for name in [*columns, *amounts]},
                "trial_ids": tuple(best["trial_id"]),
                "num_seeds": len(by_seed),
                "num_seeds_asked": int(asked["seed"].nunique()),
                "num_trials": len(group),
                "censored": not whole,
                "epochs": int(best["epochs"].max()),
                "val_accuracy": mean,
                "val_low": low,
                "val_high": high,
                "train_accuracy": best["train_accuracy"].mean(),
                "generalization_gap": best["generalization_gap"].mean(),
            }
        )
    if not rows:
        return pd.DataFrame()
    return pd.DataFrame(rows).sort_values(["censored", "val_accuracy"], ascending=[True, False], ignore_index=True)


def top_trials(trials: pd.DataFrame, k: int) -> pd.DataFrame:
    """Return the trials of the k configurations that are worth a look at the test set, best first.

    The seeds of a configuration stand together. The best configuration of each recipe comes before its others, then
    validation accuracy, averaged over seeds, decides. Trials that were stopped early count only where none was
    completed, and only those with a checkpoint.
    """
    seen = trials[trials["val_accuracy"].notna()]
    has_checkpoint = seen["checkpoint"].notna()
    completed = seen["status"] == "completed"
    if (completed & has_checkpoint).any():
        seen, has_checkpoint = seen[completed], has_checkpoint[completed]
    usable = seen[has_checkpoint]
    columns, amounts = recipe_columns(trials), amount_columns(trials)
    keys = [*columns, *amounts]
    if usable.empty or not keys:
        return usable.sort_values("val_accuracy", ascending=False, kind="stable") if k else usable.head(0)
    # The mean is over all seeds, also over those whose checkpoints were let go.
    means = seen.groupby(keys, observed=True, sort=False).agg({"val_accuracy": "mean", "checkpoint": "count"})
    means = means[means["checkpoint"] > 0].sort_values("val_accuracy", ascending=False, kind="stable")
    ranked = means.reset_index()[keys]
    again = ranked.duplicated(columns)
    ranked = pd.concat([ranked[~again], ranked[again]]).head(k).assign(_rank=range(min(k, len(ranked))))
    ordered = usable.reset_index().merge(ranked, on=keys).sort_values(["_rank", "seed"], kind="stable")
    return usable.loc[ordered["index"]]


def asha_savings(trials: pd.DataFrame) -> pd.DataFrame:
    """Return how many trials were trained for how long, one row for each number of epochs that some trial ended at.

    Returns:
        ``epoch``, ``trials_trained`` (at least so long), ``trials_stopped`` (there), and for the whole run in every
        row ``epochs_run`` and ``epochs_without_stopping``.
    """
    ended = trials[trials["epochs"] > 0]
    if ended.empty:
        return pd.DataFrame()
    stopped = ended[ended["status"] == "stopped"]
    marks = sorted(set(ended["epochs"]))
    return pd.DataFrame(
        {
            "epoch": marks,
            "trials_trained": [int((ended["epochs"] >= mark).sum()) for mark in marks],
            "trials_stopped": [int((stopped["epochs"] == mark).sum()) for mark in marks],
            "epochs_run": int(ended["epochs"].sum()),
            "epochs_without_stopping": int(ended["max_epochs"].sum()),
        }
    )


def accuracy_over(trials: pd.DataFrame, name: str = "lr") -> pd.DataFrame:
    """Return validation accuracy over one hyperparameter for every combination of the recipe's columns.

    Returns:
        The recipe's columns, ``recipe``, ``name``, ``val_accuracy`` (best over what else varies, mean over seeds) and
        ``censored`` (no trial of the point was completed).
    """
    columns = [column for column in recipe_columns(trials) if column != name]
    others = [column for column in HYPERPARAMETERS if column in varied(trials) and column not in (*columns, name)]
    rows = []
    keys = [*columns, name]
    for _, group in trials[trials["val_accuracy"].notna()].groupby(keys, observed=True):
        whole = group[group["status"] == "completed"]
        pool = group if whole.empty else whole
        means = pool.groupby(others, observed=True)["val_accuracy"].mean() if others else pool["val_accuracy"].mean()
        first = group.iloc[0]
        rows.append(
            {
                **{key: first[key] for key in keys},
                "recipe": recipe_name(first, columns),
                "val_accuracy": float(np.max(means)),
                "censored": whole.empty,
            }
        )
    return pd.DataFrame(rows, columns=[*keys, "recipe", "val_accuracy", "censored"])
