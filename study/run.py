"""Run a study: make the run directory, and go on in it until every trial has ended."""

import contextlib
import itertools
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import ray
import yaml

from analysis.compare import top_configurations
from analysis.ray_session import ClusterError, ray_session
from analysis.remote import RunPath, copy_of, exists, is_held, is_uri, local_run, show_life
from analysis.run_log import open_attempt
from analysis.study_file import read_study
from analysis.trials import ENDED, load_trials, settings_of
from study.attempt import run_attempt
from study.disk import DiskFullError, checkpoint_bytes, free_bytes, immediately, needed_bytes, size_text
from study.events import EventLog
from study.manifest import (
    Manifest,
    check_resumable,
    make_manifest,
    read_manifest,
    write_atomically,
    write_manifest,
)
from study.resources import check_storage_is_shared, share_out
from study.settings import StudySettings, check_settings
from study.space import fixed_settings, list_trials
from study.supervise import Interruption, StudyError, holding, interruptible, lost_trials, supervise
from study.upload import Uploads
from trainables.data import ImageData, load_data, stratified_split
from trainables.device import DeviceError, describe_machine, resolve_device
from trainables.settings import TrialSettings
from trainables.train import split_validation

PACKAGES = ("torch", "torchvision", "ray", "optuna", "pandas", "matplotlib")


def run_study(
    settings: StudySettings, run: RunPath, *, address: str = "local", show: bool = True, command: str = "run_study(...)"
) -> bool:
    """Run a study from its beginning.

    Args:
        settings: what to run.
        run: the run directory, or a URI of any pyarrow file system (``s3://bucket/runs/NAME``); made here, must not
            exist.
        address: ``local`` starts Ray on this machine for as long as the study runs; else a Ray cluster's address.
        show: whether to print progress.
        command: what was typed to run it, for the record.

    Returns:
        Whether all trials ended; False after an interruption.

    Raises:
        StudyError: if the directory exists or attempt after attempt fails.
        ClusterError: if Ray cannot be reached, or cannot run its trials.
        DiskFullError: if the disk has not the room, or no longer.
        DataError, DeviceError: if the data or the device are not there.
    """
    folder = copy_of(str(run)) if is_uri(run) else Path(run).absolute()
    _check_is_new(run)
    with interruptible() as interruption:
        trials = [] if settings.search == "optuna" else list_trials(settings)
        loaded = [_load(settings, address)]
        study = {
            "name": Path(str(run)).name,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": command,
            "settings": {},
            "data": _describe_data(settings, loaded[0]),
            "machine": describe_machine(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        }

        def begin(resolved: StudySettings, held: contextlib.ExitStack) -> None:
            """Make the run directory and hold it. It appears whole."""
            draft = folder.with_name(f".{folder.name}.{os.getpid()}")
            try:
                _check_is_new(run)
                draft.mkdir(parents=True)
                held.enter_context(holding(draft))
                write_manifest(draft, make_manifest(resolved, trials))
                content = yaml.safe_dump(
                    study | {"settings": resolved.model_dump()}, sort_keys=False, allow_unicode=True, width=120
                )
                write_atomically(draft / "study.yaml", content)
                if is_uri(run) and not is_held(folder):
                    shutil.rmtree(folder, ignore_errors=True)  # the copy of a run that is no more
                draft.rename(folder)
                local_run(run)
                if is_uri(run):
                    show_life(folder, str(run))
            except OSError as error:
                raise StudyError(f"{run}: cannot be made ({error.strerror or error})") from error
            finally:
                shutil.rmtree(draft, ignore_errors=True)

        fingerprint = loaded[0].fingerprint()
        return _run_to_the_end(settings, folder, run, trials, loaded, fingerprint, address, show, interruption, begin)


def resume_study(run: RunPath, *, address: str = "local", show: bool = True, force: bool = False) -> bool:
    """Go on with a study that was interrupted. Trials that ended stay as they are; see :func:`run_study`.

    Args:
        run: the run directory.
        address: see :func:`run_study`.
        show: whether to print progress.
        force: go on also with code, packages or resources other than those it began with.

    Raises:
        StudyError: if its data are not those it began with, or another process still runs it.
        ManifestError: if what it was begun with has changed.
        RunError: if the directory is no run.
    """
    return _go_on(local_run(run).absolute(), run, address, show, force)


def _go_on(
    folder: Path,
    run: RunPath,
    address: str,
    show: bool,
    force: bool,
    confirmations: Callable[[pd.DataFrame], list[TrialSettings]] = lambda found: [],
) -> bool:
    """Go on with a run; ``confirmations`` says, by the trials of its search, what is to be trained besides."""
    study = read_study(folder)
    settings = check_settings(study["settings"], str(folder / "study.yaml"))
    now = _manifest_of(settings)
    with interruptible() as interruption, holding(folder):
        begun = read_manifest(folder)
        changes = check_resumable(begun, now, folder, force)
        begun = _with_confirmations(begun, folder, run, confirmations(load_trials(folder).query("phase == 'search'")))
        trials = load_trials(folder)
        lost = trials[trials["trial_id"].isin(lost_trials(folder))]
        if lost.empty and trials["status"].isin(ENDED).all():
            if is_uri(run):  # what could not be sent when it ended
                with Uploads(folder, str(run), interruption):
                    pass
            return True
        events = EventLog(folder)
        if left_open := open_attempt(folder):  # nobody runs it any more
            with contextlib.suppress(OSError):  # a disk that is full still: the attempt will say so
                events.append("attempt_ended", attempt=left_open, reason="killed")
        fingerprint = study["data"]["fingerprint"]
        try:
            loaded = [_load_again(settings, address, run, fingerprint)]
        except DeviceError as error:
            raise StudyError(
                f"{run}: began on {settings.device}, which this machine has not; go on where there is one, or write "
                "another device into its study.yaml and give --force"
            ) from error
        try:
            for row in lost.to_dict("records"):  # what took its workers away may be over
                events.append("trial_lost", trial_id=row["trial_id"], error=row["error"])
            if changes:
                events.append("changed", what=changes)
                write_manifest(folder, replace(now, confirmations=begun.confirmations))
        except OSError as error:
            raise StudyError(f"{run}: cannot be written to ({error.strerror or error})") from error
        asked = [*now.trials, *begun.confirmations]
        return _run_to_the_end(settings, folder, run, asked, loaded, fingerprint, address, show, interruption)


def confirm_study(
    run: RunPath,
    *,
    top: int = 3,
    trials: Sequence[str] = (),
    seeds: int = 5,
    address: str = "local",
    show: bool = True,
    force: bool = False,
) -> bool:
    """Train the best configurations of a study that has ended again, to their last epoch, with seeds it did not use.

    Their mean over fresh seeds is free of the winner's curse: what was the best of many was also lucky. They are trials
    of the same run, of ``phase`` ``confirm``; an interruption is gone on from by :func:`resume_study`.

    Args:
        run: the run directory, or its URI.
        top: how many configurations; the best of each recipe come first, as in the report.
        trials: ids of trials whose configurations are wanted, too, wherever they came in.
        seeds: how many fresh seeds each of them is to have. Those that it has count.
        address: see :func:`run_study`.
        show: whether to print progress.
        force: see :func:`resume_study`.

    Raises:
        StudyError: if the study has not ended, has nothing to confirm or no such trial, or another process runs it.
        DiskFullError: if the disk has not the room.
        ManifestError, RunError: see :func:`resume_study`.
    """

    def chosen(found: pd.DataFrame) -> list[TrialSettings]:
        if not found["status"].isin(ENDED).all():
            raise StudyError(f"{run}: its trials have not all ended; first: python -m study resume {run}")
        best = top_configurations(found, top)
        if best.empty:
            raise StudyError(f"{run}: no trial has a finished epoch, so there is nothing to confirm")
        if unknown := sorted(set(trials) - set(found["trial_id"])):
            raise StudyError(f"{run}: its search has no trial {unknown[0]}; python -m study status {run} lists them")
        best = pd.concat([best, found[found["trial_id"].isin(trials)]])
        used = set(found["seed"])
        fresh = list(itertools.islice((seed for seed in itertools.count() if seed not in used), seeds))
        return [settings_of(row).model_copy(update={"seed": seed}) for _, row in best.iterrows() for seed in fresh]

    return _go_on(local_run(run).absolute(), run, address, show, force, chosen)


def _with_confirmations(begun: Manifest, folder: Path, run: RunPath, asked: Sequence[TrialSettings]) -> Manifest:
    """Write into a run's manifest what is asked for and not in it yet; return that."""
    known = {trial.key() for trial in begun.confirmations}
    new = {trial.key(): trial for trial in asked if trial.key() not in known}.values()
    if new:
        num_classes = len(read_study(folder)["data"]["class_names"])
        size = max(checkpoint_bytes(trial, num_classes) for trial in new)
        _check_room(needed_bytes(size, len(new), 1, None), run if is_uri(run) else folder)
        begun = replace(begun, confirmations=(*begun.confirmations, *new))
        try:
            write_manifest(folder, begun)
        except OSError as error:
            raise StudyError(f"{run}: cannot be written to ({error.strerror or error})") from error
    return begun


def _manifest_of(settings: StudySettings) -> Manifest:
    return make_manifest(settings, [] if settings.search == "optuna" else list_trials(settings))


def _check_is_new(run: RunPath) -> None:
    """See that there is nothing yet where a study is to begin."""
    if exists(f"{run}/study.yaml" if is_uri(run) else run):
        raise StudyError(f"{run}: exists; go on with it by python -m study resume {run}, or give another --name")


def _load(settings: StudySettings, address: str) -> ImageData:
    if address == "local":
        resolve_device(settings.device)
    directory = Path(settings.data_dir) if settings.data_dir else None
    return load_data(settings.dataset, "train", directory, seed=settings.seed, size=settings.train_size)


def _load_again(settings: StudySettings, address: str, run: RunPath, fingerprint: str) -> ImageData:
    """Return the images that the study began with; among others, trials would be validated on what they have seen."""
    data = _load(settings, address)
    if (found := data.fingerprint()) != fingerprint:
        raise StudyError(
            f"{run}: began with other images (fingerprint {fingerprint}, now {found}); restore them to go on"
        )
    return data


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


def _run_to_the_end(
    settings: StudySettings,
    folder: Path,
    run: RunPath,
    trials: Sequence[TrialSettings],
    loaded: list[ImageData],
    fingerprint: str,
    address: str,
    show: bool,
    interruption: Interruption,
    begin: Callable[[StudySettings, contextlib.ExitStack], None] | None = None,
) -> bool:
    """Attempt the study until it ends; ``loaded`` holds the data, of this fingerprint, until Ray's store has them."""
    num_trials = len(trials) or settings.num_trials or 1
    storage = run if is_uri(run) else folder

    def tell(text: str) -> None:
        if show:
            print(text, flush=True)

    def attempt(alone: bool) -> str:
        nonlocal settings, begin
        data = loaded.pop() if loaded else _load_again(settings, address, run, fingerprint)
        with ray_session(address):
            # Of all trials, not of those that are left: sums, and so results, depend on the threads of a trial.
            resources = share_out(settings, address, num_trials)
            # So that it goes on with the same ones, wherever that is.
            settings = settings.model_copy(
                update={
                    "device": resources.device,
                    "cpus_per_trial": resources.cpus,
                    "gpus_per_trial": resources.gpus,
                }
            )
            size = _largest_checkpoint(settings, trials, len(data.class_names))
            if begin:
                # Only now is it sure that the study can begin.
                at_once = max(1, min(resources.concurrent, num_trials))
                needed = needed_bytes(size, num_trials, at_once, settings.keep_checkpoints)
                room = _check_room(needed, storage)
                tell(f"checkpoints will need up to {size_text(needed)} (trials at once: {at_once}); {room}")
                begin(settings, held)
                begin = None
            if not is_uri(run):
                check_storage_is_shared(folder)
            elif not uploads:
                uploads.append(Uploads(folder, str(run), interruption))
                held.enter_context(uploads[0])
            train_data, val_data = split_validation(data, settings.val_fraction, settings.seed)
            try:
                images = ray.put(train_data), ray.put(val_data)
            except ray.exceptions.RayError as error:
                raise ClusterError(f"Ray has no room for the images ({error})") from error
            del data, train_data, val_data  # the object store has them now: one copy a node
            if not resources.concurrent:
                tell(
                    f"a trial needs {resources.cpus} CPUs and {resources.gpus:g} GPUs, and no node has that now; "
                    "trials wait until the cluster gives one"
                )
            local = 0 if is_uri(run) else size
            later = uploads[0].later if uploads else immediately
            return run_attempt(settings, folder, storage, images, resources, local, interruption, alone, show, later)

    uploads: list[Uploads] = []
    with contextlib.ExitStack() as held:
        return supervise(folder, attempt, tell)


def _check_room(needed: int, storage: RunPath) -> str:
    """Return what to say of the room there is.

    Raises:
        DiskFullError: if it is not enough.
    """
    if not isinstance(storage, Path):
        return f"they go to {storage}"
    free = free_bytes(storage)
    if needed > free:
        raise DiskFullError(
            f"{storage}: the study needs up to {size_text(needed)} of disk, {size_text(free)} are free; "
            "make room, or lower keep_checkpoints"
        )
    return f"{size_text(free)} are free"


def _largest_checkpoint(settings: StudySettings, trials: Sequence[TrialSettings], num_classes: int) -> int:
    if not trials:  # a search that chooses as it goes: the largest value of what matters
        fixed = fixed_settings(settings)
        varied = {
            name: values for name, values in settings.space.items() if name in ("width", "optimizer", "ema_decay")
        }
        trials = [TrialSettings(**fixed)]
        for name, values in varied.items():
            options = values if isinstance(values, list) else [int(values.max) if name == "width" else values.max]
            trials = [t.model_copy(update={name: option}) for t in trials for option in options]
    return max(checkpoint_bytes(trial, num_classes) for trial in trials)
