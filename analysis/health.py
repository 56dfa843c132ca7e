"""Whether a search space was searched well: what its results warn of."""

import math

import pandas as pd

from analysis.compare import best_configuration, compare_recipes, confirmed, drawn, varied_hyperparameters
from analysis.intervals import Z95, paired_over_seeds, student_t95
from analysis.tables import signed
from analysis.trials import ENDED
from trainables.settings import TrialSettings

Z80 = 0.841621  # 80 % quantile of the normal distribution
HEALTH_COLUMNS = {"warning": "str", "hyperparameter": "str", "value": "str", "text": "str"}


def search_space_health(trials: pd.DataFrame, num_val_images: int) -> pd.DataFrame:
    """Return what should be known before the results of a search are relied on, one row a warning.

    - ``edge``: the best configuration has the least or greatest value tried of a number, so better ones may lie beyond
      (Godbole et al., Deep Learning Tuning Playbook, 2023).
    - ``unknown``: trials whose value of a hyperparameter that varies is missing or cannot be read, so that nothing is
      compared with them.
    - ``not tried``: no trial with a value was trained to the end, though all have ended.
    - ``chance``: the best recipe cannot be told from another one, and how many seeds that would take: with so many, a
      difference as large as the one seen would be found in four of five studies.

    Args:
        trials: as :func:`analysis.load_trials` gives them.
        num_val_images: images behind each validation accuracy.

    Returns:
        ``warning``, ``hyperparameter`` and ``value`` (missing where there is none), and ``text``: the whole sentence.
    """
    trials = trials[trials["seed"].notna()]  # a search that chooses as it goes has trials without settings yet
    if "run" in trials:  # the same settings may have been run twice
        trials = trials.assign(trial_id=trials["run"] + "/" + trials["trial_id"])
    rows = [*_unknown(trials), *_edges(trials), *_not_tried(trials), *_chance(trials, num_val_images)]
    return pd.DataFrame(rows, columns=list(HEALTH_COLUMNS)).astype(HEALTH_COLUMNS)


def _unknown(trials: pd.DataFrame) -> list[dict[str, str]]:
    rows = []
    for name in varied_hyperparameters(trials):
        if count := int(trials[name].isna().sum()):
            which = f"{count} trials have" if count > 1 else "A trial has"
            text = f"{which} no {name} that can be read: nothing here is compared with {'them' if count > 1 else 'it'}."
            rows.append({"warning": "unknown", "hyperparameter": name, "text": text})
    return rows


def _edges(trials: pd.DataFrame) -> list[dict[str, str]]:
    best = best_configuration(confirmed(trials))
    rows = []
    for name in varied_hyperparameters(trials) if len(best) else []:
        if not pd.api.types.is_numeric_dtype(trials[name]) or pd.api.types.is_bool_dtype(trials[name]):
            continue
        value, least, greatest = best[name].iloc[0], trials[name].min(), trials[name].max()
        # None lie beyond what a setting allows.
        bounds = {
            getattr(bound, end, None) for bound in TrialSettings.model_fields[name].metadata for end in ("ge", "le")
        }
        for edge, word, further in ((least, "least", "lower"), (greatest, "greatest", "higher")):
            if value == edge and edge not in bounds:
                text = f"The best configuration has the {word} {name} tried, {value:g}: try {further} ones."
                rows.append({"warning": "edge", "hyperparameter": name, "value": f"{value:g}", "text": text})
    return rows


def _not_tried(trials: pd.DataFrame) -> list[dict[str, str]]:
    rows = []
    for name in varied_hyperparameters(trials):
        if drawn(trials[name]):
            continue
        for value, group in trials.groupby(name, observed=True):
            if not group["status"].isin(ENDED).all() or (group["status"] == "completed").any():
                continue
            if (group["status"] == "diverged").all():  # that is what it is
                continue
            counts = ", ".join(f"{n} {status}" for status, n in group["status"].value_counts().items() if n)
            text = f"No trial with {name} {value} was trained to the end ({counts}): it may be better than it looks."
            rows.append({"warning": "not tried", "hyperparameter": name, "value": str(value), "text": text})
    return rows


def _chance(trials: pd.DataFrame, num_val_images: int) -> list[dict[str, str]]:
    recipes = compare_recipes(trials, num_val_images)
    recipes = recipes[~recipes["censored"]] if len(recipes) else recipes
    if len(recipes) and recipes["confirmed"].iloc[0]:  # the others have the seeds for which they were not chosen
        recipes = recipes[recipes["confirmed"]]
    if len(recipes) < 2:
        return []
    by_id = trials.set_index("trial_id")
    first, *others = (by_id.loc[list(ids)].set_index("seed")["val_accuracy"] for ids in recipes["trial_ids"])
    names = recipes["recipe"].to_list()
    rows: list[dict[str, str]] = []
    for name, other in zip(names[1:], others, strict=True):
        difference, low, high, n = paired_over_seeds(first, other)
        if n < 2:
            text = (
                "One seed does not tell recipes apart, however far they are: python -m study confirm trains the best "
                "again with fresh ones."
            )
            return [*rows, {"warning": "chance", "text": text}]
        if low > 0 or high < 0:
            continue
        numbers = f"{signed(100 * difference)} points, {signed(100 * low)} to {signed(100 * high)}"
        needed = seeds_to_tell(difference, (high - low) / 2 / student_t95(n - 1), n)
        text = f"{names[0]} and {name} cannot be told apart with {n} seeds ({numbers}); if that is the difference, it "
        rows.append({"warning": "chance", "text": f"{text}would take about {needed:,}."})
    return rows


def seeds_to_tell(difference: float, standard_error: float, n: int) -> int:
    """Return how many seeds find a difference beyond chance in four of five studies, given its error with n seeds.

    The least m above n with (t(m - 1) + 0.84) standard_error sqrt(n / m) <= difference, Student's t at 97.5 %. A
    difference of less than a hundredth of a point is taken for one of that.
    """
    share = standard_error * math.sqrt(n) / max(abs(difference), 1e-4)
    m = max(n + 1, math.ceil(((Z95 + Z80) * share) ** 2))
    while (student_t95(m - 1) + Z80) * share > math.sqrt(m):
        m += 1
    return m
