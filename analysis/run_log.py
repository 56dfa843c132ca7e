"""What the files of a run say: JSON and YAML only, nothing is unpickled, and what is not whole says nothing.

RUN/study.yaml                          settings as resolved, data fingerprint, machine, versions
RUN/manifest.json                       every trial that was asked for, written before the first one starts
RUN/events.jsonl                        attempts, starts and ends of trials, epochs, ASHA's decisions; append-only
RUN/lock                                held by the process that runs the study
RUN/tune/attempt-N/TRIAL/checkpoint_*/  of the best epoch and, until it has ended, the last two
RUN/explanations/TRIAL/summary.json     of explained trials; see :mod:`analysis.explanations`
"""

import functools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from analysis.remote import RunPath, is_held, is_run_elsewhere, local_run, source
from analysis.study_file import BEYOND, RunError, is_count, is_number, read_study

# What an epoch's event must have, as numbers; columns of the table of epochs.
EPOCH_METRICS = (
    "epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "epoch_seconds", "images_per_second",
)  # fmt: skip
_AT_ONCE = 1000  # lines parsed by one call
# Both become paths: of a stranger's run, they must not lead out of it, nor be too long for a file system.
_TRIAL_ID = re.compile(r"[\w-]{1,128}", re.ASCII)
_CHECKPOINT = re.compile(r"tune/attempt-\d{1,18}/[\w-]{1,128}/checkpoint_\d{1,18}", re.ASCII)

# What ends a span of a trial in its slot, or shows that it goes on.
_OUTCOMES = {
    "epoch": "", "trial_ended": "ended", "trial_failed": "failed", "trial_retried": "retried", "trial_lost": "lost",
}  # fmt: skip


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
    last_error: str = ""  # of any trial


def read_log(run: Path) -> RunLog:
    """Return what the manifest and the log of a run say; it is not to be changed, for who asks next is given the same.

    Raises:
        RunError: if the directory is no run, or a file of it cannot be read.
    """
    read_study(run)
    return _read_log(run, _stamp(run / "manifest.json"), _stamp(run / "events.jsonl"))


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """Return what is different whenever a file is."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=1)  # the tables of trials, epochs and decisions are asked for one after the other
def _read_log(run: Path, *stamps: tuple[int, int, int] | None) -> RunLog:
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
        except (KeyError, TypeError, ValueError, RecursionError):
            continue  # an event that is not whole says nothing
    return read


def is_folder(path: Path) -> bool:
    """Return whether there is a folder; False also where one may not look."""
    return os.path.isdir(path)  # noqa: PTH112 -- Path.is_dir raises there


def load_checkpoints(run: RunPath) -> dict[str, dict[int, str]]:
    """Return the folders of the checkpoints that are there, as paths within the run, by trial and epoch."""
    run = local_run(run)
    found: dict[str, dict[int, str]] = {}
    for trial in read_log(run).trials.values():
        folders = {epoch: row["checkpoint"] for epoch, row in trial.rows.items() if row.get("checkpoint")}
        found[trial.trial_id] = {epoch: folder for epoch, folder in folders.items() if is_folder(run / folder)}
    return found


def load_faults(run: RunPath) -> dict[str, Faults]:
    """Return what has befallen each trial, by trial id."""
    return {trial.trial_id: replace(trial.faults) for trial in read_log(local_run(run)).trials.values()}


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
    if kind != "epoch" and kind in ("attempt_started", "trial_started") and not is_count(event["attempt"]):
        return
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
    read.last_error = str(event.get("error", read.last_error))
    if trial.spans and kind in _OUTCOMES and is_number(event.get("time")):
        span = trial.spans[-1]
        span.end, span.host = event["time"], str(event.get("host") or span.host)
        span.outcome = _OUTCOMES[kind]
    if kind == "trial_started":
        trial.started, trial.ended, trial.error = event["attempt"], "", ""
        if is_number(event.get("time")):
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


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def _is_decision(event: dict[str, Any]) -> bool:
    # The first trial at a rung has no cutoff to be below.
    first = "cutoff" in event and event["cutoff"] is None and event.get("stop") is False
    numbers = is_number(event.get("rung")) and _is_share(event.get("objective"))
    return numbers and (first or _is_share(event.get("cutoff"))) and isinstance(event.get("stop"), bool)


def _is_id(trial_id: Any) -> bool:
    return isinstance(trial_id, str) and bool(_TRIAL_ID.fullmatch(trial_id))


def _is_epoch(event: dict[str, Any]) -> bool:
    for name in EPOCH_METRICS:  # some 100,000 events are looked at: a generator would take twice as long
        value = event.get(name)
        if type(value) is not float and (type(value) is not int or not -BEYOND <= value < BEYOND):
            return False
    epoch, train, val, folder = event["epoch"], event["train_accuracy"], event["val_accuracy"], event.get("checkpoint")
    return (
        type(epoch) is int
        and epoch > 0
        # Of an epoch that diverged, losses are not finite and accuracies may be NaN: that is neither < 0 nor > 1.
        and not (train < 0 or train > 1 or val < 0 or val > 1)
        and 0 <= event["lr"] < BEYOND
        and 0 <= event["epoch_seconds"] < BEYOND
        and 0 <= event["images_per_second"] < BEYOND
        and (folder is None or bool(_CHECKPOINT.fullmatch(folder)))
    )


def _read(file: Path) -> str:
    """Return a file's text, empty if there is no such file. One that cannot be read is not one that is empty."""
    try:
        return file.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise RunError(f"{source(file.parent)}/{file.name}: cannot be read ({error.strerror or error})") from error


def read_json(file: Path) -> Any:
    """Return what a file of JSON holds; None if there is no such file, or it is not whole.

    Raises:
        RunError: if it is there and cannot be read.
    """
    try:
        return json.loads(_read(file))
    except (ValueError, RecursionError):
        return None


def _read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in a file of JSON lines. A last line that is only half written is not there yet."""
    lines = _read(file).splitlines()
    for start in range(0, len(lines), _AT_ONCE):
        part = lines[start : start + _AT_ONCE]
        try:
            rows = json.loads(f"[{','.join(part)}]")
        except (ValueError, RecursionError):
            rows = []
        if len(rows) != len(part):  # a line is broken: each by itself
            rows = [row for row in map(_parsed, part) if row is not None]
        yield from (row for row in rows if isinstance(row, dict))


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
