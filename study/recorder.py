"""What the driver does as trials of an attempt report, fail and end.

An epoch's metrics and ASHA's decision on them are in the log before Ray Tune goes on. What befalls a trial is told
apart: errors of its own count against it, a lost worker, node or storage does not.
"""

import contextlib
import dataclasses
import errno
import os
import time
from pathlib import Path
from typing import Any

import pandas as pd
import ray
from ray import tune
from ray.exceptions import RayError, RayTaskError
from ray.tune.experiment import Trial

from analysis.trials import Faults
from study.asha import RecordingASHA, trial_name
from study.disk import Checkpoints, free_bytes
from study.events import EventLog
from study.progress import Progress
from study.supervise import Interruption
from trainables.device import DeviceError
from trainables.settings import TrialSettings
from trainables.train import EpochMetrics
from trainables.tune_trial import OBJECTIVE, StorageError

# Of what a trial reports, that which is not Ray Tune's own.
REPORTED = [*(field.name for field in dataclasses.fields(EpochMetrics)), OBJECTIVE, "device"]
# A trial that lost its worker or node so often, without ending another epoch in between, is not begun again.
MAX_LOSSES = 4


class Guard(tune.Stopper):
    """Ends an attempt before its end: when asked to, and while there is room to write down how far its trials are."""

    def __init__(self, run: Path, reserve: int, interruption: Interruption) -> None:
        self._run, self._reserve, self._next, self._interruption = run, reserve, 0.0, interruption
        self.is_full = False
        self.is_over = False  # something else wants the attempt to end

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 1
            self.is_full = self.is_full or free_bytes(self._run) < self._reserve
        return self.is_full or self.is_over or self._interruption.asked


class Recorder(tune.Callback):
    """Writes what happens into the event log, shows it, and lets the checkpoints of beaten trials go."""

    def __init__(
        self,
        events: EventLog,
        progress: Progress | None,
        attempt: int,
        fixed: dict[str, Any],
        asha: RecordingASHA | None,
        budget: Checkpoints,
        guard: Guard,
        max_failures: int,
        alone: bool,
        one_at_a_time: bool,
    ) -> None:
        self._events, self._progress, self._attempt = events, progress, attempt
        self._fixed, self._asha, self._budget, self._guard = fixed, asha, budget, guard
        self._max_failures, self._alone, self._one_at_a_time = max_failures, alone, one_at_a_time
        self._best: dict[str, tuple[float, int, str]] = {}
        self._folders: dict[str, list[str]] = {}  # of each trial's checkpoints that are there, in their order
        self._running: dict[str, Trial] = {}
        self._faults: dict[str, Faults] = {}
        self._diverged: set[str] = set()
        self.disk_error = ""

    def resume(
        self, unfinished: pd.DataFrame, faults: dict[str, Faults], checkpoints: dict[str, dict[int, str]]
    ) -> None:
        """Take over what is known of the trials that an earlier attempt began."""
        self._faults = faults
        for row in unfinished.to_dict("records"):
            name, folders = row["trial_id"], checkpoints.get(row["trial_id"], {})
            self._folders[name] = [folders[epoch] for epoch in sorted(folders)]
            if row["best_epoch"] in folders:
                self._best[name] = (row["val_accuracy"], row["best_epoch"], folders[row["best_epoch"]])

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name, settings = trial_name(trial), settings_of(trial, self._fixed).model_dump()
        self._events.append("trial_started", trial_id=name, attempt=self._attempt, settings=settings)
        self._running[name] = trial
        if self._progress:
            self._progress.trial_started(name, settings)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        name = trial_name(trial)
        metrics = {field: result[field] for field in REPORTED}
        folder = f"tune/attempt-{self._attempt}/{name}/{result['checkpoint_dir_name']}"
        decision = (self._asha.decision if self._asha else None) or {}
        self._events.append("epoch", trial_id=name, **metrics, checkpoint=folder, **decision)
        self._running[name] = trial
        self._faults_of(name).losses = 0
        accuracy = (result["val_accuracy"], result["epoch"])
        if accuracy[0] == accuracy[0] and accuracy >= self._best.get(name, (-1.0, 0))[:2]:
            self._best[name] = (*accuracy, folder)
        self._folders.setdefault(name, []).append(folder)
        if result["diverged"]:
            self._diverged.add(name)
        if self._progress:
            self._progress.epoch_done(name, result)

    def on_trial_save(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Keep the best epoch's checkpoint and the last one's. Only now does Ray Tune know of the last."""
        name = trial_name(trial)
        folders = self._folders.get(name, [])
        stay = {folders[-1], self._best[name][2] if name in self._best else ""} if folders else set()
        for folder in folders:
            if folder not in stay:
                self._budget.remove(folder)
        self._folders[name] = [folder for folder in folders if folder in stay]

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name = trial_name(trial)
        done = trial.last_result.get("epoch") == self._fixed["max_epochs"]
        with contextlib.suppress(OSError):  # its epochs say so too
            self._events.append("trial_ended", trial_id=name)
        self._end(trial, "diverged" if name in self._diverged else "completed" if done else "stopped")

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._fault(trial, _error_of(trial), goes_on=True)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._fault(trial, _error_of(trial), goes_on=False)

    def worker_died(self, error: Exception) -> None:
        """Note what broke the attempt off. A trial that ran alone was the cause; which of several was, nobody knows."""
        if len(self._running) == 1:
            (trial,) = self._running.values()
            self._fault(trial, error, goes_on=False)

    def _faults_of(self, name: str) -> Faults:
        return self._faults.setdefault(name, Faults())

    def _fault(self, trial: Trial, error: Exception, goes_on: bool) -> None:
        """Write down what befell a trial. Where Ray Tune does not go on with it, a later attempt may, or it failed."""
        name, text, own = trial_name(trial), in_short(error), _is_own(error)
        self._running.pop(name, None)
        if is_disk_full(error):
            self._guard.is_full, self.disk_error = True, text
            return
        faults = self._faults_of(name)
        faults.failures += own
        faults.losses += not own
        if not goes_on and (faults.failures > self._max_failures if own else faults.losses >= MAX_LOSSES):
            self._events.append("trial_failed", trial_id=name, error=text)
            self._end(trial, "failed")
            return
        self._events.append("trial_retried" if own else "trial_lost", trial_id=name, error=text)
        # One at a time, it goes on before any other: ASHA would judge in another order.
        self._guard.is_over |= self._one_at_a_time and not goes_on

    def _end(self, trial: Trial, status: str) -> None:
        name = trial_name(trial)
        self._running.pop(name, None)
        self._folders.pop(name, None)
        val_accuracy, _, checkpoint = self._best.pop(name, (-1.0, 0, None))
        self._guard.is_over |= self._alone
        # What is raised here would have Ray Tune begin the trial again, which has ended.
        with contextlib.suppress(OSError):
            settings = settings_of(trial, self._fixed).model_dump()
            self._budget.trial_ended(name, settings, status, val_accuracy, checkpoint)
            if self._progress:
                self._progress.trial_ended(name, status)

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles its callbacks into the experiment; a terminal and a scheduler's lock cannot be.
        return {"_attempt": self._attempt}


def settings_of(trial: Trial, fixed: dict[str, Any]) -> TrialSettings:
    """Return the settings of a trial: what the study fixes, and what the search chose."""
    return TrialSettings(**{**fixed, **trial.config["trial"]})


def _error_of(trial: Trial) -> Exception:
    """Return what ended a trial. The driver reads what it pickled itself."""
    try:
        with Path(trial.pickled_error_file).open("rb") as file:
            error: Exception = ray.cloudpickle.load(file)
            return error
    except Exception:  # of a class that is not here
        return RuntimeError(Path(trial.error_file).read_text() if trial.error_file else "no error was recorded")


def _is_own(error: Exception) -> bool:
    """Whether a trial is to blame for an error: not for a worker, node, device or storage that is not there."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return not isinstance(cause, RayError | OSError | StorageError | DeviceError)


def in_short(error: BaseException) -> str:
    """Return one line of an error: the last where there is a traceback before it, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    has_traceback = isinstance(error, RayTaskError) or any(line.startswith("Traceback") for line in lines)
    return lines[-1 if has_traceback else 0][:1000]


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, tells of a disk or quota without room."""
    while error is not None:
        for number in (errno.ENOSPC, errno.EDQUOT):
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return True
        error = error.__cause__ or error.__context__
    return False
