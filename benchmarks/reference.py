"""The reference study on CIFAR-100, from the search to what is published of it in results/cifar100.

python -m benchmarks.reference                    hours on two cores: results/cifar100/parts.csv says how many
python -m benchmarks.reference --only grid        a part alone: search, tune, final, grid, setups, gpu-...
python -m benchmarks.reference --only publish     tables, reports and figures of the parts that have ended

What is published takes the place of what lies in results/cifar100. CIFAR-100 is read from (or downloaded into) data/,
or --data-dir. Each part is a study in runs/; Ctrl-C ends it, and the same command goes on. Scales are chosen for two
cores, where an epoch of 45,000 images takes ResNet-18 of full width some three minutes at 16 pixels, and eight at 32;
there, trials of two threads run one at a time. Where there is a GPU, other parts are run: gpu-search, gpu-final and
gpu-setups. gpu-final trains what search and tune chose here or, if they were not run here, as published. An H200 takes
one to three seconds for an epoch at 32 pixels.
"""

import argparse
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from PIL import Image

from analysis import compare_recipes, decide, load_epochs, load_measures, load_timeline, load_trials, read_study
from analysis.compare import best_configuration, top_configurations
from analysis.explanations import explain_trials, load_test_data
from analysis.intervals import paired_over_seeds
from analysis.report import write_report
from analysis.trials import ENDED
from benchmarks.rungs import early_stopping_loss, learning_curves, rungs
from benchmarks.tables import run_main
from study import confirm_study, load_settings, resume_study, run_study
from study.supervise import lost_trials
from trainables import resolve_device
from trainables.errors import UserError

RUNS, PUBLISHED = Path("runs"), Path("results/cifar100")
SPACE = ("space.optimizer=[sgd,adam,muon]", "space.augmentation=[none,flip+crop]", "fixed.batch_size=256")
SMALL = ("fixed.width=16", "fixed.resolution=16", "cpus_per_trial=1")
PARTS: dict[str, tuple[str, ...]] = {
    # Which recipe wins?
    "search": ("--preset", "cifar100", *SPACE, "max_epochs=9", "fixed.resolution=16", "cpus_per_trial=2"),
    # Which weight decay does the winner want, once targets are softer?
    "tune": ("--preset", "cifar100", "space={weight_decay: [0.0005, 0.03, 0.1, 0.2]}", "early_stopping=none",
             "max_epochs=9", "fixed.resolution=16", "fixed.label_smoothing=0.1", "fixed.batch_size=256",
             "fixed.width=32", "cpus_per_trial=1"),
    # The winner of both, with seeds that neither had, for longer and up to 28 pixels.
    "final": ("--preset", "cifar100", "space={seed: [1, 2, 3]}", "early_stopping=none", "max_epochs=14",
              "fixed.resolution=16,20,24,28", "fixed.label_smoothing=0.1", "fixed.batch_size=256", "cpus_per_trial=2"),
    # Would the full grid have told the same winner? Small enough to train all of it to the end.
    "grid": ("--preset", "cifar100", *SPACE, "max_epochs=9", "early_stopping=none", *SMALL),
    # Does training with maps help?
    "setups": ("--preset", "setups", "space.seed=[0,1,2]", "max_epochs=12", "equal_compute=false", *SMALL),
    # On a GPU, at full width and up to 32 pixels. Does the search find the same winner there?
    "gpu-search": ("--preset", "cifar100", *SPACE, "max_epochs=9", "device=cuda"),
    # The winner of search and tune, long enough for cutout to pay (benchmarks/README.md).
    "gpu-final": ("--preset", "cifar100", "space={seed: [1, 2, 3]}", "early_stopping=none", "max_epochs=48",
                  "fixed.label_smoothing=0.1", "fixed.cutout=8", "fixed.batch_size=256", "device=cuda"),
    "gpu-setups": ("--preset", "setups", "space.seed=[0,1,2]", "max_epochs=8", "equal_compute=false",
                   "fixed.resolution=16,24,32", "fixed.batch_size=256", "device=cuda"),
}  # fmt: skip
WINNER = ["optimizer", "lr", "augmentation"]  # what the search decides
BOTH = {"search": WINNER, "tune": ["weight_decay"]}
CHOSEN = {"tune": {"search": WINNER}, "final": BOTH, "gpu-final": BOTH}
TOP, SEEDS = 2, 5  # recipes of the grid that are confirmed, and with how many seeds
ALL_EXPLAINED = ("final", "setups", "gpu-final", "gpu-setups")  # of the others, what a report explains
# Of a run: all but weights, maps and predictions; measures, which are large, where all networks have them.
KEPT = ("study.yaml", "manifest.json", "events.jsonl", "explanations/*/summary.json")
MEASURES = "explanations/*/measures.parquet"
PANEL_SCALE = 0.6


def parts_of(device: str) -> list[str]:
    """Return the parts that are run on a kind of device, in order."""
    return [part for part in PARTS if part.startswith("gpu-") == (device == "cuda")]


def place_of(part: str) -> Path | None:
    """Return where a part that has ended lies: its run, or without that what was published of it."""
    for run in (RUNS / part, PUBLISHED / part):
        if run.exists() and load_trials(run)["status"].isin(ENDED).all():
            return run
    return None


def winner_of(part: str) -> pd.Series:
    """Return the best trial of a part.

    Raises:
        UserError: if the part has not ended.
    """
    run = place_of(part)
    if not run or (run != RUNS / part and (RUNS / part).exists()):  # what was published is not what is run here
        raise UserError(f"{part} has not ended, which says what to train; first: --only {part}")
    return _best_of(run)


def _best_of(run: Path) -> pd.Series:
    return best_configuration(load_trials(run)).iloc[0]


def words_of(part: str) -> list[str]:
    """Return what ``python -m study run`` is given for a part; some train what parts before it chose."""
    words = ["--name", part, *PARTS[part]]
    for chooser, names in CHOSEN.get(part, {}).items():
        winner = winner_of(chooser)
        words += [f"fixed.{name}={winner[name]}" for name in names]
    return words


def same_in(grid: Path, winner: pd.Series) -> list[str]:
    """Return the id of the trial that is in the grid what the winner is in the search; it is confirmed, too."""
    trials = load_trials(grid).query("phase == 'search'")
    return trials[_is(trials, winner)]["trial_id"].to_list()


def _is(trials: pd.DataFrame, configuration: pd.Series) -> pd.Series:
    return (trials[WINNER] == configuration[WINNER]).all(axis=1)


def run_part(part: str, data_dir: Path | None) -> bool:
    """Run a part, or go on with it; return whether it ended."""
    run = RUNS / part
    if not run.exists():
        words = words_of(part)
        if data_dir:  # as a YAML string, whatever characters it has
            words.append(f"data_dir={yaml.safe_dump(str(data_dir.absolute())).splitlines()[0]}")
        command = shlex.join(["python", "-m", "study", "run", *words])
        print(command, flush=True)
        settings = load_settings(words[words.index("--preset") + 1], [word for word in words if "=" in word])
        ended = run_study(settings, run, command=command)
    else:
        ended = (place_of(part) == run and not lost_trials(run)) or resume_study(run)
    if ended and part == "grid" and not (load_trials(run)["phase"] == "confirm").any():
        return confirm_study(run, top=TOP, trials=same_in(run, winner_of("search")), seeds=SEEDS)
    return ended


def publish(data_dir: Path | None) -> None:
    """Write a report of each part that has ended, and tables over all of them."""
    ended = {part: place for part in PARTS if (place := place_of(part))}
    if not ended:
        raise UserError(f"{RUNS}: no part of the reference study has ended yet")
    for part, run in ended.items():
        if run.parent == RUNS:
            if failed := (load_trials(run)["status"] == "failed").sum():
                print(f"{part}: {failed} trials failed; they count for nothing in what is published")
            publish_part(run, PUBLISHED / part, data_dir)
    # From what was published, so that whoever has it gets the same tables.
    copies = {part: PUBLISHED / part for part in ended}
    tables = {
        "parts": pd.concat([summary(copy) for copy in copies.values()]),
        "trials": over(copies, load_trials).drop(columns="checkpoint"),
        "epochs": over(copies, load_epochs),
        "comparison": over(copies, recipes),
        "claims": over(copies, claims),
    }
    if "grid" in copies:
        tables["early_stopping"] = early_stopping(copies["grid"], _best_of(PUBLISHED / "search"))
    for name, table in tables.items():
        table.to_csv(PUBLISHED / f"{name}.csv", index=False)
        print(f"{len(table)} rows: {PUBLISHED / name}.csv")


def publish_part(run: Path, copy: Path, data_dir: Path | None) -> None:
    """Explain a part's networks, and copy all of it but weights, maps and predictions; its report stands beside it.

    What was published of it before is there until all of it is written.
    """
    trials = load_trials(run)
    kept = trials[trials["checkpoint"].notna()]
    if run.name in ALL_EXPLAINED:
        explain_trials(run, kept, load_test_data(run, data_dir), tell=print)
    copy.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=copy.parent) as folder:
        new = Path(folder) / copy.name
        write_report([run], new, data_dir=data_dir, tell=print).unlink()  # report.md has the same
        if (panel := new / "figures" / "panel.png").exists():
            shrink_panel(panel)
        for name in (*KEPT, MEASURES) if run.name in ALL_EXPLAINED else KEPT:
            for file in run.glob(name):
                there = new / file.relative_to(run)
                there.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, there)
        for file in new.glob(MEASURES):
            shrink_measures(file)
        shutil.rmtree(copy, ignore_errors=True)
        new.rename(copy)


def shrink_panel(panel: Path) -> None:
    """Make a picture of maps, most of a report's size, smaller: three fifths a side, and 256 colours."""
    with Image.open(panel) as picture:
        colours = picture.convert("RGB")
    colours = colours.resize((round(PANEL_SCALE * colours.width), round(PANEL_SCALE * colours.height)))
    palette = colours.quantize(256, method=Image.Quantize.MAXCOVERAGE)
    colours.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(panel, optimize=True)


def shrink_measures(file: Path) -> None:
    """Round what maps show of each image to the 11 bits of half precision: less than half the size."""
    measures = pd.read_parquet(file)
    measures["value"] = measures["value"].astype("float16").astype("float32")
    measures.to_parquet(file, index=False, compression="zstd", compression_level=19)


def over(runs: dict[str, Path], table: Callable[[Path], pd.DataFrame]) -> pd.DataFrame:
    """Return the table of each run under the other's, with the part's name in front."""
    return pd.concat([table(run).assign(part=name) for name, run in runs.items()]).set_index("part").reset_index()


def recipes(run: Path) -> pd.DataFrame:
    return compare_recipes(load_trials(run), int(read_study(run)["data"]["num_val_images"]))


def claims(run: Path) -> pd.DataFrame:
    measures = load_measures(run) if run.name in ALL_EXPLAINED else None
    return decide(measures, load_trials(run), load_epochs(run))


def summary(run: Path) -> pd.DataFrame:
    """Return what a part was, and what it took where."""
    study, trials, timeline = read_study(run), load_trials(run), load_timeline(run)
    attempts = timeline.groupby("attempt")
    hours = (attempts["end_seconds"].max() - attempts["start_seconds"].min()).sum() / 3600
    machine = study["machine"]
    commands = [study["command"]]
    if (trials["phase"] == "confirm").any():
        chosen = " ".join(same_in(run, _best_of(PUBLISHED / "search")))
        commands.append(f"python -m study confirm runs/{run.name} --top {TOP} --trials {chosen} --seeds {SEEDS}")
    if run.name in ALL_EXPLAINED:
        commands.append(f"python -m analysis explain runs/{run.name} --all")
    commands.append(f"python -m analysis report runs/{run.name}")
    return pd.DataFrame(
        {
            "part": run.name,
            "trials": len(trials),
            "completed": (trials["status"] == "completed").sum(),
            "stopped": (trials["status"] == "stopped").sum(),
            "epochs": trials["epochs"].sum(),
            "images": study["data"]["num_train_images"],
            "width": trials["width"].iloc[0],
            "resolution": trials["resolution"].iloc[0],
            "hours": round(hours, 2),
            "machine": ", ".join([f"{machine['cores']} cores of {machine['processor']}", *machine["gpus"]]),
            "versions": ", ".join(f"{name} {number}" for name, number in study["versions"].items()),
            "begun": study["created"],
            "commands": "; ".join(commands),
        },
        index=[0],
    )


def early_stopping(grid: Path, winner: pd.Series) -> pd.DataFrame:
    """Return what ASHA would have cost on the grid, and by how much the search's winner is worse than the grid's best.

    The latter is of fresh seeds, on which neither was chosen: it may well be negative. It is 0 where both are the same.

    Args:
        grid: a run without early stopping, confirmed.
        winner: the best trial of the search.

    Returns:
        Of each ``method``: ``epochs``, ``loss`` (validation accuracy of the last epoch, with the ends of its 95 %
        interval ``low`` and ``high``, and of ``n`` orders of arrival or seeds), ``found`` (whether, or how often, the
        best was picked).
    """
    trials, epochs = load_trials(grid), load_epochs(grid)
    searched, again = (trials[trials["phase"] == phase] for phase in ("search", "confirm"))
    curves = learning_curves(searched, epochs)
    rows = early_stopping_loss(curves, rungs(len(curves.columns))).assign(n=[1000, 1])
    if again.empty:
        return rows.round(4)
    best = top_configurations(searched, 1).iloc[0]
    again = again.assign(last=again["trial_id"].map(learning_curves(again, epochs).iloc[:, -1])).set_index("seed")
    ours, theirs = (again[_is(again, of)]["last"] for of in (winner, best))
    loss, low, high, n = paired_over_seeds(theirs, ours)
    row = {"method": "the search at full width: its winner here", "loss": loss, "low": low, "high": high, "n": n}
    row["found"] = float((winner[WINNER] == best[WINNER]).all())
    if row["found"]:  # one configuration: nothing was compared
        row |= {"low": np.nan, "high": np.nan, "n": None}
    return pd.concat([rows, pd.DataFrame([row])]).round(4).astype({"n": "Int64"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of CIFAR-100 [data/]")
    parser.add_argument("--only", choices=[*PARTS, "publish"], help="a part alone")
    args = parser.parse_args()
    for part in (args.only,) if args.only else parts_of(resolve_device().type):
        if part != "publish" and not run_part(part, args.data_dir):
            print("interrupted; the same command goes on", file=sys.stderr)
            return 130
    if args.only in (None, "publish"):
        publish(args.data_dir)
    return 0


if __name__ == "__main__":
    run_main(main)
