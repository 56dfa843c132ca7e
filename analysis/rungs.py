"""Would early stopping have picked the winner? What each rung says of a grid trained to the end."""

import math

import numpy as np
import pandas as pd
from numpy.typing import NDArray


def learning_curves(trials: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """Return validation accuracy by trial (rows) and epoch (columns, from 1) of the trials trained to the end.

    A trial that diverged has 0 from then on, as the scheduler sees it.
    """
    ended = trials[trials["status"].isin(["completed", "diverged"])]["trial_id"]
    curves = epochs[epochs["trial_id"].isin(ended)].pivot_table(
        index="trial_id", columns="epoch", values="val_accuracy", dropna=False, observed=True
    )
    return curves.reindex(columns=range(1, int(curves.columns.max()) + 1)).fillna(0.0)


def rungs(max_epochs: int, grace_period: int = 1, reduction_factor: float = 3) -> list[int]:
    """Return the epochs below ``max_epochs`` at which ASHA judges (Li et al., MLSys 2020, algorithm 2)."""
    count = int(math.log(max_epochs / grace_period) / math.log(reduction_factor) + 1 + 1e-9)
    marks = [math.ceil(grace_period * reduction_factor**k) for k in range(count)]
    return [mark for mark in marks if mark < max_epochs]


def rung_correlations(curves: pd.DataFrame, marks: list[int]) -> pd.DataFrame:
    """Return how well each rung ranks the trials as their last epoch does.

    Args:
        curves: see :func:`learning_curves`.
        marks: epochs of the rungs.

    Returns:
        One row a rung: ``rung``, ``spearman`` (rank correlation with the last epoch, ties averaged) and
        ``spearman_top`` (of the better half of the trials in the end).
    """
    final = curves.iloc[:, -1]
    top = final >= final.median()
    rows = []
    for mark in marks:
        both = (curves[mark].rank().corr(final.rank()), curves[mark][top].rank().corr(final[top].rank()))
        rows.append({"rung": mark, "spearman": both[0], "spearman_top": both[1]})
    return pd.DataFrame(rows)


def replay_asha(values: NDArray[np.float64], marks: list[int], reduction_factor: float = 3) -> NDArray[np.int64]:
    """Return the epochs each trial would have run if they had come one after the other.

    At a rung a trial goes on if it is at least as good as the (1 - 1 / reduction_factor) quantile of those that were
    there before it, as in Ray Tune; the first always does.

    Args:
        values: (N, E) validation accuracy by trial, in order of arrival, and epoch.
        marks: epochs of the rungs.
        reduction_factor: one trial in so many goes on.
    """
    recorded: dict[int, list[float]] = {mark: [] for mark in marks}
    ran = np.full(len(values), values.shape[1], dtype=np.int64)
    for i, curve in enumerate(values):
        for mark in marks:
            before, value = recorded[mark], curve[mark - 1]
            stop = bool(before) and value < np.quantile(before, 1 - 1 / reduction_factor)
            before.append(value)
            if stop:
                ran[i] = mark
                break
    return ran


def early_stopping_loss(
    curves: pd.DataFrame, marks: list[int], reduction_factor: float = 3, orders: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Return what early stopping would have cost in final accuracy, against training all of the trials to the end.

    Args:
        curves: see :func:`learning_curves`.
        marks: epochs of the rungs.
        reduction_factor: one trial in so many goes on.
        orders: seeded orders of arrival to average over.
        seed: their seed.

    Returns:
        Two rows: ``method`` (ASHA, and the control that trains all for one epoch and the best K of them to the end,
        with K the largest for which it takes no more epochs), ``epochs`` (mean, all trials together), ``loss`` (final
        accuracy of the best trial less that of the best one picked; mean) and ``found`` (share of orders in which the
        best was picked).
    """
    values = curves.to_numpy()
    final, length = values[:, -1], values.shape[1]
    rng = np.random.default_rng(seed)
    losses, epochs = [], []
    for _ in range(orders):
        order = rng.permutation(len(values))
        ran = replay_asha(values[order], marks, reduction_factor)
        losses.append(final.max() - final[order][ran == length].max())
        epochs.append(ran.sum())
    k = int(min(max((np.mean(epochs) - len(values)) // (length - 1), 1), len(values)))
    kept = np.argsort(-values[:, 0], kind="stable")[:k]
    control = final.max() - final[kept].max()
    return pd.DataFrame(
        [
            {
                "method": "ASHA",
                "epochs": float(np.mean(epochs)),
                "loss": float(np.mean(losses)),
                "found": float(np.mean(np.array(losses) == 0)),
            },
            {
                "method": f"one epoch each, best {k} to the end",
                "epochs": float(len(values) + k * (length - 1)),
                "loss": float(control),
                "found": float(control == 0),
            },
        ]
    )
