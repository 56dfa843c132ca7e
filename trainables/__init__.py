"""What one trial is: its settings, data, network, optimizer, training loop and checkpoint."""

from trainables.checkpoint import CheckpointError, load_checkpoint, load_model, save_checkpoint
from trainables.data import DataError, ImageData, load_data, read_image, stratified_split, stratified_subset
from trainables.device import DeviceError, OutOfMemoryError, autocast, resolve_device, resolve_precision
from trainables.errors import UserError
from trainables.resnet import ResNet18
from trainables.settings import TrialSettings
from trainables.train import (
    EpochMetrics,
    SettingsMismatchError,
    TrainingState,
    evaluate,
    split_validation,
    to_input,
    to_tensors,
    train,
)

__all__ = [
    "CheckpointError",
    "DataError",
    "DeviceError",
    "EpochMetrics",
    "ImageData",
    "OutOfMemoryError",
    "ResNet18",
    "SettingsMismatchError",
    "TrainingState",
    "TrialSettings",
    "UserError",
    "autocast",
    "evaluate",
    "load_checkpoint",
    "load_data",
    "load_model",
    "read_image",
    "resolve_device",
    "resolve_precision",
    "save_checkpoint",
    "split_validation",
    "stratified_split",
    "stratified_subset",
    "to_input",
    "to_tensors",
    "train",
]
