"""Run directory -> one DataFrame of trials and one of epochs. Only JSON and YAML are read: nothing is unpickled.

RUN/study.yaml                      settings as resolved, data fingerprint, machine, versions
RUN/trials.json                     every trial that was asked for, written before the first one starts
RUN/events.jsonl                    attempts, starts and ends of trials, ASHA's decisions; append-only
RUN/tune/attempt-N/TRIAL/           result.json (one line an epoch), checkpoint_*/
"""

import json
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import yaml

from trainables.errors import UserError
from trainables.settings import TrialSettings

RunPath: TypeAlias = str | Path
HYPERPARAMETERS = [name for name in TrialSettings.model_fields if name not in ("max_epochs", "seed")]
_DTYPES: dict[Any, str] = {int: "Int64", bool: "boolean", float: "float64"}
STATUSES = ["pending", "running", "completed", "stopped", "diverged", "failed"]
EPOCH_COLUMNS: dict[str, Any] = {
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
TRIAL_COLUMNS: dict[str, Any] = {
    "trial_id": "str",
    "status": pd.CategoricalDtype(STATUSES),
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
}


class RunError(UserError):
    """A run directory that is missing or cannot be read."""


@dataclass
class _Trial:
    """What the files of a run say of one trial."""

    trial_id: str
    settings: dict[str, Any]
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    started: int = 0  # attempt that started it last
    ended: str = ""  # completed, failed
    stop_reason: str = ""
    error: str = ""


def read_study(run: RunPath) -> dict[str, Any]:
    """Return what ``RUN/study.yaml`` says, with ``settings``, ``data``, ``machine`` and ``versions``.

    Raises:
        RunError: if the directory is no run or the file cannot be read.
    """
    file = Path(run) / "study.yaml"
    try:
        study = yaml.safe_load(file.read_text())
    except FileNotFoundError as error:
        what = "is no run directory (study.yaml is missing)" if Path(run).is_dir() else "no such run"
        raise RunError(f"{run}: {what}; python -m study list shows the runs") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"{file}: cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(study, dict) or not all(isinstance(study.get(part), dict) for part in ("settings", "data")):
        raise RunError(f"{file}: is not the study.yaml of a run: it has no settings and data")
    return study


def load_trials(runs: RunPath | Iterable[RunPath]) -> pd.DataFrame:
    """Return one row for every trial that was asked for, whatever became of it.

    Args:
        runs: a run directory, or several; then a column ``run`` comes first.

    Returns:
        A DataFrame with the columns of ``TRIAL_COLUMNS`` and then one for each hyperparameter, under its own name.
        ``val_accuracy``, ``val_loss`` and ``train_accuracy`` are those of ``best_epoch``, the epoch of the highest
        validation accuracy (of equals the last, whose checkpoint is kept); accuracies are fractions in [0, 1].
        ``generalization_gap`` is train minus validation accuracy there. ``checkpoint`` is the path of that epoch's
        checkpoint. What is not known is missing (NaN or <NA>).

    Raises:
        RunError: if a directory is no run.
    """
    return _over_runs(runs, _trial_table)


def load_epochs(runs: RunPath | Iterable[RunPath]) -> pd.DataFrame:
    """Return one row for each trial and epoch, with the columns of ``EPOCH_COLUMNS``.

    An epoch that was run twice, because its trial was interrupted, stands there once: as it was run last.

    Args:
        runs: a run directory, or several; then a column ``run`` comes first.

    Raises:
        RunError: if a directory is no run.
    """
    return _over_runs(runs, _epoch_table)


def checkpoints_of(run: RunPath, trial_id: str) -> dict[int, Path]:
    """Return the folders of a trial's checkpoints by epoch."""
    found = {}
    for file in sorted(Path(run).glob(f"tune/attempt-*/{trial_id}/checkpoint_*/checkpoint.json"), key=_by_attempt):
        about = _read_json(file)
        if isinstance(about, dict) and isinstance(about.get("epoch"), int):
            found[about["epoch"]] = file.parent
    return found


def _over_runs(runs: RunPath | Iterable[RunPath], table: Any) -> pd.DataFrame:
    if isinstance(runs, str | Path):
        result: pd.DataFrame = table(Path(runs))
        return result
    tables = [(str(run), table(Path(run))) for run in runs]
    if not tables:
        raise RunError("no run given")
    for run, frame in tables:
        frame.insert(0, "run", run)
    return pd.concat([frame for _, frame in tables], ignore_index=True)


def _epoch_table(run: Path) -> pd.DataFrame:
    trials, _ = _read_run(run)
    rows = [{**t.rows[epoch], "trial_id": t.trial_id} for t in trials for epoch in sorted(t.rows)]
    return pd.DataFrame(rows, columns=list(EPOCH_COLUMNS)).astype(EPOCH_COLUMNS)


def _trial_table(run: Path) -> pd.DataFrame:
    trials, live_attempt = _read_run(run)
    rows = [_trial_row(run, trial, live_attempt) for trial in trials]
    settings = read_study(run)["settings"]
    asked = settings.get("num_trials") or 0 if settings.get("search") == "optuna" else 0
    # A search that chooses as it goes has not yet said what its last trials are: they are asked for all the same.
    rows += [{"trial_id": f"pending-{i + 1}", "status": "pending", "epochs": 0} for i in range(len(rows), asked)]
    frame = pd.DataFrame(rows, columns=[*TRIAL_COLUMNS, *HYPERPARAMETERS])
    fields = TrialSettings.model_fields
    return frame.astype(TRIAL_COLUMNS | {name: _DTYPES.get(fields[name].annotation, "str") for name in HYPERPARAMETERS})


def _trial_row(run: Path, trial: _Trial, live_attempt: int | None) -> dict[str, Any]:
    rows = [trial.rows[epoch] for epoch in sorted(trial.rows)]
    scored = [row for row in rows if row["val_accuracy"] == row["val_accuracy"]]
    max_epochs = trial.settings.get("max_epochs")
    if trial.ended == "failed":
        status = "failed"
    elif rows and rows[-1].get("diverged"):
        status = "diverged"
    elif trial.stop_reason:
        status = "stopped"
    elif trial.ended or (rows and rows[-1]["epoch"] == max_epochs):
        status = "completed"
    else:
        status = "running" if live_attempt and trial.started == live_attempt else "pending"
    row: dict[str, Any] = {
        **trial.settings,
        "trial_id": trial.trial_id,
        "status": status,
        "stop_reason": trial.stop_reason or None,
        "error": trial.error or None,
        "epochs": len(rows),
    }
    if status == "diverged":
        row["stop_reason"] = f"loss was {rows[-1]['train_loss']} in epoch {rows[-1]['epoch']}"
    if rows:
        row["train_seconds"] = sum(r["epoch_seconds"] for r in rows)
        row["images_per_second"] = float(pd.Series([r["images_per_second"] for r in rows]).median())
        row["device"] = rows[-1].get("device")
    if scored:
        best = max(scored, key=lambda r: (r["val_accuracy"], r["epoch"]))
        row["best_epoch"] = best["epoch"]
        row |= {name: best[name] for name in ("val_accuracy", "val_loss", "train_accuracy")}
        row["generalization_gap"] = best["train_accuracy"] - best["val_accuracy"]
        checkpoint = checkpoints_of(run, trial.trial_id).get(best["epoch"])
        row["checkpoint"] = str(checkpoint) if checkpoint else None
    return row


def _read_run(run: Path) -> tuple[list[_Trial], int | None]:
    """Return the trials in the order asked for, and the number of the attempt that is running now, if one is."""
    read_study(run)
    trials: dict[str, _Trial] = {}
    entries = _read_json(run / "trials.json")
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("settings"), dict) and "trial_id" in entry:
            trials[entry["trial_id"]] = _Trial(entry["trial_id"], entry["settings"])
    live_attempt = _read_events(run, trials)
    for file in sorted(run.glob("tune/attempt-*/*/result.json"), key=_by_attempt):
        trial = trials.get(file.parent.name)
        if trial is not None:
            trial.rows |= {row["epoch"]: row for row in _read_lines(file) if _is_epoch(row)}
    return list(trials.values()), live_attempt


def _read_events(run: Path, trials: dict[str, _Trial]) -> int | None:
    live: dict[str, Any] | None = None
    for event in _read_lines(run / "events.jsonl"):
        try:
            if event["event"] == "attempt_started":
                live = {name: event[name] for name in ("attempt", "pid", "host")}
            elif event["event"] == "attempt_ended":
                live = None
            elif "trial_id" in event:
                _read_event(event, trials)
        except (KeyError, TypeError, ValueError):
            continue  # an event that is not whole says nothing
    return live["attempt"] if live and _is_alive(live) else None


def _read_event(event: dict[str, Any], trials: dict[str, _Trial]) -> None:
    trial_id, kind = event["trial_id"], event["event"]
    if trial_id not in trials and kind == "trial_started":
        trials[trial_id] = _Trial(trial_id, dict(event["settings"]))
    trial = trials[trial_id]
    if kind == "trial_started":
        trial.started, trial.ended, trial.error = event["attempt"], "", ""
    elif kind == "rung" and event["stop"]:
        trial.stop_reason = (
            f"ASHA at epoch {event['epoch']}: accuracy {event['value']:.4f} below the cutoff "
            f"{event['cutoff']:.4f} of rung {event['rung']:g}"
        )
    elif kind == "trial_ended":
        trial.ended = "completed"
    elif kind == "trial_failed":
        trial.ended, trial.error = "failed", event["error"]


def _is_alive(attempt: dict[str, Any]) -> bool:
    """Whether the process of an attempt without an end still runs; on another host that cannot be known."""
    if attempt["host"] != socket.gethostname():
        return True
    try:
        os.kill(attempt["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_epoch(row: dict[str, Any]) -> bool:
    return isinstance(row.get("epoch"), int) and EPOCH_COLUMNS.keys() - {"trial_id"} <= row.keys()


def _by_attempt(file: Path) -> tuple[int, str]:
    attempt = next((part for part in file.parts if part.startswith("attempt-")), "attempt-0")
    number = attempt.removeprefix("attempt-")
    return (int(number) if number.isdigit() else 0, str(file))


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines. A last line that is only half written is not there yet."""
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return []
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def varied(trials: pd.DataFrame) -> Sequence[str]:
    """Return the hyperparameters (and ``seed``) that differ between trials, in their usual order."""
    names = [*HYPERPARAMETERS, "seed"]
    return [name for name in names if name in trials and trials[name].dropna().nunique() > 1]
