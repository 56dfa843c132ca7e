"""Comparisons of trials: DataFrame in, DataFrame out."""

import functools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.trials import ENDED, HYPERPARAMETERS, varied
from trainables.setups import FORWARDS

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


def student_t95(freedom: int) -> float:
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
    half = student_t95(len(finite) - 1) * float(finite.std(ddof=1)) / math.sqrt(len(finite))
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
    half = student_t95(freedom) * math.sqrt(np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b))
    return difference, difference - half, difference + half


def paired_over_seeds(a: pd.Series, b: pd.Series) -> tuple[float, float, float, int]:
    """Return the difference of two groups' means with its 95 % interval, and of how many seeds that is.

    What the seeds have in common (the first weights, the order of images) is taken out where there are at least two
    shared ones: the interval is Student's t over their differences. Else it is Welch's over both groups' seeds. It is
    not the bootstrap: of five values its 95 % interval covers 84 %.

    Args:
        a: a value of each trial, indexed by its seed; several of one seed are averaged.
        b: likewise, of the other group.
    """
    a, b = (values.dropna().groupby(level=0).mean() for values in (a, b))
    shared = a.index.intersection(b.index)
    if len(shared) > 1:
        return *mean_interval((a[shared] - b[shared]).to_numpy(dtype=np.float64)), len(shared)
    return *difference_of_means(a.to_list(), b.to_list()), min(len(a), len(b))


def best_configuration(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the trials of the configuration that is best in validation accuracy, averaged over seeds.

    Only of those whose seeds were all trained to the end and, once any such is confirmed, of the confirmed ones;
    without rows if there is none.
    """
    seen = _eligible(trials)
    if seen.empty:
        return seen
    configurations = seen.groupby(_configuration_columns(trials), observed=True)
    numbers, means = configurations.ngroup(), configurations["val_accuracy"].transform("mean")
    return seen[numbers.to_numpy() == numbers.iloc[int(means.to_numpy().argmax())]]


def _eligible(trials: pd.DataFrame) -> pd.DataFrame:
    trials = trials[trials["seed"].notna()]
    if trials.empty:
        return trials
    names = _configuration_columns(trials)
    whole = (trials["status"] == "completed").groupby([trials[name] for name in names], observed=True).transform("all")
    seen = trials[whole & trials["val_accuracy"].notna()]
    again = seen["phase"] == "confirm"
    return seen[again] if again.any() else seen


def best_over_seeds(trials: pd.DataFrame, measure: str) -> pd.Series:
    """Return a measure of the best configuration, one value a seed, indexed by it.

    Which configuration is the best is decided for each seed by the validation accuracy of the others, so that luck
    which made it the best does not count as merit. (Chosen and judged by the same five seeds, the best of eight equal
    configurations would beat a ninth one, beyond chance, in one study of eight.) The configurations are those of
    :func:`best_configuration`.
    """
    seen = _eligible(trials)
    if seen.empty:
        return pd.Series(dtype="float64")
    names = _configuration_columns(seen)
    seen = seen.assign(_number=seen.groupby(names, observed=True).ngroup())
    tables = [
        seen.pivot_table(index="_number", columns="seed", values=name, aggfunc="mean", dropna=False, observed=True)
        for name in ("val_accuracy", measure)
    ]
    accuracy, values = tables[0], tables[1].reindex_like(tables[0])
    chosen = {}
    for seed in accuracy.columns:
        there = accuracy[accuracy[seed].notna()]
        others = there.drop(columns=seed).mean(axis=1)
        by = others if others.notna().any() else there[seed]  # a single seed, which gives no verdict anyway
        chosen[seed] = values[seed].iloc[accuracy.index.get_loc(by.idxmax())]
    return pd.Series(chosen, dtype="float64")


def recipe_columns(trials: pd.DataFrame) -> list[str]:
    """Return the hyperparameters that make up a recipe: those that vary and are kinds, not amounts.

    Amounts (``lr``, ``weight_decay``, ...) are tuned within a recipe. Where only amounts vary, they are the recipe.
    """
    names = varied_hyperparameters(trials)
    kinds = [
        name
        for name in names
        if not pd.api.types.is_numeric_dtype(trials[name]) or pd.api.types.is_bool_dtype(trials[name])
    ]
    return kinds or names


def varied_hyperparameters(trials: pd.DataFrame) -> list[str]:
    """Return the hyperparameters that vary, without the seed and what the setup decides."""
    names = [name for name in varied(trials) if name != "seed"]
    if "setup" not in names:
        return names
    own = trials.groupby("setup", observed=True)
    return [name for name in names if name == "setup" or own[name].nunique().max() > 1]


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
    return [name for name in varied_hyperparameters(trials) if name not in columns]


def compare_recipes(trials: pd.DataFrame, num_val_images: int) -> pd.DataFrame:
    """Return each recipe's best configuration, best recipe first.

    Configurations are compared by validation accuracy, averaged over seeds. A configuration counts as whole if all its
    seeds were trained to the end: of one that ASHA thinned out, only the lucky seeds would be left. A recipe is
    represented by one that is not whole only if it has no other, is then marked ``censored`` and stands after the
    others. Once a configuration was confirmed (see :func:`confirmed`), recipes are represented by such, and those that
    are not stand after them: their accuracy is that of the luckiest.

    Args:
        trials: as :func:`analysis.load_trials` gives them.
        num_val_images: images behind each validation accuracy.

    Returns:
        One row a recipe: ``recipe``, the recipe's columns and the varied amounts, ``trial_ids``, ``num_seeds`` (with a
        result), ``num_seeds_asked``, ``num_trials`` (of the recipe), ``censored``, ``epochs``, ``val_accuracy`` with
        ``val_low`` and ``val_high`` (95 %: over seeds where there are several, else over images), ``train_accuracy``,
        ``generalization_gap``, ``train_seconds`` (mean of a trial), ``confirmed``; of the trials that were explained,
        ``test_accuracy``, ``test_low``, ``test_high``, ``test_seeds``, and what their maps measure, with ``_low`` and
        ``_high``, likewise.
    """
    trials = confirmed(trials)
    columns, amounts = recipe_columns(trials), amount_columns(trials)
    measured = [str(name) for name in trials if f"{name}_low" in trials]
    rows = []
    for _, group in trials.groupby(columns, observed=True, sort=False) if columns else [((), trials)]:
        candidates = []
        for _, asked in group.groupby([*amounts, "max_epochs"], observed=True, sort=False):
            completed = asked["status"] == "completed"
            seen = asked[asked["val_accuracy"].notna() & (completed | (not completed.any()))]
            if len(seen):
                sure = bool(completed.all()), bool((asked["phase"] == "confirm").all())
                candidates.append((*sure, float(seen["val_accuracy"].mean()), asked, seen))
        if not candidates:
            continue
        whole, again, _, asked, best = max(candidates, key=lambda candidate: candidate[:3])
        num_test = best["num_test_images"].max() if "num_test_images" in best else 0
        mean, low, high, seeds = _accuracy_over_seeds(best, "val_accuracy", num_val_images)
        test_mean, test_low, test_high, test_seeds = _accuracy_over_seeds(best, "test_accuracy", num_test)
        first = best.iloc[0]
        rows.append(
            {
                "recipe": recipe_name(first, columns),
                **{name: first[name] for name in [*columns, *amounts]},
                "trial_ids": tuple(best["trial_id"]),
                "num_seeds": seeds,
                "num_seeds_asked": int(asked["seed"].nunique()),
                "num_trials": len(group),
                "censored": not whole,
                "confirmed": again,
                "epochs": int(best["epochs"].max()),
                "val_accuracy": mean,
                "val_low": low,
                "val_high": high,
                "train_accuracy": best["train_accuracy"].mean(),
                "generalization_gap": best["generalization_gap"].mean(),
                "train_seconds": best["train_seconds"].mean(),
                "test_accuracy": test_mean,
                "test_low": test_low,
                "test_high": test_high,
                "test_seeds": test_seeds,
                **{key: value for name in measured for key, value in _measure_over_seeds(best, name).items()},
            }
        )
    if not rows:
        return pd.DataFrame()
    order = {"censored": True, "confirmed": False, "val_accuracy": False}
    return pd.DataFrame(rows).sort_values(list(order), ascending=list(order.values()), ignore_index=True)


def _accuracy_over_seeds(trials: pd.DataFrame, name: str, num_images: float) -> tuple[float, float, float, int]:
    """Return the mean over seeds, its interval (over seeds where there are several, else over images), and how many."""
    if name not in trials or trials[name].isna().all():
        return math.nan, math.nan, math.nan, 0
    by_seed = trials.dropna(subset=name).groupby("seed")[name].mean()
    mean, low, high = mean_interval(by_seed.to_numpy())
    low, high = (max(0.0, low), min(1.0, high)) if len(by_seed) > 1 else wilson_interval(mean, int(num_images))
    return mean, low, high, len(by_seed)


def _measure_over_seeds(trials: pd.DataFrame, name: str) -> dict[str, float]:
    by_seed = trials.dropna(subset=name).groupby("seed")[[name, f"{name}_low", f"{name}_high"]].mean()
    mean, low, high = mean_interval(by_seed[name].to_numpy())
    if len(by_seed) == 1:  # of its images
        low, high = (float(by_seed[f"{name}{end}"].iloc[0]) for end in ("_low", "_high"))
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def by_budget(trials: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the trials of equal epochs and those of equal compute, of studies with ``equal_compute``.

    Of equal compute are the trials of setups that cost no more than plain training, and of the others those that had
    fewer epochs for it. Without such, the second table has no rows.
    """
    trials = trials[trials["seed"].notna()]  # a search that chooses as it goes has trials without settings yet
    most = trials.groupby("run")["max_epochs"].transform("max") if "run" in trials else trials["max_epochs"].max()
    shorter = trials["max_epochs"] < most
    costs_more = trials["setup"].isin([setup for setup, cost in FORWARDS.items() if cost > FORWARDS["plain"]])
    return trials[~shorter], trials[shorter == costs_more] if (shorter & costs_more).any() else trials.head(0)


def confirmed(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the trials that speak for their configurations.

    Of a configuration whose fresh seeds have all ended, those alone (``phase`` ``confirm``): that it was chosen for its
    search trials makes these look better than it is. Of any other, its search trials.
    """
    names = _configuration_columns(trials)
    again = trials[trials["phase"] == "confirm"]
    done = again["status"].isin(ENDED).groupby([again[name] for name in names], observed=True).transform("all")
    whole = again.loc[done[done].index]
    settled = pd.MultiIndex.from_frame(trials[names]).isin(pd.MultiIndex.from_frame(whole[names]))
    return trials[(trials["phase"] == "search") & ~settled | trials.index.isin(whole.index)]


def _configuration_columns(trials: pd.DataFrame) -> list[str]:
    return [*recipe_columns(trials), *amount_columns(trials), "max_epochs"]


def top_configurations(trials: pd.DataFrame, k: int) -> pd.DataFrame:
    """Return the first trial of each of the k best configurations, best first.

    The best configuration of each recipe comes before its others, then validation accuracy, averaged over seeds,
    decides. Where any trial was completed, only such count.
    """
    seen = trials["val_accuracy"].notna()
    if (completed := seen & (trials["status"] == "completed")).any():
        seen = completed
    return _best_first(trials[seen], recipe_columns(trials), _configuration_columns(trials)).head(k)


def _best_first(seen: pd.DataFrame, recipe: Sequence[str], configuration: Sequence[str]) -> pd.DataFrame:
    names = list(configuration)
    means = seen.groupby(names, observed=True, sort=False)["val_accuracy"].transform("mean")
    order = pd.DataFrame({"again": seen["phase"] == "confirm", "mean": means}).sort_values(
        ["again", "mean"], ascending=False, kind="stable"
    )
    first = seen.loc[order.index].drop_duplicates(names)
    again = first.duplicated(list(recipe)) if recipe else pd.Series(False, index=first.index)
    return pd.concat([first[~again], first[again]])


def top_trials(trials: pd.DataFrame, k: int) -> pd.DataFrame:
    """Return the trials of the k configurations that are worth a look at the test set, best first.

    Only those with a checkpoint, and of a configuration that was confirmed only its fresh seeds; confirmed ones come
    first, else see :func:`top_configurations`. The seeds of a configuration stand together.
    """
    trials = confirmed(trials)
    seen = trials["val_accuracy"].notna()
    kept = seen & trials["checkpoint"].notna()
    if (completed := kept & (trials["status"] == "completed")).any():
        kept, seen = completed, seen & (trials["status"] == "completed")
    names = _configuration_columns(trials)
    # The mean is over all seeds, also over those whose checkpoints were let go.
    has_kept = kept.groupby([trials[name] for name in names], observed=True, dropna=False).transform("any")
    best = _best_first(trials[seen & has_kept], recipe_columns(trials), names).head(k)[names]
    chosen = trials[kept].reset_index().merge(best.assign(_rank=range(len(best))), on=names)
    return trials.loc[chosen.sort_values(["_rank", "seed"], kind="stable")["index"]]


def asha_savings(trials: pd.DataFrame) -> pd.DataFrame:
    """Return how many trials of the search were trained for how long, one row for each number of epochs one ended at.

    Returns:
        ``epoch``, ``trials_trained`` (at least so long), ``trials_stopped`` (there), and for the whole run in every
        row ``epochs_run`` and ``epochs_without_stopping``.
    """
    ended = trials[(trials["epochs"] > 0) & (trials["phase"] == "search")]
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
    """Return validation accuracy of the search over one hyperparameter, for every combination of the recipe's columns.

    Returns:
        The recipe's columns, ``recipe``, ``name``, ``val_accuracy`` (best over what else varies, mean over seeds) and
        ``censored`` (no trial of the point was completed).
    """
    trials = trials[trials["phase"] == "search"]
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
