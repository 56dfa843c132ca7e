"""One attempt at a study: the trials that are left, handed to Ray Tune.

Ray Tune is given each attempt as an experiment of its own, and its restore is not used: it forgets ASHA's rungs, and
starts a fresh one-trial run where its state file is truncated. What is left to do is read from the run directory.
"""

import contextlib
import dataclasses
import errno
import itertools
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import ray
from pyarrow import fs
from ray import tune
from ray.exceptions import RayError, RayTaskError
from ray.tune.experiment import Trial
from ray.tune.logger import TBXLoggerCallback
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from analysis.remote import RunPath, is_uri, open_storage, source
from analysis.trials import ENDED, Faults, load_checkpoints, load_decisions, load_epochs, load_faults, load_trials
from study.asha import RecordingASHA, trial_name
from study.disk import Checkpoints, DiskFullError, as_text, free_bytes
from study.events import EventLog
from study.manifest import read_manifest
from study.progress import Progress
from study.ray_session import Resources
from study.settings import StudySettings
from study.space import fixed_settings, optuna_space
from study.supervise import AttemptError, Interruption
from trainables.device import DeviceError
from trainables.settings import TrialSettings
from trainables.train import EpochMetrics
from trainables.tune_trial import OBJECTIVE, StorageError, run_trial

# Of what a trial reports, that which is not Ray Tune's own.
REPORTED = [*(field.name for field in dataclasses.fields(EpochMetrics)), OBJECTIVE, "device"]
# A trial that lost its worker or node so often, without ending another epoch in between, is not begun again.
MAX_LOSSES = 4


def run_attempt(
    settings: StudySettings,
    run: Path,
    storage: RunPath,
    images: tuple[ray.ObjectRef, ray.ObjectRef],
    resources: Resources,
    reserve: int,
    interruption: Interruption,
    alone: bool,
    show: bool,
) -> str:
    """Run the trials that have not ended.

    Args:
        settings: of the study.
        run: the run directory.
        storage: path or URI under which checkpoints are to lie; the run directory itself, or what it is the copy of.
        images: to train and to validate on, in Ray's object store.
        resources: of each trial.
        reserve: bytes of free disk below which no trial goes on.
        interruption: says when to end before the end.
        alone: run one trial at a time, and only until one has ended.
        show: whether to print progress.

    Returns:
        ``finished``; ``interrupted``; ``lost``, if trials were lost and should be begun again; or ``alone``, if trials
        are left that were not to run beside others.

    Raises:
        DiskFullError: if the disk is full.
        AttemptError: if Ray Tune gave up.
    """
    budget = Checkpoints(run, storage, settings.keep_checkpoints)
    trials = load_trials(run)
    known = trials[~trials["trial_id"].str.startswith("pending-")]
    ended = known[known["status"].isin(ENDED)]
    unfinished = known[~known["status"].isin(ENDED)]
    left = len(trials) - len(ended)
    if not left:  # what broke the last attempt off came after the last epoch
        return "finished"
    events = EventLog(run)
    attempt = _next_attempt(storage)
    fixed = fixed_settings(settings)
    asked = {entry.key(): entry for entry in read_manifest(run).trials}
    over, waiting = set(ended["trial_id"]), set(unfinished["trial_id"])
    todo = [s.model_dump() for key, s in asked.items() if key not in over]
    there = {
        trial_id: folders for trial_id, folders in load_checkpoints(run).items() if folders and trial_id in waiting
    }
    title = f"{Path(source(run)).name}: {settings.dataset}, {len(trials)} trials, {settings.search} search"
    progress = Progress(title, len(trials), settings.max_epochs, list(settings.space))
    progress.resume(list(ended["status"]), known)
    asha = _asha(settings, run)
    guard = _Guard(run, reserve, interruption)
    recorder = _Recorder(
        events,
        progress if show else None,
        attempt,
        fixed,
        asha,
        budget,
        guard,
        settings.max_failures,
        alone,
        one_at_a_time=resources.limit == 1,
    )
    recorder.resume(unfinished, load_faults(run), there)

    # Ray Tune logs which trials failed and Optuna what it tries; the run directory says so too.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trainable = tune.with_parameters(
        run_trial,
        run=None if is_uri(storage) else str(run),
        fixed=fixed,
        images=images,
        device=settings.device,
        num_threads=resources.cpus,
        checkpoints={
            name: [f"{storage}/{folders[epoch]}" for epoch in sorted(folders, reverse=True)]
            for name, folders in there.items()
        },
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": resources.cpus, "gpu": resources.gpus}),
        param_space={} if settings.search == "optuna" else {"trial": tune.grid_search(todo)},
        tune_config=tune.TuneConfig(
            metric=OBJECTIVE,
            mode="max",
            search_alg=_optuna(settings, run, ended, unfinished, attempt) if settings.search == "optuna" else None,
            num_samples=left if settings.search == "optuna" else 1,
            scheduler=asha,
            reuse_actors=True,
            trial_dirname_creator=_FolderNames(fixed, known["trial_id"], unfinished["trial_id"]),
            max_concurrent_trials=1 if alone else resources.limit,
        ),
        run_config=tune.RunConfig(
            name=f"attempt-{attempt}",
            storage_path=f"{storage}/tune",
            verbose=0,
            stop=guard,
            callbacks=[recorder, TBXLoggerCallback()],
            failure_config=tune.FailureConfig(max_failures=settings.max_failures),
        ),
    )
    outcome = "interrupted"
    try:
        events.append("attempt_started", attempt=attempt, pid=os.getpid(), host=socket.gethostname())
        with progress if show else contextlib.nullcontext(), _ray_tune_settings():
            interruption.heeded = True
            tuner.fit()
        all_over = load_trials(run)["status"].isin(ENDED).all()
        if not all_over and guard.is_full:
            outcome = "disk full"
            raise _disk_full(run, recorder.disk_error)
        if all_over:
            outcome = "finished"
        elif not interruption.asked:
            outcome = "alone" if alone else "lost"
    except DiskFullError:
        raise
    except Exception as error:  # TuneError, a full disk, a worker killed for memory: whatever ends fit()
        if interruption.asked:
            return outcome
        outcome = f"error: {_in_short(error)}"
        if _is_disk_full(error):
            raise _disk_full(run, _in_short(error)) from error
        if isinstance(error.__cause__, RayError):
            recorder.worker_died(error.__cause__)
        raise AttemptError(_in_short(error)) from error
    finally:
        interruption.heeded = False
        with contextlib.suppress(OSError):  # a full disk says so already
            events.append("attempt_ended", attempt=attempt, reason=outcome)
    return outcome


def _next_attempt(storage: RunPath) -> int:
    """Return a number that no attempt has yet, also if one left its folder but no line in the log."""
    system, base = open_storage(storage)
    names = [info.base_name for info in system.get_file_info(fs.FileSelector(f"{base}/tune", allow_not_found=True))]
    return 1 + max((int(name.removeprefix("attempt-")) for name in names if name.startswith("attempt-")), default=0)


@contextlib.contextmanager
def _ray_tune_settings() -> Iterator[None]:
    """Spare what would repeat the event log: JSON and CSV files, and snapshots, which grow with every trial."""
    settings = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": "86400",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would stay in place afterwards
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def _settings_of(trial: Trial, fixed: dict[str, Any]) -> TrialSettings:
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


def _in_short(error: BaseException) -> str:
    """Return one line of an error: the last where there is a traceback before it, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    has_traceback = isinstance(error, RayTaskError) or any(line.startswith("Traceback") for line in lines)
    return lines[-1 if has_traceback else 0][:1000]


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        for number in (errno.ENOSPC, errno.EDQUOT):
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return True
        error = error.__cause__ or error.__context__
    return False


def _disk_full(run: Path, error: str) -> DiskFullError:
    why = error or f"{as_text(free_bytes(run))} free"
    return DiskFullError(
        f"{source(run)}: the disk is full ({why}); every finished epoch is kept: "
        f"make room and go on by python -m study resume {source(run)}"
    )


class _Guard(tune.Stopper):
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


class _Recorder(tune.Callback):
    """Writes what happens into the event log, shows it, and lets the checkpoints of beaten trials go."""

    def __init__(
        self,
        events: EventLog,
        progress: Progress | None,
        attempt: int,
        fixed: dict[str, Any],
        asha: RecordingASHA | None,
        budget: Checkpoints,
        guard: _Guard,
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
        name, settings = trial_name(trial), _settings_of(trial, self._fixed).model_dump()
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
        name, text, own = trial_name(trial), _in_short(error), _is_own(error)
        self._running.pop(name, None)
        if _is_disk_full(error):
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
            settings = _settings_of(trial, self._fixed).model_dump()
            self._budget.trial_ended(name, settings, status, val_accuracy, checkpoint)
            if self._progress:
                self._progress.trial_ended(name, status)

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles its callbacks into the experiment; a terminal and a scheduler's lock cannot be.
        return {"_attempt": self._attempt}


class _FolderNames:
    """Names a trial's folder by the key of its settings; settings that were tried before get a number.

    Args:
        fixed: the hyperparameters that do not vary.
        known: the trials of earlier attempts.
        unfinished: those of them that are to be gone on with; each is claimed once.
    """

    def __init__(self, fixed: dict[str, Any], known: Iterable[str], unfinished: Iterable[str]) -> None:
        self._fixed = fixed
        self._taken = set(known) - set(unfinished)

    def __call__(self, trial: Trial) -> str:
        key = _settings_of(trial, self._fixed).key()
        names = (key if i == 1 else f"{key}-{i}" for i in itertools.count(1))
        free = next(name for name in names if name not in self._taken)
        self._taken.add(free)
        return free


def _asha(settings: StudySettings, run: Path) -> RecordingASHA | None:
    if settings.early_stopping == "none":
        return None
    history: dict[str, dict[float, float]] = {}
    for row in load_decisions(run).to_dict("records"):
        history.setdefault(row["trial_id"], {})[row["rung"]] = row["value"]
    return RecordingASHA(
        max_epochs=settings.max_epochs,
        grace_period=settings.grace_period,
        reduction_factor=settings.reduction_factor,
        history=history,
    )


def _optuna(
    settings: StudySettings, run: Path, ended: pd.DataFrame, unfinished: pd.DataFrame, attempt: int
) -> Searcher:
    """Return Optuna's TPE, told of the trials that ended and asked to go on first with those that did not."""
    names = list(settings.space)
    points = [{f"trial/{name}": row[name] for name in names} for _, row in unfinished.iterrows()]
    searcher = OptunaSearch(
        space={f"trial/{name}": dist for name, dist in optuna_space(settings).items()},
        metric=OBJECTIVE,
        mode="max",
        points_to_evaluate=points or None,
        # With the seed of the attempt before, it would suggest the same settings again.
        seed=settings.seed + attempt - 1,
    )
    # As Ray Tune tells it: the last epoch's, 0 of a trial that diverged, and nothing of one that failed.
    last = load_epochs(run).groupby("trial_id")["val_accuracy"].last(skipna=False).fillna(0.0)
    for _, row in ended[ended["trial_id"].isin(last.index) & (ended["status"] != "failed")].iterrows():
        searcher.add_evaluated_point({f"trial/{name}": row[name] for name in names}, last[row["trial_id"]])
    return searcher
