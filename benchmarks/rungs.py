"""Do ASHA's rungs rank trials as their final results do? A full grid, trained to the end under several schedules.

python -m benchmarks.rungs --data-dir DIR --out RUNS    about half an hour on two cores; resumable
python -m benchmarks.rungs --out RUNS                   the tables of what has been run

CIFAR-100 at a small scale: ResNet-18 of width 16 at 16 pixels, 10,000 images of which 3,000 are held out, 9 epochs,
optimizer {sgd, adam} x 6 learning rates x augmentation {none, flip+crop}: 24 trials a schedule, one seed. Rungs at 1
and 3 epochs, a third goes on.
"""

import argparse
from pathlib import Path

from analysis import load_epochs, load_trials
from analysis.intervals import mean_interval
from analysis.rungs import early_stopping_loss, learning_curves, rung_correlations, rungs
from benchmarks.tables import save, show
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
    main()
