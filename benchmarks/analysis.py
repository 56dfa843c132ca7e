"""What the DataFrames and the report of a large study cost, beside Ray Tune's own DataFrame.

python -m benchmarks.analysis                    all figures, about eight minutes on two cores
python -m benchmarks.analysis --only frames      one of: frames, scaling, report

Our run directories are made up: plausible numbers in the files that a study leaves. Ray Tune's are left by trials that
report as many numbers and train nothing, and are read by its ResultGrid. Each figure is of a fresh process, without the
imports. Prints tables and merges them into benchmarks/analysis.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.tables import run_main, save, show
from trainables import TrialSettings

Rows = list[dict[str, Any]]
OPTIMIZERS, AUGMENTATIONS = ("sgd", "adam"), ("none", "flip", "crop", "flip+crop")


def make_run(run: Path, num_trials: int, num_epochs: int) -> None:
    """Write the files of a finished study: learning curves that rise to what optimizer, rate and augmentation allow."""
    rng = np.random.default_rng(0)
    run.mkdir(parents=True)
    data = {"dataset": "made-up", "num_train_images": 45000, "num_val_images": 5000, "fingerprint": "0" * 16,
            "class_names": [f"class {i}" for i in range(100)]}  # fmt: skip
    settings = {"dataset": "cifar100", "data_dir": None, "train_size": None, "val_fraction": 0.1, "search": "random",
                "seed": 0, "max_epochs": num_epochs, "num_trials": num_trials, "early_stopping": "none"}  # fmt: skip
    machine = {"processor": "none", "cores": 2, "gpus": [], "system": "none"}
    study = {"name": run.name, "created": "2026-01-01", "command": "none", "settings": settings, "data": data,
             "machine": machine, "versions": {}}  # fmt: skip
    (run / "study.yaml").write_text(yaml.safe_dump(study))
    trials, lines = [], [{"time": 0.0, "event": "attempt_started", "attempt": 1}]
    for i in range(num_trials):
        settings = TrialSettings(
            optimizer=OPTIMIZERS[i % 2],
            augmentation=AUGMENTATIONS[i // 2 % 4],
            lr=float(10 ** rng.uniform(-3, -0.5)),
            seed=i % 3,
            max_epochs=num_epochs,
        ).model_dump(mode="json")
        name = f"{i:010x}"
        trials.append({"trial_id": name, "settings": settings})
        lines.append({"event": "trial_started", "trial_id": name, "attempt": 1, "settings": settings, "time": float(i)})
        height = 0.5 + 0.05 * (i // 2 % 4) + 0.05 * (i % 2) + rng.normal(0, 0.02)
        for epoch in range(1, num_epochs + 1):
            accuracy = round(float(height * (1 - np.exp(-epoch / 8)) + rng.normal(0, 0.004)), 4)
            lines.append(
                {"time": i + epoch / 2, "event": "epoch", "trial_id": name, "epoch": epoch, "lr": settings["lr"],
                 "train_loss": 4.6 - 4 * accuracy, "train_accuracy": min(1.0, accuracy * 1.2), "diverged": False,
                 "val_loss": 4.6 - 4 * accuracy, "val_accuracy": accuracy, "epoch_seconds": 10.692714903000024,
                 "images_per_second": 151.81268571693056, "objective": accuracy, "device": "cpu", "host": "node",
                 "checkpoint": f"tune/attempt-1/{name}/checkpoint_{epoch - 1:06d}"}
            )  # fmt: skip
        lines.append({"time": i + num_epochs / 2, "event": "trial_ended", "trial_id": name})
    (run / "manifest.json").write_text(json.dumps({"trials": trials}))
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_tune_run(folder: Path, num_trials: int, num_epochs: int) -> Path:
    """Let Ray Tune run trials that only report; return its experiment's directory."""
    import ray
    from ray import tune

    def report(config: dict[str, Any]) -> None:
        for epoch in range(1, num_epochs + 1):
            tune.report({"epoch": epoch, "val_accuracy": 0.5, "val_loss": 1.0, "train_accuracy": 0.5, "train_loss": 1.0,
                         "epoch_seconds": 1.0, "images_per_second": 1.0})  # fmt: skip

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=str(folder / "ray"))
    tune.Tuner(
        report,
        param_space={"lr": tune.grid_search([0.001 + i * 1e-5 for i in range(num_trials)])},
        tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=2),
        run_config=tune.RunConfig(storage_path=str(folder), name="tune", verbose=0),
    ).fit()
    ray.shutdown()
    return folder / "tune"


OURS = """
from analysis import load_epochs, load_trials
def load(run):
    trials, epochs = load_trials(run), load_epochs(run)
    return len(trials), len(epochs)
"""
THEIRS = """
from ray import tune
def load(run):
    grid = tune.ResultGrid(tune.ExperimentAnalysis(run))
    return len(grid.get_dataframe()), sum(len(result.metrics_dataframe) for result in grid)
"""
TIMED = """
import json, re, sys, time
def peak():  # of this process, in MB; Linux
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before, start = peak(), time.perf_counter()
rows = load(sys.argv[1])
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "mb": peak() - before, "rows": rows}))
"""


def timed(code: str, run: Path) -> dict[str, Any]:
    """Return seconds, growth of the process's greatest memory, and rows of tables, of one load in a fresh process."""
    command = [sys.executable, "-W", "ignore", "-c", code + TIMED, str(run)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def frames(folder: Path, trials: int, epochs: int, repeats: int) -> Rows:
    """Trial and epoch tables of the same size, in turns."""
    runs = {"ours": folder / f"ours-{trials}", "Ray Tune's ResultGrid": make_tune_run(folder, trials, epochs)}
    make_run(runs["ours"], trials, epochs)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            found[name].append(timed(OURS if name == "ours" else THEIRS, run))
            assert found[name][-1]["rows"] == [trials, trials * epochs]
    ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in zip(*found.values(), strict=True)]
    rows = [_row(name, trials, epochs, some) for name, some in found.items()]
    rows[1]["times_ours"] = round(statistics.median(ratios), 2)
    return rows


def _row(name: str, trials: int, epochs: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [each["seconds"] for each in found]
    return {
        "tables of": name,
        "trials": trials,
        "epochs": epochs,
        "seconds": round(statistics.median(seconds), 2),
        "least": round(min(seconds), 2),
        "most": round(max(seconds), 2),
        "mb": round(statistics.median(each["mb"] for each in found)),
        "n": len(found),
    }


def scaling(folder: Path, repeats: int) -> Rows:
    """Our tables of more and more trials of 30 epochs."""
    rows = []
    for trials in (500, 2000, 8000):
        make_run(folder / f"scale-{trials}", trials, 30)
        rows.append(_row("ours", trials, 30, [timed(OURS, folder / f"scale-{trials}") for _ in range(repeats)]))
    return rows


def report(folder: Path, repeats: int) -> Rows:
    """The report of a study of 100 trials, without the work of explaining; its size."""
    from analysis import write_report

    run = folder / "report"
    make_run(run, 100, 30)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        file = write_report([run], top=0)
        seconds.append(time.perf_counter() - start)
    size = round(file.stat().st_size / 1e6, 2)
    return [{"trials": 100, "seconds": round(statistics.median(seconds), 1), "most": round(max(seconds), 1),
             "html_mb": size, "n": repeats}]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("frames", "scaling", "report"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trials", type=int, default=500, help="of the comparison with Ray Tune")
    args = parser.parse_args()
    file = Path(__file__).with_suffix(".json")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = {
            "frames": lambda: frames(folder, args.trials, 30, args.repeats),
            "scaling": lambda: scaling(folder, args.repeats),
            "report": lambda: report(folder, args.repeats),
        }
        for figure, measure in figures.items():
            if args.only in (None, figure):
                rows = measure()
                show(figure, rows)
                save(file, figure, rows)


if __name__ == "__main__":
    run_main(main)
