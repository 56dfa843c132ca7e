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
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import date
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
_BEYOND = 2.0**63  # what an int64 cannot hold
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C it is ten times as fast
_MANY_PARTS = 5000  # in a study.yaml; it has some 100, and one a class
# Both become paths: of a stranger's run, they must not lead out of it, nor be too long for a file system.
_TRIAL_ID = re.compile(r"[\w-]{1,128}", re.ASCII)
_CHECKPOINT = re.compile(r"tune/attempt-\d{1,18}/[\w-]{1,128}/checkpoint_\d{1,18}", re.ASCII)

# What ends a span of a trial in its slot, or shows that it goes on.
_OUTCOMES = {
    "epoch": "", "trial_ended": "ended", "trial_failed": "failed", "trial_retried": "retried", "trial_lost": "lost",
}  # fmt: skip


class RunError(UserError):
    """A run directory that is missing or cannot be read."""


class _Part(dict[str, Any]):
    """A part of study.yaml: whoever reads what it lacks gets an error that says so."""

    def __init__(self, values: dict[str, Any], name: str) -> None:
        super().__init__(values)
        self._name = name

    def __missing__(self, key: str) -> Any:
        raise RunError(f"{self._name}.{key} is missing")


yaml.SafeDumper.add_representer(_Part, yaml.SafeDumper.represent_dict)  # reports show settings


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**53


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len({*value}) == len(value)


_Kind = tuple[Callable[[Any], bool], str]
_TEXT: _Kind = (lambda value: isinstance(value, str), "text")
_COUNT: _Kind = (_is_count, "a whole number above 0")
_NUMBER: _Kind = (lambda value: is_number(value) and value > 0, "a number above 0")
_NAMES: _Kind = (_are_names, "a list of different names")
# What the project reads of study.yaml: where it is there, it must be this. Whether it is there, its readers ask.
_STUDY: dict[str, dict[str, _Kind]] = {
    "data": {
        "dataset": _TEXT,
        "fingerprint": _TEXT,
        "num_train_images": _COUNT,
        "num_val_images": _COUNT,
        "class_names": _NAMES,
        "superclass_names": _NAMES,
        "superclasses": (
            lambda value: isinstance(value, list) and all(type(i) is int and 0 <= i < _BEYOND for i in value),
            "a list of whole numbers",
        ),
    },
    "settings": {
        "dataset": _TEXT,
        "data_dir": (lambda value: value is None or isinstance(value, str), "text or null"),
        "train_size": (lambda value: value is None or _is_count(value), "a whole number above 0 or null"),
        "val_fraction": _NUMBER,
        "num_trials": (
            lambda value: value is None or (_is_count(value) and value <= 10**6),  # each has a row
            "a whole number from 1 to a million or null",
        ),
        "max_epochs": _COUNT,
        "seed": (lambda value: type(value) is int and 0 <= value < 2**31, "a whole number from 0 on"),
        "grace_period": _COUNT,
        "reduction_factor": _NUMBER,
    },
}


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

    What is only shown (name, date, command, machine, versions) is said to be unknown where it is missing. To read
    settings or facts on the data that are missing raises a RunError, too.

    Raises:
        RunError: if the directory is no run, the file cannot be read, or a part of it is of another kind than it must.
    """
    folder = local_run(run)
    file = folder / "study.yaml"
    try:
        text = file.read_text()
        # The loader in C overflows the stack, and ends the process, on what is nested some 10,000 times.
        deep = sum(map(text.count, "[{-?")) > _MANY_PARTS
        study = yaml.load(text, Loader=yaml.SafeLoader if deep else _LOADER)
    except FileNotFoundError as error:
        there = folder.is_dir() and source(folder) == str(folder)
        what = "is no run directory (study.yaml is missing)" if there else "no such run"
        raise RunError(f"{source(folder)}: {what}; python -m study list shows the runs") from error
    except Exception as error:  # values that are not what they look like raise errors of many kinds, as 2026-13-45 does
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RunError(f"{source(folder)}/study.yaml: cannot be read ({reason})") from error
    if not isinstance(study, dict) or not all(isinstance(study.get(part), dict) for part in ("settings", "data")):
        raise RunError(f"{source(folder)}/study.yaml: is not the study.yaml of a run: it has no settings and data")
    for part, kinds in _STUDY.items():
        for name, (is_one, kind) in kinds.items():
            if name in study[part] and not is_one(study[part][name]):
                raise RunError(f"{source(folder)}/study.yaml: {part}.{name} must be {kind}")
        study[part] = _Part(study[part], f"{source(folder)}/study.yaml: {part}")
    of_classes, names = (study["data"].get(name) or [] for name in ("superclasses", "superclass_names"))
    if of_classes and (len(of_classes) != len(study["data"]["class_names"]) or max(of_classes) >= len(names)):
        raise RunError(f"{source(folder)}/study.yaml: data.superclasses must have a superclass for each class")
    return study | _shown(study, Path(source(folder)).name)


def _shown(study: dict[str, Any], name: str) -> dict[str, Any]:
    """Return what is shown of a study and decides nothing: what is missing, or no text, is unknown."""
    machine, versions = (part if isinstance(part := study.get(key), dict) else {} for key in ("machine", "versions"))
    texts = {"name": name, "created": "an unknown date", "command": "unknown"}
    computer = {"system": "an unknown system", "processor": "an unknown processor"}
    gpus = machine.get("gpus")
    return {
        **{key: study[key] if isinstance(study.get(key), str | date) else text for key, text in texts.items()},
        "machine": {
            **{key: machine[key] if isinstance(machine.get(key), str) else text for key, text in computer.items()},
            "cores": machine["cores"] if _is_count(machine.get("cores")) else "?",
            "gpus": [gpu for gpu in gpus if isinstance(gpu, str)] if isinstance(gpus, list) else [],
        },
        "versions": {package: number for package, number in versions.items() if isinstance(number, str)},
    }


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
    if kind != "epoch" and kind in ("attempt_started", "trial_started") and not _is_count(event["attempt"]):
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


def is_number(value: Any) -> bool:
    """Return whether a value is a number that a column can hold: not NaN, infinite or too large."""
    return type(value) in _NUMBERS and -_BEYOND <= value < _BEYOND


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
        if type(value) is not float and (type(value) is not int or not -_BEYOND <= value < _BEYOND):
            return False
    epoch, train, val, folder = event["epoch"], event["train_accuracy"], event["val_accuracy"], event.get("checkpoint")
    return (
        type(epoch) is int
        and epoch > 0
        # Of an epoch that diverged, losses are not finite and accuracies may be NaN: that is neither < 0 nor > 1.
        and not (train < 0 or train > 1 or val < 0 or val > 1)
        and 0 <= event["lr"] < _BEYOND
        and 0 <= event["epoch_seconds"] < _BEYOND
        and 0 <= event["images_per_second"] < _BEYOND
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


def check_inside(path: Path, folder: Path) -> None:
    """See that what is written to a path lands in a folder: in a stranger's run, links may lead out of it.

    Raises:
        RunError: if it would not.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"{path}: leads out of {folder}: remove that link")


def read_json(file: Path) -> Any:
    """Return what a file of JSON holds; None if there is no such file, or it is not whole."""
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
