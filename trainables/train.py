"""The training loop: an iterator that yields after each epoch, and knows nothing of Ray.

from trainables import TrialSettings, load_data, split_validation, save_checkpoint, train

train_data, val_data = split_validation(load_data("shapes100", "train", size=5000), 0.1, seed=0)
for metrics, state in train(TrialSettings(width=16, max_epochs=5), train_data, val_data):
    print(metrics.epoch, metrics.val_accuracy)
save_checkpoint("my-checkpoint", state)
"""

import contextlib
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.augment import augment, draw
from trainables.data import ImageData, stratified_split
from trainables.errors import UserError
from trainables.optim import lr_at, make_optimizer
from trainables.resnet import ResNet18
from trainables.settings import Precision, TrialSettings

EVAL_BATCH_SIZE = 500


class DeviceError(UserError):
    """A device was asked for that this machine does not have."""


class SettingsMismatchError(UserError):
    """A training state should go on with other settings than its own."""


@dataclass(frozen=True)
class EpochMetrics:
    """What one epoch of training gave. Accuracies are fractions in [0, 1], losses mean cross-entropies in nats.

    Attributes:
        epoch: epochs done, from 1.
        lr: learning rate of the last step.
        train_loss: mean over the epoch's images as they were trained on: augmented, in train mode, before each step.
        train_accuracy: likewise.
        val_loss: mean over the validation images, after the epoch, in eval mode. NaN if the trial diverged.
        val_accuracy: likewise.
        epoch_seconds: wall-clock time of training and validation.
        images_per_second: training images over the time of training alone.
        diverged: the loss became NaN or infinite; the trial ends with this epoch.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    epoch_seconds: float
    images_per_second: float
    diverged: bool = False


@dataclass
class TrainingState:
    """A network in training, and all that going on from here depends on."""

    settings: TrialSettings
    class_names: tuple[str, ...]
    model: ResNet18
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    metrics: EpochMetrics | None = None


def resolve_device(device: str = "auto") -> torch.device:
    """Return the device of a name; ``auto`` is CUDA, else Apple's MPS, else the CPU.

    Raises:
        DeviceError: if the machine does not have the device that was asked for.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"device {device!r}: not a device; allowed are auto, cpu, cuda, cuda:N, mps") from error
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (resolved.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(resolved.type, False):
        raise DeviceError(f"device {device!r}: this machine has none; use device=auto or device=cpu")
    return resolved


def split_validation(data: ImageData, fraction: float, seed: int) -> tuple[ImageData, ImageData]:
    """Hold out a stratified, seeded ``fraction`` of the training images for validation."""
    train_indices, val_indices = stratified_split(data.labels, fraction, seed)
    return data.subset(train_indices), data.subset(val_indices)


def autocast(device: torch.device, precision: Precision = "auto") -> contextlib.AbstractContextManager[object]:
    """Return the context that runs convolutions and matrix products in the precision of a trial.

    ``auto`` is bf16 where the hardware multiplies bf16 (CUDA from Ampere on; CPUs with AVX512-BF16 or AMX), else fp32.
    """
    if precision == "auto":
        precision = "bf16" if _multiplies_bf16(device) else "fp32"
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the layout in which convolutions are fast: channels_last, but not on MPS."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # The public torch.cpu.get_capabilities() is newer than the oldest torch that is supported.
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def new_state(settings: TrialSettings, data: ImageData, device: torch.device) -> TrainingState:
    """Return an untrained network and its optimizer; initialization depends on ``settings.seed`` alone."""
    mean, std = data.channel_statistics() if settings.normalize else ((0.0,) * 3, (1.0,) * 3)
    torch.manual_seed(settings.seed)
    model = ResNet18(len(data.class_names), settings.width, settings.dropout, mean, std)
    model = model.to(device, memory_format=memory_format(device))  # type: ignore[call-overload]
    return TrainingState(settings, data.class_names, model, make_optimizer(model, settings))


def to_input(images: Tensor) -> Tensor:
    """Return uint8 images (N, H, W, 3) as floats (N, 3, H, W) in [0, 1], without moving memory: channels_last."""
    return images.permute(0, 3, 1, 2).float().div_(255)


def to_tensors(data: ImageData, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return images (N, H, W, 3) uint8 and labels (N,) int64 on a device, sharing memory where they can."""
    with warnings.catch_warnings():
        # Arrays out of Ray's object store are read-only; nothing here writes to them.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(data.images).to(device), torch.from_numpy(data.labels).to(device)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, images: Tensor, labels: Tensor, precision: Precision = "auto"
) -> tuple[float, float]:
    """Return mean cross-entropy (nats) and accuracy (fraction) of a model in eval mode; its mode is left as it was.

    Args:
        model: gives logits (N, C) of floats (N, 3, H, W) in [0, 1].
        images: (N, H, W, 3) uint8, on the model's device.
        labels: (N,) int64, on the model's device.
        precision: see :func:`autocast`.
    """
    was_training = model.training
    model.eval()
    loss = torch.zeros((), device=images.device)
    correct = torch.zeros((), device=images.device)
    try:
        for x, y in zip(images.split(EVAL_BATCH_SIZE), labels.split(EVAL_BATCH_SIZE), strict=True):
            with autocast(images.device, precision):
                logits = model(to_input(x))
            loss += F.cross_entropy(logits.float(), y, reduction="sum")
            correct += (logits.argmax(1) == y).sum()
    finally:
        model.train(was_training)
    return loss.item() / len(labels), correct.item() / len(labels)


def train(
    settings: TrialSettings,
    train_data: ImageData,
    val_data: ImageData,
    *,
    device: str = "auto",
    state: TrainingState | None = None,
) -> Iterator[tuple[EpochMetrics, TrainingState]]:
    """Train, yielding after each epoch its metrics and the state.

    Order of images, augmentation and dropout are functions of (seed, epoch), so a run that goes on from a loaded
    state is the run that was never interrupted. The global random state of torch is set.

    Args:
        settings: the hyperparameters.
        train_data: images to train on.
        val_data: images to validate on, of the same classes.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        state: where to go on from (see :func:`trainables.checkpoint.load_checkpoint`); a new network by default.

    Yields:
        Metrics, and the state they belong to: the same object each time, trained further by the next step. A trial
        whose loss becomes NaN or infinite yields once more with ``diverged=True`` and ends.

    Raises:
        DeviceError: if the machine does not have the device.
        SettingsMismatchError: if the state belongs to other settings.
    """
    target = resolve_device(device)
    if state and state.settings != settings:
        raise SettingsMismatchError("the state to go on from was trained with other settings; give it its own")
    state = state or new_state(settings, train_data, target)
    images, labels = to_tensors(train_data, target)
    val_images, val_labels = to_tensors(val_data, target)
    while state.epoch < settings.max_epochs and not (state.metrics and state.metrics.diverged):
        start = time.perf_counter()
        train_loss, train_accuracy, lr = _train_epoch(state, images, labels)
        train_seconds = time.perf_counter() - start
        diverged = not math.isfinite(train_loss)
        val_loss, val_accuracy = math.nan, math.nan
        if not diverged:
            val_loss, val_accuracy = evaluate(state.model, val_images, val_labels, settings.precision)
            if not math.isfinite(val_loss):
                diverged, val_accuracy = True, math.nan
        state.epoch += 1
        state.metrics = EpochMetrics(
            epoch=state.epoch,
            lr=lr,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            epoch_seconds=time.perf_counter() - start,
            images_per_second=len(labels) / train_seconds,
            diverged=diverged,
        )
        yield state.metrics, state


def _train_epoch(state: TrainingState, images: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Train one epoch; return mean loss, accuracy and the last learning rate. Ends early if the loss diverges."""
    settings, model, optimizer = state.settings, state.model, state.optimizer
    device = images.device
    # One stream for each (seed, epoch); 63 bits because torch takes signed 64-bit seeds.
    epoch_seed = int(np.random.SeedSequence([settings.seed, state.epoch]).generate_state(1, np.uint64)[0] >> 1)
    torch.manual_seed(epoch_seed)  # dropout
    generator = torch.Generator().manual_seed(epoch_seed)
    order = torch.randperm(len(labels), generator=generator).to(device)
    draws = draw(len(labels), settings.augmentation, generator).to(device)

    steps_per_epoch = math.ceil(len(labels) / settings.batch_size)
    loss_sum = torch.zeros((), device=device)
    correct = torch.zeros((), device=device)
    lr = math.nan
    model.train()
    for step in range(steps_per_epoch):
        lr = lr_at(state.epoch * steps_per_epoch + step, steps_per_epoch, settings)
        for group in optimizer.param_groups:
            group["lr"] = lr
        start, stop = step * settings.batch_size, min((step + 1) * settings.batch_size, len(labels))
        chosen = order[start:stop]
        x, y = images[chosen], labels[chosen]
        if settings.augmentation != "none":
            x = augment(x, draws.batch(start, stop))
        with autocast(device, settings.precision):
            logits = model(to_input(x))
        loss = F.cross_entropy(logits.float(), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss_sum += loss.detach() * len(y)
        correct += (logits.argmax(1) == y).sum()
        # On an accelerator this would wait for every step; there the epoch's end is soon enough.
        if device.type == "cpu" and not torch.isfinite(loss):
            break
    return loss_sum.item() / len(labels), correct.item() / len(labels), lr
