import contextlib
import fcntl
import json
import math
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from analysis import RunError, load_decisions, load_epochs, load_timeline, load_trials, read_study, varied
from analysis.run_log import Faults, is_running, load_checkpoints, load_faults, open_attempt
from analysis.trials import EXPLANATION_FORMAT, check_comparable
from study.events import EventLog
from trainables import CheckpointError, TrialSettings, load_model
from trainables.checkpoint import FORMAT

NAN = float("nan")
Event = tuple[str, dict[str, Any]]


def settings(**values: Any) -> dict[str, Any]:
    return TrialSettings(max_epochs=3).model_dump() | values


def epoch(trial_id: str, number: int, val_accuracy: float = 0.5, attempt: int = 1, **values: Any) -> Event:
    """An epoch as it stands in the event log; at a rung of ASHA also with rung, cutoff and stop."""
    return "epoch", {
        "trial_id": trial_id,
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
        "checkpoint": checkpoint(trial_id, number, attempt),
    } | values


def checkpoint(trial_id: str, number: int, attempt: int = 1) -> str:
    return f"tune/attempt-{attempt}/{trial_id}/checkpoint_{number - 1:06}"


def decided(cutoff: float | None, rung: float = 1.0, stop: bool = False) -> dict[str, Any]:
    return {"rung": rung, "cutoff": cutoff, "stop": stop}


def begun(attempt: int = 1) -> Event:
    return "attempt_started", {"attempt": attempt, "pid": 4321, "host": "somewhere"}


def over(attempt: int = 1) -> Event:
    return "attempt_ended", {"attempt": attempt, "reason": "interrupted"}


def started(trial_id: str, attempt: int = 1, **values: Any) -> Event:
    return "trial_started", {"trial_id": trial_id, "attempt": attempt, "settings": settings(**values)}


def ended(trial_id: str) -> Event:
    return "trial_ended", {"trial_id": trial_id}


def lost(trial_id: str, error: str = "ActorDiedError: the node is gone") -> Event:
    return "trial_lost", {"trial_id": trial_id, "error": error}


def log(run: Path, *events: Event) -> None:
    """Append events to those that a run has."""
    with (run / "events.jsonl").open("a") as file:
        file.writelines(json.dumps({"time": 1.5, "event": name, **fields}) + "\n" for name, fields in events)


def make_run(
    run: Path,
    trials: Mapping[str, dict[str, Any]],
    events: Sequence[Event] = (),
    checkpoints: Sequence[str] = (),
    **study_settings: Any,
) -> Path:
    """Write a run directory; of the checkpoints that its epochs name, only those listed are there."""
    run.mkdir(parents=True)
    study = {"settings": {"num_trials": None, "search": "grid", **study_settings}, "data": {"num_val_images": 100}}
    (run / "study.yaml").write_text(yaml.safe_dump(study))
    entries = [{"trial_id": trial_id, "settings": values} for trial_id, values in trials.items()]
    manifest = {"code": {"study/asha.py": "0a1b"}, "versions": {"ray": "2"}, "settings": {}, "trials": entries}
    (run / "manifest.json").write_text(json.dumps(manifest))
    log(run, *events)
    for folder in checkpoints:
        (run / folder).mkdir(parents=True)
    return run


@contextlib.contextmanager
def held(run: Path, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold the lock of a run as a study does; flock does not care whether that is in another process."""
    with (run / "lock").open("a") as file:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        yield


HOLDER = """
import fcntl, sys, time
lock = open(sys.argv[1], "a")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
time.sleep(300)
"""


@pytest.fixture
def holder() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Start other processes that hold the lock of a run until they are killed."""
    with contextlib.ExitStack() as stack:

        def hold(run: Path) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", HOLDER, str(run / "lock")]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            assert process.stdout.readline() == "held\n"
            return process

        yield hold


IDS = ["waiting", "running", "whole", "unsaid", "stopped", "diverged", "failed", "lost", "cut"]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run in its second attempt, with a trial for each thing that can become of one."""
    run = make_run(
        tmp_path / "run",
        {name: settings(lr=0.1 / (i + 1), optimizer="sgd" if i % 2 else "adam") for i, name in enumerate(IDS)},
        [
            begun(1),
            *(started(name) for name in ("whole", "unsaid", "stopped", "diverged", "failed", "cut")),
            epoch("whole", 1, 0.25, **decided(None)),
            epoch("diverged", 1, 0.125),
            epoch("whole", 2, 0.75, train_accuracy=0.875),
            epoch("stopped", 1, 0.25, **decided(0.5, stop=True)),
            ended("stopped"),
            epoch("whole", 3, 0.5),
            ended("whole"),
            epoch("diverged", 2, NAN, train_loss=NAN, val_loss=NAN, diverged=True),
            ended("diverged"),
            epoch("failed", 1),
            ("trial_failed", {"trial_id": "failed", "error": "RuntimeError: out of memory"}),
            *(epoch("unsaid", n) for n in (1, 2, 3)),  # killed between its last epoch and the event
            *(epoch("cut", n) for n in (1, 2)),
            # killed here
            ("changed", {"what": ["device cpu -> cuda"]}),
            begun(2),
            started("lost", 2),
            started("running", 2),
            epoch("running", 1, attempt=2),
            epoch("lost", 1, attempt=2),
            lost("lost"),
        ],
        [checkpoint("whole", 2), checkpoint("whole", 3)],
    )
    with held(run):
        yield run


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
        "lost": "pending",
        "cut": "pending",
    }
    assert trials["epochs"].to_list() == [0, 1, 3, 3, 1, 2, 1, 1, 2]
    assert trials["stop_reason"].dropna().to_dict() == {
        "stopped": "ASHA at epoch 1: accuracy 0.2500 below the cutoff 0.5000 of rung 1",
        "diverged": "training loss was nan in epoch 2",
    }
    assert trials["error"].dropna().to_dict() == {
        "failed": "RuntimeError: out of memory",
        "lost": "ActorDiedError: the node is gone",
    }


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
        "phase": pd.CategoricalDtype(["search", "confirm"]),
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
        "setup": "str",
        "resolution": "str",
        "augmentation": "str",
        "cutout": "Int64",
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
    gone = epoch("a", 1, NAN, train_loss=math.inf, val_loss=NAN, diverged=True)
    run = make_run(tmp_path / "run", {"a": settings()}, [started("a"), gone], [checkpoint("a", 1)])
    text = (run / "events.jsonl").read_text()
    assert "NaN" in text  # bare, as Python writes it
    assert "Infinity" in text
    row = load_trials(run).iloc[0]
    assert (row["status"], row["stop_reason"]) == ("diverged", "training loss was inf in epoch 1")
    assert row[["best_epoch", "val_accuracy", "generalization_gap", "checkpoint"]].isna().all()
    assert row["epochs"] == 1


def test_a_trial_that_asha_stops_as_it_diverges_has_diverged(tmp_path):
    gone = epoch("a", 1, NAN, train_loss=NAN, val_loss=NAN, diverged=True, **decided(0.5, stop=True))
    run = make_run(tmp_path / "run", {"a": settings()}, [started("a"), gone, ended("a")])
    row = load_trials(run).iloc[0]
    assert (row["status"], row["stop_reason"]) == ("diverged", "training loss was nan in epoch 1")
    assert load_decisions(run)[["value", "cutoff", "stop"]].to_numpy().tolist() == [[0.0, 0.5, True]]


def test_epochs_stand_by_trial_as_asked_for_and_by_number_however_they_are_logged(run):
    epochs = load_epochs(run)
    order = ["running", "whole", "unsaid", "stopped", "diverged", "failed", "lost", "cut"]
    assert list(epochs["trial_id"].unique()) == order
    assert epochs["trial_id"].to_list() == sorted(epochs["trial_id"], key=order.index)
    assert epochs.groupby("trial_id")["epoch"].apply(list)["whole"] == [1, 2, 3]
    assert (epochs["lr"] == 0.1).all()
    log(run, epoch("cut", 4), epoch("cut", 3))
    assert load_epochs(run).groupby("trial_id")["epoch"].apply(list)["cut"] == [1, 2, 3, 4]


def test_a_trial_runs_while_another_process_holds_the_lock(tmp_path, holder):
    run = make_run(tmp_path / "run", {"a": settings()}, [begun(), started("a"), epoch("a", 1)])
    assert not is_running(run)
    assert not (run / "lock").exists()  # asking makes none
    assert load_trials(run)["status"].to_list() == ["pending"]

    process = holder(run)
    assert is_running(run)
    assert is_running(str(run))
    assert load_trials(run)["status"].to_list() == ["running"]

    process.kill()
    process.wait()
    assert (run / "lock").exists()  # left behind
    assert not is_running(run)
    assert load_trials(run)["status"].to_list() == ["pending"]


def test_a_study_that_said_that_it_ended_runs_no_trial(tmp_path):
    run = make_run(tmp_path / "run", {"a": settings()}, [begun(), started("a"), epoch("a", 1)])
    with held(run):
        assert load_trials(run)["status"].to_list() == ["running"]
        log(run, over())
        assert load_trials(run)["status"].to_list() == ["pending"]
        log(run, begun(2))  # it goes on, but not yet with this trial
        assert load_trials(run)["status"].to_list() == ["pending"]
        log(run, started("a", 2))
        assert load_trials(run)["status"].to_list() == ["running"]


def test_who_looks_whether_a_study_runs_is_not_taken_for_it_and_lets_go(tmp_path):
    run = make_run(tmp_path / "run", {})
    with held(run, fcntl.LOCK_SH):
        assert not is_running(run)
    with held(run):  # fails if one who looked still held it
        assert is_running(run)
    assert not is_running(run)


def test_a_failed_trial_that_starts_again_is_no_longer_failed(tmp_path):
    failed = ("trial_failed", {"trial_id": "a", "error": "worker died"})
    run = make_run(tmp_path / "run", {"a": settings()}, [begun(), started("a"), failed])
    with held(run):
        assert load_trials(run)[["status", "error"]].to_numpy().tolist() == [["failed", "worker died"]]
        log(run, started("a"))
        row = load_trials(run).iloc[0]
    assert row["status"] == "running"
    assert pd.isna(row["error"])


def test_a_lost_trial_waits_with_its_error_until_it_goes_on(tmp_path):
    events = [begun(), started("a"), started("b"), epoch("a", 1), epoch("b", 1), lost("a", "node died")]
    run = make_run(tmp_path / "run", {"a": settings(), "b": settings()}, events)
    with held(run):  # the attempt runs on, with the other trial
        assert load_trials(run)["status"].to_list() == ["pending", "running"]
    trials = load_trials(run)
    assert trials["status"].to_list() == ["pending", "pending"]
    assert trials["error"].fillna("").to_list() == ["node died", ""]
    assert trials["epochs"].to_list() == [1, 1]  # those that ended are not lost

    log(run, over(), begun(2), started("a", 2))
    with held(run):
        trials = load_trials(run)
        assert trials["status"].to_list() == ["running", "pending"]
        assert trials["error"].isna().all()
        log(run, lost("a", "node died again"))
        assert load_trials(run).loc[0, ["status", "error"]].to_list() == ["pending", "node died again"]
    log(run, started("a", 3), epoch("a", 2, attempt=3), epoch("a", 3, attempt=3), ended("a"))
    row = load_trials(run).iloc[0]
    assert (row["status"], row["epochs"]) == ("completed", 3)
    assert pd.isna(row["error"])


def test_an_attempt_is_open_until_it_says_that_it_ended(tmp_path):
    run = make_run(tmp_path / "run", {"a": settings()}, [])
    found = [open_attempt(run)]
    for event in (begun(), over(), begun(2), started("a", 2), over(2)):
        log(run, event)
        found.append(open_attempt(run))
    assert found == [0, 1, 0, 2, 2, 0]


def test_an_error_after_its_last_epoch_takes_nothing_from_a_trial(tmp_path):
    failed = ("trial_failed", {"trial_id": "a", "error": "OSError: Input/output error"})
    run = make_run(tmp_path / "run", {"a": settings(max_epochs=1)}, [begun(), started("a"), epoch("a", 1), failed])
    assert load_trials(run).loc[0, "status"] == "completed"
    assert load_trials(run)["error"].isna().all()


def test_failures_of_a_trial_are_counted_over_all_attempts(tmp_path):
    retried = ("trial_retried", {"trial_id": "a", "error": "RuntimeError: a cosmic ray"})
    run = make_run(tmp_path / "run", {"a": settings(), "b": settings()}, [begun(), started("a"), retried])
    with held(run):  # until it has ended another epoch, nobody knows whether it runs again
        assert load_trials(run)["status"].to_list() == ["pending", "pending"]
        log(run, epoch("a", 1))
        assert load_trials(run)["status"].to_list() == ["running", "pending"]
    log(run, lost("a"), over(), begun(2), started("a", 2), epoch("a", 2, attempt=2), retried)
    assert load_faults(run) == {"a": Faults(failures=2, losses=0), "b": Faults()}


def test_what_was_read_once_is_nobodys_to_change(tmp_path):
    run = make_run(tmp_path / "run", {"a": settings()}, [begun(), started("a"), lost("a")])
    load_faults(run)["a"].losses = 7
    assert load_faults(run)["a"].losses == 1
    log(run, started("a"), lost("a"))  # and what is written later is read
    assert load_faults(run)["a"].losses == 2


def test_losses_are_counted_from_the_last_epoch_on(tmp_path):
    run = make_run(tmp_path / "run", {name: settings() for name in "abc"}, [begun(), started("a"), started("b")])

    def losses(run: Path | str) -> dict[str, int]:
        return {name: faults.losses for name, faults in load_faults(run).items()}

    assert losses(run) == {"a": 0, "b": 0, "c": 0}
    log(run, lost("a"), lost("b"), begun(2), started("a", 2), lost("a"))
    assert losses(run) == {"a": 2, "b": 1, "c": 0}
    log(run, begun(3), started("a", 3), epoch("a", 1, attempt=3), lost("a"))
    assert losses(run) == {"a": 1, "b": 1, "c": 0}
    log(run, ("trial_lost", {"trial_id": "b"}), lost("stranger"))  # not whole, and of no trial
    assert losses(str(run)) == {"a": 1, "b": 1, "c": 0}
    failed = {"error": "died"}
    log(run, ("trial_failed", {"trial_id": "a", "lost": True, **failed}), ("trial_failed", {"trial_id": "b", **failed}))
    assert losses(run) == {"a": 1, "b": 0, "c": 0}  # b failed by an error of its own


def test_an_epoch_that_was_run_twice_stands_once_as_it_was_run_last(tmp_path):
    events = [
        epoch("a", 1, 0.8),
        *(epoch("a", n, value, attempt=2) for n, value in ((1, 0.1), (2, 0.9), (3, 0.3))),
        *(epoch("a", n, value, attempt=10) for n, value in ((2, 0.4), (3, 0.6), (4, 0.5))),
    ]
    folders = [checkpoint("a", 3, attempt=attempt) for attempt in (2, 10)]
    run = make_run(tmp_path / "run", {"a": settings(max_epochs=9)}, events, folders)
    assert load_epochs(run)[["epoch", "val_accuracy"]].to_numpy().tolist() == [[1, 0.1], [2, 0.4], [3, 0.6], [4, 0.5]]
    row = load_trials(run).iloc[0]
    assert (row["epochs"], row["best_epoch"], row["val_accuracy"]) == (4, 3, 0.6)
    assert row["train_seconds"] == 8
    assert row["checkpoint"] == str(run / "tune/attempt-10/a/checkpoint_000002")


def test_a_decision_on_an_epoch_that_was_run_twice_is_kept(tmp_path):
    events = [
        started("first"),
        started("a"),
        started("b"),
        epoch("first", 1, 0.5, **decided(None)),
        epoch("a", 1, 0.75, **decided(0.5)),
        epoch("b", 1, 0.25, **decided(0.625, stop=True)),
        epoch("a", 1, 0.875, attempt=2),
        epoch("b", 1, 0.375, attempt=2),
    ]
    run = make_run(tmp_path / "run", {name: settings() for name in ("first", "a", "b")}, events)
    assert load_epochs(run)["val_accuracy"].to_list() == [0.5, 0.875, 0.375]
    # The values are those on which it was decided then.
    assert load_decisions(run)[["trial_id", "value", "stop"]].to_numpy().tolist() == [
        ["first", 0.5, False],
        ["a", 0.75, False],
        ["b", 0.25, True],
    ]
    trials = load_trials(run)
    assert trials["status"].to_list() == ["pending", "pending", "stopped"]
    assert trials["stop_reason"].dropna().to_list() == [
        "ASHA at epoch 1: accuracy 0.2500 below the cutoff 0.6250 of rung 1"
    ]


def test_decisions_stand_in_the_order_in_which_they_were_made(tmp_path):
    events = [
        begun(),
        epoch("b", 1, 0.5, **decided(None, rung=1)),
        epoch("a", 1, 0.25, **decided(0.5, rung=1, stop=True)),
        epoch("b", 2, 0.625),
        epoch("c", 1, 0.75, **decided(0.375, rung=1)),
        over(),
        begun(2),
        epoch("c", 2, 0.5, attempt=2),
        epoch("c", 3, 0.875, attempt=2, **decided(None, rung=2.5)),
        epoch("b", 3, NAN, attempt=2, train_loss=NAN, diverged=True, **decided(0.875, rung=2.5, stop=True)),
        epoch("c", 4, 1.0, attempt=2),
    ]
    run = make_run(tmp_path / "run", {name: settings() for name in "abc"}, events)
    decisions = load_decisions(run)
    assert {name: str(dtype) for name, dtype in decisions.dtypes.items()} == {
        "trial_id": "str",
        "epoch": "int64",
        "rung": "float64",
        "value": "float64",
        "cutoff": "float64",
        "stop": "bool",
    }
    assert list(decisions.columns) == ["trial_id", "epoch", "rung", "value", "cutoff", "stop"]
    assert list(decisions.index) == [0, 1, 2, 3, 4]
    assert decisions["cutoff"].isna().to_list() == [True, False, False, True, False]
    assert decisions.fillna(-1.0).to_numpy().tolist() == [
        ["b", 1, 1.0, 0.5, -1.0, False],
        ["a", 1, 1.0, 0.25, 0.5, True],
        ["c", 1, 1.0, 0.75, 0.375, False],
        ["c", 3, 2.5, 0.875, -1.0, False],
        ["b", 3, 2.5, 0.0, 0.875, True],
    ]


def test_a_run_without_decisions_has_a_table_of_the_same_form(tmp_path):
    some = make_run(tmp_path / "some", {"a": settings()}, [epoch("a", 1, **decided(None))])
    none = make_run(tmp_path / "none", {"a": settings()}, [epoch("a", 1)])
    assert load_decisions(none).empty
    assert load_decisions(none).dtypes.to_dict() == load_decisions(some).dtypes.to_dict()
    both = load_decisions([none, some])
    assert list(both.columns) == ["run", "trial_id", "epoch", "rung", "value", "cutoff", "stop"]
    assert both[["run", "trial_id", "epoch"]].to_numpy().tolist() == [[str(some), "a", 1]]
    assert both["stop"].dtype == "bool"


def test_of_equal_epochs_the_last_is_the_best_and_has_the_checkpoint(tmp_path):
    events = [
        epoch("a", 1, 0.5),
        epoch("a", 2, 0.7, val_loss=1.0),
        epoch("a", 3, 0.7, attempt=2, val_loss=2.0),
        epoch("a", 4, 0.6, attempt=2),
        epoch("b", 1, 0.5),
    ]
    folders = [checkpoint("a", 2), checkpoint("a", 3, 2), checkpoint("a", 4, 2)]
    run = make_run(tmp_path / "run", {"a": settings(max_epochs=9), "b": settings()}, events, folders)
    row = load_trials(run).iloc[0]
    assert (row["best_epoch"], row["val_loss"]) == (3, 2.0)
    assert row["checkpoint"] == str(run / "tune/attempt-2/a/checkpoint_000002")
    assert {name: found for name, found in load_checkpoints(run).items() if found} == {
        "a": {
            number: f"tune/attempt-{attempt}/a/checkpoint_{number - 1:06}"
            for number, attempt in ((2, 1), (3, 2), (4, 2))
        }
    }
    assert load_checkpoints(str(run)) == load_checkpoints(run)


def test_the_checkpoint_of_another_epoch_is_not_the_best_ones(tmp_path):
    events = [epoch("a", 1, 0.7), epoch("a", 2, 0.5)]
    run = make_run(tmp_path / "run", {"a": settings()}, events, [checkpoint("a", 2)])
    assert load_trials(run)["checkpoint"].isna().all()


def test_a_checkpoint_that_was_removed_is_missing(tmp_path):
    events = [epoch("a", 1, 0.7), epoch("a", 2, 0.5), epoch("b", 1), epoch("c", 1, checkpoint=None)]
    folders = [checkpoint("a", 1), checkpoint("a", 2), checkpoint("b", 1)]
    run = make_run(tmp_path / "run", {name: settings() for name in "abc"}, events, folders)
    assert load_trials(run)["checkpoint"].notna().to_list() == [True, True, False]
    shutil.rmtree(run / folders[0])
    (run / folders[2]).rmdir()
    (run / folders[2]).write_text("a file is no checkpoint")
    assert load_trials(run)["checkpoint"].isna().all()
    assert load_checkpoints(run)["a"] == {2: folders[1]}
    assert not load_checkpoints(run).get("b")
    assert load_trials(run)["val_accuracy"].to_list() == [0.7, 0.5, 0.5]  # known all the same


HALF = json.dumps({"time": 1.0, "event": "epoch", **epoch("a", 2)[1]})[:-20]


@pytest.mark.parametrize(
    "garbage",
    [
        HALF,
        "\0" * 50,
        "[1, 2]\n7\nnull\n",
        "Traceback\n",
        '{"event": "epoch"}\n',
        '{"event": "epoch", "trial_id": "a", "epoch": 2}\n',
        '{"event": ["epoch"], "trial_id": "a", "epoch": 2, "lr": 0.1}\n',
        json.dumps(epoch("a", 2)[1]) + "\n",
        "[" * 200_000 + "\n",
    ],
)
def test_a_line_that_cannot_be_read_costs_only_itself(tmp_path, garbage):
    run = make_run(tmp_path / "run", {"a": settings(), "b": settings()}, [epoch("a", 1), epoch("b", 1)])
    with (run / "events.jsonl").open("a") as file:
        file.write(garbage)
    assert load_trials(run)["epochs"].to_list() == [1, 1]
    name, fields = epoch("b", 2, **decided(None))
    EventLog(run).append(name, **fields)  # the study goes on
    assert load_trials(run)["epochs"].to_list() == [1, 2]
    assert load_epochs(run)[["trial_id", "epoch"]].to_numpy().tolist() == [["a", 1], ["b", 1], ["b", 2]]
    assert load_decisions(run)[["trial_id", "epoch"]].to_numpy().tolist() == [["b", 2]]


NUMBERS = ("lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "epoch_seconds", "images_per_second")


def test_an_epoch_without_one_of_its_numbers_costs_only_itself(tmp_path):
    events = []
    for name in NUMBERS:
        _, lacking = epoch(name, 2, 0.75, **decided(None))
        del lacking[name]
        events += [epoch(name, 1), ("epoch", lacking)]
    run = make_run(tmp_path / "run", {name: settings() for name in NUMBERS}, events)
    trials = load_trials(run)
    assert trials["trial_id"].to_list() == list(NUMBERS)
    assert trials["val_accuracy"].to_list() == [0.5] * len(NUMBERS)
    assert trials["epochs"].to_list() == [1] * len(NUMBERS)
    assert load_decisions(run).empty


def around(tmp_path: Path, damaged: dict[str, Any]) -> Path:
    """A run with a damaged event amid whole ones."""
    events = [
        epoch("a", 1, 0.5, **decided(None)),
        epoch("b", 1, 0.25, **decided(0.5, stop=True)),
        ("epoch", damaged),
        epoch("a", 3, 0.75, **decided(None, rung=3)),
    ]
    return make_run(tmp_path / "run", {"a": settings(max_epochs=9), "b": settings()}, events)


OUTSIDE = "tune/attempt-1/../../../elsewhere/checkpoint_000000"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in NUMBERS for value in ("0.5", None, True, [0.5], {})),
        *((name, value) for name in NUMBERS for value in (10**30, 10**400)),
        *((name, value) for name in ("train_accuracy", "val_accuracy") for value in (1e9, -3, math.inf, -math.inf)),
        *((name, value) for name in ("lr", "epoch_seconds", "images_per_second") for value in (math.inf, NAN, -1)),
        *(("epoch", value) for value in ("2", 2.0, None, True, [2], 0, -1, 10**30)),
        *(("trial_id", value) for value in (7, None, ["a"], {"a": 1}, "stranger")),
        *(("checkpoint", value) for value in (7, ["tune"], {}, True, "", OUTSIDE)),
    ],
)
def test_an_epoch_with_a_value_of_the_wrong_type_costs_only_itself(tmp_path, name, value):
    _, whole = epoch("a", 2, 0.875, **decided(None))
    (tmp_path / "whole").mkdir()
    assert load_trials(around(tmp_path / "whole", whole))["epochs"].to_list() == [3, 1]
    run = around(tmp_path, {**whole, name: value})
    trials = load_trials(run)
    assert trials["epochs"].to_list() == [2, 1]
    assert trials["val_accuracy"].to_list() == [0.75, 0.25]
    assert trials["status"].to_list() == ["pending", "stopped"]
    assert load_epochs(run)[["trial_id", "epoch"]].to_numpy().tolist() == [["a", 1], ["a", 3], ["b", 1]]
    assert load_decisions(run)["value"].to_list() == [0.5, 0.25, 0.75]


@pytest.mark.parametrize(
    "damage",
    [
        {"rung": "one"},
        {"rung": None},
        {"rung": [1]},
        {"cutoff": "0.5"},
        {"cutoff": "half"},
        {"cutoff": [0.5]},
        {"stop": "no"},
        {"stop": None},
        {"objective": "much"},
        {"objective": None},
        {"objective": 1e9},
        {"cutoff": NAN},
        {"rung": 10**400},
        {"stop": ...},
        {"cutoff": ...},
        {"objective": ...},
    ],
)
def test_a_damaged_decision_costs_only_itself(tmp_path, damage):
    _, fields = epoch("a", 2, 0.875, **decided(0.5, rung=2))
    damaged = {name: value for name, value in {**fields, **damage}.items() if value is not ...}
    run = around(tmp_path, damaged)
    assert load_decisions(run)["value"].to_list() == [0.5, 0.25, 0.75]
    assert load_trials(run)["status"].to_list() == ["pending", "stopped"]
    epochs = load_epochs(run).query("trial_id == 'b' or epoch != 2")
    assert epochs[["trial_id", "epoch"]].to_numpy().tolist() == [["a", 1], ["a", 3], ["b", 1]]


def test_only_settings_are_taken_from_a_manifest(tmp_path):
    forged = {"checkpoint": "/etc", "val_accuracy": 0.999, "best_epoch": 1, "run": "x", "train_seconds": 1.0}
    trials = load_trials(make_run(tmp_path / "run", {"a": settings() | forged}))
    assert trials[["checkpoint", "val_accuracy", "best_epoch", "train_seconds"]].isna().all(axis=None)
    assert "run" not in trials


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        *(("lr", value, told) for value, told in (("abc", "'abc'"), ([1], r"\[1\]"), (NAN, "nan"), (None, "None"))),
        *(("max_epochs", value, told) for value, told in (("ten", "'ten'"), (True, "True"), (10**30, "10+"))),
        *(("seed", value, told) for value, told in ((1.5, "1.5"), (10**30, "10+"))),
        ("weight_decay", 10**400, r"10+\.\.\.0+"),
        ("normalize", 1, "1"),
        ("optimizer", {"a": 1}, r"{'a': 1}"),
        ("optimizer", "\ud800", r"'\\ud800'"),
        ("optimizer", "", "''"),
        ("augmentation", "$\\frac$", r"'\$\\\\frac\$'"),
    ],
)
def test_a_setting_that_cannot_be_read_is_missing_and_told_of(tmp_path, name, value, told):
    events = [epoch("a", 1), ended("a"), epoch("b", 1), ("trial_failed", {"trial_id": "c", "error": "no room"})]
    trials = {"a": settings(), "b": settings(), "c": settings()}
    sound = load_trials(make_run(tmp_path / "sound", trials, events))
    trials |= {key: trials[key] | {name: value} for key in "ac"}
    table = load_trials(make_run(tmp_path / "run", trials, events))
    assert table[name].isna().to_list() == [True, False, True]
    sentence = f"its settings cannot be read: {name} is {told}"
    for error, expected in zip(table["error"], (sentence, None, f"no room; {sentence}"), strict=True):
        assert re.fullmatch(expected, error) if expected else pd.isna(error)
    rest = [column for column in table if column not in (name, "error")]
    pd.testing.assert_frame_equal(table[rest], sound[rest])
    assert table["status"].to_list() == ["completed", "pending", "failed"]
    load_epochs(tmp_path / "run")


@pytest.mark.parametrize("attempt", ["x", 1.5, None, [1], True, 10**30])
def test_a_start_in_an_attempt_without_a_number_does_not_count(tmp_path, attempt):
    run = make_run(tmp_path / "run", {"a": settings()}, [begun(attempt), started("a", attempt), epoch("a", 1)])
    assert load_timeline(run).empty
    assert load_trials(run)["epochs"].to_list() == [1]
    assert open_attempt(run) == 0


def test_text_with_characters_that_are_none_is_told_without_them(tmp_path):
    failed = ("trial_failed", {"trial_id": "a", "error": "what \ud800\x1b]52;c;eA==\x07\n?"})  # fills a clipboard
    events = [started("a"), epoch("a", 1, device="\udfff", host="\ud800"), failed, epoch("b", 1, device=[1])]
    run = make_run(tmp_path / "run", {"a": settings(), "b": settings()}, events)
    trials = load_trials(run)
    assert trials["error"].to_list()[0] == "what ? ]52;c;eA==  ?"
    assert trials["device"].fillna("").to_list() == ["?", ""]
    assert load_timeline(run)["host"].to_list() == ["?"]


def write_summary(run: Path, **values: Any) -> Path:
    summary = {"format": EXPLANATION_FORMAT, "checkpoint": checkpoint("a", 1), **values}
    file = run / "explanations/a/summary.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(summary))
    return file


def test_measures_that_are_no_numbers_do_not_count(tmp_path):
    run = make_run(tmp_path / "run", {"a": settings()}, [epoch("a", 1)], [checkpoint("a", 1)])
    gini = {"mean": 0.5, "low": math.inf, "high": "x"}
    write_summary(run, test_accuracy=0.75, num_test_images=40, saliency_gini=gini, gradcam_gini={"mean": NAN})
    found = load_trials(run).iloc[0]
    assert (found["test_accuracy"], found["num_test_images"], found["saliency_gini"]) == (0.75, 40, 0.5)
    assert {"saliency_gini_low", "saliency_gini_high", "gradcam_gini"}.isdisjoint(found.index)


@pytest.mark.parametrize("images", [None, 0, -1, 2.5, True, "40", 10**400])
def test_test_accuracy_counts_with_the_number_of_its_images_only(tmp_path, images):
    run = make_run(tmp_path / "run", {"a": settings()}, [epoch("a", 1)], [checkpoint("a", 1)])
    write_summary(run, test_accuracy=0.75, num_test_images=images)
    assert {"test_accuracy", "num_test_images"}.isdisjoint(load_trials(run))


def test_reading_a_run_writes_nothing_whatever_lies_there(tmp_path):
    """A sign of life, as of a run at a URI, would make it look for the id of its copy, and make one."""
    run = make_run(tmp_path / "run", {"a": settings()}, [epoch("a", 1)])
    (run / "heartbeat").write_text('{"copy": "x", "time": 0}')
    (run / ".id").symlink_to(tmp_path / "made")
    load_trials(run)
    assert not (tmp_path / "made").exists()


def test_what_was_measured_stays_when_its_checkpoint_goes(tmp_path):
    run = make_run(tmp_path / "run", {"a": settings()}, [epoch("a", 1)], [checkpoint("a", 1)])
    write_summary(run, test_accuracy=0.75, num_test_images=40)
    shutil.rmtree(run / "tune")
    found = load_trials(run).iloc[0]
    assert (found["test_accuracy"], found["num_test_images"]) == (0.75, 40)
    assert pd.isna(found["checkpoint"])


@pytest.mark.parametrize("value", [1e9, -3, math.inf, NAN, True, "0.5", 10**400])
def test_a_test_accuracy_that_is_no_share_does_not_count(tmp_path, value):
    run = make_run(tmp_path / "run", {"a": settings()}, [epoch("a", 1)], [checkpoint("a", 1)])
    write_summary(run, test_accuracy=value, num_test_images=4)
    assert "test_accuracy" not in load_trials(run)


def test_a_summary_that_is_no_file_costs_nothing_else(tmp_path):
    run = make_run(tmp_path / "run", {"a": settings()}, [epoch("a", 1)], [checkpoint("a", 1)])
    (run / "explanations/a/summary.json").mkdir(parents=True)
    assert load_trials(run)["val_accuracy"].to_list() == [0.5]


def test_files_that_are_something_else_cost_only_what_they_would_say(tmp_path):
    ids = ("good", "file", "late", "missing")
    run = make_run(
        tmp_path / "run",
        {name: settings() for name in ids},
        [
            epoch("good", 1),
            epoch("file", 1),
            epoch("stranger", 1, **decided(None)),
            ended("stranger"),
            lost("stranger"),
        ],
        [checkpoint("good", 1)],
    )
    with (run / "events.jsonl").open("ab") as file:
        file.write(bytes(range(256)) * 4 + b"\n")
    log(run, epoch("late", 1))
    tune = run / "tune/attempt-1"
    (tune / "file").mkdir()
    (tune / "file/checkpoint_000000").write_bytes(b"\xff\xfe\x00")
    (tune / "stranger").mkdir()
    (tune / "notes.txt").write_text("not a trial")
    (run / "tune/attempt-x").mkdir()
    trials = load_trials(run)
    assert trials["trial_id"].to_list() == list(ids)
    assert trials["epochs"].to_list() == [1, 1, 1, 0]
    assert trials["checkpoint"].notna().to_list() == [True, False, False, False]
    assert load_epochs(run)["trial_id"].to_list() == ["good", "file", "late"]
    assert load_decisions(run).empty
    assert set(load_checkpoints(run)) <= set(ids)


@pytest.mark.parametrize("name", ["events.jsonl", "manifest.json"])
def test_what_cannot_be_read_is_not_taken_for_what_is_empty(name, tmp_path):
    """A study that goes on would else let go of the checkpoints of trials of which it sees nothing."""
    run = make_run(tmp_path / "run", {"a": settings()}, [begun(), started("a"), epoch("a", 1)])
    (run / name).unlink()
    (run / name).mkdir()
    with pytest.raises(RunError, match=f"{name}: cannot be read"):
        load_trials(run)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b'{"a": 1}',
        b"[1, 2]",
        b'{"trials": null}',
        b'{"trials": {"a": 1}}',
        b'{"trials": [1, null, {"trial_id": "a"}, {"settings": {}}, {"trial_id": "a", "settings": 3}]}',
        b'{"trials": [{"trial_id": 7, "settings": {}}, {"trial_id": ["a"], "settings": {}}]}',
        b'{"trials": [{"trial_id": "' + b"a" * 1000 + b'", "settings": {}}]}',
        b"[" * 200_000,
    ],
)
def test_trials_are_read_from_the_log_where_their_list_is_garbage(tmp_path, content):
    run = make_run(tmp_path / "run", {}, [started("b", lr=0.5), epoch("b", 1)])
    (run / "manifest.json").write_bytes(content)
    trials = load_trials(run).set_index("trial_id")
    assert trials.index.to_list() == ["b"]
    assert trials.loc["b", ["epochs", "lr"]].to_list() == [1, 0.5]


def test_a_damaged_entry_of_the_manifest_costs_only_its_trial(tmp_path):
    run = make_run(tmp_path / "run", {"a": settings(), "b": settings(lr=0.5)})
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["trials"][1:1] = [7, None, {"trial_id": "x"}, {"trial_id": 5, "settings": {}}]
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert load_trials(run)[["trial_id", "lr"]].to_numpy().tolist() == [["a", 0.1], ["b", 0.5]]


def test_without_a_log_every_trial_is_pending(tmp_path):
    run = make_run(tmp_path / "run", {"a": settings(), "b": settings(lr=0.5)})
    (run / "events.jsonl").unlink()
    trials = load_trials(run)
    assert trials["status"].to_list() == ["pending", "pending"]
    assert trials["lr"].to_list() == [0.1, 0.5]
    assert load_epochs(run).empty
    assert load_decisions(run).empty


def test_a_search_that_chooses_as_it_goes_has_rows_for_what_it_has_not_chosen(tmp_path):
    events = [begun(), started("a", lr=0.5), started("b"), *(epoch("a", n) for n in (1, 2, 3)), ended("a")]
    run = make_run(tmp_path / "run", {}, events, search="optuna", num_trials=4)
    with held(run):
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
    # Whole numbers allow fewer trials than asked for: those of the manifest are all that there will be.
    run = make_run(tmp_path / "run", {"a": settings(), "b": settings(width=65)}, search="random", num_trials=10)
    assert load_trials(run)["trial_id"].to_list() == ["a", "b"]


def test_several_runs_are_told_apart(run, tmp_path):
    other = make_run(
        tmp_path / "other", {"whole": settings(lr=0.9)}, [epoch("whole", n, **decided(None, n)) for n in (1, 2, 3)]
    )
    waiting = make_run(tmp_path / "waiting", {}, search="optuna", num_trials=1)
    trials, epochs = load_trials([run, str(other), waiting]), load_epochs(iter([run, other, waiting]))
    assert list(trials.columns) == ["run", *load_trials(run).columns]
    assert trials["run"].to_list() == [str(run)] * 9 + [str(other), str(waiting)]
    assert trials["status"].dtype == load_trials(run)["status"].dtype
    assert list(trials.index) == list(range(11))
    assert trials.query("lr > 0.8")["run"].to_list() == [str(other)]
    assert list(epochs.columns) == ["run", *load_epochs(run).columns]
    assert epochs["run"].value_counts().to_dict() == {str(run): 14, str(other): 3}
    assert epochs["epoch"].dtype == "int64"
    assert list(load_trials([run]).columns) == list(trials.columns)
    decisions = load_decisions([run, other])
    assert decisions[["run", "trial_id", "rung"]].to_numpy().tolist() == [
        *([str(run), name, 1.0] for name in ("whole", "stopped")),
        *([str(other), "whole", rung] for rung in (1.0, 2.0, 3.0)),
    ]
    for load in (load_trials, load_epochs, load_decisions):
        with pytest.raises(RunError, match="no run"):
            load([])


def test_queries_read_as_one_would_guess(tmp_path):
    values = {"a": ("sgd", 0.1), "b": ("sgd", 0.01), "c": ("sgd", 0.001), "d": ("adam", 0.01)}
    trials = {key: settings(optimizer=name, lr=lr, normalize=lr < 0.1) for key, (name, lr) in values.items()}
    run = make_run(tmp_path / "run", trials, [epoch("b", 1, 0.7, **decided(0.75, stop=True))])
    table = load_trials(run)
    assert table.query("optimizer == 'sgd' and lr <= 0.01")["trial_id"].to_list() == ["b", "c"]
    assert table.query("val_accuracy > 0.6 and status == 'stopped'")["trial_id"].to_list() == ["b"]
    assert table.query("not normalize")["trial_id"].to_list() == ["a"]
    assert load_epochs(run).query("epoch == 1 and val_accuracy > 0.6")["trial_id"].to_list() == ["b"]
    assert load_decisions(run).query("stop and value < cutoff")["trial_id"].to_list() == ["b"]


@pytest.mark.parametrize("load", [load_trials, load_epochs, load_decisions, load_timeline])
def test_a_missing_run_is_said_to_be_missing(tmp_path, load):
    with pytest.raises(RunError, match=r"nowhere: no such run; python -m study list"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"empty: is no run directory \(study.yaml is missing\)"):
        load(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file"):
        load(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"settings: [1, 2", r"study.yaml: cannot be read \(while parsing"),
        (b"settings: \xff\xfe", r"study.yaml: cannot be read"),
        (b"", "is not the study.yaml of a run"),
        (b"- settings\n- data\n", "is not the study.yaml of a run"),
        (b"settings: {}\n", "is not the study.yaml of a run"),
        (b"settings: 3\ndata: 4\n", "is not the study.yaml of a run"),
        (b"created: 2026-13-45\n", r"study.yaml: cannot be read \(month must be in 1..12\)"),
        (b"created: !!timestamp x\n", r"study.yaml: cannot be read"),
        (b"created: !!bool x\n", r"study.yaml: cannot be read"),
        (b"[" * 200_000, r"study.yaml: cannot be read \(maximum recursion depth"),
        (b"- " * 60_000, r"study.yaml: cannot be read \(maximum recursion depth"),
    ],
)
def test_a_broken_study_is_said_to_be_broken(tmp_path, content, message):
    run = make_run(tmp_path / "run", {"a": settings()})
    (run / "study.yaml").write_bytes(content)
    for load in (load_trials, load_epochs, load_decisions):
        with pytest.raises(RunError, match=message):
            load(run)


def test_a_study_is_read_as_it_was_written(run):
    study = read_study(str(run))
    assert study["settings"] == {"num_trials": None, "search": "grid"}
    assert study["data"] == {"num_val_images": 100}
    assert yaml.safe_load(yaml.safe_dump(study["settings"])) == study["settings"]


def rewrite_study(run: Path, **parts: Any) -> None:
    """Change parts of a study.yaml; of settings and data, single values."""
    study = yaml.safe_load((run / "study.yaml").read_text())
    changed = {
        name: study.get(name, {}) | part if name in ("settings", "data") else part for name, part in parts.items()
    }
    (run / "study.yaml").write_text(yaml.safe_dump(study | changed))


@pytest.mark.parametrize(
    ("part", "name", "value", "kind"),
    [
        *(("data", "num_val_images", value, "a whole number above 0") for value in ("x", None, 0, True, 1.5)),
        ("data", "num_train_images", "many", "a whole number above 0"),
        *(("data", "class_names", value, "a list of different names") for value in (5, ["a", "a"], [["a"]], [1, 2])),
        ("data", "dataset", ["a"], "text"),
        ("data", "superclasses", ["a"], "a list of whole numbers"),
        ("data", "superclasses", [0, 7], "a superclass for each class"),
        ("data", "superclasses", [0], "a superclass for each class"),
        ("settings", "max_epochs", [1], "a whole number above 0"),
        ("settings", "val_fraction", "half", "a number above 0"),
        ("settings", "num_trials", 10**12, "a whole number from 1 to a million or null"),
        ("settings", "data_dir", 5, "text or null"),
    ],
)
def test_a_study_with_a_part_of_another_kind_is_refused(tmp_path, part, name, value, kind):
    run = make_run(tmp_path / "run", {"a": settings()})
    rewrite_study(run, data={"class_names": ["a", "b"], "superclass_names": ["c"]})
    rewrite_study(run, **{part: {name: value}})
    with pytest.raises(RunError, match=f"run/study.yaml: {part}.{name} must (be|have) {kind}$"):
        load_trials(run)


def test_what_a_study_lacks_is_told_when_it_is_asked_for(tmp_path):
    study = read_study(make_run(tmp_path / "run", {}))
    for part, name in (("data", "class_names"), ("settings", "dataset")):
        assert study[part].get(name) is None
        with pytest.raises(RunError, match=f"run/study.yaml: {part}.{name} is missing$"):
            study[part][name]


@pytest.mark.parametrize("broken", [None, 5, [1], {"a": 1}, {"gpus": 5, "cores": [8], "system": [1], "torch": [2]}])
def test_what_is_only_shown_of_a_study_may_be_missing(tmp_path, broken):
    run = make_run(tmp_path / "run", {})
    if broken is not None:
        rewrite_study(run, **dict.fromkeys(["name", "created", "command", "machine", "versions"], broken))
    study = read_study(run)
    assert [study[name] for name in ("name", "created", "command")] == ["run", "an unknown date", "unknown"]
    nothing = {"system": "an unknown system", "processor": "an unknown processor", "cores": "?", "gpus": []}
    assert study["machine"] == nothing
    assert study["versions"] == {}


def test_what_is_shown_of_a_study_is_what_it_says(tmp_path):
    run = make_run(tmp_path / "run", {})
    machine = {"system": "Linux", "processor": "fast", "cores": 8, "gpus": ["H100"]}
    rewrite_study(run, name="n", created="now", command="c", machine=machine, versions={"torch": "2.9"})
    study = read_study(run)
    assert [study[name] for name in ("name", "created", "command")] == ["n", "now", "c"]
    assert (study["machine"], study["versions"]) == (machine, {"torch": "2.9"})


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize(
    "folder",
    [
        OUTSIDE,
        "tune/attempt-1/a/checkpoint_000000/../../../../../elsewhere/checkpoint_000000",
        "../elsewhere/tune/attempt-1/a/checkpoint_000000",
        "tune/attempt-1/../checkpoint_000001",
        "{tmp_path}/elsewhere/checkpoint_000000",
        "../elsewhere",
        "tune",
        ".",
    ],
)
def test_a_checkpoint_is_never_outside_of_its_run(tmp_path, folder):
    for place in ("checkpoint_000000", "tune/attempt-1/a/checkpoint_000000"):
        (tmp_path / "elsewhere" / place).mkdir(parents=True)
    folder = folder.format(tmp_path=tmp_path)
    events = [epoch("a", 1, 0.5), epoch("a", 2, 0.75, checkpoint=folder)]
    run = make_run(tmp_path / "run", {"a": settings()}, events, [checkpoint("a", 1)])
    (run / "tune/checkpoint_000001").mkdir()
    assert (run / folder).is_dir()  # it would be found
    assert load_trials(run)["checkpoint"].to_list() == [str(run / checkpoint("a", 1))]
    assert load_checkpoints(run) == {"a": {1: checkpoint("a", 1)}}


@pytest.mark.parametrize("name", ["../../elsewhere", "/elsewhere", "a/b", "..", ".", "", "a\n", "a b"])
def test_a_trial_whose_id_is_no_folder_of_its_own_is_none(tmp_path, name):
    events = [started("b-2"), started(name), epoch(name, 1, checkpoint=None, **decided(None)), epoch("b-2", 1)]
    run = make_run(tmp_path / "run", {"a_1": settings(), name: settings()}, events)
    assert load_trials(run)["trial_id"].to_list() == ["a_1", "b-2"]
    assert load_epochs(run)["trial_id"].to_list() == ["b-2"]
    assert load_decisions(run).empty


def test_nothing_in_a_run_is_executed(tmp_path):
    touched = tmp_path / "touched"
    run = make_run(tmp_path / "run", {"a": settings()}, [started("a"), epoch("a", 1)], [checkpoint("a", 1)])
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


# --- load_timeline ---

TIMELINE = {
    "trial_id": "str",
    "attempt": "int64",
    "host": "str",
    "slot": "int64",
    "start_seconds": "float64",
    "end_seconds": "float64",
    "outcome": "str",
}


def at(time: Any, event: Event) -> Event:
    return event[0], {**event[1], "time": time}


def spans(run: Path) -> list[list[Any]]:
    """The rows of the timeline, with what is missing as an empty text."""
    timeline = load_timeline(run)
    assert {name: str(dtype) for name, dtype in timeline.dtypes.items()} == TIMELINE
    return timeline.fillna({"host": "", "outcome": ""}).to_numpy().tolist()


def timed_run(run: Path, *events: Event) -> Path:
    return make_run(run, {name: settings() for name in "abcd"}, events)


def test_trials_side_by_side_have_slots_and_the_next_takes_the_one_left_free(tmp_path):
    run = timed_run(
        tmp_path / "run",
        at(90, begun()),
        at(100, started("a")),
        at(101.5, started("b")),
        at(105, epoch("a", 1, host="one")),
        at(106, epoch("b", 1, host="one")),
        at(107, ended("b")),
        at(107, started("c")),
        at(109, epoch("c", 1, host="one")),
        at(110, ended("a")),
        at(111, ended("c")),
        at(112, started("d")),
        at(113, epoch("d", 1, host="one")),
        at(114, ended("d")),
    )
    assert spans(run) == [
        ["a", 1, "one", 0, 0.0, 10.0, "ended"],
        ["b", 1, "one", 1, 1.5, 7.0, "ended"],
        ["c", 1, "one", 1, 7.0, 11.0, "ended"],
        ["d", 1, "one", 0, 12.0, 14.0, "ended"],
    ]


def test_each_host_and_each_attempt_has_slots_of_its_own(tmp_path):
    run = timed_run(
        tmp_path / "run",
        at(100, started("a")),
        at(100, started("b")),
        at(101, epoch("b", 1, host="two")),
        at(102, epoch("a", 1, host="one")),
        # killed here
        at(200, begun(2)),
        at(201, started("b", 2)),
        at(202, epoch("b", 2, attempt=2, host="one")),
        at(203, ended("b")),
    )
    assert spans(run) == [
        ["a", 1, "one", 0, 0.0, 2.0, ""],
        ["b", 1, "two", 0, 0.0, 1.0, ""],
        ["b", 2, "one", 0, 101.0, 103.0, "ended"],
    ]


def test_a_trial_that_was_begun_again_has_a_row_for_each_time(tmp_path):
    retried = ("trial_retried", {"trial_id": "a", "error": "RuntimeError: a cosmic ray"})
    failed = ("trial_failed", {"trial_id": "a", "error": "RuntimeError: again"})
    run = timed_run(
        tmp_path / "run",
        at(10, started("a")),
        at(11, started("b")),
        at(12, epoch("b", 1, host="one")),
        at(13, retried),  # before its first epoch: nobody knows where
        at(14, lost("b")),
        at(15, started("b")),
        at(16, started("a")),
        at(17, epoch("b", 1, host="two")),
        at(18, epoch("a", 1, host="two")),
        at(19, failed),
        at(20, ended("b")),
    )
    assert spans(run) == [
        ["a", 1, "", 0, 0.0, 3.0, "retried"],
        ["b", 1, "one", 0, 1.0, 4.0, "lost"],
        ["b", 1, "two", 0, 5.0, 10.0, "ended"],
        ["a", 1, "two", 1, 6.0, 9.0, "failed"],
    ]


def test_a_trial_that_runs_holds_its_slot_and_ends_with_its_last_epoch(tmp_path):
    run = timed_run(
        tmp_path / "run",
        at(10, started("a")),
        at(12, epoch("a", 1, host="one")),
        at(13, epoch("a", 2, host="one")),
        at(15, started("b")),
        at(16, epoch("b", 1, host="one")),
        at(17, started("c")),
    )
    assert spans(run) == [
        ["a", 1, "one", 0, 0.0, 3.0, ""],
        ["b", 1, "one", 1, 5.0, 6.0, ""],
        ["c", 1, "", 0, 7.0, 7.0, ""],
    ]


def test_timelines_of_several_runs_begin_at_0_each(tmp_path):
    one = timed_run(tmp_path / "one", at(10, started("a")), at(12, ended("a")))
    two = timed_run(tmp_path / "two", at(50, started("a")), at(51, started("b")), at(53, ended("b")))
    timeline = load_timeline([one, str(two)])
    assert list(timeline.columns) == ["run", *TIMELINE]
    assert timeline[["run", "trial_id", "slot", "start_seconds", "end_seconds"]].to_numpy().tolist() == [
        [str(one), "a", 0, 0.0, 2.0],
        [str(two), "a", 0, 0.0, 0.0],
        [str(two), "b", 1, 1.0, 3.0],
    ]


def test_without_events_the_timeline_has_its_form(tmp_path):
    assert spans(timed_run(tmp_path / "run")) == []
    assert spans(timed_run(tmp_path / "other", at(5, begun()), at(6, over()))) == []


@pytest.mark.parametrize("time", ["12", None, True, [12], {}, NAN, math.inf, 10**400, ...])
def test_an_event_without_its_time_costs_nothing_but_its_place_in_the_timeline(tmp_path, time):
    _, fields = at(time, epoch("a", 2, 0.75, host="two"))
    damaged = {name: value for name, value in fields.items() if value is not ...}
    lines = [{"event": "epoch", **damaged}, {"event": "trial_started", **started("b")[1], "time": time}]
    if time is ...:
        del lines[1]["time"]
    run = timed_run(tmp_path / "run", at(10, started("a")), at(11, epoch("a", 1, 0.5, host="one")))
    with (run / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    assert spans(run) == [["a", 1, "one", 0, 0.0, 1.0, ""]]
    assert load_trials(run)["epochs"].to_list() == [2, 0, 0, 0]
    log(run, at(13, epoch("b", 1, 0.25, host="one")), at(14, ended("a")), at(15, ended("b")))
    assert spans(run) == [["a", 1, "one", 0, 0.0, 4.0, "ended"]]  # when b was begun is not known
    trials = load_trials(run)
    assert trials["epochs"].to_list() == [2, 1, 0, 0]
    assert trials["val_accuracy"].to_list()[:2] == [0.75, 0.25]
    assert trials["status"].to_list()[:2] == ["completed", "completed"]


# --- check_comparable ---


def two_runs(folder: Path, fingerprint: str = "a", **changed: Any) -> list[Path]:
    """Two runs, the second with what was changed."""
    same = {"val_fraction": 0.1, "seed": 0, "max_epochs": 9}
    runs = [make_run(folder / name, {}, **values) for name, values in (("one", same), ("two", same | changed))]
    for run, of in zip(runs, ("a", fingerprint), strict=True):
        study = yaml.safe_load((run / "study.yaml").read_text())
        (run / "study.yaml").write_text(yaml.safe_dump(study | {"data": {"fingerprint": of}}))
    return runs


def test_runs_over_the_same_images_can_be_compared(tmp_path):
    check_comparable(two_runs(tmp_path), same_epochs=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fingerprint": "b"}, "two and .*one were trained on different images"),
        ({"val_fraction": 0.5}, "two and .*one differ in val_fraction, so"),
        ({"seed": 7}, "two and .*one differ in seed, so"),
    ],
)
def test_runs_over_other_images_cannot_be_compared(tmp_path, changed, message):
    with pytest.raises(RunError, match=message):
        check_comparable(two_runs(tmp_path, **changed))


def test_runs_of_other_epochs_can_be_compared_but_where_it_matters(tmp_path):
    runs = two_runs(tmp_path, max_epochs=3)
    check_comparable(runs)
    with pytest.raises(RunError, match=r"two and .*one trained for 3 and 9 epochs"):
        check_comparable(runs, same_epochs=True)


def test_a_run_is_not_compared_with_itself(tmp_path):
    run, _ = two_runs(tmp_path)
    for again in (run, run / ".." / "one"):
        with pytest.raises(RunError, match="the same run is given twice"):
            check_comparable([run, again])
