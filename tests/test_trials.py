import json
import math
import os
import pickle
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from analysis import RunError, load_epochs, load_trials, read_study, varied
from analysis.trials import checkpoints_of
from trainables import CheckpointError, TrialSettings, load_model
from trainables.checkpoint import FORMAT

NAN = float("nan")
HERE = {"pid": os.getpid(), "host": socket.gethostname()}


def settings(**values: Any) -> dict[str, Any]:
    return TrialSettings(max_epochs=3).model_dump() | values


def epoch(number: int, val_accuracy: float = 0.5, **values: Any) -> dict[str, Any]:
    """A line of result.json: what a trial reports, and the trial_id and pid that Ray Tune adds."""
    return {
        "epoch": number,
        "lr": 0.1,
        "train_loss": 1.0,
        "train_accuracy": 0.6,
        "val_loss": 1.5,
        "val_accuracy": val_accuracy,
        "epoch_seconds": 2.0,
        "images_per_second": 100.0 * number,
        "diverged": False,
        "objective": 0.0 if math.isnan(val_accuracy) else val_accuracy,
        "device": "cpu",
        "training_iteration": number,
        "trial_id": "7ebd5_00000",
        "pid": 4321,
        "config": {"trial": {"lr": 7.0}},
    } | values


def make_run(
    run: Path,
    trials: Mapping[str, dict[str, Any]],
    events: Sequence[tuple[str, dict[str, Any]]] = (),
    results: Mapping[str, Sequence[dict[str, Any]]] = {},
    checkpoints: Mapping[str, Sequence[int]] = {},
    **study_settings: Any,
) -> Path:
    """Write a run directory. Keys of results and checkpoints are ``ATTEMPT/TRIAL``."""
    run.mkdir(parents=True)
    study = {"settings": {"num_trials": None, "search": "grid", **study_settings}, "data": {"num_val_images": 100}}
    (run / "study.yaml").write_text(yaml.safe_dump(study))
    entries = [{"trial_id": trial_id, "settings": values} for trial_id, values in trials.items()]
    (run / "trials.json").write_text(json.dumps(entries))
    lines = [json.dumps({"time": 1.0 + i, "event": name, **fields}) for i, (name, fields) in enumerate(events)]
    (run / "events.jsonl").write_text("".join(line + "\n" for line in lines))
    for where, rows in results.items():
        folder = run / "tune" / f"attempt-{where}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for where, epochs in checkpoints.items():
        for number in epochs:
            folder = run / "tune" / f"attempt-{where}" / f"checkpoint_{number - 1:06}"
            folder.mkdir(parents=True)
            (folder / "checkpoint.json").write_text(json.dumps({"format": 1, "epoch": number}))
    return run


def started(trial_id: str, attempt: int = 1, **values: Any) -> tuple[str, dict[str, Any]]:
    return "trial_started", {"trial_id": trial_id, "attempt": attempt, "settings": settings(**values)}


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


IDS = ["waiting", "running", "whole", "unsaid", "stopped", "diverged", "failed", "cut"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run in its second attempt, with a trial for each thing that can become of one."""
    rung = {"epoch": 1, "rung": 1.0, "value": 0.125, "stop": False, "cutoff": None}
    return make_run(
        tmp_path / "run",
        {name: settings(lr=0.1 / (i + 1), optimizer="sgd" if i % 2 else "adam") for i, name in enumerate(IDS)},
        [
            ("attempt_started", {"attempt": 1, "pid": dead_pid(), "host": HERE["host"]}),
            *(started(name) for name in ("whole", "unsaid", "stopped", "diverged", "failed", "cut")),
            ("rung", {"trial_id": "whole", **rung}),
            ("trial_ended", {"trial_id": "whole"}),
            ("rung", {"trial_id": "stopped", **rung, "value": 0.25, "cutoff": 0.5, "stop": True}),
            ("trial_ended", {"trial_id": "stopped"}),
            ("trial_ended", {"trial_id": "diverged"}),
            ("trial_failed", {"trial_id": "failed", "error": "RuntimeError: out of memory"}),
            ("attempt_ended", {"attempt": 1, "reason": "interrupted"}),
            ("attempt_started", {"attempt": 2, **HERE}),
            started("running", 2),
        ],
        {
            "1/whole": [epoch(1, 0.25), epoch(2, 0.75, train_accuracy=0.875), epoch(3, 0.5)],
            "1/unsaid": [epoch(1), epoch(2), epoch(3)],  # killed between its last epoch and the event
            "1/stopped": [epoch(1, 0.25)],
            "1/diverged": [epoch(1, 0.125), epoch(2, NAN, train_loss=NAN, val_loss=NAN, diverged=True)],
            "1/failed": [epoch(1)],
            "1/cut": [epoch(1), epoch(2)],
            "2/running": [epoch(1)],
        },
        {"1/whole": [2, 3]},
    )


def test_every_status_is_told(run):
    trials = load_trials(run).set_index("trial_id")
    assert trials["status"].to_dict() == {
        "waiting": "pending",
        "running": "running",
        "whole": "completed",
        "unsaid": "completed",
        "stopped": "stopped",
        "diverged": "diverged",
        "failed": "failed",
        "cut": "pending",
    }
    assert trials["epochs"].to_list() == [0, 1, 3, 3, 1, 2, 1, 2]
    assert trials["stop_reason"].dropna().to_dict() == {
        "stopped": "ASHA at epoch 1: accuracy 0.2500 below the cutoff 0.5000 of rung 1",
        "diverged": "loss was nan in epoch 2",
    }
    assert trials["error"].dropna().to_dict() == {"failed": "RuntimeError: out of memory"}


def test_a_row_holds_the_best_epoch_and_the_settings(run):
    row = load_trials(run).set_index("trial_id").loc["whole"]
    assert row["best_epoch"] == 2
    assert (row["val_accuracy"], row["val_loss"], row["train_accuracy"]) == (0.75, 1.5, 0.875)
    assert row["generalization_gap"] == 0.125
    assert (row["train_seconds"], row["images_per_second"], row["device"]) == (6.0, 200.0, "cpu")
    assert row["checkpoint"] == str(run / "tune/attempt-1/whole/checkpoint_000001")
    assert row["max_epochs"] == 3
    assert {name: row[name] for name in TrialSettings.model_fields} == settings(lr=0.1 / 3, optimizer="adam")


def test_columns_have_their_order_and_types(run):
    trials, epochs = load_trials(run), load_epochs(run)
    statuses = pd.CategoricalDtype(["pending", "running", "completed", "stopped", "diverged", "failed"])
    assert {name: str(dtype) for name, dtype in epochs.dtypes.items()} == {
        "trial_id": "str",
        "epoch": "int64",
        "lr": "float64",
        "train_loss": "float64",
        "train_accuracy": "float64",
        "val_loss": "float64",
        "val_accuracy": "float64",
        "epoch_seconds": "float64",
        "images_per_second": "float64",
    }
    expected = {
        "trial_id": "str",
        "status": statuses,
        "stop_reason": "str",
        "seed": "Int64",
        "epochs": "int64",
        "max_epochs": "Int64",
        "best_epoch": "Int64",
        "val_accuracy": "float64",
        "val_loss": "float64",
        "train_accuracy": "float64",
        "generalization_gap": "float64",
        "train_seconds": "float64",
        "images_per_second": "float64",
        "device": "str",
        "checkpoint": "str",
        "error": "str",
        "optimizer": "str",
        "lr": "float64",
        "weight_decay": "float64",
        "batch_size": "Int64",
        "schedule": "str",
        "warmup_epochs": "float64",
        "ema_decay": "float64",
        "resolution": "str",
        "augmentation": "str",
        "flip": "str",
        "cutout": "Int64",
        "mixing": "str",
        "normalize": "boolean",
        "label_smoothing": "float64",
        "dropout": "float64",
        "width": "Int64",
        "precision": "str",
    }
    assert list(trials.columns) == list(expected)
    assert {name: dtype for name, dtype in trials.dtypes.items() if dtype != expected[name]} == {}
    assert list(trials["trial_id"]) == IDS
    assert varied(trials) == ["optimizer", "lr"]


def test_what_is_not_known_is_missing(run):
    trials, epochs = load_trials(run).set_index("trial_id"), load_epochs(run)
    names = ["best_epoch", "val_accuracy", "val_loss", "train_accuracy", "generalization_gap", "train_seconds"]
    assert trials.loc["waiting", [*names, "device", "checkpoint", "stop_reason", "error"]].isna().all()
    assert trials["checkpoint"].notna().to_list() == [name == "whole" for name in IDS]
    diverged = epochs[epochs["trial_id"] == "diverged"]
    assert diverged["val_accuracy"].isna().to_list() == [False, True]
    assert diverged["train_loss"].isna().to_list() == [False, True]
    assert trials.loc["diverged", "val_accuracy"] == 0.125
    assert trials.loc["diverged", "best_epoch"] == 1


def test_a_trial_that_diverges_at_once_has_no_best_epoch(tmp_path):
    lost = epoch(1, NAN, train_loss=math.inf, val_loss=NAN, diverged=True)
    run = make_run(tmp_path / "run", {"a": settings()}, [started("a")], {"1/a": [lost]}, {"1/a": [1]})
    assert "NaN" in (run / "tune/attempt-1/a/result.json").read_text()  # bare, as Ray Tune writes it
    row = load_trials(run).iloc[0]
    assert (row["status"], row["stop_reason"]) == ("diverged", "loss was inf in epoch 1")
    assert row[["best_epoch", "val_accuracy", "generalization_gap", "checkpoint"]].isna().all()
    assert row["epochs"] == 1


def test_the_folder_names_the_trial_whatever_ray_tune_calls_it(run):
    epochs = load_epochs(run)
    assert list(epochs["trial_id"].unique()) == ["running", "whole", "unsaid", "stopped", "diverged", "failed", "cut"]
    assert epochs.groupby("trial_id")["epoch"].apply(list)["whole"] == [1, 2, 3]
    assert (epochs["lr"] == 0.1).all()


@pytest.mark.parametrize(
    ("attempt", "status"),
    [
        (HERE, "running"),
        ({"pid": None, "host": "another-host"}, "running"),  # whether it does cannot be known from here
        ({"pid": None, "host": HERE["host"]}, "pending"),  # a process that is no more
    ],
)
def test_a_trial_runs_while_the_process_of_its_attempt_does(tmp_path, attempt, status):
    attempt = attempt | {"pid": attempt["pid"] or dead_pid()}
    events = [("attempt_started", {"attempt": 1, **attempt}), started("a")]
    run = make_run(tmp_path / "run", {"a": settings()}, events, {"1/a": [epoch(1)]})
    assert load_trials(run)["status"].to_list() == [status]
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 9, "event": "attempt_ended", "attempt": 1, "reason": "interrupted"}) + "\n")
    assert load_trials(run)["status"].to_list() == ["pending"]


def test_a_failed_trial_that_starts_again_is_no_longer_failed(tmp_path):
    failed = ("trial_failed", {"trial_id": "a", "error": "worker died"})
    events = [("attempt_started", {"attempt": 1, **HERE}), started("a"), failed, started("a")]
    row = load_trials(make_run(tmp_path / "run", {"a": settings()}, events)).iloc[0]
    assert row["status"] == "running"
    assert pd.isna(row["error"])


def test_an_epoch_that_was_run_twice_stands_once_as_it_was_run_last(tmp_path):
    results = {
        "2/a": [epoch(1, 0.1), epoch(2, 0.9), epoch(3, 0.3)],
        "10/a": [epoch(2, 0.4), epoch(3, 0.6), epoch(4, 0.5)],
        "1/a": [epoch(1, 0.8)],
    }
    run = make_run(tmp_path / "run", {"a": settings(max_epochs=9)}, results=results)
    assert load_epochs(run)[["epoch", "val_accuracy"]].to_numpy().tolist() == [[1, 0.1], [2, 0.4], [3, 0.6], [4, 0.5]]
    row = load_trials(run).iloc[0]
    assert (row["epochs"], row["best_epoch"], row["val_accuracy"]) == (4, 3, 0.6)
    assert row["train_seconds"] == 8


def test_of_equal_epochs_the_last_is_the_best_and_has_the_checkpoint(tmp_path):
    results = {"1/a": [epoch(1, 0.5), epoch(2, 0.7, val_loss=1.0)], "2/a": [epoch(3, 0.7, val_loss=2.0), epoch(4, 0.6)]}
    checkpoints = {"1/a": [2], "2/a": [3, 4]}
    run = make_run(tmp_path / "run", {"a": settings(max_epochs=9)}, results=results, checkpoints=checkpoints)
    row = load_trials(run).iloc[0]
    assert (row["best_epoch"], row["val_loss"]) == (3, 2.0)
    assert row["checkpoint"] == str(run / "tune/attempt-2/a/checkpoint_000002")
    assert checkpoints_of(run, "a") == {
        number: run / f"tune/attempt-{attempt}/a/checkpoint_{number - 1:06}"
        for number, attempt in ((2, 1), (3, 2), (4, 2))
    }


def test_the_checkpoint_of_another_epoch_is_not_the_best_ones(tmp_path):
    results = {"1/a": [epoch(1, 0.7), epoch(2, 0.5)]}
    run = make_run(tmp_path / "run", {"a": settings()}, results=results, checkpoints={"1/a": [2]})
    assert load_trials(run)["checkpoint"].isna().all()


HALF = json.dumps(epoch(2))[:-20]


@pytest.mark.parametrize(
    "garbage", [HALF, "\0" * 50, "[1, 2]\n7\nnull\n", "Traceback\n", '{"epoch": 2}\n', '{"epoch": "2", "lr": 0.1}\n']
)
def test_a_line_that_cannot_be_read_costs_only_itself(tmp_path, garbage):
    run = make_run(tmp_path / "run", {"a": settings(), "b": settings()}, [], {"1/a": [epoch(1)], "1/b": [epoch(1)]})
    with (run / "tune/attempt-1/a/result.json").open("a") as file:
        file.write(garbage)
    with (run / "events.jsonl").open("a") as file:
        file.write(garbage)
    assert load_trials(run)["epochs"].to_list() == [1, 1]
    assert load_epochs(run)[["trial_id", "epoch"]].to_numpy().tolist() == [["a", 1], ["b", 1]]


def test_an_epoch_without_one_of_its_numbers_costs_only_itself(tmp_path):
    needed = ("lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "epoch_seconds", "images_per_second")
    results = {}
    for name in needed:
        lacking = epoch(2)
        del lacking[name]
        results[f"1/{name}"] = [epoch(1), lacking]
    run = make_run(tmp_path / "run", {name: settings() for name in needed}, results=results)
    trials = load_trials(run)
    assert trials["trial_id"].to_list() == list(needed)
    assert trials["val_accuracy"].to_list() == [0.5] * len(needed)


def test_files_that_are_something_else_cost_only_their_trial(tmp_path):
    ids = ("good", "binary", "folder", "missing")
    run = make_run(
        tmp_path / "run",
        {name: settings() for name in ids},
        [],
        {"1/good": [epoch(1)]},
        {"1/good": [1], "1/binary": [1]},
    )
    tune = run / "tune/attempt-1"
    (tune / "binary/result.json").write_bytes(bytes(range(256)) * 4)
    (tune / "binary/checkpoint_000000/checkpoint.json").write_bytes(b"\xff\xfe\x00")
    (tune / "folder/result.json").mkdir(parents=True)
    (tune / "stranger").mkdir()
    (tune / "stranger/result.json").write_text(json.dumps(epoch(1)))
    (tune / "notes.txt").write_text("not a trial")
    (run / "tune/attempt-x").mkdir()
    trials = load_trials(run)
    assert trials["trial_id"].to_list() == list(ids)
    assert trials["epochs"].to_list() == [1, 0, 0, 0]
    assert trials["checkpoint"].notna().to_list() == [True, False, False, False]
    assert load_epochs(run)["trial_id"].to_list() == ["good"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"null", b'{"a": 1}', b"[1, 2]", b'[{"trial_id": "a"}]'])
def test_trials_are_read_from_the_log_where_their_list_is_garbage(tmp_path, content):
    run = make_run(tmp_path / "run", {}, [started("b", lr=0.5)], {"1/b": [epoch(1)]})
    (run / "trials.json").write_bytes(content)
    trials = load_trials(run).set_index("trial_id")
    assert trials.loc["b", ["epochs", "lr"]].to_list() == [1, 0.5]


def test_without_events_and_results_every_trial_is_pending(tmp_path):
    run = make_run(tmp_path / "run", {"a": settings(), "b": settings(lr=0.5)})
    (run / "events.jsonl").unlink()
    trials = load_trials(run)
    assert trials["status"].to_list() == ["pending", "pending"]
    assert trials["lr"].to_list() == [0.1, 0.5]
    assert load_epochs(run).empty


def test_a_search_that_chooses_as_it_goes_has_rows_for_what_it_has_not_chosen(tmp_path):
    events = [
        ("attempt_started", {"attempt": 1, **HERE}),
        started("a", lr=0.5),
        started("b"),
        ("trial_ended", {"trial_id": "a"}),
    ]
    results = {"1/a": [epoch(n) for n in (1, 2, 3)]}
    run = make_run(tmp_path / "run", {}, events, results, search="optuna", num_trials=4)
    trials = load_trials(run)
    assert trials["trial_id"].to_list() == ["a", "b", "pending-3", "pending-4"]
    assert trials["status"].to_list() == ["completed", "running", "pending", "pending"]
    assert trials["epochs"].to_list() == [3, 0, 0, 0]
    assert trials["lr"].isna().to_list() == [False, False, True, True]
    assert varied(trials) == ["lr"]
    assert trials["status"].dtype.categories.to_list()[0] == "pending"


def test_a_search_that_has_not_begun_is_pending_throughout(tmp_path):
    trials = load_trials(make_run(tmp_path / "run", {}, search="optuna", num_trials=3))
    assert trials["status"].to_list() == ["pending"] * 3
    assert trials["trial_id"].is_unique
    assert trials["val_accuracy"].isna().all()


def test_a_random_search_with_fewer_trials_than_asked_for_ends(tmp_path):
    # Whole numbers allow fewer trials than asked for: the list in trials.json is all that there will be.
    run = make_run(tmp_path / "run", {"a": settings(), "b": settings(width=65)}, search="random", num_trials=10)
    assert load_trials(run)["trial_id"].to_list() == ["a", "b"]


def test_several_runs_are_told_apart(run, tmp_path):
    other = make_run(
        tmp_path / "other", {"whole": settings(lr=0.9)}, results={"1/whole": [epoch(n) for n in (1, 2, 3)]}
    )
    waiting = make_run(tmp_path / "waiting", {}, search="optuna", num_trials=1)
    trials, epochs = load_trials([run, str(other), waiting]), load_epochs(iter([run, other, waiting]))
    assert list(trials.columns) == ["run", *load_trials(run).columns]
    assert trials["run"].to_list() == [str(run)] * 8 + [str(other), str(waiting)]
    assert trials["status"].dtype == load_trials(run)["status"].dtype
    assert list(trials.index) == list(range(10))
    assert trials.query("lr > 0.8")["run"].to_list() == [str(other)]
    assert list(epochs.columns) == ["run", *load_epochs(run).columns]
    assert epochs["run"].value_counts().to_dict() == {str(run): 13, str(other): 3}
    assert epochs["epoch"].dtype == "int64"
    assert list(load_trials([run]).columns) == list(trials.columns)
    with pytest.raises(RunError, match="no run"):
        load_trials([])


def test_queries_read_as_one_would_guess(tmp_path):
    values = [("sgd", 0.1), ("sgd", 0.01), ("sgd", 0.001), ("adam", 0.01)]
    trials = {f"{name}-{lr}": settings(optimizer=name, lr=lr, normalize=lr < 0.1) for name, lr in values}
    run = make_run(tmp_path / "run", trials, results={"1/sgd-0.01": [epoch(1, 0.7)]})
    table = load_trials(run)
    assert table.query("optimizer == 'sgd' and lr <= 0.01")["trial_id"].to_list() == ["sgd-0.01", "sgd-0.001"]
    assert table.query("val_accuracy > 0.6 and status == 'pending'")["trial_id"].to_list() == ["sgd-0.01"]
    assert table.query("not normalize")["trial_id"].to_list() == ["sgd-0.1"]
    assert load_epochs(run).query("epoch == 1 and val_accuracy > 0.6")["trial_id"].to_list() == ["sgd-0.01"]


def test_a_missing_run_is_said_to_be_missing(tmp_path):
    with pytest.raises(RunError, match=r"nowhere: no such run; python -m study list"):
        load_trials(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"empty: is no run directory \(study.yaml is missing\)"):
        load_epochs(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file"):
        load_trials(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"settings: [1, 2", r"study.yaml: cannot be read \(while parsing"),
        (b"settings: \xff\xfe", r"study.yaml: cannot be read"),
        (b"", "is not the study.yaml of a run"),
        (b"- settings\n- data\n", "is not the study.yaml of a run"),
        (b"settings: {}\n", "is not the study.yaml of a run"),
        (b"settings: 3\ndata: 4\n", "is not the study.yaml of a run"),
    ],
)
def test_a_broken_study_is_said_to_be_broken(tmp_path, content, message):
    run = make_run(tmp_path / "run", {"a": settings()})
    (run / "study.yaml").write_bytes(content)
    for load in (load_trials, load_epochs):
        with pytest.raises(RunError, match=message):
            load(run)


def test_a_study_is_read_as_it_was_written(run):
    study = read_study(str(run))
    assert study == {"settings": {"num_trials": None, "search": "grid"}, "data": {"num_val_images": 100}}


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_nothing_in_a_run_is_executed(tmp_path):
    touched = tmp_path / "touched"
    run = make_run(tmp_path / "run", {"a": settings()}, [started("a")], {"1/a": [epoch(1)]}, {"1/a": [1]})
    pickle.loads(pickle.dumps(Evil(touched)))
    assert touched.exists()  # it would work
    touched.unlink()
    for name in ("params.pkl", "checkpoint_000000/weights.pt", "checkpoint_000000/training.pt"):
        (run / "tune/attempt-1/a" / name).write_bytes(pickle.dumps(Evil(touched)))
    assert len(load_trials(run)) == len(load_epochs(run)) == 1
    call = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{touched}']]"
    (run / "study.yaml").write_text(f"settings: {call}\ndata: {{}}\n")
    with pytest.raises(RunError, match=r"study.yaml: cannot be read \(could not determine a constructor"):
        load_trials(run)
    assert not touched.exists()


@pytest.mark.parametrize("zipped", [False, True])
def test_weights_with_code_in_them_are_refused(tmp_path, zipped):
    touched = tmp_path / "touched"
    about = {"format": FORMAT, "epoch": 1, "settings": settings(width=1), "class_names": ["a", "b"], "metrics": None}
    (tmp_path / "checkpoint.json").write_text(json.dumps(about))
    evil = {"head.weight": Evil(touched)}
    if zipped:
        torch.save(evil, tmp_path / "weights.pt")
    else:
        (tmp_path / "weights.pt").write_bytes(pickle.dumps(evil, protocol=2))
    with pytest.raises(CheckpointError, match=r"weights\.pt"):
        load_model(tmp_path, "cpu")
    assert not touched.exists()
