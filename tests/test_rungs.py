"""What rungs say of trials trained to the end: by hand, and against Ray Tune's own ASHA."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ray.tune.schedulers.async_hyperband import _Bracket

from analysis import load_decisions, load_epochs, load_trials, read_study, replay_decisions
from benchmarks.rungs import early_stopping_loss, learning_curves, replay_asha, rung_correlations, rungs


def frame(rows: list[list[float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=range(1, len(rows[0]) + 1))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((9, 1, 3), [1, 3]),
        ((27, 1, 3), [1, 3, 9]),
        ((30, 1, 3), [1, 3, 9, 27]),
        ((10, 2, 2), [2, 4, 8]),
        ((1, 1, 3), []),
    ],
)
def test_rungs_lie_where_ray_tune_has_them(arguments, expected):
    assert rungs(*arguments) == expected
    max_epochs, grace_period, factor = arguments
    milestones = {int(m) for m, _ in _Bracket(grace_period, max_epochs, factor, 0)._rungs}
    assert sorted(m for m in milestones if m < max_epochs) == expected


def test_correlations_by_hand():
    # Ranks after epoch 1: the same order, but that the two in the middle are exchanged; d = (0, 1, -1, 0):
    # rho = 1 - 6 * 2 / (4 * 15) = 0.8. The better half is turned round at epoch 2.
    curves = frame([[0.1, 0.1, 0.1], [0.3, 0.2, 0.2], [0.2, 0.9, 0.3], [0.4, 0.8, 0.4]])
    table = rung_correlations(curves, [1, 2])
    assert table["rung"].tolist() == [1, 2]
    assert table["spearman"].tolist() == pytest.approx([0.8, 0.8])
    assert table["spearman_top"].tolist() == pytest.approx([1, -1])


def test_asha_by_hand():
    # Rung 1, factor 2, so the cutoff is the median: the first goes on; 0.3 < 0.5 stops; 0.4 >= 0.4 goes on (a tie).
    values = np.array([[0.5, 0.5, 0.9], [0.3, 0.9, 0.9], [0.4, 0.6, 0.7]])
    assert replay_asha(values, [1], 2).tolist() == [3, 1, 3]
    # At rung 2 the third is compared with the first alone.
    assert replay_asha(values, [1, 2], 2).tolist() == [3, 1, 3]
    assert replay_asha(values[[0, 2, 1]], [1, 2], 2).tolist() == [3, 1, 1]


def test_replay_decides_as_ray_tune():
    values = np.random.default_rng(0).random((200, 9)).round(2)  # with ties
    bracket = _Bracket(1, 9, 3, 0)
    expected = []
    for i, curve in enumerate(values):
        actions = (bracket.on_result(_Trial(str(i)), epoch, curve[epoch - 1]) for epoch in range(1, 10))
        expected.append(next((epoch for epoch, action in enumerate(actions, 1) if action == "STOP"), 9))
    assert replay_asha(values, rungs(9), 3).tolist() == expected
    assert len(set(expected)) == 3


def judged(rows: list[tuple[str, int, float, float, float, bool]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["trial_id", "epoch", "rung", "value", "cutoff", "stop"])


# Factor 2, so each cutoff is the median of what was recorded before at the rung; a value equal to it goes on.
JUDGED = judged(
    [
        ("a", 1, 1.0, 0.5, np.nan, False),
        ("b", 1, 1.0, 0.25, 0.5, True),
        ("c", 1, 1.0, 0.375, 0.375, False),
        ("a", 3, 2.5, 0.75, np.nan, False),
        ("d", 1, 1.0, 0.4375, 0.375, False),
        ("c", 3, 2.5, 0.5, 0.75, True),
        ("e", 1, 1.0, 0.0, 0.40625, True),
        ("d", 3, 2.5, 0.625, 0.625, False),
    ]
)


def replayed_otherwise(decisions: pd.DataFrame) -> list[tuple[str, float]]:
    """Return trial and rung of the decisions that replaying makes otherwise than recorded."""
    again = replay_decisions(decisions, 2)
    same = again["cutoff"].eq(decisions["cutoff"]) | (again["cutoff"].isna() & decisions["cutoff"].isna())
    same &= again["stop"].eq(decisions["stop"])
    return list(decisions.loc[~same, ["trial_id", "rung"]].itertuples(index=False, name=None))


def test_decisions_are_replayed_by_hand():
    blank = JUDGED.assign(cutoff=-1.0, stop=~JUDGED["stop"])
    pd.testing.assert_frame_equal(replay_decisions(blank, 2), JUDGED, check_exact=True)
    assert (blank["cutoff"] == -1).all()  # what is given stays as it is
    assert replayed_otherwise(JUDGED) == []
    # Factor 4: the cutoff is the upper quartile. That of 0 and 0.5 is 0.375, of 0, 0.375 and 0.5 is 0.4375.
    rows = [("a", 1, 1.0, 0.5), ("b", 1, 1.0, 0.0), ("c", 1, 1.0, 0.375), ("d", 1, 1.0, 0.4)]
    again = replay_decisions(judged([(*row, 9.0, True) for row in rows]), 4)
    assert again["cutoff"].tolist() == pytest.approx([np.nan, 0.5, 0.375, 0.4375], nan_ok=True)
    assert again["stop"].tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("row", "otherwise"),
    [
        # Without a, b is the first; c has 0.25 before it, d the median of 0.25 and 0.375, e that and 0.4375.
        (0, [("b", 1), ("c", 1), ("d", 1), ("e", 1)]),
        (1, [("c", 1), ("d", 1), ("e", 1)]),
        (2, [("e", 1)]),  # d has the median of 0.25 and 0.5 before it, which is the same
        (3, [("c", 2.5), ("d", 2.5)]),
        (4, [("e", 1)]),
        (5, [("d", 2.5)]),
    ],
)
def test_a_lost_decision_makes_those_after_it_differ(row, otherwise):
    assert replayed_otherwise(JUDGED.drop(index=row).reset_index(drop=True)) == otherwise


@pytest.mark.parametrize(
    ("row", "otherwise"),
    [
        (0, [("a", 1), ("c", 1), ("d", 1), ("e", 1)]),  # a is no longer the first; b has the same median before it
        (1, [("b", 1), ("c", 1), ("d", 1), ("e", 1)]),
        (3, [("a", 2.5), ("d", 2.5)]),  # c has the same median before it
        (5, [("c", 2.5), ("d", 2.5)]),
    ],
)
def test_a_decision_that_stands_twice_differs(row, otherwise):
    twice = pd.concat([JUDGED.iloc[: row + 1], JUDGED.iloc[row:]], ignore_index=True)
    assert replayed_otherwise(twice) == otherwise


@pytest.mark.parametrize(
    ("row", "change", "otherwise"),
    [
        (0, {"value": 0.625}, [("b", 1), ("c", 1)]),  # d and e have the same median before them
        (1, {"value": 0.4375}, [("c", 1), ("d", 1), ("e", 1)]),
        (7, {"value": 0.5625}, [("d", 2.5)]),  # the last one, now below its cutoff
        (4, {"cutoff": 0.25}, [("d", 1)]),
        (4, {"cutoff": np.nan}, [("d", 1)]),
        (0, {"cutoff": 0.5}, [("a", 1)]),
        (2, {"stop": True}, [("c", 1)]),
        (5, {"stop": False}, [("c", 2.5)]),
        (3, {"rung": 1.0}, [("a", 1), ("d", 1), ("c", 2.5), ("e", 1), ("d", 2.5)]),
    ],
)
def test_an_altered_decision_differs(row, change, otherwise):
    altered = JUDGED.copy()
    for name, value in change.items():
        altered.loc[row, name] = value
    assert replayed_otherwise(altered) == otherwise


def test_decisions_made_in_another_order_differ():
    swapped = JUDGED.iloc[[1, 0, *range(2, len(JUDGED))]].reset_index(drop=True)
    assert replayed_otherwise(swapped) == [("b", 1), ("a", 1)]


def test_no_decisions_are_replayed_to_none():
    none = JUDGED.iloc[:0]
    pd.testing.assert_frame_equal(replay_decisions(none, 3), none)


def test_decisions_are_replayed_as_ray_tune_makes_them():
    rng = np.random.default_rng(0)
    bracket = _Bracket(1, 9, 3, 0)
    rows = []
    for i in range(300):
        name, epoch, value = str(i), int(rng.choice([1, 3])), round(float(rng.random()), 2)  # with ties
        # A trial reaches rung 3 only after rung 1; Ray Tune records at the highest that was reached.
        recorded = next(recorded for mark, recorded in bracket._rungs if mark == epoch)
        cutoff = bracket.cutoff(recorded)
        stop = bracket.on_result(_Trial(name), epoch, value) == "STOP"
        rows.append((name, epoch, float(epoch), value, np.nan if cutoff is None else float(cutoff), stop))
    decisions = judged(rows)
    assert 50 < decisions["stop"].sum() < 250
    pd.testing.assert_frame_equal(replay_decisions(decisions, 3), decisions, check_exact=True)


def test_the_decisions_of_a_study_follow_from_the_values_in_its_log(finished_run: Path):
    decisions = load_decisions(finished_run)
    trials, epochs = load_trials(finished_run), load_epochs(finished_run)
    assert set(decisions.loc[decisions["rung"] == 1, "trial_id"]) == set(trials["trial_id"])
    stopped = trials.loc[trials["status"] == "stopped", "trial_id"]
    assert set(decisions.loc[decisions["stop"], "trial_id"]) == set(stopped)
    values = decisions.merge(epochs, on=["trial_id", "epoch"], validate="one_to_one")
    np.testing.assert_array_equal(values["value"], values["val_accuracy"])
    assert len(values) == len(decisions)
    factor = read_study(finished_run)["settings"]["reduction_factor"]
    pd.testing.assert_frame_equal(replay_decisions(decisions, factor), decisions, check_exact=True)


class _Trial:
    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


def test_early_stopping_costs_nothing_where_rungs_rank_as_the_end_does():
    curves = frame([[0.1 * i, 0.1 * i, 0.1 * i, 0.1 * i] for i in range(1, 10)])
    asha, control = early_stopping_loss(curves, [1], 3, orders=50).to_dict("records")
    assert (asha["loss"], asha["found"], control["loss"], control["found"]) == (0, 1, 0, 1)
    assert 9 + 3 <= asha["epochs"] <= 36
    assert control["epochs"] == pytest.approx(asha["epochs"])


def test_early_stopping_costs_what_the_late_bloomer_would_have_won():
    # The last one is the worst at the rung and the best in the end: it is found only if it comes first.
    curves = frame([[0.5, 0.5], [0.6, 0.6], [0.7, 0.7], [0.1, 0.9]])
    asha, control = early_stopping_loss(curves, [1], 3, orders=2000).to_dict("records")
    assert asha["found"] == pytest.approx(1 / 4, abs=0.05)
    # Otherwise 0.7 always wins: it is the best of those before it.
    assert asha["loss"] == pytest.approx(0.75 * 0.2, abs=0.01)
    # Three at most are trained to the end for as many epochs; the fourth is last at epoch 1.
    assert control["loss"] == pytest.approx(0.2)
    assert control["found"] == 0


def test_control_lies_between_whole_numbers_of_trials():
    # ASHA, at a median, trains 3 of 4 in this one order; the control has 4 + K epochs.
    curves = frame([[0.4, 0.4], [0.3, 0.9], [0.5, 0.5], [0.6, 0.6]])
    asha, control = early_stopping_loss(curves, [1], 2, orders=3000).to_dict("records")
    k = asha["epochs"] - 4
    assert 2 < k < 3
    assert control["epochs"] == pytest.approx(asha["epochs"])
    assert control["loss"] == pytest.approx(0.3)  # the best three at epoch 1 are without the winner
    top = early_stopping_loss(frame([[0.6, 0.6], [0.5, 0.5], [0.4, 0.9], [0.3, 0.3]]), [1], 2, orders=3000)
    asha, control = top.to_dict("records")
    k = asha["epochs"] - 4
    assert control["found"] == pytest.approx(k - 2)  # in with three, out with two
    assert control["loss"] == pytest.approx(0.3 * (3 - k))


def test_intervals_hold_the_correlation_and_narrow_with_more_trials():
    rng = np.random.default_rng(0)
    widths = []
    for n in (20, 200):
        quality = rng.random(n)
        noisy = quality[:, None] + np.array([0.3, 0.0]) * rng.normal(size=(n, 2))
        row = rung_correlations(frame(noisy.tolist()), [1], resamples=300).iloc[0]
        assert row["spearman_low"] < row["spearman"] < row["spearman_high"]
        widths.append(row["spearman_high"] - row["spearman_low"])
    assert widths[1] < widths[0] / 2


def test_curves_of_a_run_without_results_are_empty():
    trials = pd.DataFrame({"trial_id": ["a"], "status": ["pending"]})
    epochs = pd.DataFrame({"trial_id": [], "epoch": [], "val_accuracy": []})
    assert learning_curves(trials, epochs).empty


def test_curves_of_a_run_hold_the_trials_trained_to_the_end(finished_run: Path):
    trials, epochs = load_trials(finished_run), load_epochs(finished_run)
    curves = learning_curves(trials, epochs)
    completed = trials[trials["status"] == "completed"]
    assert set(curves.index) == set(completed["trial_id"])
    assert list(curves.columns) == [1, 2, 3]
    for trial_id, curve in curves.iterrows():
        own = epochs[epochs["trial_id"] == trial_id].sort_values("epoch")
        np.testing.assert_array_equal(curve, own["val_accuracy"])


def test_a_diverged_trial_has_zero_from_then_on():
    trials = pd.DataFrame({"trial_id": ["a", "b", "c"], "status": ["completed", "diverged", "stopped"]})
    epochs = pd.DataFrame(
        {
            "trial_id": ["a", "a", "a", "b", "b", "c"],
            "epoch": [1, 2, 3, 1, 2, 1],
            "val_accuracy": [0.1, 0.2, 0.3, 0.4, np.nan, 0.5],
        }
    )
    curves = learning_curves(trials, epochs)
    assert curves.loc["a"].tolist() == [0.1, 0.2, 0.3]
    assert curves.loc["b"].tolist() == [0.4, 0, 0]
    assert "c" not in curves.index
