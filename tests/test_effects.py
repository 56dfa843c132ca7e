from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import accuracy_over, asha_savings, importance, isolation, pareto_front
from analysis.effects import at_common_epoch
from analysis.trials import PHASES, STATUSES

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
    "cutout": 0,
    "normalize": True,
    "label_smoothing": 0.0,
    "dropout": 0.0,
    "width": 64,
}
SWITCH = [{"normalize": True, "width": 8}, {"normalize": False, "width": 16}]


def table(*rows: dict[str, Any]) -> pd.DataFrame:
    """Trials t0, t1, ... as load_trials gives them, each said by what is not as in DEFAULTS."""
    frame = pd.DataFrame([{"trial_id": f"t{i}"} | DEFAULTS | row for i, row in enumerate(rows)])
    types = {"status": pd.CategoricalDtype(STATUSES), "phase": pd.CategoricalDtype(PHASES), "val_accuracy": "float64"}
    return frame.astype(types | {"seed": "Int64", "max_epochs": "Int64", "cutout": "Int64", "normalize": "boolean"})


def curves(*accuracies: list[float]) -> pd.DataFrame:
    """Validation accuracy of t0, t1, ... after epochs 1, 2, ..., as load_epochs gives it."""
    rows = [
        {"trial_id": f"t{i}", "epoch": number, "train_accuracy": value + 0.1, "val_accuracy": value}
        for i, curve in enumerate(accuracies)
        for number, value in enumerate(curve, 1)
    ]
    types = {"trial_id": "str", "epoch": "int64", "train_accuracy": "float64", "val_accuracy": "float64"}
    return pd.DataFrame(rows, columns=list(types)).astype(types)


NO_EPOCHS = curves()


# --- at_common_epoch ---


def test_trials_that_were_all_trained_to_the_end_have_their_best_epochs():
    trials = table({"val_accuracy": 0.7}, {"lr": 0.5, "val_accuracy": 0.6}, {"seed": 7, "phase": "confirm"})
    then, epoch = at_common_epoch(trials, curves([0.1] * 9, [0.2] * 9, [0.3] * 9))
    assert epoch is None
    assert then[["trial_id", "val_accuracy"]].to_numpy().tolist() == [["t0", 0.7], ["t1", 0.6]]


def test_under_early_stopping_trials_are_compared_after_the_last_epoch_that_all_reached():
    trials = table(
        {"lr": 0.1, "val_accuracy": 0.9},
        {"lr": 0.2, "val_accuracy": 0.8, "status": "stopped", "epochs": 3},
        {"lr": 0.3, "val_accuracy": 0.7, "status": "stopped", "epochs": 2},
        {"lr": 0.4, "val_accuracy": 0.6, "status": "running", "epochs": 1},
        {"lr": 0.5, "val_accuracy": 0.5, "status": "diverged", "epochs": 1},
        {"lr": 0.6, "val_accuracy": NAN, "status": "pending", "epochs": 0},
        {"lr": 0.7, "val_accuracy": 0.4, "status": "running", "epochs": 2},
    )
    epochs = curves([0.1, 0.2, *[0.9] * 7], [0.3, 0.4, 0.8], [0.5, 0.6], [0.6], [0.5], [], [0.3, 0.35])
    then, epoch = at_common_epoch(trials, epochs)
    assert epoch == 2
    assert then[["trial_id", "val_accuracy"]].to_numpy().tolist() == [
        ["t0", 0.2],
        ["t1", 0.4],
        ["t2", 0.6],
        ["t4", 0.0],
        ["t6", 0.35],
    ]


def test_trials_of_fewer_epochs_for_equal_compute_are_left_out():
    trials = table({"setup": "plain"}, {"setup": "saliency"}, {"setup": "saliency", "max_epochs": 3, "epochs": 3})
    assert at_common_epoch(trials, NO_EPOCHS)[0]["trial_id"].to_list() == ["t0", "t1"]


def test_what_came_to_nothing_is_left_out_but_what_diverged_has_accuracy_0():
    rows = [("completed", NAN), ("failed", 0.7), ("diverged", 0.8), ("diverged", NAN), ("pending", NAN)]
    trials = table({}, *({"status": status, "val_accuracy": value} for status, value in rows))
    then, _ = at_common_epoch(trials, NO_EPOCHS)
    assert then[["trial_id", "val_accuracy"]].to_numpy().tolist() == [["t0", 0.5], ["t3", 0.0], ["t4", 0.0]]
    assert trials["val_accuracy"].to_list()[3] == 0.8  # the table given is as it was


def test_runs_of_different_length_are_compared_after_the_last_epoch_that_both_reached():
    """Else a run that was trained for longer would give its learning rate an effect."""
    short, long = {"max_epochs": 2, "epochs": 2}, {"max_epochs": 6, "epochs": 6}
    trials = table({"lr": 0.01, "val_accuracy": 0.4} | short, {"lr": 0.1, "val_accuracy": 0.9} | long)
    trials = trials.assign(run=["a", "b"])
    epochs = curves([0.3, 0.4], [0.3, 0.4, 0.5, 0.6, 0.7, 0.9]).assign(run=["a"] * 2 + ["b"] * 6)
    then, epoch = at_common_epoch(trials, epochs)
    assert epoch == 2
    assert then["val_accuracy"].to_list() == [0.4, 0.4]
    found = isolation(trials, epochs)
    assert found["effect"].to_list() == pytest.approx([0, 0])
    assert found["epoch"].to_list() == [2, 2]


# --- isolation ---

BLOCKS = [
    {"optimizer": "adam", "cutout": 0, "seed": 0, "val_accuracy": 0.50},
    {"optimizer": "adam", "cutout": 0, "seed": 1, "val_accuracy": 0.52},
    {"optimizer": "adam", "cutout": 8, "seed": 0, "val_accuracy": 0.60},
    {"optimizer": "adam", "cutout": 8, "seed": 1, "val_accuracy": 0.62},
    {"optimizer": "sgd", "cutout": 0, "seed": 0, "val_accuracy": 0.40},
    {"optimizer": "sgd", "cutout": 0, "seed": 1, "val_accuracy": 0.44},
    {"optimizer": "sgd", "cutout": 8, "seed": 0, "val_accuracy": 0.42},
    {"optimizer": "sgd", "cutout": 8, "seed": 1, "val_accuracy": 0.50},
]
ISOLATION_KINDS = {
    "hyperparameter": "str",
    "value": "str",
    "effect": "float64",
    "low": "float64",
    "high": "float64",
    "num_blocks": "int64",
    "best": "float64",
    "num_trials": "int64",
    "epoch": "Int64",
}


def kinds(frame: pd.DataFrame) -> dict[str, str]:
    return {str(name): str(dtype) for name, dtype in frame.dtypes.items()}


def test_effects_by_hand():
    found = isolation(table(*BLOCKS), NO_EPOCHS)
    assert found[["hyperparameter", "value"]].to_numpy().tolist() == [
        ["optimizer", "adam"],
        ["optimizer", "sgd"],
        ["cutout", "0"],
        ["cutout", "8"],
    ]
    # Above the mean of its block adam lies 0.05, 0.04, 0.09, 0.06: 0.06 -+ 3.182 * 0.021602 / 2.
    # Cutout of 8 pixels 0.05, 0.05, 0.01, 0.03: 0.035 -+ 3.182 * 0.019149 / 2.
    assert found["effect"].to_list() == pytest.approx([0.06, -0.06, -0.035, 0.035])
    assert found["low"].to_list() == pytest.approx([0.02563, -0.09437, -0.06547, 0.00453], abs=1e-5)
    assert found["high"].to_list() == pytest.approx([0.09437, -0.02563, -0.00453, 0.06547], abs=1e-5)
    assert found["num_blocks"].to_list() == [4] * 4
    assert found["best"].to_list() == pytest.approx([0.61, 0.46, 0.51, 0.61])
    assert found["num_trials"].to_list() == [4] * 4
    assert found["epoch"].isna().all()
    assert kinds(found) == ISOLATION_KINDS


@pytest.mark.parametrize(
    "last",
    [
        [],
        [{"status": "failed", "val_accuracy": NAN}],
        [{"status": "running", "val_accuracy": 0.9}],
        [{"phase": "confirm", "val_accuracy": 0.9}],
    ],
)
def test_a_block_without_one_of_its_trials_does_not_count(last):
    found = isolation(table(*BLOCKS[:-1], *({**BLOCKS[-1], **row} for row in last)), NO_EPOCHS)
    assert found["effect"].to_list() == pytest.approx([0.06, -0.06, -0.11 / 3, 0.11 / 3])
    assert found["num_blocks"].to_list() == [3] * 4
    assert found["num_trials"].to_list() == [4, 3, 4, 3]
    assert found["best"].to_list() == pytest.approx([0.61, 0.42, 0.51, 0.61])


def test_a_trial_that_diverged_counts_as_accuracy_0():
    found = isolation(table(*BLOCKS[:-1], {**BLOCKS[-1], "status": "diverged"}), NO_EPOCHS)
    # The last blocks: 0.62 and 0, 0.44 and 0.
    assert found["effect"].to_list() == pytest.approx([0.1225, -0.1225, 0.0275, -0.0275])
    assert found["num_blocks"].to_list() == [4] * 4
    assert found["best"].to_list() == pytest.approx([0.61, 0.42, 0.51, 0.61])


def test_under_early_stopping_effects_are_those_after_the_common_epoch():
    trials = table(
        {"optimizer": "adam", "seed": 0, "val_accuracy": 0.9},
        {"optimizer": "adam", "seed": 1, "val_accuracy": 0.9, "status": "stopped", "epochs": 2},
        {"optimizer": "sgd", "seed": 0, "val_accuracy": 0.9},
        {"optimizer": "sgd", "seed": 1, "val_accuracy": 0.9, "status": "diverged", "epochs": 1},
    )
    found = isolation(trials, curves([0.1, 0.3, *[0.9] * 7], [0.2, 0.4], [0.3, 0.5, *[0.9] * 7], [0.9]))
    # After epoch 2: 0.3 and 0.5 with seed 0, 0.4 and 0 with seed 1.
    assert found["value"].to_list() == ["adam", "sgd"]
    assert found["effect"].to_list() == pytest.approx([0.05, -0.05])
    assert found["best"].to_list() == pytest.approx([0.35, 0.25])
    assert found["epoch"].to_list() == [2, 2]
    assert found["num_trials"].to_list() == [2, 2]


def test_blocks_are_of_one_seed_and_several_trials_of_a_cell_are_averaged():
    rows = [("adam", 0, 0.6), ("adam", 0, 0.8), ("sgd", 0, 0.5), ("adam", 1, 0.1), ("sgd", 2, 0.9)]
    found = isolation(table(*({"optimizer": o, "seed": s, "val_accuracy": v} for o, s, v in rows)), NO_EPOCHS)
    assert found["effect"].to_list() == pytest.approx([0.1, -0.1])
    assert found["num_blocks"].to_list() == [1, 1]
    assert found[["low", "high"]].isna().all(axis=None)
    assert found["best"].to_list() == pytest.approx([0.5, 0.7])  # adam: (0.6 + 0.8 + 0.1) / 3
    assert found["num_trials"].to_list() == [3, 2]


def test_what_was_drawn_from_a_range_is_left_out_and_leaves_no_blocks():
    """Five drawn hyperparameters: a table of all their combinations would have ten billion rows."""
    names = ["lr", "weight_decay", "label_smoothing", "dropout", "width"]
    draws = np.random.default_rng(0).random((100, len(names)))
    rows = [dict(zip(names, draw.tolist(), strict=True)) for draw in draws]
    options = [{"optimizer": ("adam", "sgd")[i % 2], "val_accuracy": i / 100} for i in range(100)]
    found = isolation(table(*(row | more for row, more in zip(rows, options, strict=True))), NO_EPOCHS)
    assert found["hyperparameter"].to_list() == ["optimizer"] * 2
    assert found[["effect", "low", "high"]].isna().all(axis=None)
    assert found["num_blocks"].to_list() == [0, 0]
    assert found["num_trials"].to_list() == [50, 50]
    assert found["best"].to_list() == pytest.approx([0.98, 0.99])


def test_a_trial_whose_value_is_not_known_is_left_out_and_the_others_have_effects():
    known = [{"lr": lr, "width": width} for lr in (0.1, 0.01) for width in (8, 16)]
    trials = table(*known, {"lr": NAN, "width": 8, "val_accuracy": 0.9})
    pd.testing.assert_frame_equal(isolation(trials, NO_EPOCHS), isolation(table(*known), NO_EPOCHS))


def test_values_are_told_as_text():
    rows = [{"lr": lr, "normalize": on} for lr in (0.1, 1e-5) for on in (True, False)]
    found = isolation(table(*rows), NO_EPOCHS)
    assert found["value"].to_list() == ["1e-05", "0.1", "False", "True"]


@pytest.mark.parametrize(
    "trials", [table({}, {}), table({}).head(0), table({"status": "pending", "val_accuracy": NAN})]
)
def test_where_nothing_varies_there_are_no_effects(trials):
    found = isolation(trials, NO_EPOCHS)
    assert found.empty
    assert kinds(found) == ISOLATION_KINDS
    weights = importance(trials, NO_EPOCHS)
    assert weights.empty
    assert kinds(weights) == IMPORTANCE_KINDS


# --- importance ---

IMPORTANCE_KINDS = {"hyperparameter": "str", "importance": "float64", "num_trials": "int64", "epoch": "Int64"}
DESIGN = [{"optimizer": o, "cutout": c, "seed": s} for o in ("adam", "sgd") for c in (0, 8) for s in range(4)]


@pytest.mark.parametrize(("name", "good", "other"), [("optimizer", "sgd", "cutout"), ("cutout", 8, "optimizer")])
def test_a_hyperparameter_that_decides_all_comes_first(name, good, other):
    # The best four have the good value and seeds 2 and 3, and are two of each other value.
    trials = table(*({**row, "val_accuracy": 0.4 * (row[name] == good) + 0.01 * row["seed"]} for row in DESIGN))
    found = importance(trials, NO_EPOCHS)
    assert found["hyperparameter"].to_list() == [name, other]
    assert found["importance"].to_list() == pytest.approx([1, 0], abs=1e-6)
    assert found["num_trials"].to_list() == [16, 16]
    assert found["epoch"].isna().all()
    assert kinds(found) == IMPORTANCE_KINDS


def test_importances_add_up_to_1_the_greatest_first():
    values = np.random.default_rng(0).random((16, 2)).tolist()
    rows = [{**row, "lr": lr, "val_accuracy": value} for row, (lr, value) in zip(DESIGN, values, strict=True)]
    found = importance(table(*rows), NO_EPOCHS)
    assert set(found["hyperparameter"]) == {"optimizer", "cutout", "lr"}
    assert found["importance"].sum() == pytest.approx(1)
    assert found["importance"].is_monotonic_decreasing
    assert found["importance"].iloc[1] > 0.1


def test_a_diverged_trial_is_never_among_the_best():
    rows = [{"lr": lr, "width": w, "seed": s} for lr in (0.1, 10.0) for w in (8, 16) for s in (0, 1)]
    lost = {"status": "diverged", "val_accuracy": 0.9}
    found = importance(table(*({**row, **(lost if row["lr"] == 10 else {})} for row in rows)), NO_EPOCHS)
    assert found["hyperparameter"].to_list() == ["lr", "width"]
    assert found["importance"].to_list() == pytest.approx([1, 0], abs=1e-6)


def test_under_early_stopping_importance_is_that_after_the_common_epoch():
    rows, accuracies = [], []
    for row in DESIGN:
        stopped = {"status": "stopped", "epochs": 2} if row["optimizer"] == "adam" else {}
        rows.append({**row, **stopped, "val_accuracy": 0.9 if row["optimizer"] == "sgd" else 0.5})
        accuracies.append([0.5, 0.4 * (row["cutout"] == 8) + 0.01 * row["seed"]])
    found = importance(table(*rows), curves(*accuracies))
    assert found["hyperparameter"].to_list() == ["cutout", "optimizer"]
    assert found["importance"].to_list() == pytest.approx([1, 0], abs=1e-6)
    assert found["epoch"].to_list() == [2, 2]


def some(*accuracies: float) -> pd.DataFrame:
    return table(*({"lr": (0.1, 0.2)[i % 2], "val_accuracy": value} for i, value in enumerate(accuracies)))


def test_fewer_than_eight_trials_say_nothing_of_importance():
    accuracies = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert importance(some(*accuracies), NO_EPOCHS).empty
    assert len(importance(some(*accuracies, 0.8), NO_EPOCHS)) == 1


def test_where_the_worst_are_among_the_best_importance_is_not_known():
    assert importance(some(*[0.5] * 9), NO_EPOCHS).empty
    assert importance(some(0.9, 0.8, 0.7, *[0.0] * 6), NO_EPOCHS).empty
    assert len(importance(some(0.9, 0.8, 0.7, 0.6, *[0.0] * 5), NO_EPOCHS)) == 1


# --- pareto_front ---


def test_the_front_by_hand():
    trials = table(
        {"lr": 0.1, "seed": 0, "val_accuracy": 0.5, "train_seconds": 10.0},
        {"lr": 0.1, "seed": 1, "val_accuracy": 0.7, "train_seconds": 20.0},
        {"lr": 0.01, "val_accuracy": 0.8, "train_seconds": 30.0},
        {"lr": 0.001, "val_accuracy": 0.7, "train_seconds": 40.0},
        {"lr": 1.0, "seed": 0, "val_accuracy": 0.3, "train_seconds": 5.0, "status": "stopped"},
        {"lr": 1.0, "seed": 1, "val_accuracy": 0.9, "train_seconds": 50.0},
        {"lr": 2.0, "val_accuracy": 0.95, "train_seconds": 1.0, "status": "diverged"},
        {"lr": 3.0, "val_accuracy": NAN, "train_seconds": NAN, "status": "pending"},
    )
    found = pareto_front(trials)
    columns = ["recipe", "lr", "max_epochs", "train_seconds", "val_accuracy", "num_seeds", "censored", "on_front"]
    assert list(found.columns) == columns
    assert found.to_numpy().tolist() == [
        ["lr 1.0", 1.0, 9, 5.0, 0.3, 1, True, True],
        ["lr 0.1", 0.1, 9, 15.0, pytest.approx(0.6), 2, False, True],
        ["lr 0.01", 0.01, 9, 30.0, 0.8, 1, False, True],
        ["lr 0.001", 0.001, 9, 40.0, 0.7, 1, False, False],
        ["lr 1.0", 1.0, 9, 50.0, 0.9, 1, False, True],
    ]


def test_a_confirmed_point_is_that_of_its_fresh_seeds():
    found = pareto_front(
        table(
            {"lr": 0.1, "val_accuracy": 0.9},
            {"lr": 0.1, "val_accuracy": 0.7, "seed": 1, "phase": "confirm"},
            {"lr": 0.1, "val_accuracy": 0.6, "seed": 2, "phase": "confirm"},
            {"lr": 0.01, "val_accuracy": 0.5},
        )
    ).set_index("lr")
    assert found["val_accuracy"].to_dict() == {0.1: pytest.approx(0.65), 0.01: 0.5}
    assert found["num_seeds"].to_dict() == {0.1: 2, 0.01: 1}


def test_of_equally_dear_points_the_more_accurate_is_on_the_front_and_of_equal_points_each():
    rows = [(10.0, 0.4), (10.0, 0.5), (20.0, 0.5), (10.0, 0.5), (30.0, 0.6)]
    trials = table(*({"lr": i / 10 + 0.1, "train_seconds": s, "val_accuracy": v} for i, (s, v) in enumerate(rows)))
    found = pareto_front(trials)
    assert found["lr"].to_list() == pytest.approx([0.2, 0.4, 0.1, 0.3, 0.5])
    assert found["on_front"].to_list() == [True, True, False, False, True]


def test_points_are_named_by_recipe_and_tell_the_amounts():
    trials = table({"optimizer": "adam", "lr": 0.01}, {"lr": 0.1, "train_seconds": 50.0})
    found = pareto_front(trials)
    assert found[["recipe", "optimizer", "lr"]].to_numpy().tolist() == [["sgd", "sgd", 0.1], ["adam", "adam", 0.01]]


def test_without_any_result_there_is_no_front():
    found = pareto_front(table({"val_accuracy": NAN, "train_seconds": NAN, "status": "pending"}))
    assert found.empty
    assert "on_front" in found


# --- asha_savings ---


def test_savings_by_hand():
    trials = table(
        *[{"status": "stopped", "epochs": 1}] * 6,
        *[{"status": "stopped", "epochs": 3}] * 2,
        {"epochs": 9},
        {"status": "pending", "epochs": 0, "val_accuracy": NAN},
    )
    savings = asha_savings(trials)
    assert savings.to_dict("list") == {
        "epoch": [1, 3, 9],
        "trials_trained": [9, 3, 1],
        "trials_without_stopping": [9, 9, 9],
        "trials_stopped": [6, 2, 0],
        "epochs_run": [6 + 6 + 9] * 3,
        "epochs_without_stopping": [81] * 3,
    }


def test_only_what_stopped_trials_had_left_was_saved():
    """Trials that diverged, failed or still run would have run no further without ASHA."""
    rows = [("stopped", 2), ("diverged", 3), ("failed", 5), ("running", 6), ("completed", 9), ("stopped", 2)]
    savings = asha_savings(table(*({"status": status, "epochs": epochs} for status, epochs in rows)))
    assert savings["epoch"].to_list() == [2, 3, 5, 6, 9]
    assert savings["trials_trained"].to_list() == [6, 4, 3, 2, 1]
    assert savings["trials_without_stopping"].to_list() == [6, 6, 5, 4, 3]
    assert savings["trials_stopped"].to_list() == [2, 0, 0, 0, 0]
    lengths = np.diff(savings["epoch"], prepend=0)
    assert (savings["trials_trained"] * lengths).sum() == savings["epochs_run"].iloc[0] == 27
    full = (savings["trials_without_stopping"] * lengths).sum()
    assert full == savings["epochs_without_stopping"].iloc[0] == 3 + 5 + 6 + 3 * 9


def test_savings_reach_to_the_end_that_no_trial_has_reached_yet():
    savings = asha_savings(table({"status": "stopped", "epochs": 1}, {"status": "running", "epochs": 3}))
    assert savings["epoch"].to_list() == [1, 3, 9]
    assert savings["trials_trained"].to_list() == [2, 1, 0]
    assert savings["trials_without_stopping"].to_list() == [2, 2, 1]


def test_savings_are_those_of_equal_epochs():
    short = {"setup": "saliency", "max_epochs": 3, "epochs": 3}
    savings = asha_savings(table({"setup": "plain"}, {"setup": "saliency", "status": "stopped", "epochs": 1}, short))
    assert savings["epoch"].to_list() == [1, 9]
    assert savings["epochs_without_stopping"].to_list() == [18, 18]


def test_savings_of_a_study_that_stopped_nothing():
    assert asha_savings(table({}, {}))[["epoch", "trials_trained", "trials_stopped"]].to_numpy().tolist() == [[9, 2, 0]]
    nothing = asha_savings(table({"status": "pending", "epochs": 0}))
    assert nothing.empty
    assert kinds(nothing) == dict.fromkeys(asha_savings(table({})), "int64")


# --- accuracy_over ---


def test_accuracy_over_by_hand():
    trials = table(
        {"optimizer": "sgd", "lr": 0.1, "width": 8, "seed": 0, "val_accuracy": 0.3},
        {"optimizer": "sgd", "lr": 0.1, "width": 8, "seed": 1, "val_accuracy": 0.5},
        {"optimizer": "sgd", "lr": 0.1, "width": 16, "seed": 0, "val_accuracy": 0.35},
        {"optimizer": "sgd", "lr": 0.1, "width": 16, "seed": 1, "val_accuracy": 0.9, "status": "stopped"},
        {"optimizer": "sgd", "lr": 0.01, "width": 8, "val_accuracy": 0.2, "status": "stopped"},
        {"optimizer": "adam", "lr": 0.01, "width": 8, "val_accuracy": 0.6},
        {"optimizer": "adam", "lr": 0.1, "width": 8, "val_accuracy": NAN, "status": "diverged"},
    )
    points = accuracy_over(trials, "lr")
    assert list(points.columns) == ["optimizer", "lr", "recipe", "val_accuracy", "censored"]
    assert points.to_numpy().tolist() == [
        ["adam", 0.01, "adam", pytest.approx(0.6), False],
        ["adam", 0.1, "adam", 0.0, False],
        ["sgd", 0.01, "sgd", pytest.approx(0.2), True],
        ["sgd", 0.1, "sgd", pytest.approx(0.4), False],
    ]


def test_a_diverged_trial_counts_as_accuracy_0_and_is_no_unfinished_one():
    trials = table(
        {"lr": 0.1, "seed": 0, "val_accuracy": 0.8},
        {"lr": 0.1, "seed": 1, "val_accuracy": 0.7, "status": "diverged"},
        {"lr": 0.2, "seed": 0, "val_accuracy": 0.9, "status": "diverged"},
        {"lr": 0.3, "seed": 0, "val_accuracy": 0.6, "status": "stopped"},
        {"lr": 0.3, "seed": 1, "val_accuracy": 0.9, "status": "diverged"},
    )
    points = accuracy_over(trials)
    assert points["val_accuracy"].to_list() == pytest.approx([0.4, 0.0, 0.3])
    assert points["censored"].to_list() == [False, False, True]


def test_accuracy_over_another_amount():
    trials = table({"width": 8, "val_accuracy": 0.4}, {"width": 16, "val_accuracy": 0.6}, {"width": 16, "seed": 1})
    points = accuracy_over(trials, "width")
    assert points[["width", "recipe"]].to_numpy().tolist() == [[8, "the one recipe"], [16, "the one recipe"]]
    assert points["val_accuracy"].to_list() == pytest.approx([0.4, 0.55])


@pytest.mark.parametrize(
    ("rows", "recipes"),
    [
        ([{}], ["the one recipe"]),
        (SWITCH, ["normalize False", "normalize True"]),
        ([{"lr": 0.1}, {"lr": 0.01}], ["the one recipe"] * 2),
        ([{"weight_decay": 0.0}, {"weight_decay": 0.1}], ["weight_decay 0.0", "weight_decay 0.1"]),
    ],
)
def test_accuracy_over_the_learning_rate_of_small_studies(rows, recipes):
    points = accuracy_over(table(*rows))
    assert points["recipe"].to_list() == recipes
    assert points["val_accuracy"].to_list() == [0.5] * len(recipes)


def test_without_any_accuracy_there_are_no_points():
    points = accuracy_over(table({"val_accuracy": NAN, "status": "pending"}, {"val_accuracy": NAN, "lr": 0.5}))
    assert points.empty
    assert list(points.columns) == ["lr", "recipe", "val_accuracy", "censored"]
