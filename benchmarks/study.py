"""What running trials costs beside training them, against plain Ray Tune.

python -m benchmarks.study                       all figures, about six minutes on two cores
python -m benchmarks.study --only overhead       one of: overhead, slots, thousand

The trials train nothing: they report made-up metrics with a checkpoint of one small file, and what is left is the study
runner's own. Prints tables and merges them into benchmarks/study.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler

import study.attempt
from analysis import load_epochs, load_trials
from benchmarks.tables import run_main, save, show
from study import load_settings, run_study

Rows = list[dict[str, Any]]

REPORT = {
    "lr": 0.1, "train_loss": 1.0, "train_accuracy": 0.5, "val_loss": 1.0, "epoch_seconds": 0.0,
    "images_per_second": 1.0, "diverged": False, "device": "none", "passed_over": [],
}  # fmt: skip
LITTLE_DATA = ("dataset=shapes100", "train_size=200", "val_fraction=0.5")


def _pretend(lr: float, epochs: int, seconds: float) -> None:
    """Report as a trial does, after sleeping for as long as an epoch is to take."""
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        time.sleep(seconds)
        accuracy = (lr * 1e4) % 1
        report = REPORT | {"epoch": epoch, "val_accuracy": accuracy, "objective": accuracy}
        report["epoch_seconds"] = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "checkpoint.json").write_text(json.dumps({"epoch": epoch}))
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))


def ours(
    folder: Path, trials: int, epochs: int = 1, seconds: float = 0.0, early_stopping: str = "asha"
) -> tuple[Path, float]:
    """Run a study of trials that train nothing; return its directory and the seconds it took."""

    def run_trial(config: dict[str, Any], **_: Any) -> None:
        _pretend(config["trial"]["lr"], epochs, seconds)

    rates = [round(0.001 + i * 1e-5, 5) for i in range(trials)]
    settings = load_settings(
        "demo",
        (*LITTLE_DATA, f"max_epochs={epochs}", f"early_stopping={early_stopping}", "cpus_per_trial=1",
         "space.optimizer=[sgd]", "space.augmentation=[none]", f"space.lr={rates}"),
    )  # fmt: skip
    original, study.attempt.run_trial = study.attempt.run_trial, run_trial
    run, start = folder / f"ours-{trials}-{time.monotonic_ns()}", time.perf_counter()
    try:
        assert run_study(settings, run, show=False)
    finally:
        study.attempt.run_trial = original
    return run, time.perf_counter() - start


def plain(folder: Path, trials: int, reuse_actors: bool) -> float:
    """Run the same trials through Ray Tune as its documentation does; return the seconds."""
    start = time.perf_counter()
    results = tune.Tuner(
        lambda config: _pretend(config["lr"], 1, 0.0),
        param_space={"lr": tune.grid_search([0.001 + i * 1e-5 for i in range(trials)])},
        tune_config=tune.TuneConfig(
            metric="objective",
            mode="max",
            scheduler=AsyncHyperBandScheduler(time_attr="epoch", max_t=1),
            reuse_actors=reuse_actors,
        ),
        run_config=tune.RunConfig(
            storage_path=str(folder.absolute()), name=f"plain-{trials}-{time.monotonic_ns()}", verbose=0
        ),
    ).fit()
    assert len(results) == trials
    return time.perf_counter() - start


def overhead(folder: Path, rounds: int) -> Rows:
    """A grid of 48 trials that do nothing, in turns with plain Ray Tune."""
    ways: dict[str, Callable[[], float]] = {
        "this project": lambda: ours(folder, 48)[1],
        "Ray Tune, reuse_actors=True": lambda: plain(folder, 48, True),
        "Ray Tune, defaults": lambda: plain(folder, 48, False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(way())
    rows = []
    for name, own in seconds.items():
        ratios = [mine / other for mine, other in zip(seconds["this project"], own, strict=True)]
        rows.append(
            {
                "way": name,
                "seconds_per_trial": round(statistics.median(own) / 48, 3),
                "ratio": round(statistics.median(ratios), 2),
                "ratio_range": f"{min(ratios):.2f}-{max(ratios):.2f}",
                "n": rounds,
            }
        )
    return rows


def slots(folder: Path, trials: int = 8, epochs: int = 3, seconds: float = 10.0) -> Rows:
    """Share of the slots' time in which trials of 30 seconds train, from the first start to the last end."""
    run, whole = ours(folder, trials, epochs, seconds, early_stopping="none")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    started = min(e["time"] for e in events if e["event"] == "trial_started")
    ended = max(e["time"] for e in events if e["event"] == "trial_ended")
    num_slots = int(ray.cluster_resources()["CPU"])
    trained = float(load_epochs(run)["epoch_seconds"].sum())
    share = trained / num_slots / (ended - started)
    return [
        {
            "trials": trials,
            "slots": num_slots,
            "share": round(share, 4),
            "with_start_and_end": round(trained / num_slots / whole, 4),
        }
    ]


def thousand(folder: Path) -> Rows:
    """Trials that do nothing, more and more of them; ten thousand on paper, from the slope."""
    rows: Rows = []
    for trials in (250, 500, 1000):
        run, seconds = ours(folder, trials)
        start = time.perf_counter()
        table = load_trials(run)
        loading = time.perf_counter() - start
        assert len(table) == trials
        rows.append({"trials": trials, "seconds": round(seconds, 1), "dataframe_seconds": round(loading, 3)})
    slope = (rows[-1]["seconds"] - rows[-2]["seconds"]) / 500
    loading = (rows[-1]["dataframe_seconds"] - rows[-2]["dataframe_seconds"]) / 500
    paper = {
        "seconds": rows[-1]["seconds"] + 9000 * slope,
        "dataframe_seconds": rows[-1]["dataframe_seconds"] + 9000 * loading,
    }
    rows.append({"trials": 10_000, **{name: round(value, 1) for name, value in paper.items()}, "on_paper": True})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    figures: dict[str, Callable[[Path], Rows]] = {
        "overhead": lambda folder: overhead(folder, args.rounds),
        "slots": slots,
        "thousand": thousand,
    }
    parser.add_argument("--only", choices=list(figures))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="study-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        ray.init(address="local", include_dashboard=False, log_to_driver=False, _temp_dir=str(folder / "ray"))
        for figure, measure in figures.items():
            if args.only in (None, figure):
                rows = measure(folder)
                show(figure, rows)
                save(Path(__file__).with_suffix(".json"), figure, rows)
        ray.shutdown()


if __name__ == "__main__":
    run_main(main)
