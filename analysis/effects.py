"""What each hyperparameter did, what early stopping saved, what accuracy cost: DataFrame in, DataFrame out.

Under early stopping, or of runs of different length, trials are compared after the last epoch that all of them
reached: what they had when they ended says as much about that epoch as about the trial. A trial that diverged counts as
accuracy 0, as it does for ASHA.
"""

import math

import numpy as np
import pandas as pd

from analysis.compare import (
    at_epoch,
    by_budget,
    common_epoch,
    configuration_columns,
    confirmed,
    drawn,
    recipe_columns,
    recipe_name,
    varied_hyperparameters,
)
from analysis.intervals import mean_interval
from analysis.optuna_study import to_optuna
from analysis.trials import HYPERPARAMETERS, varied

MIN_IMPORTANT = 4  # trials that count as good ones, at least: fewer say nothing of what they share


def at_common_epoch(trials: pd.DataFrame, epochs: pd.DataFrame) -> tuple[pd.DataFrame, int | None]:
    """Return the trials of the search after the last epoch that all of them reached, and that epoch.

    Args:
        trials: as :func:`analysis.load_trials` gives them; those of equal epochs, see :func:`analysis.by_budget`.
        epochs: as :func:`analysis.load_epochs` does, of the same runs.

    Returns:
        The trials that reached it, and those that diverged, with accuracy 0; none whose value of a hyperparameter that
        varies is not known. Where every trial was trained to the same end, their own best epoch counts, and the epoch
        is None.
    """
    searched = by_budget(trials)[0]
    searched = searched[searched["phase"] == "search"]
    if (searched["status"] == "stopped").any() or searched["max_epochs"].nunique() > 1:
        epoch = common_epoch(searched)
        then = at_epoch(searched, epochs, epoch or 0)
    else:
        epoch, then = None, searched.copy()
    diverged = searched["status"].to_numpy() == "diverged"
    then.loc[diverged, "val_accuracy"] = 0.0
    then = then[(diverged | (then["status"] == "completed").to_numpy()) & then["val_accuracy"].notna()]
    return then.dropna(subset=varied_hyperparameters(then)), epoch


def isolation(trials: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """Return the effect of each hyperparameter's values, the others being equal, with the seed.

    Trials that differ in nothing else make a block. A value's effect is by how much its trials lie above the mean of
    their block, averaged over the blocks that have all values: as in a randomized block design (Fisher, The Design of
    Experiments, 1935). ``best`` is what the tuning playbook's isolation plots show: the best that was reached with the
    value, whatever the others are (Godbole et al., Deep Learning Tuning Playbook, 2023).

    Args:
        trials: as :func:`analysis.load_trials` gives them.
        epochs: as :func:`analysis.load_epochs` does, of the same runs.

    Returns:
        One row a hyperparameter that varies and value, in this order: ``hyperparameter``, ``value`` (as text),
        ``effect`` (difference in validation accuracy), ``low``, ``high`` (95 %, Student's t over blocks, which are no
        independent draws: seeds and other values come back in several), ``num_blocks``, ``best`` (validation accuracy,
        mean over seeds), ``num_trials``, ``epoch`` (after which they were compared; missing if each at its best).
        Hyperparameters drawn from a range are left out; where others were, no block has two trials, and ``effect`` is
        missing.
    """
    then, epoch = at_common_epoch(trials, epochs)
    names = varied_hyperparameters(then)
    rows = []
    for name in names:
        if drawn(then[name]):
            continue
        others = [other for other in (*names, "seed") if other != name]
        # A pivot_table would have a row for each combination of values that others were drawn at.
        cells = then.groupby([*others, name], observed=True)["val_accuracy"].mean()
        table = cells.unstack(name)  # noqa: PD010
        blocks = table.dropna()
        above = blocks.sub(blocks.mean(axis=1), axis=0)
        by_seed = then.groupby([*others[:-1], name], observed=True)["val_accuracy"].mean()
        best = by_seed.groupby(level=name).max()
        for value in table.columns:
            effect, low, high = mean_interval(above[value].to_numpy())
            rows.append(
                {
                    "hyperparameter": name,
                    "value": f"{value:g}" if isinstance(value, float) else str(value),
                    "effect": effect,
                    "low": low,
                    "high": high,
                    "num_blocks": len(blocks),
                    "best": float(best[value]),
                    "num_trials": int((then[name] == value).sum()),
                    "epoch": epoch,
                }
            )
    kinds = {"hyperparameter": "str", "value": "str", "effect": "float64", "low": "float64", "high": "float64",
             "num_blocks": "int64", "best": "float64", "num_trials": "int64", "epoch": "Int64"}  # fmt: skip
    return pd.DataFrame(rows, columns=list(kinds)).astype(kinds)


def importance(trials: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """Return how much each hyperparameter decides whether a trial is among the best tenth.

    PED-ANOVA (Watanabe, Bansal & Hutter, IJCAI 2023) as in Optuna, of trials after the same epoch; the best four at
    least, for a tenth of a small study is nobody.

    Args:
        trials: as :func:`analysis.load_trials` gives them.
        epochs: as :func:`analysis.load_epochs` does, of the same runs.

    Returns:
        One row a hyperparameter that varies, the most important first: ``hyperparameter``, ``importance`` (they add up
        to 1), ``num_trials``, ``epoch`` (after which they were compared; missing if each at its best). No rows where
        nothing varies, for fewer than twice four trials, or where the worst are as accurate as the last of the best.
    """
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    then, epoch = at_common_epoch(trials, epochs)
    kinds = {"hyperparameter": "str", "importance": "float64", "num_trials": "int64", "epoch": "Int64"}
    names = varied_hyperparameters(then)
    num_best = max(MIN_IMPORTANT, math.ceil(len(then) / 10))
    ranked = then["val_accuracy"].sort_values(ascending=False).to_numpy()
    if len(then) < 2 * MIN_IMPORTANT or not names or ranked[num_best - 1] == ranked[-1]:
        return pd.DataFrame(columns=list(kinds)).astype(kinds)
    # Optuna rounds up: half a trial less, so that no rounding error adds one.
    evaluator = PedAnovaImportanceEvaluator(target_quantile=(num_best - 0.5) / len(then))
    found = get_param_importances(to_optuna(then.assign(status="completed")), evaluator=evaluator, params=names)
    rows = [
        {"hyperparameter": name, "importance": share, "num_trials": len(then), "epoch": epoch}
        for name, share in found.items()
    ]
    return pd.DataFrame(rows, columns=list(kinds)).astype(kinds)


def replay_decisions(decisions: pd.DataFrame, reduction_factor: float) -> pd.DataFrame:
    """Return what ASHA must have decided, from nothing but the values in their order.

    Args:
        decisions: as :func:`analysis.load_decisions` gives them.
        reduction_factor: of the study.

    Returns:
        The same rows, with ``cutoff`` and ``stop`` worked out again. They are equal to those recorded if no decision
        was lost, made twice, or made on other values than those in the log.
    """
    recorded: dict[float, list[float]] = {}
    cutoffs = []
    for rung, value in zip(decisions["rung"], decisions["value"], strict=True):
        before = recorded.setdefault(rung, [])
        cutoffs.append(float(np.percentile(before, (1 - 1 / reduction_factor) * 100)) if before else math.nan)
        before.append(value)
    return decisions.assign(cutoff=cutoffs, stop=decisions["value"] < cutoffs)


def pareto_front(trials: pd.DataFrame) -> pd.DataFrame:
    """Return what each configuration reached and what it cost, and which none beats in both.

    Args:
        trials: as :func:`analysis.load_trials` gives them.

    Returns:
        One row a configuration (of its fresh seeds, once it is confirmed) and how its trials ended (those not completed
        are points of their own: networks that were had for less), cheapest first: ``recipe``, the recipe's columns and
        the varied amounts, ``train_seconds`` and ``val_accuracy`` (mean over seeds), ``num_seeds``, ``censored`` (not
        completed), ``on_front`` (no other is as accurate for less, or more accurate for as much).
    """
    trials = confirmed(trials)
    names = configuration_columns(trials)
    seen = trials[trials["val_accuracy"].notna() & trials["train_seconds"].notna() & (trials["status"] != "diverged")]
    seen = seen.assign(censored=seen["status"] != "completed")
    columns = recipe_columns(trials)
    rows = []
    for _, group in seen.groupby([*names, "censored"], observed=True, sort=False):
        first = group.iloc[0]
        rows.append(
            {
                "recipe": recipe_name(first, columns),
                **{name: first[name] for name in names},
                "train_seconds": float(group["train_seconds"].mean()),
                "val_accuracy": float(group["val_accuracy"].mean()),
                "num_seeds": int(group["seed"].nunique()),
                "censored": bool(first["censored"]),
            }
        )
    order = ["recipe", *names, "train_seconds", "val_accuracy", "num_seeds", "censored"]
    table = pd.DataFrame(rows, columns=order).sort_values(
        ["train_seconds", "val_accuracy"], ascending=[True, False], ignore_index=True
    )
    before = table["val_accuracy"].cummax().shift(fill_value=-np.inf)
    ahead = table["val_accuracy"] > before
    equals = [table["train_seconds"], table["val_accuracy"]]  # of which none beats the other
    return table.assign(on_front=ahead.groupby(equals).transform("any"))


def asha_savings(trials: pd.DataFrame) -> pd.DataFrame:
    """Return how many trials of the search were trained for how long, and how many would have been without ASHA.

    What it saved are the epochs that stopped trials had left; those that other trials did not run (they diverged,
    failed or have yet to run) are not its merit. Trials of fewer epochs for equal compute are left out.

    Returns:
        One row for each number of epochs at which a trial ended or would have: ``epoch``, ``trials_trained`` (at least
        so long), ``trials_without_stopping`` (likewise, had none been stopped), ``trials_stopped`` (there), and for the
        whole run in every row ``epochs_run`` and ``epochs_without_stopping``. No rows if no epoch was run.
    """
    searched = by_budget(trials)[0]
    begun = searched[(searched["epochs"] > 0) & (searched["phase"] == "search")]
    stopped = begun["status"] == "stopped"
    run = begun["epochs"].astype("int64")
    full = run.where(~stopped, begun["max_epochs"].astype("int64"))
    marks = sorted({*run, *full})
    columns = {
        "epoch": marks,
        "trials_trained": [(run >= mark).sum() for mark in marks],
        "trials_without_stopping": [(full >= mark).sum() for mark in marks],
        "trials_stopped": [(run[stopped] == mark).sum() for mark in marks],
        "epochs_run": [run.sum()] * len(marks),
        "epochs_without_stopping": [full.sum()] * len(marks),
    }
    return pd.DataFrame(columns, dtype="int64")


def accuracy_over(trials: pd.DataFrame, name: str = "lr") -> pd.DataFrame:
    """Return validation accuracy of the search over one hyperparameter, for every combination of the recipe's columns.

    A trial that diverged counts as accuracy 0, whatever it had before.

    Returns:
        The recipe's columns, ``recipe``, ``name``, ``val_accuracy`` (best over what else varies, mean over seeds) and
        ``censored`` (no trial of the point was completed, nor did all of them diverge).
    """
    trials = trials[trials["phase"] == "search"]
    columns = [column for column in recipe_columns(trials) if column != name]
    others = [column for column in HYPERPARAMETERS if column in varied(trials) and column not in (*columns, name)]
    diverged = trials["status"] == "diverged"
    trials = trials.assign(val_accuracy=trials["val_accuracy"].mask(diverged, 0.0))
    rows = []
    keys = [*columns, name]
    for _, group in trials[trials["val_accuracy"].notna()].groupby(keys, observed=True):
        ended = group["status"].isin(["completed", "diverged"])
        censored = not (group["status"] == "completed").any() and not ended.all()
        pool = group if censored else group[ended]
        means = pool.groupby(others, observed=True)["val_accuracy"].mean() if others else pool["val_accuracy"].mean()
        first = group.iloc[0]
        rows.append(
            {
                **{key: first[key] for key in keys},
                "recipe": recipe_name(first, columns),
                "val_accuracy": float(np.max(means)),
                "censored": censored,
            }
        )
    return pd.DataFrame(rows, columns=[*keys, "recipe", "val_accuracy", "censored"])
