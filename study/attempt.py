"""One attempt at a study: the trials that are left, handed to Ray Tune.

Ray Tune is given each attempt as an experiment of its own, and its restore is not used: it forgets ASHA's rungs, and
starts a fresh one-trial run where its state file is truncated. What is left to do is read from the run directory.
"""

import contextlib
import itertools
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import ray
from pyarrow import fs
from ray import tune
from ray.exceptions import RayError
from ray.tune.experiment import Trial
from ray.tune.logger import TBXLoggerCallback
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from analysis.ray_session import ClusterError
from analysis.remote import RunPath, is_uri, open_storage, source
from analysis.run_log import load_checkpoints, load_faults
from analysis.trials import ENDED, load_decisions, load_epochs, load_trials
from study.asha import RecordingASHA
from study.disk import Checkpoints, DiskFullError, free_bytes, size_text
from study.events import EventLog
from study.manifest import read_manifest
from study.progress import Progress
from study.recorder import Guard, Recorder, in_short, is_disk_full, settings_of_ray
from study.resources import Resources
from study.settings import StudySettings
from study.space import fixed_settings, optuna_space
from study.supervise import AttemptError, Interruption
from trainables.tune_trial import OBJECTIVE, run_trial


def run_attempt(
    settings: StudySettings,
    run: Path,
    storage: RunPath,
    images: tuple[ray.ObjectRef, ray.ObjectRef],
    resources: Resources,
    checkpoint: int,
    interruption: Interruption,
    alone: bool,
    show: bool,
    later: Callable[[Callable[[], None]], None],
) -> str:
    """Run the trials that have not ended.

    Args:
        settings: of the study.
        run: the run directory.
        storage: path or URI under which checkpoints are to lie; the run directory itself, or what it is the copy of.
        images: to train and to validate on, in Ray's object store.
        resources: of each trial.
        checkpoint: bytes of the disk that each of a trial's checkpoints takes.
        interruption: says when to end before the end.
        alone: run one trial at a time, and only until one has ended.
        show: whether to print progress.
        later: see :class:`study.disk.Checkpoints`.

    Returns:
        ``finished``; ``interrupted``; ``lost``, if trials were lost and should be begun again; ``searched``, if only
        confirmations are left; or ``alone``, if trials are left that were not to run beside others.

    Raises:
        DiskFullError: if the disk is full.
        ClusterError: if the nodes do not see the run directory.
        AttemptError: if Ray Tune gave up.
    """
    budget = Checkpoints(run, storage, settings.keep_checkpoints, later)
    trials = load_trials(run)
    is_over = trials["status"].isin(ENDED)
    if is_over.all():  # what broke the last attempt off came after the last epoch
        return "finished"
    # Confirmations repeat what the search found, so they come after it, are given, and are not stopped early.
    phase = "confirm" if is_over[trials["phase"] == "search"].all() else "search"
    chooses = settings.search == "optuna" and phase == "search"
    left = int((~is_over & (trials["phase"] == phase)).sum())
    known = trials[~trials["trial_id"].str.startswith("pending-")]
    ended = known[known["status"].isin(ENDED)]
    unfinished = known[~known["status"].isin(ENDED) & (known["phase"] == phase)]
    events = EventLog(run)
    attempt = _next_attempt(storage)
    fixed = fixed_settings(settings)
    manifest = read_manifest(run)
    asked = {entry.key(): entry for entry in (manifest.trials if phase == "search" else manifest.confirmations)}
    over, waiting = set(ended["trial_id"]), set(unfinished["trial_id"])
    todo = [s.model_dump() for key, s in asked.items() if key not in over]
    there = {
        trial_id: folders for trial_id, folders in load_checkpoints(run).items() if folders and trial_id in waiting
    }
    title = f"{Path(source(run)).name}: {settings.dataset}, {len(trials)} trials, {settings.search} search"
    progress = Progress(title, len(trials), settings.max_epochs, list(settings.space))
    progress.resume(list(ended["status"]), known)
    asha = _asha(settings, run) if phase == "search" and settings.early_stopping == "asha" else None
    guard = Guard(run, checkpoint, interruption)
    recorder = Recorder(
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
    recorder.resume(load_epochs(run), load_faults(run), there)

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
        param_space={} if chooses else {"trial": tune.grid_search(todo)},
        tune_config=tune.TuneConfig(
            metric=OBJECTIVE,
            mode="max",
            search_alg=_optuna(settings, run, ended[ended["phase"] == "search"], unfinished, attempt)
            if chooses
            else None,
            num_samples=left if chooses else 1,
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
        if recorder.storage_error:
            outcome = "error: storage is not shared"
            raise ClusterError(recorder.storage_error)
        now = load_trials(run)
        is_over = now["status"].isin(ENDED)
        all_over = is_over[now["phase"] == phase].all()
        if not all_over and guard.is_full:
            outcome = "disk full"
            raise _disk_full(run, recorder.disk_error)
        if is_over.all():
            outcome = "finished"
        elif all_over and not interruption.asked:
            outcome = "searched"
        elif not interruption.asked:
            outcome = "alone" if alone else "lost"
    except (DiskFullError, ClusterError):
        raise
    except Exception as error:  # TuneError, a full disk, a worker killed for memory: whatever ends fit()
        if interruption.asked:
            return outcome
        outcome = f"error: {in_short(error)}"
        if is_disk_full(error):
            raise _disk_full(run, in_short(error)) from error
        if isinstance(error.__cause__, RayError):
            recorder.worker_died(error.__cause__)
        raise AttemptError(in_short(error)) from error
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


def _disk_full(run: Path, error: str) -> DiskFullError:
    why = error or f"{size_text(free_bytes(run))} free"
    return DiskFullError(
        f"{source(run)}: the disk is full ({why}); every finished epoch is kept: "
        f"make room and go on by python -m study resume {source(run)}"
    )


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
        key = settings_of_ray(trial, self._fixed).key()
        names = (key if i == 1 else f"{key}-{i}" for i in itertools.count(1))
        free = next(name for name in names if name not in self._taken)
        self._taken.add(free)
        return free


def _asha(settings: StudySettings, run: Path) -> RecordingASHA:
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
