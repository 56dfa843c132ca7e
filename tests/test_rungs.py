"""What rungs say of trials trained to the end: by hand, and against Ray Tune's own ASHA."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ray.tune.schedulers.async_hyperband import _Bracket

from analysis import load_epochs, load_trials
from analysis.rungs import early_stopping_loss, learning_curves, replay_asha, rung_correlations, rungs


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
