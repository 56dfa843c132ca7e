"""``RUN/study.yaml``: what a study was to do, on which data and machine. Read with suspicion: it may be anybody's."""

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from analysis.remote import RunPath, local_run, source
from trainables.errors import UserError

_NUMBERS = (int, float)  # not bool
BEYOND = 2.0**63  # what an int64 cannot hold
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C it is ten times as fast
_MANY_PARTS = 5000  # in a study.yaml; it has some 100, and one a class


class RunError(UserError):
    """A run directory that is missing or cannot be read."""


def is_number(value: Any) -> bool:
    """Return whether a value is a number that a column can hold: not NaN, infinite or too large."""
    return type(value) in _NUMBERS and -BEYOND <= value < BEYOND


def check_inside(path: Path, folder: Path) -> None:
    """See that what is written to a path lands in a folder: in a stranger's run, links may lead out of it.

    Raises:
        RunError: if it would not.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"{path}: leads out of {folder}: remove that link")


class _Part(dict[str, Any]):
    """A part of study.yaml: whoever reads what it lacks gets an error that says so."""

    def __init__(self, values: dict[str, Any], name: str) -> None:
        super().__init__(values)
        self._name = name

    def __missing__(self, key: str) -> Any:
        raise RunError(f"{self._name}.{key} is missing")


yaml.SafeDumper.add_representer(_Part, yaml.SafeDumper.represent_dict)  # it is written as any dict is


def is_count(value: Any) -> bool:
    """Return whether a value is a whole number above 0, and not too large."""
    return type(value) is int and 0 < value < 2**53


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len({*value}) == len(value)


_Kind = tuple[Callable[[Any], bool], str]
_TEXT: _Kind = (lambda value: isinstance(value, str), "text")
_COUNT: _Kind = (is_count, "a whole number above 0")
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
            lambda value: isinstance(value, list) and all(type(i) is int and 0 <= i < BEYOND for i in value),
            "a list of whole numbers",
        ),
    },
    "settings": {
        "dataset": _TEXT,
        "data_dir": (lambda value: value is None or isinstance(value, str), "text or null"),
        "train_size": (lambda value: value is None or is_count(value), "a whole number above 0 or null"),
        "val_fraction": _NUMBER,
        "num_trials": (
            lambda value: value is None or (is_count(value) and value <= 10**6),  # each has a row
            "a whole number from 1 to a million or null",
        ),
        "max_epochs": _COUNT,
        "seed": (lambda value: type(value) is int and 0 <= value < 2**31, "a whole number from 0 on"),
        "grace_period": _COUNT,
        "reduction_factor": _NUMBER,
    },
}


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
    except NotADirectoryError as error:
        raise RunError(
            f"{source(folder)}: is no run directory, but a file or in one; python -m study list shows the runs"
        ) from error
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
            "cores": machine["cores"] if is_count(machine.get("cores")) else "?",
            "gpus": [gpu for gpu in gpus if isinstance(gpu, str)] if isinstance(gpus, list) else [],
        },
        "versions": {package: number for package, number in versions.items() if isinstance(number, str)},
    }
