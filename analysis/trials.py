"""Run directory -> DataFrames of trials, epochs and decisions. Only JSON and YAML are read: nothing is unpickled.

RUN/study.yaml                          settings as resolved, data fingerprint, machine, versions
RUN/manifest.json                       every trial that was asked for, written before the first one starts
RUN/events.jsonl                        attempts, starts and ends of trials, epochs, ASHA's decisions; append-only
RUN/lock                                held by the process that runs the study
RUN/tune/attempt-N/TRIAL/checkpoint_*/  of the best epoch and, until it has ended, the last two
RUN/explanations/TRIAL/summary.json     of explained trials; see :mod:`analysis.explanations`
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from analysis.remote import RunPath, is_held, is_run_elsewhere, local_run, source
from trainables.errors import UserError
from trainables.settings import TrialSettings

HYPERPARAMETERS = [name for name in TrialSettings.model_fields if name not in ("max_epochs", "seed")]
_DTYPES: dict[Any, str] = {int: "Int64", bool: "boolean", float: "float64"}
ENDED = ["completed", "stopped", "diverged", "failed"]
STATUSES = ["pending", "running", *ENDED]
PHASES = ["search", "confirm"]
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
    "phase": pd.CategoricalDtype(PHASES),
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
DECISION_COLUMNS: dict[str, Any] = {
    "trial_id": "str",
    "epoch": "int64",
    "rung": "float64",
    "value": "float64",
    "cutoff": "float64",
    "stop": "bool",
}
# Both become paths: of a stranger's run, they must not lead out of it.
_TRIAL_ID = re.compile(r"[\w-]+")
# Measures of a network's own maps, as columns.
MEASURE_OF_MAPS = re.compile(r"(saliency|gradcam)_[a-z_]+")
EXPLANATION_FORMAT = 4  # counted up when what is stored, or a definition of it, changes
_CHECKPOINT = re.compile(r"tune/attempt-\d+/[\w-]+/checkpoint_\d+")


class RunError(UserError):
    """A run directory that is missing or cannot be read."""


@dataclass
class Faults:
    """What has befallen a trial.

    Attributes:
        failures: how often its own code raised an error.
        losses: how often its worker or node died, or could not be used, since its last epoch.
    """

    failures: int = 0
    losses: int = 0


@dataclass
class _Trial:
    """What the files of a run say of one trial."""

    trial_id: str
    settings: dict[str, Any]
    phase: str = "search"
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    started: int = 0  # attempt that started it last
    ended: str = ""  # completed, failed
    stop_reason: str = ""
    error: str = ""
    faults: Faults = field(default_factory=Faults)


@dataclass
class _Run:
    """What the files of a run say, trials in the order asked for."""

    trials: dict[str, _Trial] = field(default_factory=dict)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    attempt: int = 0  # the last that was begun and has not said that it ended


def read_study(run: RunPath) -> dict[str, Any]:
    """Return what ``RUN/study.yaml`` says, with ``settings``, ``data``, ``machine`` and ``versions``.

    Raises:
        RunError: if the directory is no run or the file cannot be read.
    """
    folder = local_run(run)
    file = folder / "study.yaml"
    try:
        study = yaml.safe_load(file.read_text())
    except FileNotFoundError as error:
        there = folder.is_dir() and source(folder) == str(folder)
        what = "is no run directory (study.yaml is missing)" if there else "no such run"
        raise RunError(f"{source(folder)}: {what}; python -m study list shows the runs") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"{source(folder)}/study.yaml: cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(study, dict) or not all(isinstance(study.get(part), dict) for part in ("settings", "data")):
        raise RunError(f"{source(folder)}/study.yaml: is not the study.yaml of a run: it has no settings and data")
    return study


def load_trials(runs: RunPath | Iterable[RunPath]) -> pd.DataFrame:
    """Return one row for every trial that was asked for, whatever became of it.

    Args:
        runs: a run directory, or several; then a column ``run`` comes first.

    Returns:
        A DataFrame with the columns of ``TRIAL_COLUMNS`` and then one for each hyperparameter, under its own name.
        ``val_accuracy``, ``val_loss`` and ``train_accuracy`` are those of ``best_epoch``, the epoch of the highest
        validation accuracy (of equals the last, whose checkpoint is kept); accuracies are fractions in [0, 1].
        ``generalization_gap`` is train minus validation accuracy there, both of images as they are, in eval mode.
        ``checkpoint`` is the path of that epoch's checkpoint. ``phase`` is ``search``, or ``confirm`` for the fresh
        seeds of ``python -m study confirm``. What is not known is missing (NaN or <NA>).

        Where trials were explained (by the report, or ``python -m analysis explain``), there follow ``test_accuracy``,
        ``num_test_images`` and the measures of their maps on test images, for example ``saliency_energy_on_object``, as
        mean and, with ``_low`` and ``_high``, 95 % interval over images; see :mod:`analysis.measures`.

    Raises:
        RunError: if a directory is no run.
    """
    return over_runs(runs, _trial_table)


def load_epochs(runs: RunPath | Iterable[RunPath]) -> pd.DataFrame:
    """Return one row for each trial and epoch, with the columns of ``EPOCH_COLUMNS``.

    An epoch that was run twice, because its trial was interrupted, stands there once: as it was run last.

    Args:
        runs: a run directory, or several; then a column ``run`` comes first.

    Raises:
        RunError: if a directory is no run.
    """
    return over_runs(runs, _epoch_table)


def load_decisions(runs: RunPath | Iterable[RunPath]) -> pd.DataFrame:
    """Return one row for each decision of ASHA, in the order in which it decided.

    Args:
        runs: a run directory, or several; then a column ``run`` comes first.

    Returns:
        A DataFrame with ``trial_id``, ``epoch`` (at which the trial was judged), ``rung`` (the epoch at which it had
        to be), ``value`` (validation accuracy; 0 for a trial that diverged), ``cutoff`` (what it had to reach; NaN for
        the first trial at a rung) and ``stop``. See :func:`analysis.rungs.replay_decisions`.

    Raises:
        RunError: if a directory is no run.
    """
    return over_runs(runs, _decision_table)


def load_checkpoints(run: RunPath) -> dict[str, dict[int, str]]:
    """Return the folders of the checkpoints that are there, as paths within the run, by trial and epoch."""
    run = local_run(run)
    found: dict[str, dict[int, str]] = {}
    for trial in _read_run(run).trials.values():
        folders = {epoch: row["checkpoint"] for epoch, row in trial.rows.items() if row.get("checkpoint")}
        found[trial.trial_id] = {epoch: folder for epoch, folder in folders.items() if (run / folder).is_dir()}
    return found


def load_faults(run: RunPath) -> dict[str, Faults]:
    """Return what has befallen each trial, by trial id."""
    return {trial.trial_id: trial.faults for trial in _read_run(local_run(run)).trials.values()}


def open_attempt(run: RunPath) -> int:
    """Return the number of the attempt that was begun and has not said that it ended; 0 if there is none."""
    return _read_run(local_run(run)).attempt


def is_running(run: RunPath) -> bool:
    """Return whether some process runs the study now, here or on another host.

    Where the file system is shared, that is certain; of a run at a URI it may be said up to a minute too long.
    """
    folder = local_run(run)
    return is_held(folder) or is_run_elsewhere(folder)


def over_runs(runs: RunPath | Iterable[RunPath], table: Callable[[Path], pd.DataFrame]) -> pd.DataFrame:
    """Return the table of a run, or of several under each other with a column ``run`` in front."""
    if isinstance(runs, str | Path):
        return table(local_run(runs))
    tables = [(str(run), table(local_run(run))) for run in runs]
    if not tables:
        raise RunError("no run given")
    for run, frame in tables:
        frame.insert(0, "run", run)
    return pd.concat([frame for _, frame in tables], ignore_index=True)


def _epoch_table(run: Path) -> pd.DataFrame:
    trials = _read_run(run).trials.values()
    rows = [{**t.rows[epoch], "trial_id": t.trial_id} for t in trials for epoch in sorted(t.rows)]
    return pd.DataFrame(rows, columns=list(EPOCH_COLUMNS)).astype(EPOCH_COLUMNS)


def _decision_table(run: Path) -> pd.DataFrame:
    return pd.DataFrame(_read_run(run).decisions, columns=list(DECISION_COLUMNS)).astype(DECISION_COLUMNS)


def _trial_table(run: Path) -> pd.DataFrame:
    # The lock first: a study that ends in between is then said to run for a moment longer, not to be broken.
    running = is_running(run)
    read = _read_run(run)
    rows = [_trial_row(run, trial, read.attempt if running else 0) for trial in read.trials.values()]
    settings = read_study(run)["settings"]
    asked = settings.get("num_trials") or 0 if settings.get("search") == "optuna" else 0
    # A search that chooses as it goes has not yet said what its last trials are: they are asked for all the same.
    found = sum(row["phase"] == "search" for row in rows)
    nothing = {"status": "pending", "phase": "search", "epochs": 0}
    rows += [{"trial_id": f"pending-{i + 1}", **nothing} for i in range(found, asked)]
    frame = pd.DataFrame(rows, columns=[*TRIAL_COLUMNS, *HYPERPARAMETERS])
    fields = TrialSettings.model_fields
    kinds = TRIAL_COLUMNS | {name: _DTYPES.get(fields[name].annotation, "str") for name in HYPERPARAMETERS}
    measured = pd.DataFrame([_measured(run, row["trial_id"], row.get("checkpoint")) for row in rows])
    return pd.concat([frame.astype(kinds), measured.astype("float64")], axis=1)


def _measured(run: Path, trial_id: str, checkpoint: str | None) -> dict[str, float]:
    """Return what is known of a trial's maps; nothing if they are of another checkpoint than its best, or outdated."""
    summary = _read_json(run / "explanations" / trial_id / "summary.json")
    of = summary.get("checkpoint") if isinstance(summary, dict) else None
    if not isinstance(of, str) or checkpoint is None or run / of != Path(checkpoint):
        return {}
    if summary.get("format") != EXPLANATION_FORMAT:
        return {}
    columns = {}
    for name, value in summary.items():
        if name in ("test_accuracy", "num_test_images") and isinstance(value, float | int):
            columns[name] = value
        elif MEASURE_OF_MAPS.fullmatch(name) and isinstance(value, dict):
            parts = {"": value.get("mean"), "_low": value.get("low"), "_high": value.get("high")}
            columns |= {f"{name}{end}": part for end, part in parts.items() if isinstance(part, float)}
    return columns


def _trial_row(run: Path, trial: _Trial, live_attempt: int) -> dict[str, Any]:
    rows = [trial.rows[epoch] for epoch in sorted(trial.rows)]
    scored = [row for row in rows if row["val_accuracy"] == row["val_accuracy"]]
    max_epochs = trial.settings.get("max_epochs")
    # What its epochs say comes first: an error after the last of them takes nothing from the trial.
    if rows and rows[-1].get("diverged"):
        status = "diverged"
    elif trial.stop_reason:
        status = "stopped"
    elif rows and rows[-1]["epoch"] == max_epochs:
        status = "completed"
    elif trial.ended:
        status = trial.ended
    else:
        status = "running" if live_attempt and trial.started == live_attempt else "pending"
    row: dict[str, Any] = {
        **trial.settings,
        "trial_id": trial.trial_id,
        "status": status,
        "stop_reason": trial.stop_reason or None,
        "phase": trial.phase,
        "error": None if status in ENDED and status != "failed" else trial.error or None,
        "epochs": len(rows),
    }
    if status == "diverged":
        part, name = ("validation", "val_loss") if math.isfinite(rows[-1]["train_loss"]) else ("training", "train_loss")
        row["stop_reason"] = f"{part} loss was {rows[-1][name]} in epoch {rows[-1]['epoch']}"
    if rows:
        row["train_seconds"] = sum(r["epoch_seconds"] for r in rows)
        row["images_per_second"] = float(pd.Series([r["images_per_second"] for r in rows]).median())
        row["device"] = rows[-1].get("device")
    if scored:
        best = max(scored, key=lambda r: (r["val_accuracy"], r["epoch"]))
        row["best_epoch"] = best["epoch"]
        row |= {name: best[name] for name in ("val_accuracy", "val_loss", "train_accuracy")}
        row["generalization_gap"] = best["train_accuracy"] - best["val_accuracy"]
        if best.get("checkpoint") and (run / best["checkpoint"]).is_dir():
            row["checkpoint"] = str(run / best["checkpoint"])
    return row


def _read_run(run: Path) -> _Run:
    read_study(run)
    read = _Run()
    manifest = _read_json(run / "manifest.json")
    for part, phase in (("trials", "search"), ("confirmations", "confirm")):
        entries = manifest.get(part) if isinstance(manifest, dict) else None
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("settings"), dict) and _is_id(entry.get("trial_id")):
                read.trials[entry["trial_id"]] = _Trial(entry["trial_id"], entry["settings"], phase)
    for event in _read_lines(run / "events.jsonl"):
        try:
            _read_event(event, read)
        except (KeyError, TypeError, ValueError):
            continue  # an event that is not whole says nothing
    return read


def _read_event(event: dict[str, Any], read: _Run) -> None:
    kind = event["event"]
    if kind == "attempt_started":
        read.attempt = event["attempt"]
    elif kind == "attempt_ended":
        read.attempt = 0
    if "trial_id" not in event:
        return
    trial_id = event["trial_id"]
    if kind == "trial_started" and trial_id not in read.trials and _is_id(trial_id):
        read.trials[trial_id] = _Trial(trial_id, dict(event["settings"]))
    trial = read.trials[trial_id]
    if kind == "trial_started":
        trial.started, trial.ended, trial.error = event["attempt"], "", ""
    elif kind == "epoch" and _is_epoch(event):
        trial.rows[event["epoch"]] = event
        trial.started, trial.error, trial.faults.losses = read.attempt, "", 0
        if _is_decision(event):
            read.decisions.append({**event, "value": event["objective"]})
            if event["stop"]:
                trial.stop_reason = (
                    f"ASHA at epoch {event['epoch']}: accuracy {event['objective']:.4f} below the cutoff "
                    f"{event['cutoff']:.4f} of rung {event['rung']:g}"
                )
    elif kind == "trial_ended":
        trial.ended = "completed"
    elif kind == "trial_failed":
        trial.ended, trial.error = "failed", event["error"]
        trial.faults.losses *= bool(event.get("lost"))
    elif kind in ("trial_retried", "trial_lost"):
        trial.started, trial.ended, trial.error = 0, "", event["error"]
        trial.faults.losses += kind == "trial_lost"
        trial.faults.failures += kind == "trial_retried"


def _is_decision(event: dict[str, Any]) -> bool:
    numbers = all(type(event.get(name)) in (int, float) for name in ("rung", "objective"))
    # The first trial at a rung has no cutoff to be below.
    first = "cutoff" in event and event["cutoff"] is None and event.get("stop") is False
    cutoff = first or type(event.get("cutoff")) in (int, float)
    return numbers and cutoff and isinstance(event.get("stop"), bool)


def _is_id(trial_id: Any) -> bool:
    return isinstance(trial_id, str) and bool(_TRIAL_ID.fullmatch(trial_id))


def _is_epoch(event: dict[str, Any]) -> bool:
    numbers = all(type(event.get(name)) in (int, float) for name in EPOCH_COLUMNS if name != "trial_id")
    folder = event.get("checkpoint")
    return numbers and isinstance(event["epoch"], int) and (folder is None or bool(_CHECKPOINT.fullmatch(folder)))


def _read(file: Path) -> str:
    """Return a file's text, empty if there is no such file. One that cannot be read is not one that is empty."""
    try:
        return file.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise RunError(f"{source(file.parent)}/{file.name}: cannot be read ({error.strerror or error})") from error


def _read_json(file: Path) -> Any:
    try:
        return json.loads(_read(file))
    except ValueError:
        return None


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines. A last line that is only half written is not there yet."""
    rows = []
    for line in _read(file).splitlines():
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


def settings_of(row: pd.Series) -> TrialSettings:
    """Return the settings of a trial, given its row of :func:`load_trials`."""
    names = TrialSettings.model_fields
    return TrialSettings(**{n: row[n].item() if isinstance(row[n], np.generic) else row[n] for n in names})


def check_comparable(runs: Sequence[Path], *, same_epochs: bool = False) -> None:
    """See that trials of several runs can stand beside each other: trained and validated on the same images.

    Args:
        runs: run directories.
        same_epochs: whether they must have been trained for as many epochs, too.

    Raises:
        RunError: if they are not, or a run is given twice.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise RunError(f"{', '.join(map(source, runs))}: the same run is given twice")
    studies = [read_study(run) for run in runs]
    for run, study in zip(runs, studies, strict=True):
        both = f"{source(run)} and {source(runs[0])}"
        if study["data"].get("fingerprint") != studies[0]["data"].get("fingerprint"):
            raise RunError(f"{both} were trained on different images: accuracies cannot be compared")
        for name in ("val_fraction", "seed"):
            if study["settings"].get(name) != studies[0]["settings"].get(name):
                raise RunError(f"{both} differ in {name}, so they were validated on different images")
        lengths = [entry["settings"].get("max_epochs") for entry in (study, studies[0])]
        if same_epochs and lengths[0] != lengths[1]:
            raise RunError(f"{both} trained for {lengths[0]} and {lengths[1]} epochs: claims compare equal trainings")
