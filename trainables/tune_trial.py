"""The function that Ray Tune runs: unpack, resume, report, nothing else."""

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from trainables.checkpoint import load_checkpoint, save_checkpoint
from trainables.device import resolve_device
from trainables.settings import TrialSettings
from trainables.train import train

OBJECTIVE = "objective"


def run_trial(
    config: dict[str, Any],
    *,
    fixed: dict[str, Any],
    images: tuple[ray.ObjectRef, ray.ObjectRef],
    device: str,
    num_threads: int,
    checkpoints: dict[str, str],
) -> None:
    """Train one trial, reporting metrics and a checkpoint after each epoch.

    What is reported is :class:`trainables.train.EpochMetrics` and ``objective``: the validation accuracy, or 0 for a
    trial that diverged, so that the scheduler always compares finite numbers.

    Args:
        config: ``{"trial": hyperparameters}`` as the search gives them.
        fixed: the hyperparameters that do not vary.
        images: in Ray's object store, the :class:`ImageData` to train and to validate on; read in place.
        device: see :func:`trainables.device.resolve_device`.
        num_threads: CPU threads of the trial.
        checkpoints: for trials begun by an earlier attempt, the folder to go on from, by trial id.
    """
    torch.set_num_threads(num_threads)
    settings = TrialSettings(**{**fixed, **config["trial"]})
    recovered = tune.get_checkpoint()
    begun = Path(tune.get_context().get_trial_dir()).name
    train_data, val_data = ray.get(list(images))
    state = None
    if recovered is not None:
        with recovered.as_directory() as folder:
            state = load_checkpoint(folder, device)
    elif begun in checkpoints:
        state = load_checkpoint(checkpoints[begun], device)
    name = str(resolve_device(device))
    for metrics, trained in train(settings, train_data, val_data, device=device, state=state):
        report = dataclasses.asdict(metrics)
        report[OBJECTIVE] = metrics.val_accuracy if math.isfinite(metrics.val_accuracy) else 0.0
        report["device"] = torch.cuda.get_device_name() if name.startswith("cuda") else name
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(folder, trained)
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))
