"""Whether a search space was searched well: what its results warn of."""

import math

import pandas as pd

from analysis.compare import (
    Z95,
    amount_columns,
    best_configuration,
    compare_recipes,
    confirmed,
    paired_over_seeds,
    recipe_columns,
    student_t95,
)
from analysis.trials import ENDED

Z80 = 0.841621  # 80 % quantile of the normal distribution
HEALTH_COLUMNS = {"warning": "str", "hyperparameter": "str", "value": "str", "text": "str"}


def search_space_health(trials: pd.DataFrame, num_val_images: int) -> pd.DataFrame:
    """Return what should be known before the results of a search are relied on, one row a warning.

    - ``edge``: the best configuration has the least or greatest value tried of a number, so better ones may lie beyond
      (Godbole et al., Deep Learning Tuning Playbook, 2023).
    - ``not tried``: no trial with a value was trained to the end, though all have ended.
    - ``chance``: the best recipe cannot be told from another one, and how many seeds that would take: with so many, a
      difference as large as the one seen would be found in four of five studies.

    Args:
        trials: as :func:`analysis.load_trials` gives them.
        num_val_images: images behind each validation accuracy.

    Returns:
        ``warning``, ``hyperparameter`` and ``value`` (missing for ``chance``), and ``text``: the whole sentence.
    """
    trials = trials[trials["seed"].notna()]  # a search that chooses as it goes has trials without settings yet
    if "run" in trials:  # the same settings may have been run twice
        trials = trials.assign(trial_id=trials["run"] + "/" + trials["trial_id"])
    rows = [*_edges(trials), *_not_tried(trials), *_chance(trials, num_val_images)]
    return pd.DataFrame(rows, columns=list(HEALTH_COLUMNS)).astype(HEALTH_COLUMNS)


def _edges(trials: pd.DataFrame) -> list[dict[str, str]]:
    best = best_configuration(confirmed(trials))
    rows = []
    for name in amount_columns(trials) if len(best) else []:
        if not pd.api.types.is_numeric_dtype(trials[name]):
            continue
        value, least, greatest = best[name].iloc[0], trials[name].min(), trials[name].max()
        for edge, word in ((least, "least"), (greatest, "greatest")):
            if value == edge:
                further = "lower" if edge == least else "higher"
                text = f"The best configuration has the {word} {name} tried, {value:g}: try {further} ones."
                rows.append({"warning": "edge", "hyperparameter": name, "value": f"{value:g}", "text": text})
    return rows


def _not_tried(trials: pd.DataFrame) -> list[dict[str, str]]:
    rows = []
    for name in [*recipe_columns(trials), *amount_columns(trials)]:
        if trials[name].nunique() > len(trials) / 2:  # drawn from a range: each value stands for itself alone
            continue
        for value, group in trials.groupby(name, observed=True):
            if not group["status"].isin(ENDED).all() or (group["status"] == "completed").any():
                continue
            counts = ", ".join(f"{n} {status}" for status, n in group["status"].value_counts().items() if n)
            text = f"No trial with {name} {value} was trained to the end ({counts}): it may be better than it looks."
            rows.append({"warning": "not tried", "hyperparameter": name, "value": str(value), "text": text})
    return rows


def _chance(trials: pd.DataFrame, num_val_images: int) -> list[dict[str, str]]:
    recipes = compare_recipes(trials, num_val_images)
    recipes = recipes[~recipes["censored"]] if len(recipes) else recipes
    if len(recipes) < 2:
        return []
    by_id = trials.set_index("trial_id")
    first, *others = (by_id.loc[list(ids)].set_index("seed")["val_accuracy"] for ids in recipes["trial_ids"])
    names = recipes["recipe"].to_list()
    rows = []
    for name, other in zip(names[1:], others, strict=True):
        difference, low, high, n = paired_over_seeds(first, other)
        if low > 0:
            continue
        text = f"{names[0]} and {name} cannot be told apart with "
        if n < 2:
            text += "one seed: python -m study confirm trains the best again with fresh ones."
        else:
            numbers = f"{100 * difference:+.1f} points, {100 * low:+.1f} to {100 * high:+.1f}".replace("-", "−")
            needed = seeds_to_tell(difference, (high - low) / 2 / student_t95(n - 1), n)
            text += f"{n} seeds ({numbers}); if that is the difference, it would take about {needed:,}."
        rows.append({"warning": "chance", "text": text})
    return rows


def seeds_to_tell(difference: float, standard_error: float, n: int) -> int:
    """Return how many seeds find a difference beyond chance in four of five studies, given its error with n seeds.

    By the normal approximation: n ((1.96 + 0.84) standard_error / difference)^2, and 2 at least. A difference of 0 is
    taken for one of a hundredth of a point.
    """
    return max(2, math.ceil(n * ((Z95 + Z80) * standard_error / max(abs(difference), 1e-4)) ** 2))
