"""What the files of a run say: JSON and YAML only, nothing is unpickled, and what is not whole says nothing.

RUN/study.yaml                          settings as resolved, data fingerprint, machine, versions
RUN/manifest.json                       every trial that was asked for, written before the first one starts
RUN/events.jsonl                        attempts, starts and ends of trials, epochs, ASHA's decisions; append-only
RUN/lock                                held by the process that runs the study
RUN/tune/attempt-N/TRIAL/checkpoint_*/  of the best epoch and, until it has ended, the last two
RUN/explanations/TRIAL/summary.json     of explained trials; see :mod:`analysis.explanations`
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from analysis.remote import RunPath, is_held, is_run_elsewhere, local_run, source
from trainables.errors import UserError

# What an epoch's event must have, as numbers; columns of the table of epochs.
EPOCH_METRICS = (
    "epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "epoch_seconds", "images_per_second",
)  # fmt: skip
_AT_ONCE = 1000  # lines parsed by one call
_NUMBERS = (int, float)  # not bool
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C it is ten times as fast
# Both become paths: of a stranger's run, they must not lead out of it.
_TRIAL_ID = re.compile(r"[\w-]+")
_CHECKPOINT = re.compile(r"tune/attempt-\d+/[\w-]+/checkpoint_\d+")

# What ends a span of a trial in its slot, or shows that it goes on.
_OUTCOMES = {
    "epoch": "", "trial_ended": "ended", "trial_failed": "failed", "trial_retried": "retried", "trial_lost": "lost",
}  # fmt: skip


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
class Span:
    """A stretch of time in which a trial held a slot. Times are seconds since 1970, UTC."""

    attempt: int
    start: float
    end: float
    host: str = ""  # known from its first epoch on
    outcome: str = ""  # ended, failed, retried, lost; none while it runs, or if nobody saw its end


@dataclass
class LoggedTrial:
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
    spans: list[Span] = field(default_factory=list)


@dataclass
class RunLog:
    """What the files of a run say, trials in the order asked for."""

    trials: dict[str, LoggedTrial] = field(default_factory=dict)
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
        study = yaml.load(file.read_text(), Loader=_LOADER)
    except FileNotFoundError as error:
        there = folder.is_dir() and source(folder) == str(folder)
        what = "is no run directory (study.yaml is missing)" if there else "no such run"
        raise RunError(f"{source(folder)}: {what}; python -m study list shows the runs") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"{source(folder)}/study.yaml: cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(study, dict) or not all(isinstance(study.get(part), dict) for part in ("settings", "data")):
        raise RunError(f"{source(folder)}/study.yaml: is not the study.yaml of a run: it has no settings and data")
    return study


def read_log(run: Path) -> RunLog:
    """Return what the manifest and the log of a run say.

    Raises:
        RunError: if the directory is no run, or a file of it cannot be read.
    """
    read_study(run)
    read = RunLog()
    manifest = read_json(run / "manifest.json")
    for part, phase in (("trials", "search"), ("confirmations", "confirm")):
        entries = manifest.get(part) if isinstance(manifest, dict) else None
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("settings"), dict) and _is_id(entry.get("trial_id")):
                read.trials[entry["trial_id"]] = LoggedTrial(entry["trial_id"], entry["settings"], phase)
    for event in _read_lines(run / "events.jsonl"):
        try:
            _read_event(event, read)
        except (KeyError, TypeError, ValueError):
            continue  # an event that is not whole says nothing
    return read


def load_checkpoints(run: RunPath) -> dict[str, dict[int, str]]:
    """Return the folders of the checkpoints that are there, as paths within the run, by trial and epoch."""
    run = local_run(run)
    found: dict[str, dict[int, str]] = {}
    for trial in read_log(run).trials.values():
        folders = {epoch: row["checkpoint"] for epoch, row in trial.rows.items() if row.get("checkpoint")}
        found[trial.trial_id] = {epoch: folder for epoch, folder in folders.items() if (run / folder).is_dir()}
    return found


def load_faults(run: RunPath) -> dict[str, Faults]:
    """Return what has befallen each trial, by trial id."""
    return {trial.trial_id: trial.faults for trial in read_log(local_run(run)).trials.values()}


def open_attempt(run: RunPath) -> int:
    """Return the number of the attempt that was begun and has not said that it ended; 0 if there is none."""
    return read_log(local_run(run)).attempt


def is_running(run: RunPath) -> bool:
    """Return whether some process runs the study now, here or on another host.

    Where the file system is shared, that is certain; of a run at a URI it may be said up to a minute too long.
    """
    folder = local_run(run)
    return is_held(folder) or is_run_elsewhere(folder)


def _read_event(event: dict[str, Any], read: RunLog) -> None:
    kind = event["event"]
    if kind == "attempt_started":
        read.attempt = event["attempt"]
    elif kind == "attempt_ended":
        read.attempt = 0
    if "trial_id" not in event:
        return
    trial_id = event["trial_id"]
    if kind == "trial_started" and trial_id not in read.trials and _is_id(trial_id):
        read.trials[trial_id] = LoggedTrial(trial_id, dict(event["settings"]))
    trial = read.trials[trial_id]
    if trial.spans and kind in _OUTCOMES and _is_number(event.get("time")):
        span = trial.spans[-1]
        span.end, span.host = event["time"], str(event.get("host") or span.host)
        span.outcome = _OUTCOMES[kind]
    if kind == "trial_started":
        trial.started, trial.ended, trial.error = event["attempt"], "", ""
        if _is_number(event.get("time")):
            trial.spans.append(Span(event["attempt"], event["time"], event["time"]))
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


def _is_number(value: Any) -> bool:
    return type(value) in _NUMBERS


def _is_decision(event: dict[str, Any]) -> bool:
    # The first trial at a rung has no cutoff to be below.
    first = "cutoff" in event and event["cutoff"] is None and event.get("stop") is False
    numbers = _is_number(event.get("rung")) and _is_number(event.get("objective"))
    return numbers and (first or _is_number(event.get("cutoff"))) and isinstance(event.get("stop"), bool)


def _is_id(trial_id: Any) -> bool:
    return isinstance(trial_id, str) and bool(_TRIAL_ID.fullmatch(trial_id))


def _is_epoch(event: dict[str, Any]) -> bool:
    for name in EPOCH_METRICS:  # some 100,000 events are looked at: a generator would take twice as long
        if type(event.get(name)) not in _NUMBERS:
            return False
    folder = event.get("checkpoint")
    return isinstance(event["epoch"], int) and (folder is None or bool(_CHECKPOINT.fullmatch(folder)))


def _read(file: Path) -> str:
    """Return a file's text, empty if there is no such file. One that cannot be read is not one that is empty."""
    try:
        return file.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise RunError(f"{source(file.parent)}/{file.name}: cannot be read ({error.strerror or error})") from error


def check_inside(path: Path, folder: Path) -> None:
    """See that what is written to a path lands in a folder: in a stranger's run, links may lead out of it.

    Raises:
        RunError: if it would not.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"{path}: leads out of {folder}; remove that link, or give another --output")


def read_json(file: Path) -> Any:
    """Return what a file of JSON holds; None if there is no such file, or it is not whole."""
    try:
        return json.loads(_read(file))
    except ValueError:
        return None


def _read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in a file of JSON lines. A last line that is only half written is not there yet."""
    lines = _read(file).splitlines()
    for start in range(0, len(lines), _AT_ONCE):
        part = lines[start : start + _AT_ONCE]
        try:
            rows = json.loads(f"[{','.join(part)}]")
        except ValueError:
            rows = []
        if len(rows) != len(part):  # a line is broken: each by itself
            rows = [row for row in map(_parsed, part) if row is not None]
        yield from (row for row in rows if isinstance(row, dict))


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
