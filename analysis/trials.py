"""Run directory -> DataFrames of trials, epochs, decisions, and of who held which slot when."""

import math
import re
import reprlib
import shlex
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.remote import RunPath, local_run, source
from analysis.run_log import EPOCH_METRICS, LoggedTrial, is_folder, is_running, read_json, read_log
from analysis.study_file import RunError, is_number, read_study
from trainables.settings import TrialSettings

HYPERPARAMETERS = [name for name in TrialSettings.model_fields if name not in ("max_epochs", "seed")]
_DTYPES: dict[Any, str] = {int: "Int64", bool: "boolean", float: "float64"}
_KINDS = {name: field.annotation for name, field in TrialSettings.model_fields.items()}
ENDED = ["completed", "stopped", "diverged", "failed"]
STATUSES = ["pending", "running", *ENDED]
PHASES = ["search", "confirm"]
EPOCH_COLUMNS: dict[str, Any] = {
    "trial_id": "str",
    "epoch": "int64",
    **dict.fromkeys(EPOCH_METRICS[1:], "float64"),
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
TIMELINE_COLUMNS: dict[str, Any] = {
    "trial_id": "str",
    "attempt": "int64",
    "host": "str",
    "slot": "int64",
    "start_seconds": "float64",
    "end_seconds": "float64",
    "outcome": "str",
}
# Measures of a network's own maps, as columns.
MEASURE_OF_MAPS = re.compile(r"(saliency|gradcam)_[a-z_]+")
EXPLANATION_FORMAT = 5  # counted up when what is stored, or a definition of it, changes


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
        seeds of ``python -m study confirm``. What is not known is missing (NaN or <NA>); where a setting is not what
        it must be, ``error`` says so.

        Text is ``str``, shares and seconds ``float64``, counts that may be missing ``Int64``, ``status`` and ``phase``
        categories; hyperparameters are ``str``, ``float64``, ``Int64`` or ``boolean``, as
        :class:`trainables.TrialSettings` has them.

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
        the first trial at a rung) and ``stop``. See :func:`analysis.replay_decisions`.

    Raises:
        RunError: if a directory is no run.
    """
    return over_runs(runs, _decision_table)


def load_timeline(runs: RunPath | Iterable[RunPath]) -> pd.DataFrame:
    """Return who held which slot of the machine or cluster when: one row for each time that a trial was begun.

    Args:
        runs: a run directory, or several; then a column ``run`` comes first.

    Returns:
        A DataFrame with ``trial_id``, ``attempt``, ``host`` (missing until its first epoch), ``slot`` (from 0, of its
        attempt and host: no two trials hold one at the same time), ``start_seconds`` and ``end_seconds`` (since the
        first trial was begun; of one that runs, or whose end nobody saw, the end is its last epoch's) and ``outcome``
        (``ended``, ``failed``, ``retried``, ``lost``; missing where there is none).

    Raises:
        RunError: if a directory is no run.
    """
    return over_runs(runs, _timeline_table)


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
    trials = read_log(run).trials.values()
    rows = [{**t.rows[epoch], "trial_id": t.trial_id} for t in trials for epoch in sorted(t.rows)]
    return pd.DataFrame(rows, columns=list(EPOCH_COLUMNS)).astype(EPOCH_COLUMNS)


def _timeline_table(run: Path) -> pd.DataFrame:
    spans = [(t.trial_id, span) for t in read_log(run).trials.values() for span in t.spans]
    spans.sort(key=lambda entry: entry[1].start)
    first = spans[0][1].start if spans else 0.0
    free: dict[tuple[int, str], list[float]] = {}  # when each slot was left: never, by a trial that runs
    rows = []
    for trial_id, span in spans:
        slots = free.setdefault((span.attempt, span.host), [])
        slot = next((i for i, left in enumerate(slots) if left <= span.start), len(slots))
        slots[slot : slot + 1] = [span.end if span.outcome else math.inf]
        times = {"start_seconds": span.start - first, "end_seconds": span.end - first}
        known = {"host": _text(span.host), "outcome": span.outcome or None}
        rows.append({"trial_id": trial_id, "attempt": span.attempt, "slot": slot, **known, **times})
    return pd.DataFrame(rows, columns=list(TIMELINE_COLUMNS)).astype(TIMELINE_COLUMNS)


def _decision_table(run: Path) -> pd.DataFrame:
    return pd.DataFrame(read_log(run).decisions, columns=list(DECISION_COLUMNS)).astype(DECISION_COLUMNS)


def _trial_table(run: Path) -> pd.DataFrame:
    # The lock first: a study that ends in between is then said to run for a moment longer, not to be broken.
    running = is_running(run)
    read = read_log(run)
    rows = [_trial_row(run, trial, read.attempt if running else 0) for trial in read.trials.values()]
    settings = read_study(run)["settings"]
    asked = settings.get("num_trials") or 0 if settings.get("search") == "optuna" else 0
    # A search that chooses as it goes has not yet said what its last trials are: they are asked for all the same.
    found = sum(row["phase"] == "search" for row in rows)
    nothing = {"status": "pending", "phase": "search", "epochs": 0}
    rows += [{"trial_id": f"pending-{i + 1}", **nothing} for i in range(found, asked)]
    frame = pd.DataFrame(rows, columns=[*TRIAL_COLUMNS, *HYPERPARAMETERS])
    kinds = TRIAL_COLUMNS | {name: _DTYPES.get(_KINDS[name], "str") for name in HYPERPARAMETERS}
    measured = pd.DataFrame([_measured(run, row["trial_id"], row.get("kept_as")) for row in rows])
    return pd.concat([frame.astype(kinds), measured.astype("float64")], axis=1)


def _measured(run: Path, trial_id: str, checkpoint: str | None) -> dict[str, float]:
    """Return what is known of a trial's maps; nothing if they are of another checkpoint than its best, or outdated.

    Whether that checkpoint is still there does not matter: runs are published without.
    """
    try:
        summary = read_json(run / "explanations" / trial_id / "summary.json")
    except RunError:
        return {}
    of = summary.get("checkpoint") if isinstance(summary, dict) else None
    if not isinstance(of, str) or of != checkpoint:
        return {}
    if summary.get("format") != EXPLANATION_FORMAT:
        return {}
    columns = {}
    accuracy, images = summary.get("test_accuracy"), summary.get("num_test_images")
    if is_number(accuracy) and 0 <= accuracy <= 1 and type(images) is int and is_number(images) and images > 0:
        columns = {"test_accuracy": accuracy, "num_test_images": images}
    for name, value in summary.items():
        if MEASURE_OF_MAPS.fullmatch(name) and isinstance(value, dict):
            parts = {"": value.get("mean"), "_low": value.get("low"), "_high": value.get("high")}
            columns |= {f"{name}{end}": part for end, part in parts.items() if is_number(part)}
    return columns


def _text(value: Any) -> str | None:
    """Return text as a column can hold it and a terminal show it, without control characters; None of what is none."""
    if not isinstance(value, str):
        return None
    whole = value.encode(errors="replace").decode()  # JSON has characters (half of a pair) that are none
    return "".join(character if character.isprintable() else " " for character in whole) or None


def _is_setting(value: Any, kind: Any) -> bool:
    if kind is float:
        return is_number(value)
    if kind is int:
        return type(value) is int and is_number(value)
    if kind is bool:
        return type(value) is bool
    return type(value) is str and bool(re.fullmatch(r"[\w+,.-]{1,64}", value, re.ASCII))


def _trial_row(run: Path, trial: LoggedTrial, live_attempt: int) -> dict[str, Any]:
    rows = [trial.rows[epoch] for epoch in sorted(trial.rows)]
    scored = [row for row in rows if row["val_accuracy"] == row["val_accuracy"]]
    # Only what are settings: under other names, a stranger's manifest would forge what is known of its trials.
    settings = {name: trial.settings[name] for name in _KINDS if name in trial.settings}
    wrong = {name: value for name, value in settings.items() if not _is_setting(value, _KINDS[name])}
    max_epochs = None if "max_epochs" in wrong else settings.get("max_epochs")
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
    errors = [] if status in ENDED and status != "failed" else [_text(trial.error)]
    if wrong:
        told = ", ".join(f"{name} is {reprlib.repr(value)}" for name, value in wrong.items())
        errors.append(f"its settings cannot be read: {told}")
    row: dict[str, Any] = {
        **{name: value for name, value in settings.items() if name not in wrong},
        "trial_id": trial.trial_id,
        "status": status,
        "stop_reason": trial.stop_reason or None,
        "phase": trial.phase,
        "error": "; ".join(filter(None, errors)) or None,
        "epochs": len(rows),
    }
    if status == "diverged":
        part, name = ("validation", "val_loss") if math.isfinite(rows[-1]["train_loss"]) else ("training", "train_loss")
        row["stop_reason"] = f"{part} loss was {rows[-1][name]} in epoch {rows[-1]['epoch']}"
    if rows:
        row["train_seconds"] = sum(r["epoch_seconds"] for r in rows)
        row["images_per_second"] = statistics.median(r["images_per_second"] for r in rows)
        row["device"] = _text(rows[-1].get("device"))
    if scored:
        best = max(scored, key=lambda r: (r["val_accuracy"], r["epoch"]))
        row["best_epoch"] = best["epoch"]
        row |= {name: best[name] for name in ("val_accuracy", "val_loss", "train_accuracy")}
        row["generalization_gap"] = best["train_accuracy"] - best["val_accuracy"]
        row["kept_as"] = best.get("checkpoint")
        if row["kept_as"] and is_folder(run / row["kept_as"]):
            row["checkpoint"] = str(run / row["kept_as"])
    return row


def varied(trials: pd.DataFrame) -> Sequence[str]:
    """Return the hyperparameters (and ``seed``) that differ between trials, in their usual order."""
    names = [*HYPERPARAMETERS, "seed"]
    return [name for name in names if name in trials and trials[name].dropna().nunique() > 1]


def settings_of(row: pd.Series) -> TrialSettings:
    """Return the settings of a trial, given its row of :func:`load_trials`."""
    names = TrialSettings.model_fields
    return TrialSettings(**{n: row[n].item() if isinstance(row[n], np.generic) else row[n] for n in names})


def command_of(row: pd.Series, study: dict[str, Any], name: str) -> str:
    """Return the command that trains a trial again, alone and to its last epoch, whatever the preset.

    With the same images and versions of the packages, and on the same kind of CPU, it gives the same metrics, bit for
    bit; a trial that was stopped goes on after them.

    Args:
        row: of :func:`load_trials`.
        study: of the trial's run, from :func:`analysis.study_file.read_study`.
        name: of the run that the command makes.
    """
    settings = study["settings"]
    decides = ("dataset", "train_size", "val_fraction", "seed")  # which images, and which of them are held out
    words = [f"{key}={'null' if settings[key] is None else settings[key]}" for key in decides]
    if row["device"] == "cpu":  # sums depend on what adds them up
        words += ["device=cpu", f"cpus_per_trial={settings.get('cpus_per_trial') or 'null'}"]
    words += [f"max_epochs={row['max_epochs']}", "early_stopping=none", "equal_compute=false"]
    words += ["search=grid", "num_trials=1", "space={}"]
    words += [f"fixed.{key}={row[key]}" for key in (*HYPERPARAMETERS, "seed")]
    words += ["--data-dir", settings["data_dir"]] if settings["data_dir"] else []
    return shlex.join(["python", "-m", "study", "run", "--name", name, *words])


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
