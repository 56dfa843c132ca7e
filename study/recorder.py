"""What the driver does as trials of an attempt report, fail and end.

An epoch's metrics and ASHA's decision on them are in the log before Ray Tune goes on. What befalls a trial is told
apart: errors of its own count against it, a lost worker, node, storage or GPU does not.
"""

import contextlib
import dataclasses
import errno
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import pandas as pd
import ray
from ray import tune
from ray.exceptions import RayError, RayTaskError
from ray.tune.experiment import Trial

from analysis.run_log import Faults
from study.asha import RecordingASHA, trial_name
from study.disk import Checkpoints, free_bytes, reserve_bytes
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
MAX_TRACEBACK = 8000  # characters, of the end
# How torch begins to tell that a GPU failed. Of other errors, such as a device-side assert (values that are wrong, a
# label that is no class) or a kernel that is not there, the next try has them again.
_GPU_FAILED = re.compile(
    r"CUDA (driver )?error: (CUBLAS_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)|an illegal (memory access|instruction)"
    r"|unspecified launch failure|misaligned address|uncorrectable|the launch timed out|hardware stack error"
    r"|invalid program counter|device not ready|(no )?CUDA-capable device|initialization error|unknown error)"
    r"|cuDNN error: CUDNN_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)"
)
_COLOUR = re.compile(r"\x1b\[\d+m")
# What Ray Tune writes before each of a trial's errors.
_HEADLINE = re.compile(r"^Failure # \d+ \(occurred at .*\)\n", re.MULTILINE)


@dataclasses.dataclass
class _Saved:
    folder: str
    val_accuracy: float


def _best_epoch(saved: dict[int, _Saved]) -> int:
    """Return the epoch of the best checkpoint, of equals the last; 0 where there is none."""
    scored = [(there.val_accuracy, epoch) for epoch, there in saved.items() if math.isfinite(there.val_accuracy)]
    return max(scored, default=(0.0, 0))[1]


class Guard(tune.Stopper):
    """Ends an attempt before its end: when asked to, and while there is room to write down how far its trials are."""

    def __init__(self, run: Path, checkpoint: int, interruption: Interruption) -> None:
        self._run, self._checkpoint, self._next, self._interruption = run, checkpoint, 0.0, interruption
        self.running: dict[str, Trial] = {}
        self.is_full = False
        self.is_over = False  # something else wants the attempt to end

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 1
            self.is_full |= free_bytes(self._run) < reserve_bytes(self._checkpoint, len(self.running))
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
        self._saved: dict[str, dict[int, _Saved]] = {}  # of each trial, the checkpoints that are there, by epoch
        self._faults: dict[str, Faults] = {}
        self._failures_before: dict[str, int] = {}  # this attempt
        self._diverged: set[str] = set()
        self._has_epochs = False
        self.disk_error = ""
        self.storage_error = ""  # storage was never seen to be shared

    def resume(self, epochs: pd.DataFrame, faults: dict[str, Faults], checkpoints: dict[str, dict[int, str]]) -> None:
        """Take over what is known of the trials that earlier attempts began, and the checkpoints of unfinished ones."""
        self._faults = faults
        self._failures_before = {name: trial.failures for name, trial in faults.items()}
        self._has_epochs = not epochs.empty
        for row in epochs.to_dict("records"):
            folder = checkpoints.get(row["trial_id"], {}).get(row["epoch"])
            if folder:
                self._saved.setdefault(row["trial_id"], {})[row["epoch"]] = _Saved(folder, row["val_accuracy"])

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name, settings = trial_name(trial), settings_of_ray(trial, self._fixed).model_dump()
        self._events.append("trial_started", trial_id=name, attempt=self._attempt, settings=settings)
        self._guard.running[name] = trial
        trial.max_failures = max(0, self._max_failures - self._failures_before.get(name, 0))
        if self._progress:
            self._progress.trial_started(name, settings)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        name = trial_name(trial)
        metrics = {field: result[field] for field in REPORTED} | {"host": result["hostname"]}
        if result["passed_over"]:
            metrics["passed_over"] = result["passed_over"]
        folder = f"tune/attempt-{self._attempt}/{name}/{result['checkpoint_dir_name']}"
        decision = (self._asha.decision if self._asha else None) or {}
        self._events.append("epoch", trial_id=name, **metrics, checkpoint=folder, **decision)
        self._guard.running[name] = trial
        self._faults_of(name).losses = 0
        self._has_epochs = True
        # An epoch that is run again was gone back to: what came after it is no more.
        saved = {e: there for e, there in self._saved.get(name, {}).items() if e < result["epoch"]}
        self._saved[name] = {**saved, result["epoch"]: _Saved(folder, result["val_accuracy"])}
        if result["diverged"]:
            self._diverged.add(name)
        if self._progress:
            self._progress.epoch_done(name, result)

    def on_trial_save(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Keep the checkpoints of the best epoch and of the last two. Only now does Ray Tune know of the last."""
        name = trial_name(trial)
        saved = self._saved.get(name, {})
        stay = {*sorted(saved)[-2:], _best_epoch(saved)}
        for epoch in set(saved) - stay:
            self._budget.remove(saved.pop(epoch).folder)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name = trial_name(trial)
        done = trial.last_result.get("epoch") == settings_of_ray(trial, self._fixed).max_epochs
        with contextlib.suppress(OSError):  # its epochs say so too
            self._events.append("trial_ended", trial_id=name)
        self._end(trial, "diverged" if name in self._diverged else "completed" if done else "stopped")

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._fault(trial, _error_of(trial), goes_on=True)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._fault(trial, _error_of(trial), goes_on=False)

    def worker_died(self, error: Exception) -> None:
        """Note what broke the attempt off. A trial that ran alone was the cause; which of several was, nobody knows."""
        if len(self._guard.running) == 1:
            (trial,) = self._guard.running.values()
            self._fault(trial, error, goes_on=False)

    def _faults_of(self, name: str) -> Faults:
        return self._faults.setdefault(name, Faults())

    def _fault(self, trial: Trial, error: Exception, goes_on: bool) -> None:
        """Write down what befell a trial. Where Ray Tune does not go on with it, a later attempt may, or it failed."""
        name, text, own = trial_name(trial), in_short(error), _is_own(error)
        self._guard.running.pop(name, None)
        if isinstance(_cause(error), StorageError) and not self._has_epochs:
            self._guard.is_over, self.storage_error = True, str(_cause(error))
            return
        if is_disk_full(error):
            self._guard.is_full, self.disk_error = True, text
            return
        faults = self._faults_of(name)
        faults.failures += own
        faults.losses += not own
        told = {"trial_id": name, "error": text}
        if isinstance(error, RayTaskError):  # where in the worker's code; Ray's own copy goes with its session
            told["traceback"] = _COLOUR.sub("", str(error))[-MAX_TRACEBACK:]
        if not goes_on and (faults.failures > self._max_failures if own else faults.losses >= MAX_LOSSES):
            self._events.append("trial_failed", **told, lost=not own)
            self._end(trial, "failed", lost=not own)
            return
        self._events.append("trial_retried" if own else "trial_lost", **told)
        # One at a time, it goes on before any other: ASHA would judge in another order.
        self._guard.is_over |= self._one_at_a_time and not goes_on

    def _end(self, trial: Trial, status: str, lost: bool = False) -> None:
        name = trial_name(trial)
        self._guard.running.pop(name, None)
        saved = self._saved.pop(name, {})
        best = saved.get(_best_epoch(saved))
        self._guard.is_over |= self._alone
        # What is raised here would have Ray Tune begin the trial again, which has ended.
        with contextlib.suppress(OSError):
            settings = settings_of_ray(trial, self._fixed).model_dump()
            if not lost:  # resume goes on with it
                accuracy, folder = (best.val_accuracy, best.folder) if best else (-1.0, None)
                self._budget.trial_ended(name, settings, status, accuracy, folder)
            if self._progress:
                self._progress.trial_ended(name, status)

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles its callbacks into the experiment; a terminal and a scheduler's lock cannot be.
        return {"_attempt": self._attempt}


def settings_of_ray(trial: Trial, fixed: dict[str, Any]) -> TrialSettings:
    """Return the settings of a trial: what the study fixes, and what the search chose."""
    return TrialSettings(**{**fixed, **trial.config["trial"]})


def _error_of(trial: Trial) -> Exception:
    """Return what ended a trial, which the driver wrote down itself.

    Ray Tune pickles errors of tasks and actors alone. Any other is Ray's own, such as a node that died, and if the
    trial had one of its own before, that is what lies there.
    """
    told = "no error was recorded"
    if trial.error_file:
        with Path(trial.error_file).open(newline="") as file:  # with all its carriage returns
            told = file.read().removesuffix("\n")
    last = _HEADLINE.split(told)[-1]
    if not trial.pickled_error_file:
        return RayError(last)
    try:
        with Path(trial.pickled_error_file).open("rb") as pickled:
            error: Exception = ray.cloudpickle.load(pickled)
    except Exception:  # of a class that is not here
        return RuntimeError(last)
    return error if told.endswith(str(error)) else RayError(last)


def _is_own(error: Exception) -> bool:
    """Whether the trial is at fault, rather than its worker, node, storage or GPU."""
    cause = _cause(error)
    return not (isinstance(cause, RayError | OSError | StorageError | DeviceError) or _GPU_FAILED.match(str(cause)))


def _cause(error: Exception) -> BaseException:
    return error.cause if isinstance(error, RayTaskError) else error


def in_short(error: BaseException) -> str:
    """Return one line of an error: the first of its message, which comes after the traceback if it tells of one."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    frames = [i for i, line in enumerate(lines) if re.match(r'\s+File ".*", line \d+', line)]
    message = lines[frames[-1] + 1 :] if frames else lines
    return next((line for line in message if not line[0].isspace()), lines[-1]).strip()[:1000]


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, tells of a disk or quota without room."""
    while error is not None:
        for number in (errno.ENOSPC, errno.EDQUOT):
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return True
        error = error.__cause__ or error.__context__
    return False
