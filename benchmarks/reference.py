"""The reference study on CIFAR-100, from the search to what is published of it in results/cifar100.

python -m benchmarks.reference                    hours on two cores: results/cifar100/parts.csv says how many
python -m benchmarks.reference --only grid        a part alone: search, final, grid or setups
python -m benchmarks.reference --only publish     tables, report and figures of the parts that there are

CIFAR-100 is read from (or downloaded into) data/, or --data-dir. Each part is a study in runs/; Ctrl-C ends it, and the
same command goes on. Scales are chosen for two cores, where an epoch of 45,000 images takes ResNet-18 of full width
some three minutes at 16 pixels, and eight at 32.
"""

import argparse
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from analysis import compare_recipes, decide, load_epochs, load_measures, load_timeline, load_trials, read_study
from analysis.compare import best_configuration
from analysis.explanations import explain_trials, load_test_data
from analysis.report import write_report
from analysis.rungs import early_stopping_loss, learning_curves, rungs
from study import confirm_study, load_settings, resume_study, run_study

RUNS, PUBLISHED = Path("runs"), Path("results/cifar100")
SPACE = ("space.optimizer=[sgd,adam,muon]", "space.augmentation=[none,flip+crop]", "fixed.batch_size=256")
SMALL = ("fixed.width=16", "fixed.resolution=16", "cpus_per_trial=1")
PARTS: dict[str, tuple[str, ...]] = {
    # Which recipe wins? All of it at 16 pixels; one trial at a time, so that ASHA decides the same in every run of it.
    "search": ("--preset", "cifar100", *SPACE, "max_epochs=9", "fixed.resolution=16", "cpus_per_trial=2"),
    # The winner, with seeds that had no part in choosing it, for longer, up to 28 pixels and with softer targets.
    "final": ("--preset", "cifar100", "space={seed: [1, 2, 3]}", "early_stopping=none", "max_epochs=14",
              "fixed.resolution=16,20,24,28", "fixed.label_smoothing=0.1", "fixed.batch_size=256", "cpus_per_trial=2"),
    # Would the full grid have told the same winner? Small enough to train all of it to the end.
    "grid": ("--preset", "cifar100", *SPACE, "max_epochs=9", "early_stopping=none", *SMALL),
    # Does training with maps help?
    "setups": ("--preset", "setups", "space.seed=[0,1,2]", "max_epochs=12", "equal_compute=false", *SMALL),
}  # fmt: skip
WINNER = ["optimizer", "lr", "augmentation"]  # what the search decides
# Of a run: all but weights, and the maps themselves.
KEPT = ("study.yaml", "manifest.json", "events.jsonl", "explanations/*/summary.json", "explanations/*/measures.parquet")
CONFIRMED = {"grid": (4, 3)}  # configurations, and fresh seeds of each


def place_of(part: str) -> Path:
    """Return where a part lies: the run itself, or without it what was published of it."""
    return RUNS / part if (RUNS / part).exists() else PUBLISHED / part


def words_of(part: str) -> list[str]:
    """Return what ``python -m study run`` is given for a part; ``final`` trains the search's winner."""
    words = ["--name", part, *PARTS[part]]
    if part == "final":
        winner = best_configuration(load_trials(place_of("search"))).iloc[0]
        words += [f"fixed.{name}={winner[name]}" for name in WINNER]
    return words


def run_part(part: str, data_dir: Path | None) -> bool:
    """Run a part, or go on with it; return whether it ended."""
    run = RUNS / part
    if not run.exists():
        words = words_of(part) + ([f"data_dir={data_dir}"] if data_dir else [])
        overrides = [word for word in words if "=" in word]
        command = shlex.join(["python", "-m", "study", "run", *words])
        print(command, flush=True)
        ended = run_study(load_settings(words[words.index("--preset") + 1], overrides), run, command=command)
    else:
        ended = resume_study(run)
    if not ended or part not in CONFIRMED:
        return ended
    top, seeds = CONFIRMED[part]
    return confirm_study(run, top=top, seeds=seeds)


def publish(data_dir: Path | None) -> None:
    """Explain the networks of ``final`` and ``setups``; write tables, report and figures of all parts."""
    found = [run for run in map(place_of, PARTS) if run.exists()]
    for run in found:
        trials = load_trials(run)
        kept = trials[trials["checkpoint"].notna()]
        if run.name in ("final", "setups") and len(kept):
            explain_trials(run, kept, load_test_data(run, data_dir), tell=print)
    report = write_report(sorted(found, key=lambda run: run.name != "final"), PUBLISHED, data_dir=data_dir, tell=print)
    report.unlink()  # its figures and tables are those of report.md
    copies = {run.name: PUBLISHED / run.name for run in found}
    for run in found:
        for name in KEPT:
            for file in run.glob(name):
                copy = copies[run.name] / file.relative_to(run)
                copy.parent.mkdir(parents=True, exist_ok=True)
                if copy != file:
                    shutil.copyfile(file, copy)
    # From what was published, so that whoever has it gets the same tables.
    tables = {
        "parts": pd.concat([summary(copy) for copy in copies.values()]),
        "trials": over(copies, load_trials).drop(columns="checkpoint"),
        "epochs": over(copies, load_epochs),
        "comparison": over(copies, lambda run: compare_recipes(load_trials(run), num_val_images(run))),
        "claims": over(copies, claims),
    }
    if {"search", "grid"} <= set(copies):
        tables["early_stopping"] = early_stopping(copies["search"], copies["grid"])
    for name, table in tables.items():
        table.to_csv(PUBLISHED / f"{name}.csv", index=False)
        print(f"{len(table)} rows: {PUBLISHED / name}.csv")


def over(runs: dict[str, Path], table: Callable[[Path], pd.DataFrame]) -> pd.DataFrame:
    """Return the table of each run under the other's, with the part's name in front."""
    return pd.concat([table(run).assign(part=name) for name, run in runs.items()]).set_index("part").reset_index()


def num_val_images(run: Path) -> int:
    return int(read_study(run)["data"]["num_val_images"])


def claims(run: Path) -> pd.DataFrame:
    return decide(load_measures(run), load_trials(run), load_epochs(run))


def summary(run: Path) -> pd.DataFrame:
    """Return what a part was, and what it took where."""
    study, trials, timeline = read_study(run), load_trials(run), load_timeline(run)
    attempts = timeline.groupby("attempt")
    hours = (attempts["end_seconds"].max() - attempts["start_seconds"].min()).sum() / 3600
    machine = study["machine"]
    return pd.DataFrame(
        {
            "part": run.name,
            "trials": len(trials),
            "epochs": trials["epochs"].sum(),
            "images": study["data"]["num_train_images"],
            "width": trials["width"].iloc[0],
            "resolution": trials["resolution"].iloc[0],
            "hours": round(hours, 2),
            "machine": ", ".join([f"{machine['cores']} cores of {machine['processor']}", *machine["gpus"]]),
            "versions": ", ".join(f"{name} {number}" for name, number in study["versions"].items()),
            "begun": study["created"],
            "command": study["command"],
        },
        index=[0],
    )


def early_stopping(search: Path, grid: Path) -> pd.DataFrame:
    """Return what ASHA would have cost on the grid, and by how much the search's winner is worse than the grid's best.

    The latter over the fresh seeds of the grid, if the search's winner is among what was confirmed there.
    """
    trials = load_trials(grid)
    curves = learning_curves(trials[trials["phase"] == "search"], load_epochs(grid))
    picked = early_stopping_loss(curves, rungs(len(curves.columns)))
    winner = best_configuration(load_trials(search)).iloc[0]
    seen = trials[trials["phase"] == "confirm"]
    if not (seen[WINNER] == winner[WINNER]).all(axis=1).any():
        seen = trials[trials["phase"] == "search"]
    means = seen.groupby(WINNER, observed=True)["val_accuracy"].agg(["mean", "count"])
    own = means.loc[tuple(winner[WINNER])]
    loss = means["mean"].max() - own["mean"]
    row = {"method": f"the search's winner here, mean of {own['count']:.0f} seeds", "loss": loss, "found": loss == 0}
    return pd.concat([picked, pd.DataFrame([row])]).round(4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of CIFAR-100 [data/]")
    parser.add_argument("--only", choices=[*PARTS, "publish"], help="a part alone")
    args = parser.parse_args()
    for part in PARTS:
        if args.only in (None, part) and not run_part(part, args.data_dir):
            raise SystemExit("interrupted; the same command goes on")
    if args.only in (None, "publish"):
        publish(args.data_dir)


if __name__ == "__main__":
    main()
