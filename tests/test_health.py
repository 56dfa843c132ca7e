import pandas as pd
import pytest
from test_compare import table

from analysis.health import HEALTH_COLUMNS, search_space_health, seeds_to_tell


def warned(trials: pd.DataFrame, kind: str) -> list[str]:
    found = search_space_health(trials, 1000)
    return found.loc[found["warning"] == kind, "text"].to_list()


def test_columns_are_those_documented():
    found = search_space_health(table({"lr": 0.1}, {"lr": 0.01, "val_accuracy": 0.9}), 1000)
    assert list(found) == list(HEALTH_COLUMNS)
    assert list(search_space_health(table({}), 1000)) == list(HEALTH_COLUMNS)
    assert search_space_health(table({}), 1000).empty


@pytest.mark.parametrize(
    ("best", "text"),
    [
        (0.001, ["The best configuration has the least lr tried, 0.001: try lower ones."]),
        (0.01, []),
        (0.1, ["The best configuration has the greatest lr tried, 0.1: try higher ones."]),
    ],
)
def test_a_best_value_at_the_edge_is_warned_of_and_an_inner_one_is_not(best, text):
    rows = [{"optimizer": "adam", "val_accuracy": 0.1, "lr": 0.01}]
    rows += [{"lr": lr, "val_accuracy": 0.9 if lr == best else 0.5} for lr in (0.001, 0.01, 0.1)]
    assert warned(table(*rows), "edge") == text


def test_the_edge_is_that_of_the_confirmed_configuration():
    # In the search 0.1 was better by luck; its fresh seeds are worse than 0.01.
    rows = [{"optimizer": "adam", "val_accuracy": 0.1, "lr": 0.01}]
    rows += [{"lr": lr, "val_accuracy": v} for lr, v in ((0.001, 0.5), (0.01, 0.7), (0.1, 0.9))]
    fresh = ((0.01, 0.65), (0.1, 0.6))
    rows += [{"lr": lr, "val_accuracy": v, "seed": seed, "phase": "confirm"} for lr, v in fresh for seed in (7, 8)]
    assert warned(table(*rows), "edge") == []


def test_a_value_never_trained_to_the_end_is_warned_of():
    rows = [{"lr": lr, "optimizer": o} for o in ("sgd", "adam") for lr in (0.1, 0.01)]
    rows += [
        {"lr": 0.1, "optimizer": "muon", "status": "stopped"},
        {"lr": 0.01, "optimizer": "muon", "status": "diverged"},
    ]
    (text,) = warned(table(*rows), "not tried")
    assert text.startswith("No trial with optimizer muon was trained to the end (")
    assert "1 stopped" in text
    assert "1 diverged" in text


def test_a_value_that_always_diverged_is_known_for_what_it_is():
    rows = [{"lr": 0.1}, {"lr": 0.01}, {"lr": 1.0, "status": "diverged"}]
    assert warned(table(*rows), "not tried") == []


def test_trials_whose_value_is_not_known_are_told_of():
    rows = [{"lr": 0.1}, {"lr": 0.01}, {"lr": float("nan"), "val_accuracy": 0.9}]
    one, two = (warned(table(*rows, *rows[2:] * more), "unknown") for more in (0, 1))
    assert one == ["A trial has no lr that can be read: nothing here is compared with it."]
    assert two == ["2 trials have no lr that can be read: nothing here is compared with them."]


@pytest.mark.parametrize("status", ["pending", "running", "completed"])
def test_a_value_that_still_may_be_trained_to_the_end_is_not_warned_of(status):
    rows = [{"optimizer": o, "lr": lr} for o in ("sgd", "adam") for lr in (0.1, 0.01)]
    rows += [{"optimizer": "muon", "status": "stopped", "lr": 0.1}, {"optimizer": "muon", "status": status, "lr": 0.01}]
    assert warned(table(*rows), "not tried") == []


def test_a_study_that_has_not_begun_gives_no_warning():
    rows = [{"lr": lr, "status": "pending", "epochs": 0, "val_accuracy": float("nan")} for lr in (0.1, 0.01)]
    assert search_space_health(table(*rows), 1000).empty


def test_values_of_a_random_search_are_not_each_warned_of():
    # Each learning rate was drawn once, so one that was stopped says nothing of a value.
    rows = [{"lr": 0.01 * (i + 1), "status": "stopped" if i % 2 else "completed"} for i in range(20)]
    assert warned(table(*rows), "not tried") == []


def test_seeds_to_tell_by_hand():
    # With 5 seeds an error of 0.01: (t(40) + 0.8416) sqrt(5 / 41) = 2.8627 * 0.3492 = 0.99967; with 40, 1.0127.
    assert seeds_to_tell(0.01, 0.01, 5) == 41
    assert seeds_to_tell(-0.02, 0.01, 5) == 12  # (2.2010 + 0.8416) sqrt(5 / 12) / 2 = 0.982; with 11, 1.035
    assert seeds_to_tell(0.5, 0.01, 5) == 6  # more than there are, which were not enough
    assert seeds_to_tell(0.01, 0.0, 5) == 6
    assert seeds_to_tell(0.0, 0.001, 2) == pytest.approx(2 * (2.8016 * 10) ** 2, rel=0.002)
    assert seeds_to_tell(0.0, 0.001, 2) == seeds_to_tell(1e-4, 0.001, 2)


def test_with_one_seed_recipes_cannot_be_told_apart():
    (text,) = warned(table({"optimizer": "adam", "val_accuracy": 0.9}, {"val_accuracy": 0.2}), "chance")
    assert text.startswith("One seed does not tell recipes apart, however far they are: python -m study confirm")


def test_a_chance_is_told_with_the_seeds_it_takes():
    # Differences of seeds 0.00, 0.01, 0.02: error 0.01 / sqrt(3), interval 1 -+ 2.48 points;
    # (t(9) + 0.8416) 0.01 / sqrt(10) = 0.0098, with 9 seeds 0.0105.
    rows = [{"optimizer": "adam", "seed": i, "val_accuracy": 0.5 + 0.01 * i} for i in range(3)]
    rows += [{"optimizer": "sgd", "seed": i, "val_accuracy": 0.5} for i in range(3)]
    assert warned(table(*rows), "chance") == [
        "adam and sgd cannot be told apart with 3 seeds (+1.0 points, −1.5 to +3.5); "
        "if that is the difference, it would take about 10."
    ]


def test_confirmed_recipes_are_not_said_to_have_one_seed():
    rows = [{"optimizer": "adam", "val_accuracy": 0.9}, {"optimizer": "sgd", "val_accuracy": 0.2}]
    rows += [{"optimizer": "adam", "val_accuracy": 0.8, "seed": seed, "phase": "confirm"} for seed in (5, 6)]
    assert warned(table(*rows), "chance") == []


def test_recipes_that_are_told_apart_give_no_warning():
    rows = [{"optimizer": "adam", "seed": i, "val_accuracy": 0.8 + 0.001 * i} for i in range(3)]
    rows += [{"optimizer": "sgd", "seed": i, "val_accuracy": 0.5} for i in range(3)]
    assert warned(table(*rows), "chance") == []
    rows[-1]["status"] = "stopped"  # what is not whole is not compared
    assert warned(table(*rows), "chance") == []


def test_trials_of_one_name_in_two_runs_are_not_taken_for_each_other():
    # The second run's t0 is of the other recipe: were it counted, adam would have another mean.
    first = table(*({"optimizer": "adam", "seed": i, "val_accuracy": 0.8 + 0.001 * i} for i in range(3)))
    second = table(*({"optimizer": "sgd", "seed": i, "val_accuracy": 0.5} for i in range(3)))
    both = pd.concat([first.assign(run="a"), second.assign(run="b")], ignore_index=True)
    assert warned(both, "chance") == []


def test_numbers_that_vary_alone_have_edges_too_but_not_where_nothing_lies_beyond():
    assert warned(table(*({"lr": lr, "val_accuracy": lr} for lr in (0.1, 0.2, 0.3))), "edge") == [
        "The best configuration has the greatest lr tried, 0.3: try higher ones."
    ]
    assert warned(table(*({"dropout": d, "val_accuracy": 0.9 - d} for d in (0.0, 0.1, 0.2))), "edge") == []


def test_recipes_that_differ_beyond_chance_either_way_are_not_warned_of():
    rows = [{"optimizer": "sgd", "seed": s, "val_accuracy": 0.5 + 0.001 * s, "phase": "confirm"} for s in range(3)]
    rows += [{"optimizer": "adam", "seed": s, "val_accuracy": 0.6 + 0.002 * s} for s in range(3)]
    assert warned(table(*rows), "chance") == []
