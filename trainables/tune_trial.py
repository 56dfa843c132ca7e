"""The function that Ray Tune runs: unpack, resume, report, nothing else."""

import contextlib
import dataclasses
import math
import platform
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from trainables.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from trainables.device import resolve_device
from trainables.errors import UserError
from trainables.settings import TrialSettings
from trainables.train import train

OBJECTIVE = "objective"


class StorageError(UserError):
    """A node of the cluster does not see the run directory."""


def run_trial(
    config: dict[str, Any],
    *,
    run: str | None,
    fixed: dict[str, Any],
    images: tuple[ray.ObjectRef, ray.ObjectRef],
    device: str,
    num_threads: int,
    checkpoints: dict[str, list[str]],
) -> None:
    """Train one trial, reporting metrics and a checkpoint after each epoch.

    What is reported is :class:`trainables.train.EpochMetrics` and ``objective``: the validation accuracy, or 0 for a
    trial that diverged, so that the scheduler always compares finite numbers.

    Args:
        config: ``{"trial": hyperparameters}`` as the search gives them.
        run: the run directory; None if it lies at a URI, which all nodes see.
        fixed: the hyperparameters that do not vary.
        images: in Ray's object store, the :class:`ImageData` to train and to validate on; read in place.
        device: see :func:`trainables.device.resolve_device`.
        num_threads: CPU threads of the trial.
        checkpoints: for trials begun by an earlier attempt, paths or URIs of what to go on from, by trial id. The last
            comes first; what a crash has left unreadable is passed over, and if nothing is left the trial begins anew.

    Raises:
        StorageError: if this node does not see the run directory.
    """
    if run is not None and not Path(run, "study.yaml").exists():
        raise StorageError(f"{run}: is not shared by all nodes: {platform.node()} does not see it")
    torch.set_num_threads(num_threads)
    settings = TrialSettings(**{**fixed, **config["trial"]})
    train_data, val_data = ray.get(list(images))
    begun = Path(tune.get_context().get_trial_dir()).name
    saved = [tune.get_checkpoint(), *map(tune.Checkpoint, checkpoints.get(begun, []))]
    state = None
    for checkpoint in filter(None, saved):
        with contextlib.suppress(CheckpointError), checkpoint.as_directory() as folder:
            state = load_checkpoint(folder, device)
            break
    name = str(resolve_device(device))
    for metrics, trained in train(settings, train_data, val_data, device=device, state=state):
        report = dataclasses.asdict(metrics)
        report[OBJECTIVE] = metrics.val_accuracy if math.isfinite(metrics.val_accuracy) else 0.0
        report["device"] = torch.cuda.get_device_name() if name.startswith("cuda") else name
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(folder, trained)
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))
