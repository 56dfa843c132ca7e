"""Do ASHA's rungs rank trials as their final results do? A full grid, trained to the end under several schedules.

python -m benchmarks.rungs --data-dir DIR --out RUNS    about half an hour on two cores; resumable
python -m benchmarks.rungs --out RUNS                   the tables of what has been run

CIFAR-100 at a small scale: ResNet-18 of width 16 at 16 pixels, 10,000 images of which 3,000 are held out, 9 epochs,
optimizer {sgd, adam} x 6 learning rates x augmentation {none, flip+crop}: 24 trials a schedule, one seed. Rungs at 1
and 3 epochs, a third goes on.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis import load_epochs, load_trials
from analysis.intervals import mean_interval
from benchmarks.tables import run_main, save, show
from study import load_settings, resume_study, run_study

GRID = (
    "train_size=10000",
    "val_fraction=0.3",
    "max_epochs=9",
    "early_stopping=none",
    "cpus_per_trial=1",
    "fixed.width=16",
    "fixed.resolution='16'",
    "space.optimizer=[sgd,adam]",
    "space.lr=[0.3,0.1,0.03,0.01,0.003,0.001]",
    "space.augmentation=[none,flip+crop]",
)
PAIRED = ["optimizer", "lr", "augmentation"]  # what tells the trials of a grid apart
SCHEDULES = {
    "wsd": ("fixed.ema_decay=0",),
    "wsd-ema": ("fixed.ema_decay=0.98",),
    "cosine": ("fixed.ema_decay=0", "fixed.schedule=cosine"),
}


def learning_curves(trials: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """Return validation accuracy by trial (rows) and epoch (columns, from 1) of the trials trained to the end.

    A trial that diverged has 0 from then on, as the scheduler sees it.
    """
    ended = trials[trials["status"].isin(["completed", "diverged"])]["trial_id"]
    curves = epochs[epochs["trial_id"].isin(ended)].pivot_table(
        index="trial_id", columns="epoch", values="val_accuracy", dropna=False, observed=True
    )
    last = 0 if curves.empty else int(curves.columns.max())
    return curves.reindex(columns=range(1, last + 1)).fillna(0.0)


def rungs(max_epochs: int, grace_period: int = 1, reduction_factor: float = 3) -> list[int]:
    """Return the epochs below ``max_epochs`` at which ASHA judges (Li et al., MLSys 2020, algorithm 2)."""
    count = int(math.log(max_epochs / grace_period) / math.log(reduction_factor) + 1 + 1e-9)
    marks = [math.ceil(grace_period * reduction_factor**k) for k in range(count)]
    return [mark for mark in marks if mark < max_epochs]


def rung_correlations(curves: pd.DataFrame, marks: list[int], resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Return how well each rung ranks the trials as their last epoch does.

    Args:
        curves: see :func:`learning_curves`.
        marks: epochs of the rungs.
        resamples: bootstrap samples of the trials, for the intervals.
        seed: their seed.

    Returns:
        One row a rung: ``rung``, ``spearman_top`` (rank correlation with the last epoch, ties averaged, of the better
        half of the trials in the end: hopeless ones are easily told) and ``spearman`` (of all trials), each with the
        ends of its 95 % percentile interval, ``..._low`` and ``..._high``.
    """
    final = curves.iloc[:, -1]
    top = curves[final >= final.median()]
    rng = np.random.default_rng(seed)
    rows = []
    for mark in marks:
        row: dict[str, float] = {"rung": mark}
        for name, part in (("spearman_top", top), ("spearman", curves)):
            pairs = part[[mark, part.columns[-1]]].to_numpy()
            drawn = [_spearman(pairs[rng.integers(len(pairs), size=len(pairs))]) for _ in range(resamples)]
            low, high = np.nanquantile(drawn, [0.025, 0.975])
            row |= {name: _spearman(pairs), f"{name}_low": float(low), f"{name}_high": float(high)}
        rows.append(row)
    return pd.DataFrame(rows)


def _spearman(pairs: NDArray[np.float64]) -> float:
    """Return the rank correlation of two columns; NaN if one of them is constant."""
    ranks = pd.DataFrame(pairs).rank().to_numpy()
    if (np.ptp(ranks, axis=0) == 0).any():
        return math.nan
    return float(np.corrcoef(ranks.T)[0, 1])


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
        Two rows: ``method`` (ASHA, with trials coming one after the other; and the control that trains all for one
        epoch and the best K of them to the end, K such that it takes as many epochs, and between whole numbers the
        mixture of the two), ``epochs`` (mean, all trials together), ``loss`` (final accuracy of the best trial less
        that of the best one picked; mean) and ``found`` (share of orders in which the best was picked).
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
    k = float(np.clip((np.mean(epochs) - len(values)) / (length - 1), 1, len(values)))
    ranked = final[np.argsort(-values[:, 0], kind="stable")]
    below, above = (final.max() - ranked[: int(count)].max() for count in (np.floor(k), np.ceil(k)))
    share = k - np.floor(k)
    rows = [
        ("ASHA", np.mean(epochs), np.mean(losses), np.mean(np.array(losses) == 0)),
        (
            f"one epoch each, best {k:.1f} to the end",
            len(values) + k * (length - 1),
            (1 - share) * below + share * above,
            (1 - share) * (below == 0) + share * (above == 0),
        ),
    ]
    return pd.DataFrame(rows, columns=["method", "epochs", "loss", "found"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of CIFAR-100; without it nothing is run")
    parser.add_argument("--out", type=Path, required=True, help="where the run directories lie")
    args = parser.parse_args()
    correlations, losses, differences, finals = [], [], [], []
    for name, overrides in SCHEDULES.items():
        run = args.out / f"rungs-{name}"
        if args.data_dir:
            settings = load_settings("cifar100", (*GRID, *overrides, f"data_dir={args.data_dir.absolute()}"))
            if not (resume_study(run) if run.exists() else run_study(settings, run)):
                raise SystemExit("interrupted; the same command goes on")
        if not run.exists():
            continue
        trials = load_trials(run)
        curves = learning_curves(trials, load_epochs(run))
        marks = rungs(len(curves.columns))
        ranked = rung_correlations(curves, marks).round(3).assign(n=len(curves))
        cost = early_stopping_loss(curves, marks).round(4).assign(best=round(float(curves.iloc[:, -1].max()), 4))
        correlations += [{"schedule": name, **row} for row in ranked.to_dict("records")]
        losses += [{"schedule": name, **row} for row in cost.to_dict("records")]
        final = trials.assign(final=trials["trial_id"].map(curves.iloc[:, -1])).set_index(PAIRED)["final"]
        finals.append((name, final))
    for name, final in finals[1:]:
        mean, low, high = mean_interval((final - finals[0][1]).dropna().to_numpy())
        differences.append({"schedule": name, "to": finals[0][0], "mean": mean, "low": low, "high": high})
    show("rank correlation of rungs with the last epoch", correlations)
    show("what early stopping costs", losses)
    show("difference in the last epoch, paired", differences)
    if args.data_dir:
        save(Path(__file__).with_suffix(".json"), "correlations", correlations)
        save(Path(__file__).with_suffix(".json"), "losses", losses)
        save(Path(__file__).with_suffix(".json"), "differences", differences)


if __name__ == "__main__":
    run_main(main)
