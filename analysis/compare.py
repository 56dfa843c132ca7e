"""Comparisons of trials: DataFrame in, DataFrame out."""

import math
from collections.abc import Sequence

import pandas as pd

from analysis.intervals import mean_interval, wilson_interval
from analysis.trials import ENDED, HYPERPARAMETERS, varied
from trainables.setups import FORWARDS


def best_configuration(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the trials of the configuration that is best in validation accuracy, averaged over seeds.

    Only of those whose seeds were all trained to the end and, once any such is confirmed, of the confirmed ones;
    without rows if there is none.
    """
    seen = _eligible(trials)
    if seen.empty:
        return seen
    configurations = seen.groupby(configuration_columns(trials), observed=True)
    numbers, means = configurations.ngroup(), configurations["val_accuracy"].transform("mean")
    return seen[numbers.to_numpy() == numbers.iloc[int(means.to_numpy().argmax())]]


def _eligible(trials: pd.DataFrame) -> pd.DataFrame:
    if trials.empty:
        return trials
    seen = trials[_whole(trials) & trials["val_accuracy"].notna()]
    again = seen["phase"] == "confirm"
    return seen[again] if again.any() else seen


def _whole(trials: pd.DataFrame) -> pd.Series:
    """Return of each trial whether its configuration was trained to the end with all its seeds."""
    names = configuration_columns(trials)
    return (trials["status"] == "completed").groupby([trials[name] for name in names], observed=True).transform("all")


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
    names = configuration_columns(seen)
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


def drawn(values: pd.Series) -> bool:
    """Return whether a hyperparameter's values were drawn from a range, so that each stands for itself alone.

    That is taken for so of numbers if most trials have one of their own, and there are more than four.
    """
    numeric = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    return numeric and values.nunique() > max(4, len(values) / 2)


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
    search trials makes these look better than it is. Of any other, and where all fresh seeds failed before their first
    epoch, its search trials. Those of which not even the settings are known yet (a search may choose as it goes) speak
    for none.
    """
    trials = trials[trials["seed"].notna()]
    names = configuration_columns(trials)
    again = trials[trials["phase"] == "confirm"]
    of = [again[name] for name in names]
    done = again["status"].isin(ENDED).groupby(of, observed=True).transform("all")
    done &= (
        ((again["status"] == "diverged") | again["val_accuracy"].notna()).groupby(of, observed=True).transform("any")
    )
    whole = again[done]
    settled = pd.MultiIndex.from_frame(trials[names]).isin(pd.MultiIndex.from_frame(whole[names]))
    return trials[(trials["phase"] == "search") & ~settled | trials.index.isin(whole.index)]


def configuration_columns(trials: pd.DataFrame) -> list[str]:
    """Return the columns whose values make up a configuration: all that varies but the seed, and its epochs."""
    return [*recipe_columns(trials), *amount_columns(trials), "max_epochs"]


def top_configurations(trials: pd.DataFrame, k: int) -> pd.DataFrame:
    """Return the first trial of each of the k best configurations, best first.

    The best configuration of each recipe comes before its others, then those of which all seeds were trained to the
    end, then validation accuracy, averaged over seeds. Where any trial was completed, only such count.
    """
    seen = trials["val_accuracy"].notna()
    if (completed := seen & (trials["status"] == "completed")).any():
        seen = completed
    return _best_first(trials, seen).head(k)


def _best_first(trials: pd.DataFrame, counts: pd.Series) -> pd.DataFrame:
    """Return the first trial of each configuration, best first, by those trials that count."""
    recipe, names = recipe_columns(trials), configuration_columns(trials)
    seen = trials[counts]
    means = seen.groupby(names, observed=True, sort=False)["val_accuracy"].transform("mean")
    order = pd.DataFrame({"whole": _whole(trials)[counts], "again": seen["phase"] == "confirm", "mean": means})
    first = seen.loc[
        order.sort_values(["whole", "again", "mean"], ascending=False, kind="stable").index
    ].drop_duplicates(names)
    again = first.duplicated(recipe) if recipe else pd.Series(False, index=first.index)
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
    names = configuration_columns(trials)
    # The mean is over all seeds, also over those whose checkpoints were let go.
    has_kept = kept.groupby([trials[name] for name in names], observed=True, dropna=False).transform("any")
    best = _best_first(trials, seen & has_kept).head(k)[names]
    chosen = trials[kept].reset_index().merge(best.assign(_rank=range(len(best))), on=names)
    return trials.loc[chosen.sort_values(["_rank", "seed"], kind="stable")["index"]]


def common_epoch(trials: pd.DataFrame) -> int | None:
    """Return the last epoch that all trials reached; None if there is none.

    Those that diverged, failed or still run do not decide which that is.
    """
    lengths = trials[trials["status"].isin(["completed", "stopped"])]["epochs"]
    return None if lengths.empty else int(lengths.min())


def at_epoch(trials: pd.DataFrame, epochs: pd.DataFrame, epoch: int) -> pd.DataFrame:
    """Return the trials as they were after an epoch, as if it had been their last: ``completed`` if they reached it.

    Args:
        trials: as :func:`analysis.load_trials` gives them.
        epochs: as :func:`analysis.load_epochs` does, of the same runs.
        epoch: from 1.
    """
    kept = ["run", "trial_id", "status", "phase", "seed", "max_epochs", *HYPERPARAMETERS]
    keys = [name for name in ("run", "trial_id") if name in epochs and name in trials]
    then = epochs[epochs["epoch"] == epoch][[*keys, "train_accuracy", "val_accuracy"]]
    merged = trials[[name for name in kept if name in trials]].merge(then, on=keys, how="left")
    status = merged["status"].astype("str").where(merged["val_accuracy"].isna(), "completed")
    return merged.assign(generalization_gap=merged["train_accuracy"] - merged["val_accuracy"], status=status)
