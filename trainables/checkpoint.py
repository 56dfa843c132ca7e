"""Checkpoints: a folder of weights, optimizer state and readable JSON, written atomically and loaded safely.

FOLDER/checkpoint.json   format, settings, class names, epoch, metrics: for people and for `load_checkpoint`
FOLDER/weights.pt        the state dict of the network to use: of the averaged one where weights are averaged
FOLDER/training.pt       what only going on with training needs: optimizer, loss scale, the weights that are trained
"""

import dataclasses
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from trainables.device import is_out_of_memory, memory_for, place, resolve_device
from trainables.errors import UserError
from trainables.resnet import ResNet18
from trainables.settings import TrialSettings
from trainables.train import EpochMetrics, TrainingState, make_state

FORMAT = 2
# Of what keeps a file from being read; anything else is a fault of the storage, and says nothing of the checkpoint.
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class CheckpointError(UserError):
    """A checkpoint that is missing, truncated, or of another network or format."""


def save_checkpoint(folder: str | Path, state: TrainingState) -> None:
    """Write a checkpoint. Each file appears whole or not at all, and checkpoint.json last.

    Args:
        folder: made if it does not exist.
        state: what :func:`trainables.train.train` yields.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    training = {"of": _nature(state), "optimizer": state.optimizer.state_dict(), "scaler": state.scaler.state_dict()}
    if state.average:
        training["model"] = state.model.state_dict()
    for name, content in (("training.pt", training), ("weights.pt", state.network.state_dict())):
        buffer = io.BytesIO()  # of a full disk, torch would not say that it is one
        torch.save(content, buffer)
        (folder / f".{name}").write_bytes(buffer.getbuffer())
        os.replace(folder / f".{name}", folder / name)
    about = {
        "format": FORMAT,
        "epoch": state.epoch,
        "settings": state.settings.model_dump(),
        "class_names": state.class_names,
        "metrics": dataclasses.asdict(state.metrics) if state.metrics else None,
    }
    (folder / ".checkpoint.json").write_text(json.dumps(about, indent=1))
    os.replace(folder / ".checkpoint.json", folder / "checkpoint.json")


def load_checkpoint(folder: str | Path, device: str = "auto") -> TrainingState:
    """Load a checkpoint for going on with training.

    Raises:
        CheckpointError: if it cannot be used; the message says why.
        OSError: if storage fails.
        DeviceError: if the machine does not have the device.
        OutOfMemoryError: if the device's memory does not suffice.
    """
    folder = Path(folder)
    about = _read_about(folder)
    settings: TrialSettings = about["settings"]
    where = resolve_device(device)
    with memory_for(settings, where):
        network, saved = _load_network(folder, about), _load_tensors(folder / "training.pt")
        state = make_state(settings, about["class_names"], network, where)
    state.epoch = about["epoch"]
    state.metrics = EpochMetrics(**about["metrics"]) if about["metrics"] else None
    try:
        if saved["of"] != _nature(state):
            raise ValueError("it is of another epoch, network or optimizer")
        with memory_for(settings, where):
            if state.average:
                state.model.load_state_dict(saved["model"])
            state.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"] and state.scaler.is_enabled():  # not where precision=auto now means another
            state.scaler.load_state_dict(saved["scaler"])
    except torch.AcceleratorError:  # a failing GPU says nothing of the checkpoint
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder / 'training.pt'}: does not fit checkpoint.json ({reason})") from error
    return state


def _nature(state: TrainingState) -> dict[str, Any]:
    """Return what the state of an optimizer belongs to. torch itself would load what fits in number only."""
    shapes = [list(parameter.shape) for parameter in state.model.parameters()]
    averaged = state.average is not None
    return {"epoch": state.epoch, "optimizer": state.settings.optimizer, "averaged": averaged, "shapes": shapes}


def load_model(folder: str | Path, device: str = "auto") -> tuple[ResNet18, dict[str, Any]]:
    """Load a checkpoint's network, in eval mode, and what checkpoint.json says.

    Returns:
        The network, and a dict with ``epoch`` (int), ``settings`` (TrialSettings), ``class_names`` (tuple of str) and
        ``metrics`` (dict or None).

    Raises:
        CheckpointError: if it cannot be used; the message says why.
        DeviceError: if the machine does not have the device.
    """
    about = _read_about(Path(folder))
    return place(_load_network(Path(folder), about), resolve_device(device)).eval(), about


def _read_about(folder: Path) -> dict[str, Any]:
    file = folder / "checkpoint.json"
    try:
        about: dict[str, Any] = json.loads(file.read_text())
    except _MISSING as error:
        raise CheckpointError(f"{folder}: no checkpoint here (checkpoint.json is missing)") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise CheckpointError(f"{file}: checkpoint format {found!r}, but this version reads format {FORMAT}")
    try:
        about["settings"] = TrialSettings(**about["settings"])
        about["class_names"] = tuple(str(name) for name in about["class_names"])
        about["epoch"] = int(about["epoch"])
        about["metrics"] = dict(about["metrics"]) if about["metrics"] else None
        if about["metrics"]:
            EpochMetrics(**about["metrics"])
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise CheckpointError(f"{file}: written by another version of this project ({reason})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: written by another version of this project ({error})") from error
    return about


def _load_tensors(file: Path) -> Any:
    try:
        content = io.BytesIO(file.read_bytes())
    except _MISSING as error:
        raise CheckpointError(f"{file}: is missing") from error
    try:
        with zipfile.ZipFile(content) as archive:
            if damaged := archive.testzip():  # which torch.load does not ask
                raise zipfile.BadZipFile(f"{damaged} is damaged")
        content.seek(0)
        return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file makes zip, pickle and torch raise nearly anything
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")
        raise CheckpointError(f"{file}: truncated or not a checkpoint ({reason})") from error


def _load_network(folder: Path, about: dict[str, Any]) -> ResNet18:
    settings: TrialSettings = about["settings"]
    model = ResNet18(len(about["class_names"]), settings.width, settings.dropout)
    try:
        model.load_state_dict(_load_tensors(folder / "weights.pt"))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / 'weights.pt'}: of another network than checkpoint.json describes "
            f"(ResNet-18, width {settings.width}, {len(about['class_names'])} classes)"
        ) from error
    return model
