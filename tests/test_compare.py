import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import compare_recipes, top_trials
from analysis.compare import best_configuration, by_budget, confirmed, recipe_columns, recipe_name, top_configurations
from analysis.intervals import (
    bootstrap_interval,
    difference_of_means,
    mean_interval,
    paired_difference,
    wilson_interval,
)
from analysis.trials import PHASES, STATUSES, varied

NAN = float("nan")
DEFAULTS = {
    "status": "completed",
    "phase": "search",
    "seed": 0,
    "epochs": 9,
    "max_epochs": 9,
    "val_accuracy": 0.5,
    "train_accuracy": 0.6,
    "train_seconds": 60.0,
    "setup": "augmentation",
    "optimizer": "sgd",
    "lr": 0.1,
    "weight_decay": 5e-4,
    "batch_size": 128,
    "augmentation": "none",
    "cutout": 0,
    "normalize": True,
    "dropout": 0.0,
    "width": 64,
}


def table(*rows: dict[str, Any]) -> pd.DataFrame:
    """Trials t0, t1, ... as load_trials gives them, each said by what is not as in DEFAULTS."""
    frame = pd.DataFrame([{"trial_id": f"t{i}", "checkpoint": f"c{i}"} | DEFAULTS | row for i, row in enumerate(rows)])
    frame["generalization_gap"] = frame["train_accuracy"] - frame["val_accuracy"]
    types = {"status": pd.CategoricalDtype(STATUSES), "seed": "Int64", "max_epochs": "Int64", "val_accuracy": float}
    return frame.astype(types | {"checkpoint": "str", "phase": pd.CategoricalDtype(PHASES)})


# --- intervals ---


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (1, 10, 0.0179, 0.4042),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (15, 148, 0.0624, 0.1605),  # Newcombe, Statistics in Medicine 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),  # likewise
        (0, 20, 0.0, 0.1611),  # likewise
        (1, 29, 0.0061, 0.1718),  # likewise
    ],
)
def test_wilson_interval_has_the_published_limits(right, n, low, high):
    assert wilson_interval(right / n, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_covers_the_truth_in_95_of_100_samples():
    rng = np.random.default_rng(0)
    for truth, n in ((0.5, 50), (0.9, 100), (0.02, 1000)):
        shares = rng.binomial(n, truth, 20_000) / n
        limits = {share: wilson_interval(share, n) for share in set(shares.tolist())}
        covered = np.mean([limits[share][0] <= truth <= limits[share][1] for share in shares.tolist()])
        assert 0.93 <= covered <= 0.97, (truth, n)


@pytest.mark.parametrize(("accuracy", "n"), [(NAN, 10), (0.5, 0), (math.inf, 10)])
def test_wilson_interval_of_nothing_is_not_known(accuracy, n):
    assert np.isnan(wilson_interval(accuracy, n)).all()


@pytest.mark.parametrize(
    ("n", "quantile"),  # 97.5 % of Student's t with n - 1 degrees of freedom, from any table
    [
        (2, 12.706),
        (3, 4.303),
        (5, 2.776),
        (11, 2.228),
        (12, 2.201),
        (13, 2.179),
        (21, 2.086),
        (30, 2.045),
        (121, 1.980),
    ],
)
def test_mean_interval_is_as_wide_as_students_t_says(n, quantile):
    values = np.random.default_rng(n).normal(0.5, 0.1, n)
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(values.mean())
    assert mean - low == pytest.approx(high - mean)
    assert (high - mean) / (values.std(ddof=1) / math.sqrt(n)) == pytest.approx(quantile, rel=1e-3)


def test_mean_interval_by_hand():
    # mean 2, standard deviation 1, t 4.303: 2 -+ 4.303 / sqrt(3)
    assert mean_interval([1.0, 2.0, NAN, 3.0]) == pytest.approx((2.0, -0.48434, 4.48434), abs=1e-4)
    assert mean_interval([0.7, 0.7, 0.7]) == pytest.approx((0.7, 0.7, 0.7))
    assert mean_interval(np.array([0.7, NAN]))[0] == 0.7
    assert np.isnan(mean_interval([0.7])[1:]).all()
    assert np.isnan(mean_interval([NAN, NAN])).all()
    assert np.isnan(mean_interval([])).all()


def test_bootstrap_interval_by_hand():
    # Both zeros, both ones, or one of each: 1/4, 1/4 and 1/2 of the resamples.
    assert bootstrap_interval(np.array([0.0, 1.0])) == (0.5, 0.0, 1.0)
    # Of 20 values one is 0: 92 % of the resamples hold it twice at most, 98 % three times, 36 % never.
    values = np.array([1.0] * 19 + [0.0])
    assert bootstrap_interval(values) == pytest.approx((0.95, 0.85, 1.0))
    assert bootstrap_interval(np.full(8, 0.25)) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("n", [10, 40])
def test_bootstrap_interval_is_that_of_resamples_drawn_one_by_one(n):
    # Skewed, so that the limits lie at unequal distances and each is seen for itself.
    values = np.random.default_rng(n).exponential(1, n)
    rng = np.random.default_rng(1)
    means = [values[rng.integers(0, n, n)].mean() for _ in range(10_000)]
    found = bootstrap_interval(values)
    assert found[0] == pytest.approx(values.mean())
    # By chance, limits of 2,000 resamples are 0.06 standard errors off.
    tolerance = 0.15 * values.std() / math.sqrt(n)
    assert found[1:] == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=tolerance)


def test_bootstrap_interval_of_many_values_is_students():
    values = np.random.default_rng(0).normal(3, 2, 1000)
    error = values.std(ddof=1) / math.sqrt(1000)
    assert bootstrap_interval(values) == pytest.approx(mean_interval(values), abs=0.15 * error)


def test_bootstrap_interval_narrows_with_the_square_root():
    values = np.random.default_rng(0).normal(0, 1, 50)
    widths = [high - low for _, low, high in (bootstrap_interval(np.tile(values, times)) for times in (1, 4, 16))]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.1)
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.1)


def test_bootstrap_interval_leaves_out_what_is_no_number():
    values = np.random.default_rng(0).normal(0, 1, 20).astype(np.float32)
    holes = np.insert(values, [0, 7, 20], [NAN, math.inf, NAN])
    assert bootstrap_interval(holes) == bootstrap_interval(values)
    assert np.isfinite(bootstrap_interval(holes)).all()


def test_bootstrap_interval_of_fewer_than_two_values_has_no_limits():
    for values in ([], [NAN], [NAN, NAN]):
        assert np.isnan(bootstrap_interval(np.array(values))).all()
    for values in ([0.5], [NAN, 0.5]):
        mean, *limits = bootstrap_interval(np.array(values))
        assert mean == 0.5
        assert np.isnan(limits).all()


def test_bootstrap_interval_is_the_same_each_time():
    values = np.random.default_rng(0).normal(0, 1, 30)
    first = bootstrap_interval(values)
    for n in range(2, 8):  # more than are kept in memory
        bootstrap_interval(values[:n])
    assert bootstrap_interval(values) == first
    assert bootstrap_interval(values + 8) == pytest.approx(np.add(first, 8))


def test_paired_difference_by_hand():
    a = np.array([True, True, True, True, False])
    b = np.array([True, False, False, True, True])
    # Differences 0, 1, 1, 0, -1: mean 0.2, variance 2.8 / 4, t 2.776.
    half = 2.776 * math.sqrt(0.7 / 5)
    assert paired_difference(a, b) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert paired_difference(b, a) == pytest.approx((-0.2, -0.2 - half, -0.2 + half))
    assert paired_difference(a, a) == (0.0, 0.0, 0.0)


def test_paired_difference_finds_what_unpaired_intervals_hide():
    b = np.arange(1000) % 2 == 0
    a = b | (np.arange(1000) % 50 == 1)
    mean, low, _ = paired_difference(a, b)
    assert mean == pytest.approx(0.02)
    assert low > 0.01
    assert wilson_interval(a.mean(), 1000)[0] < wilson_interval(b.mean(), 1000)[1]


# --- recipes ---

NOTHING = [{}]
TWICE = [{}, {}]
SEEDS = [{"seed": 0}, {"seed": 1}]
AMOUNTS = [{"lr": 0.1, "weight_decay": 0.0}, {"lr": 0.01, "weight_decay": 0.0}, {"lr": 0.1}]
KINDS = [{"optimizer": "adam", "lr": 0.01}, {"augmentation": "flip"}, {"seed": 1}]
SWITCH = [{"normalize": True, "width": 8}, {"normalize": False, "width": 16}]


@pytest.mark.parametrize(
    ("rows", "columns", "names"),
    [
        (NOTHING, [], ["the one recipe"]),
        (TWICE, [], ["the one recipe"] * 2),
        (SEEDS, [], ["the one recipe"] * 2),
        (
            AMOUNTS,
            ["lr", "weight_decay"],
            ["lr 0.1 · weight_decay 0.0", "lr 0.01 · weight_decay 0.0", "lr 0.1 · weight_decay 0.0005"],
        ),
        (
            KINDS,
            ["optimizer", "augmentation"],
            ["adam · no augmentation", "sgd · flip", "sgd · no augmentation"],
        ),
        (SWITCH, ["normalize"], ["normalize True", "normalize False"]),
    ],
)
def test_a_recipe_is_what_varies_and_is_no_amount(rows, columns, names):
    trials = table(*rows)
    assert recipe_columns(trials) == columns
    assert [recipe_name(row, columns) for _, row in trials.iterrows()] == names


def test_a_recipe_is_the_same_while_a_search_still_chooses():
    trials = pd.concat([table(*SWITCH), pd.DataFrame([{"trial_id": "pending-3"}])], ignore_index=True)
    assert recipe_columns(trials) == ["normalize"]


# --- compare_recipes ---


def test_recipes_are_ranked_by_their_best_configuration_over_seeds():
    trials = table(
        {"optimizer": "sgd", "lr": 0.1, "seed": 0, "val_accuracy": 0.60, "train_accuracy": 0.70},
        {"optimizer": "sgd", "lr": 0.1, "seed": 1, "val_accuracy": 0.64, "train_accuracy": 0.80, "epochs": 8},
        # The best single trial, but not the best configuration.
        {"optimizer": "sgd", "lr": 0.01, "seed": 0, "val_accuracy": 0.70},
        {"optimizer": "sgd", "lr": 0.01, "seed": 1, "val_accuracy": 0.40},
        # Better while it lasted, but stopped: never chosen where a trial was completed.
        {"optimizer": "sgd", "lr": 1.0, "seed": 0, "val_accuracy": 0.90, "status": "stopped", "epochs": 3},
        {"optimizer": "adam", "lr": 0.01, "val_accuracy": 0.65, "train_accuracy": 0.60},
        {"optimizer": "adam", "lr": 0.1, "val_accuracy": NAN, "status": "diverged"},
    )
    recipes = compare_recipes(trials, 100)
    assert recipes["recipe"].to_list() == ["adam", "sgd"]
    assert recipes["trial_ids"].to_list() == [("t5",), ("t0", "t1")]
    assert recipes["num_seeds"].to_list() == [1, 2]
    assert recipes["num_trials"].to_list() == [2, 5]
    assert recipes["lr"].to_list() == [0.01, 0.1]
    assert recipes["epochs"].to_list() == [9, 9]
    assert not recipes["censored"].any()
    assert recipes["val_accuracy"].to_list() == pytest.approx([0.65, 0.62])
    assert recipes["train_accuracy"].to_list() == pytest.approx([0.60, 0.75])
    assert recipes["generalization_gap"].to_list() == pytest.approx([-0.05, 0.13])
    # One seed: over images. Two: 0.62 -+ 12.706 * 0.02828 / sqrt(2).
    assert tuple(recipes.loc[0, ["val_low", "val_high"]]) == pytest.approx(wilson_interval(0.65, 100))
    assert tuple(recipes.loc[1, ["val_low", "val_high"]]) == pytest.approx((0.62 - 0.25412, 0.62 + 0.25412), abs=1e-5)


def test_a_recipe_without_a_completed_trial_stands_last():
    trials = table(
        {"augmentation": "flip", "val_accuracy": 0.9, "status": "stopped", "epochs": 1},
        {"augmentation": "flip", "val_accuracy": 0.8, "status": "stopped", "epochs": 3, "lr": 0.01},
        {"augmentation": "crop", "val_accuracy": 0.2},
        {"augmentation": "flip+crop", "val_accuracy": 0.95, "status": "running", "epochs": 5},
        {"augmentation": "none", "val_accuracy": 0.3},
    )
    recipes = compare_recipes(trials, 50)
    assert recipes["recipe"].to_list() == ["no augmentation", "crop", "flip+crop", "flip"]
    assert recipes["censored"].to_list() == [False, False, True, True]
    assert recipes["trial_ids"].to_list() == [("t4",), ("t2",), ("t3",), ("t0",)]
    assert list(recipes.index) == [0, 1, 2, 3]


def test_a_configuration_that_lost_seeds_is_marked_and_stands_behind_a_whole_one():
    """Of three seeds ASHA stopped the unlucky one; the mean of the others would be that of survivors."""
    trials = table(
        {"seed": 0, "val_accuracy": 0.6},
        {"seed": 1, "val_accuracy": 0.1, "status": "stopped", "epochs": 1},
        {"seed": 2, "val_accuracy": 0.8},
    )
    recipes = compare_recipes(trials, 50)
    assert recipes["trial_ids"].to_list() == [("t0", "t2")]
    assert recipes["val_accuracy"].to_list() == pytest.approx([0.7])
    assert recipes["num_trials"].to_list() == [3]
    assert recipes[["num_seeds", "num_seeds_asked", "censored"]].to_numpy().tolist() == [[2, 3, True]]
    whole = table(*({"lr": 0.01, "seed": seed, "val_accuracy": 0.65} for seed in range(3)))
    whole["trial_id"] = ["w0", "w1", "w2"]
    recipes = compare_recipes(pd.concat([trials, whole], ignore_index=True), 50)
    assert recipes["trial_ids"].to_list() == [("w0", "w1", "w2"), ("t0", "t2")]
    assert recipes["censored"].to_list() == [False, True]


def test_difference_of_means_by_hand():
    # Variances 0.0002 and 0.0008 over two values each: half = 12.706 * sqrt(0.0005).
    mean, low, high = difference_of_means([0.70, 0.72], [0.60, 0.64])
    assert (mean, low, high) == pytest.approx((0.09, 0.09 - 0.284115, 0.09 + 0.284115), abs=1e-5)
    assert math.isnan(difference_of_means([0.7], [0.6, 0.5])[1])


def test_top_trials_bring_all_seeds_of_a_configuration():
    trials = table(
        {"lr": 0.1, "seed": 0, "val_accuracy": 0.5},
        {"lr": 0.1, "seed": 1, "val_accuracy": 0.7},
        {"lr": 0.01, "seed": 1, "val_accuracy": 0.9},
        {"lr": 0.01, "seed": 0, "val_accuracy": 0.2},
    )
    assert top_trials(trials, 1)["trial_id"].to_list() == ["t0", "t1"]
    assert top_trials(trials, 2)["trial_id"].to_list() == ["t0", "t1", "t3", "t2"]


def test_seeds_whose_checkpoints_were_let_go_still_count_in_the_ranking():
    trials = table(
        {"lr": 0.1, "seed": 0, "val_accuracy": 0.5},
        {"lr": 0.1, "seed": 1, "val_accuracy": 0.7},
        {"lr": 0.01, "seed": 0, "val_accuracy": 0.8},
        {"lr": 0.01, "seed": 1, "val_accuracy": 0.2, "checkpoint": None},
        {"lr": 0.001, "seed": 0, "val_accuracy": 0.9, "checkpoint": None},
    )
    assert top_trials(trials, 1)["trial_id"].to_list() == ["t0", "t1"]
    assert top_trials(trials, 3)["trial_id"].to_list() == ["t0", "t1", "t2"]


def test_the_same_seed_run_twice_is_one_seed():
    recipes = compare_recipes(table({"val_accuracy": 0.6}, {"val_accuracy": 0.6}), 50)
    assert recipes["num_seeds"].to_list() == [1]
    assert tuple(recipes.loc[0, ["val_low", "val_high"]]) == pytest.approx(wilson_interval(0.6, 50))


def test_trials_of_several_runs_that_were_to_last_differently_are_not_averaged():
    trials = table({"max_epochs": 3, "epochs": 3, "val_accuracy": 0.4}, {"val_accuracy": 0.8, "seed": 1})
    recipes = compare_recipes(trials, 50)
    assert recipes["val_accuracy"].to_list() == pytest.approx([0.8])
    assert recipes["trial_ids"].to_list() == [("t1",)]


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([{}], ["the one recipe"]),
        ([{"lr": 0.1, "val_accuracy": 0.3}, {"lr": 0.01}], ["lr 0.01", "lr 0.1"]),
        (SWITCH, ["normalize True", "normalize False"]),
        ([{"normalize": False, "val_accuracy": 0.7}, {}], ["normalize False", "normalize True"]),
    ],
)
def test_recipes_of_small_studies(rows, names):
    recipes = compare_recipes(table(*rows), 50)
    assert recipes["recipe"].to_list() == names
    assert recipes["num_seeds"].to_list() == [1] * len(names)


def test_without_any_accuracy_there_is_nothing_to_compare():
    trials = table({"val_accuracy": NAN, "status": "pending"}, {"val_accuracy": NAN, "lr": 0.5, "status": "diverged"})
    assert compare_recipes(trials, 50).empty
    assert top_trials(trials, 3).empty


# --- top_trials ---


def test_top_trials_are_completed_and_first_of_different_recipes():
    trials = table(
        {"optimizer": "sgd", "lr": 0.1, "val_accuracy": 0.6},
        {"optimizer": "sgd", "lr": 0.01, "val_accuracy": 0.8},
        {"optimizer": "adam", "lr": 0.1, "val_accuracy": 0.5},
        {"optimizer": "adam", "lr": 0.01, "val_accuracy": 0.9, "status": "stopped"},
        {"optimizer": "adam", "lr": 0.001, "val_accuracy": 0.99, "checkpoint": None},
        {"optimizer": "sgd", "lr": 0.001, "val_accuracy": NAN, "status": "diverged"},
        {"optimizer": "sgd", "lr": 1.0, "val_accuracy": 0.95, "status": "stopped"},
    )
    assert top_trials(trials, 10)["trial_id"].to_list() == ["t1", "t2", "t0"]
    assert top_trials(trials, 2)["trial_id"].to_list() == ["t1", "t2"]
    assert top_trials(trials, 0).empty
    assert list(top_trials(trials, 2).columns) == list(trials.columns)


def test_top_trials_are_stopped_ones_where_none_was_completed():
    trials = table(*({"status": "stopped", "val_accuracy": lr, "lr": lr} for lr in (0.1, 0.2)))
    assert top_trials(trials, 3)["trial_id"].to_list() == ["t1", "t0"]


def test_seeds_of_one_configuration_stand_by_seed_also_where_it_is_the_only_one():
    trials = table({"val_accuracy": 0.6, "seed": 2}, {"val_accuracy": 0.8}, {"val_accuracy": 0.7, "seed": 1})
    for k in (1, 3):
        assert top_trials(trials, k)["trial_id"].to_list() == ["t1", "t2", "t0"]
    assert top_trials(table({}), 3)["trial_id"].to_list() == ["t0"]


# --- varied ---


def test_what_varies_is_told_in_the_usual_order():
    assert varied(table({"seed": 1, "lr": 0.5, "optimizer": "adam"}, {})) == ["optimizer", "lr", "seed"]
    assert varied(table({})) == []
    assert varied(table({"dropout": NAN}, {"dropout": 0.5})) == []


# --- confirmations, budgets, setups ---


def searched_and_confirmed(**last: Any) -> pd.DataFrame:
    return table(
        {"lr": 0.1, "val_accuracy": 0.9},
        {"lr": 0.01, "val_accuracy": 0.6},
        {"lr": 0.1, "val_accuracy": 0.7, "seed": 5, "phase": "confirm"},
        {"lr": 0.1, "val_accuracy": 0.7, "seed": 6, "phase": "confirm", **last},
    )


def test_fresh_seeds_speak_for_their_configuration_once_all_are_trained():
    assert confirmed(searched_and_confirmed())["trial_id"].to_list() == ["t1", "t2", "t3"]


@pytest.mark.parametrize("status", ["failed", "diverged"])
def test_a_confirmation_that_came_to_nothing_is_not_made_up_for_by_the_search(status):
    trials = searched_and_confirmed(status=status)
    assert confirmed(trials)["trial_id"].to_list() == ["t1", "t2", "t3"]
    assert compare_recipes(trials, 50)["lr"].to_list() == [0.01, 0.1]
    assert compare_recipes(trials, 50)["censored"].to_list() == [False, True]


def test_where_all_fresh_seeds_failed_before_their_first_epoch_the_search_speaks():
    """They say nothing; had one of them diverged, that would be what they say."""
    trials = searched_and_confirmed()
    trials.loc[trials["phase"] == "confirm", ["status", "val_accuracy"]] = ["failed", NAN]
    assert confirmed(trials)["trial_id"].to_list() == ["t0", "t1"]
    trials.loc[3, "status"] = "diverged"
    assert confirmed(trials)["trial_id"].to_list() == ["t1", "t2", "t3"]


@pytest.mark.parametrize("status", ["pending", "running"])
def test_unfinished_confirmations_do_not_count_yet(status):
    assert confirmed(searched_and_confirmed(status=status))["trial_id"].to_list() == ["t0", "t1"]


def test_without_confirmations_all_trials_speak():
    trials = table(*AMOUNTS)
    pd.testing.assert_frame_equal(confirmed(trials), trials)


def test_confirmed_recipes_come_first():
    trials = table(
        {"optimizer": "adam", "val_accuracy": 0.9},
        {"optimizer": "sgd", "val_accuracy": 0.8},
        {"optimizer": "sgd", "val_accuracy": 0.6, "seed": 5, "phase": "confirm"},
        {"optimizer": "sgd", "val_accuracy": 0.7, "seed": 6, "phase": "confirm"},
        {"optimizer": "sgd", "lr": 0.5, "val_accuracy": 0.95},
    )
    recipes = compare_recipes(trials, 50)
    assert recipes["recipe"].to_list() == ["sgd", "adam"]
    assert recipes["confirmed"].to_list() == [True, False]
    assert recipes["trial_ids"].to_list() == [("t2", "t3"), ("t0",)]
    assert recipes["val_accuracy"].to_list() == pytest.approx([0.65, 0.9])


def test_what_was_measured_on_test_images_stands_with_its_interval():
    rows = [{"seed": i, "test_accuracy": 0.5 + 0.1 * i, "num_test_images": 100} for i in range(2)]
    trials = table(*rows).assign(
        saliency_gini=[0.2, 0.4],
        saliency_gini_low=[0.1, 0.3],
        saliency_gini_high=[0.3, 0.5],
        train_seconds=[60.0, 80.0],
    )
    both, one = compare_recipes(trials, 50).iloc[0], compare_recipes(trials[:1], 50).iloc[0]
    # 0.55 -+ 12.706 * 0.05 and 0.3 -+ 12.706 * 0.1; accuracies stay in [0, 1].
    assert tuple(both[["test_accuracy", "test_low", "test_high", "test_seeds"]]) == pytest.approx((0.55, 0.0, 1.0, 2))
    assert tuple(both[["saliency_gini", "saliency_gini_low"]]) == pytest.approx((0.3, -0.9706))
    assert both["train_seconds"] == 70
    # Of one seed the intervals are over images.
    assert tuple(one[["test_low", "test_high"]]) == pytest.approx(wilson_interval(0.5, 100))
    assert tuple(one[["saliency_gini_low", "saliency_gini_high"]]) == (0.1, 0.3)


def test_what_the_setup_decides_is_no_part_of_a_recipe():
    setups = [{"setup": "augmentation", "augmentation": "flip+crop"}, {"setup": "plain"}]
    assert recipe_columns(table(*setups)) == ["setup"]
    more = [*setups, {"setup": "augmentation", "augmentation": "flip"}]
    assert recipe_columns(table(*more)) == ["setup", "augmentation"]


COSTS = [
    {"setup": "plain"},
    {"setup": "augmentation", "augmentation": "flip"},
    {"setup": "saliency"},
    {"setup": "saliency", "max_epochs": 3, "epochs": 3},
    {"setup": "gradcam", "max_epochs": 5, "epochs": 5},
]


def test_trials_of_equal_epochs_and_of_equal_compute_by_hand():
    equal_epochs, equal_compute = by_budget(table(*COSTS))
    assert equal_epochs["trial_id"].to_list() == ["t0", "t1", "t2"]
    assert equal_compute["trial_id"].to_list() == ["t0", "t1", "t3", "t4"]
    assert by_budget(table(*COSTS[:3]))[1].empty


def test_budgets_are_those_of_each_run():
    short = table(*({**row, "max_epochs": row.get("max_epochs", 9) * 2} for row in COSTS))
    both = pd.concat([table(*COSTS).assign(run="a"), short.assign(run="b")], ignore_index=True)
    equal_epochs, equal_compute = by_budget(both)
    assert equal_epochs["trial_id"].to_list() == ["t0", "t1", "t2"] * 2
    assert equal_compute["trial_id"].to_list() == ["t0", "t1", "t3", "t4"] * 2


def test_trials_that_a_search_has_not_yet_chosen_are_no_configuration():
    trials = table(*COSTS)
    pending = pd.DataFrame([{"trial_id": "pending-6", "status": "pending", "phase": "search", "epochs": 0}])
    both = pd.concat([trials, pending], ignore_index=True).astype({n: trials.dtypes[n] for n in ("status", "phase")})
    assert best_configuration(both)["trial_id"].to_list() == best_configuration(trials)["trial_id"].to_list()
    assert by_budget(both)[1]["trial_id"].to_list() == ["t0", "t1", "t3", "t4"]


def test_the_best_configuration_is_whole():
    trials = table({"val_accuracy": 0.6}, {"lr": 0.5, "val_accuracy": 0.9}, {"lr": 0.5, "status": "stopped", "seed": 1})
    assert best_configuration(trials)["trial_id"].to_list() == ["t0"]
    assert best_configuration(trials[1:]).empty
    assert best_configuration(trials.head(0)).empty


def test_top_configurations_are_first_of_different_recipes():
    rows = [("sgd", 0.1, 0.9), ("sgd", 0.01, 0.8), ("adam", 0.1, 0.5), ("adam", 0.01, 0.6)]
    trials = table(*({"optimizer": name, "lr": lr, "val_accuracy": value} for name, lr, value in rows))
    assert top_configurations(trials, 3)["trial_id"].to_list() == ["t0", "t3", "t1"]
