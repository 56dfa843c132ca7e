"""Disk space: what a study will need, whether it is there, and which checkpoints are let go.

Checkpoints of running trials are kept (the best epoch's and the last two), and of the trials that ended those of the
best few. Everything else in a run directory is small.
"""

import contextlib
import shutil
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pyarrow import fs

from analysis.remote import RunPath, is_uri, list_checkpoints, open_storage
from analysis.run_log import load_checkpoints, load_faults
from analysis.trials import ENDED, HYPERPARAMETERS, load_trials
from trainables.errors import UserError
from trainables.optim import STATE_COPIES
from trainables.resnet import ResNet18
from trainables.settings import TrialSettings

# Event log, TensorBoard files, figures and tables; a floor under which nothing is begun.
_SMALL_FILES = 50 * 2**20
# A running trial's best and last two epochs, and the one being written, in a temporary folder and from there into the
# run. The last but one is for when the machine goes down before the last is on disk.
_WHILE_RUNNING = 5
# What torch.save adds to each tensor.
_PER_TENSOR = 300


class DiskFullError(UserError):
    """There is no room for what a study has to write; what is finished is on disk."""


def checkpoint_bytes(settings: TrialSettings, num_classes: int) -> int:
    """Return how large a checkpoint of a trial is, to a few percent."""
    with torch.device("meta"):
        network = ResNet18(num_classes, settings.width, settings.dropout)
    weights = sum(t.numel() * t.element_size() + _PER_TENSOR for t in network.state_dict().values())
    return round(weights * (1 + STATE_COPIES[settings.optimizer] + (settings.ema_decay > 0)))


def needed_bytes(checkpoint: int, num_trials: int, concurrent: int, keep: int | None) -> int:
    """Return what a study takes at most: ``keep`` checkpoints (None: of all trials) and those of running trials."""
    kept = num_trials if keep is None else min(keep, num_trials)
    return _SMALL_FILES + checkpoint * (kept + _WHILE_RUNNING * min(concurrent, num_trials))


def reserve_bytes(checkpoint: int, concurrent: int) -> int:
    """Return how much must be free for running trials to end their epochs."""
    return _SMALL_FILES // 2 + 2 * checkpoint * concurrent


def free_bytes(run: Path) -> int:
    """Return the free space where a run directory lies or will lie."""
    while not run.exists():
        run = run.parent
    return shutil.disk_usage(run).free


def size_text(size: float) -> str:
    """Return a size as people say it: ``850 MB``, ``1.4 GB``."""
    return f"{size / 1e9:.1f} GB" if size >= 999.5e6 else f"{size / 1e6:.0f} MB"


def configuration(settings: Mapping[Any, Any]) -> str:
    """Return a name for all settings but the seed, of a trial's settings or of its row in the table."""
    return " ".join(str(settings[name]) for name in [*HYPERPARAMETERS, "max_epochs"])


@dataclass(frozen=True)
class _Kept:
    completed: bool
    val_accuracy: float
    folder: str


def _rank(seeds: list[_Kept]) -> tuple[bool, float]:
    completed = [seed.val_accuracy for seed in seeds if seed.completed]
    return bool(completed), statistics.mean(completed or [seed.val_accuracy for seed in seeds])


def immediately(act: Callable[[], None]) -> None:
    """Do something now, and not later."""
    act()


class Checkpoints:
    """Lets the checkpoints go that will not be used again.

    Args:
        run: a run directory in which no trial runs yet. What a crash left half written or unrecorded is removed.
        storage: path or URI under which the checkpoints lie; the run directory itself, or what it is the copy of.
        keep: how many of the trials that ended keep their best epoch's checkpoint; None keeps all. Seeds of one
            configuration stand and fall together, for a few lucky ones would flatter it: configurations that ran to
            their end come before those that were stopped, and of these those that are more accurate on average. What
            was confirmed is kept beside them.
        later: calls what it is given once the log, as it is then, lies beside the checkpoints; until then a removed
            checkpoint would be missed by those who read the log there. By default that is at once.
    """

    def __init__(
        self, run: Path, storage: RunPath, keep: int | None, later: Callable[[Callable[[], None]], None] = immediately
    ) -> None:
        self._keep, self._later = keep, later
        self._storage, self._base = open_storage(storage)
        self._kept: dict[str, list[_Kept]] = {}  # by configuration
        self._gone: set[str] = set()  # configurations that were let go
        if is_uri(storage):  # workers write there, not into the copy
            list_checkpoints(run, str(storage))
        needed, lacking = set(), set()
        checkpoints, faults, trials = load_checkpoints(run), load_faults(run), load_trials(run)
        self._confirmed = {configuration(row) for row in trials[trials["phase"] == "confirm"].to_dict("records")}
        for row in trials.to_dict("records"):
            folders = checkpoints.get(row["trial_id"], {})
            best = folders.get(row["best_epoch"])
            may_go_on = row["status"] not in ENDED or faults[row["trial_id"]].losses  # lost ones may be tried again
            if folders and may_go_on:
                needed |= {best, *(folders[epoch] for epoch in sorted(folders)[-2:])}
            elif best:
                needed.add(best)
                self._add(configuration(row), row["status"], row["val_accuracy"], best)
            elif keep is not None and row["status"] in ENDED and pd.notna(row["best_epoch"]):
                lacking.add(configuration(row))
        self._gone = lacking - self._confirmed
        for name in self._gone & self._kept.keys():
            if len(self._kept[name]) >= (keep or 0):  # too large for all of its seeds, of which these stayed
                self._gone.remove(name)
            else:  # what is left does not speak for it, and displaces nobody
                del self._kept[name]
        for attempt in self._folders("tune"):
            for trial in self._folders(attempt):
                self._remove(trial, needed)
        self._shrink()

    def trial_ended(
        self, trial_id: str, settings: Mapping[str, Any], status: str, val_accuracy: float, best: str | None
    ) -> None:
        """Keep of a trial that ended its best checkpoint (a path within the run), if the trial is among the best."""
        for attempt in self._folders("tune"):
            self._remove(f"{attempt}/{trial_id}", {best})
        if best:
            self._add(configuration(settings), status, val_accuracy, best)
            self._shrink()

    def _add(self, of: str, status: str, val_accuracy: float, folder: str) -> None:
        if of in self._gone:
            self.remove(folder)
        elif of not in self._confirmed:
            self._kept.setdefault(of, []).append(_Kept(status == "completed", val_accuracy, folder))

    def _shrink(self) -> None:
        if self._keep is None or sum(map(len, self._kept.values())) <= self._keep:
            return
        left = self._keep
        for name, trials in sorted(self._kept.items(), key=lambda entry: _rank(entry[1]), reverse=True):
            # Of a single configuration that is too large, the first seeds stay.
            stay = trials if len(trials) <= left else trials[:left] if left == self._keep else []
            left = left - len(stay) if len(stay) == len(trials) else 0
            for trial in trials[len(stay) :]:
                self.remove(trial.folder)
            if stay:
                self._kept[name] = stay
            else:
                del self._kept[name]
                self._gone.add(name)

    def _remove(self, trial: str, needed: set[str | None]) -> None:
        for folder in self._folders(trial):
            if "checkpoint_" in folder and folder not in needed:
                self.remove(folder)

    def _folders(self, parent: str) -> list[str]:
        selector = fs.FileSelector(f"{self._base}/{parent}", allow_not_found=True)
        return [f"{parent}/{info.base_name}" for info in self._storage.get_file_info(selector) if not info.is_file]

    def remove(self, folder: str) -> None:
        """Remove a checkpoint, given by its path within the run."""
        self._later(lambda: self._delete(folder))

    def _delete(self, folder: str) -> None:
        with contextlib.suppress(OSError):  # it takes up room, but does no harm
            self._storage.delete_dir(f"{self._base}/{folder}")
