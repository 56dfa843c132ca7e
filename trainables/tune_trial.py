"""The function that Ray Tune runs: unpack, resume, report, nothing else."""

import dataclasses
import math
import platform
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch
from pyarrow import fs
from ray import tune

from trainables.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from trainables.device import resolve_device
from trainables.errors import UserError
from trainables.settings import TrialSettings
from trainables.train import train

OBJECTIVE = "objective"
SHARE = "give an --out on storage that every node mounts, or a URI such as s3://bucket/runs"


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

    What is reported is :class:`trainables.train.EpochMetrics`, ``objective``: the validation accuracy, or 0 for a trial
    that diverged, so that the scheduler always compares finite numbers, and ``passed_over``: why checkpoints could not
    be used, with the first epoch after.

    Args:
        config: ``{"trial": hyperparameters}`` as the search gives them.
        run: the run directory; None if it lies at a URI, which all nodes see.
        fixed: the hyperparameters that do not vary.
        images: in Ray's object store, the :class:`ImageData` to train and to validate on; read in place.
        device: see :func:`trainables.device.resolve_device`.
        num_threads: CPU threads of the trial.
        checkpoints: for trials begun by an earlier attempt, paths or URIs of what to go on from, by trial id. The last
            comes first; what cannot be used is passed over, and if nothing is left the trial begins anew.

    Raises:
        StorageError: if this node does not see the run directory.
    """
    if run is not None and not Path(run, "study.yaml").exists():
        raise StorageError(f"{run}: is not shared by all nodes: {platform.node()} does not see it; {SHARE}")
    torch.set_num_threads(num_threads)
    settings = TrialSettings(**{**fixed, **config["trial"]})
    train_data, val_data = ray.get(list(images))
    begun = Path(tune.get_context().get_trial_dir()).name
    state, passed_over = None, []
    for checkpoint in [*_saved_here(), *map(tune.Checkpoint, checkpoints.get(begun, []))]:
        try:
            with checkpoint.as_directory() as folder:
                state = load_checkpoint(folder, device)
            break
        except CheckpointError as error:
            passed_over.append(f"{checkpoint.path}: {error}")
    name = str(resolve_device(device))
    for metrics, trained in train(settings, train_data, val_data, device=device, state=state):
        report = dataclasses.asdict(metrics)
        report[OBJECTIVE] = metrics.val_accuracy if math.isfinite(metrics.val_accuracy) else 0.0
        report["device"] = torch.cuda.get_device_name() if name.startswith("cuda") else name
        report["passed_over"], passed_over = passed_over, []
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(folder, trained)
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))


def _saved_here() -> list[tune.Checkpoint]:
    """Return the checkpoints of this attempt, the last that Ray Tune knows of first."""
    last = tune.get_checkpoint()
    if not last:
        return []
    trial, name = Path(last.path).parent, Path(last.path).name
    beside = [info.base_name for info in last.filesystem.get_file_info(fs.FileSelector(str(trial)))]
    # What is beyond it was written as the worker died: its epoch may be on no record.
    names = sorted((other for other in beside if other.startswith("checkpoint_") and other <= name), reverse=True)
    return [tune.Checkpoint(str(trial / other), last.filesystem) for other in names]
