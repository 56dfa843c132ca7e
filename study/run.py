"""Run a study: make the run directory, hand the trials to Ray Tune, and go on where an earlier attempt ended.

Ray Tune is given each attempt as an experiment of its own, and its restore is not used: it forgets ASHA's rungs, and
starts a fresh one-trial run where its state file is truncated. What is left to do is read from the run directory.
"""

import contextlib
import logging
import os
import platform
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import ray
import yaml
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from analysis.trials import checkpoints_of, load_epochs, load_trials, read_study
from study.asha import RecordingASHA, trial_name
from study.events import EventLog
from study.manifest import read_manifest, write_atomically, write_manifest
from study.progress import Progress
from study.settings import StudySettings, check_settings
from study.space import fixed_settings, list_trials, optuna_space
from trainables.data import ImageData, load_data, stratified_split
from trainables.device import describe_machine, resolve_device
from trainables.errors import UserError
from trainables.settings import TrialSettings
from trainables.train import split_validation
from trainables.tune_trial import OBJECTIVE, run_trial

ENDED = ("completed", "stopped", "diverged", "failed")
PACKAGES = ("torch", "torchvision", "ray", "optuna", "pandas", "matplotlib")


class StudyError(UserError):
    """A study that cannot be started or did not come to its end; what is finished is on disk."""


def run_study(
    settings: StudySettings, run: Path, *, address: str = "local", show: bool = True, command: str = "run_study(...)"
) -> bool:
    """Run a study from its beginning.

    Args:
        settings: what to run.
        run: the run directory; made here, must not exist.
        address: ``local`` starts Ray on this machine for as long as the study runs; else a Ray cluster's address.
        show: whether to print progress.
        command: what was typed to run it, for the record.

    Returns:
        Whether all trials ended; False after an interruption.

    Raises:
        StudyError: if the directory exists or the study cannot run.
        DataError, DeviceError: if the data or the device are not there.
    """
    if run.exists():
        raise StudyError(f"{run}: exists; go on with it by python -m study resume {run}, or give another --name")
    run = run.absolute()
    data = _load(settings, address)
    trials = [] if settings.search == "optuna" else list_trials(settings)
    study = {
        "name": run.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "settings": settings.model_dump(),
        "data": _describe_data(settings, data),
        "machine": describe_machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    with _ray(address):
        resources = _resources(settings, address, len(trials) or settings.num_trials or 1)
        # Only now is it sure that the study can begin. study.yaml comes last: a directory that has it is a whole run.
        run.mkdir(parents=True)
        write_manifest(run, trials)
        write_atomically(run / "study.yaml", yaml.safe_dump(study, sort_keys=False, allow_unicode=True, width=120))
        images = _share(settings, data)
        del data  # the object store has it now: one copy
        return _attempt(settings, run, images, resources, show)


def resume_study(run: Path, *, address: str = "local", show: bool = True) -> bool:
    """Go on with a study that was interrupted. Trials that ended stay as they are; see :func:`run_study`.

    Raises:
        StudyError: if its data are not those it began with, or another process still runs it.
        RunError: if the directory is no run.
    """
    run = run.absolute()
    study = read_study(run)
    settings = check_settings(study["settings"], str(run / "study.yaml"))
    trials = load_trials(run)
    if (trials["status"] == "running").any():
        raise StudyError(f"{run}: is running now, in another process; python -m study status {run} shows it")
    data = _load(settings, address)
    now, then = _describe_data(settings, data)["fingerprint"], study["data"]["fingerprint"]
    if now != then:
        raise StudyError(f"{run}: began with other images (fingerprint {then}, now {now}); restore them to go on")
    if trials["status"].isin(ENDED).all():
        return True
    with _ray(address):
        # Of all trials, not of those that are left: sums, and so results, depend on the threads of a trial.
        resources = _resources(settings, address, len(trials))
        images = _share(settings, data)
        del data
        return _attempt(settings, run, images, resources, show)


def _load(settings: StudySettings, address: str) -> ImageData:
    if address == "local":
        resolve_device(settings.device)
    directory = Path(settings.data_dir) if settings.data_dir else None
    return load_data(settings.dataset, "train", directory, seed=settings.seed, size=settings.train_size)


def _describe_data(settings: StudySettings, data: ImageData) -> dict[str, Any]:
    num_val = len(stratified_split(data.labels, settings.val_fraction, settings.seed)[1])
    return {
        "dataset": settings.dataset,
        "fingerprint": data.fingerprint(),
        "num_train_images": len(data) - num_val,
        "num_val_images": num_val,
        "class_names": list(data.class_names),
        "superclass_names": list(data.superclass_names),
        "superclasses": list(data.superclasses),
        "has_masks": data.masks is not None,
    }


def _share(settings: StudySettings, data: ImageData) -> tuple[ray.ObjectRef, ray.ObjectRef]:
    """Put the training and the validation images where all workers of a node read the same copy."""
    train_data, val_data = split_validation(data, settings.val_fraction, settings.seed)
    return ray.put(train_data), ray.put(val_data)


@dataclass(frozen=True)
class _Resources:
    cpus: int
    gpus: float
    concurrent: int | None = None


def _resources(settings: StudySettings, address: str, num_trials: int) -> _Resources:
    """Share the machine among trials: GPUs whole, or CPU cores so that threads add up to the cores."""
    total = ray.cluster_resources()
    cpus, gpus = int(total.get("CPU", 1)), total.get("GPU", 0.0)
    # A trial runs on one node.
    largest = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=1)
    wants_gpu = settings.device.startswith("cuda") or (settings.device == "auto" and gpus > 0)
    gpus_per_trial = settings.gpus_per_trial
    if gpus_per_trial is None:
        gpus_per_trial = 1.0 if wants_gpu else 0.0
    cpus_per_trial = settings.cpus_per_trial or (
        1 if gpus_per_trial else max(1, min(largest, cpus // max(1, num_trials)))
    )
    # On a cluster that grows by itself more may come; here it cannot, and Ray Tune would wait for ever.
    if address == "local" and (cpus_per_trial > cpus or gpus_per_trial > gpus):
        raise StudyError(
            f"a trial needs {cpus_per_trial} CPUs and {gpus_per_trial:g} GPUs, but there are {cpus} and {gpus:g}; "
            "lower cpus_per_trial or gpus_per_trial"
        )
    # Ray does not know Apple's GPU: without a limit, every core would run a trial on it.
    on_mps = address == "local" and resolve_device(settings.device).type == "mps"
    return _Resources(cpus_per_trial, gpus_per_trial, 1 if on_mps else None)


@contextlib.contextmanager
def _ray(address: str) -> Iterator[None]:
    """Connect to Ray, or start it here; a session that already has one keeps it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The live view is ours; Ray Tune's own would print a header between.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise StudyError(f"Ray at {address!r} could not be reached or started: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


class _Recorder(tune.Callback):
    """Writes starts and ends of trials into the event log, and passes them to the progress view."""

    def __init__(self, events: EventLog, progress: Progress | None, attempt: int, fixed: dict[str, Any]) -> None:
        self._events, self._progress, self._attempt, self._fixed = events, progress, attempt, fixed
        self._diverged: set[str] = set()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        settings = TrialSettings(**{**self._fixed, **trial.config["trial"]}).model_dump()
        self._events.append("trial_started", trial_id=trial_name(trial), attempt=self._attempt, settings=settings)
        if self._progress:
            self._progress.trial_started(trial_name(trial), settings)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if result["diverged"]:
            self._diverged.add(trial_name(trial))
        if self._progress:
            self._progress.epoch_done(trial_name(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name = trial_name(trial)
        self._events.append("trial_ended", trial_id=name)
        done = trial.last_result.get("epoch") == self._fixed["max_epochs"]
        if self._progress:
            status = "diverged" if name in self._diverged else "completed" if done else "stopped"
            self._progress.trial_ended(name, status)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        text = Path(trial.error_file).read_text() if trial.error_file else "no error was recorded"
        self._events.append("trial_failed", trial_id=trial_name(trial), error=text.strip().splitlines()[-1][:1000])
        if self._progress:
            self._progress.trial_ended(trial_name(trial), "failed")

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles its callbacks into the experiment; a terminal cannot be.
        return {**self.__dict__, "_progress": None}


class _FolderNames:
    """Names a trial's folder by the key of its settings; settings that were tried before get a number.

    Args:
        fixed: the hyperparameters that do not vary.
        known: the trials of earlier attempts.
        unfinished: those of them that are to be gone on with; each is claimed once.
    """

    def __init__(self, fixed: dict[str, Any], known: Iterable[str], unfinished: Iterable[str]) -> None:
        self._fixed, self._unfinished = fixed, set(unfinished)
        self._taken = set(known) - self._unfinished

    def __call__(self, trial: Trial) -> str:
        key = TrialSettings(**{**self._fixed, **trial.config["trial"]}).key()
        names = [key, *(f"{key}-{i}" for i in range(2, 10_000))]
        free = [name for name in names if name not in self._taken]
        name = next((name for name in free if name in self._unfinished), free[0])
        self._taken.add(name)
        return name


def _attempt(
    settings: StudySettings,
    run: Path,
    images: tuple[ray.ObjectRef, ray.ObjectRef],
    resources: _Resources,
    show: bool,
) -> bool:
    trials = load_trials(run)
    known = trials[~trials["trial_id"].str.startswith("pending-")]
    ended = known[known["status"].isin(ENDED)]
    unfinished = known[~known["status"].isin(ENDED)]
    left = len(trials) - len(ended)
    attempt = 1 + len(list(run.glob("tune/attempt-*")))
    fixed = fixed_settings(settings)
    asked = {entry.key(): entry for entry in read_manifest(run)}
    todo = [s.model_dump() for key, s in asked.items() if key not in set(ended["trial_id"])]
    events = EventLog(run)
    title = f"{run.name}: {settings.dataset}, {len(trials)} trials, {settings.search} search"
    progress = Progress(title, len(trials), settings.max_epochs, list(settings.space))
    progress.resume(list(ended["status"]), known)
    checkpoints = {}
    for trial_id, epochs in zip(unfinished["trial_id"], unfinished["epochs"], strict=True):
        # A worker may have saved an epoch that the driver did not live to record: it is run again, not left out.
        recorded = {epoch: folder for epoch, folder in checkpoints_of(run, trial_id).items() if epoch <= epochs}
        if recorded:
            checkpoints[trial_id] = str(recorded[max(recorded)])

    # Ray Tune logs which trials failed and Optuna what it tries; the run directory says so too.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trainable = tune.with_parameters(
        run_trial,
        fixed=fixed,
        images=images,
        device=settings.device,
        num_threads=resources.cpus,
        checkpoints=checkpoints,
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": resources.cpus, "gpu": resources.gpus}),
        param_space={} if settings.search == "optuna" else {"trial": tune.grid_search(todo)},
        tune_config=tune.TuneConfig(
            metric=OBJECTIVE,
            mode="max",
            search_alg=_optuna(settings, ended, unfinished, attempt) if settings.search == "optuna" else None,
            num_samples=left if settings.search == "optuna" else 1,
            scheduler=_scheduler(settings, run, unfinished, checkpoints, events),
            reuse_actors=True,
            trial_dirname_creator=_FolderNames(fixed, known["trial_id"], unfinished["trial_id"]),
            max_concurrent_trials=resources.concurrent,
        ),
        run_config=tune.RunConfig(
            name=f"attempt-{attempt}",
            storage_path=str(run / "tune"),
            verbose=0,
            callbacks=[_Recorder(events, progress if show else None, attempt, fixed)],
            failure_config=tune.FailureConfig(max_failures=settings.max_failures),
            # The best epoch's for the report; Ray Tune always keeps the last one too, for going on.
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_score_attribute=OBJECTIVE),
        ),
    )
    events.append("attempt_started", attempt=attempt, pid=os.getpid(), host=socket.gethostname())
    reason = "error"
    try:
        with progress if show else contextlib.nullcontext():
            tuner.fit()
        over = load_trials(run)["status"].isin(ENDED).all()
        reason = "finished" if over else "interrupted"
    except Exception as error:  # TuneError, a full disk, a worker killed for memory: whatever ends fit()
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise StudyError(f"{run}: Ray Tune gave up ({first}); go on by python -m study resume {run}") from error
    finally:
        events.append("attempt_ended", attempt=attempt, reason=reason)
    return bool(over)


def _scheduler(
    settings: StudySettings, run: Path, unfinished: pd.DataFrame, checkpoints: dict[str, str], events: EventLog
) -> RecordingASHA | None:
    if settings.early_stopping == "none":
        return None
    history: dict[str, dict[int, float]] = {}
    for trial_id, rows in load_epochs(run).groupby("trial_id"):
        history[str(trial_id)] = dict(zip(rows["epoch"], rows["val_accuracy"].fillna(0.0), strict=True))
    # A trial without a checkpoint starts from its first epoch and is judged again.
    for trial_id in unfinished["trial_id"]:
        if trial_id not in checkpoints:
            history.pop(trial_id, None)
    return RecordingASHA(
        max_epochs=settings.max_epochs,
        grace_period=settings.grace_period,
        reduction_factor=settings.reduction_factor,
        events=events,
        history=history,
    )


def _optuna(settings: StudySettings, ended: pd.DataFrame, unfinished: pd.DataFrame, attempt: int) -> Searcher:
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
    for _, row in ended[ended["val_accuracy"].notna()].iterrows():
        searcher.add_evaluated_point({f"trial/{name}": row[name] for name in names}, row["val_accuracy"])
    return searcher
