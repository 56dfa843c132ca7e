"""The training loop: an iterator that yields after each epoch, and knows nothing of Ray.

from trainables import TrialSettings, load_data, split_validation, save_checkpoint, train

train_data, val_data = split_validation(load_data("shapes100", "train", size=5000), 0.1, seed=0)
for metrics, state in train(TrialSettings(width=16, max_epochs=5), train_data, val_data):
    print(metrics.epoch, metrics.val_accuracy)
save_checkpoint("my-checkpoint", state)
"""

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trainables.augment import augment, draw
from trainables.cuda_graph import GraphedStep
from trainables.data import ImageData, stratified_split, stratified_subset
from trainables.device import (
    autocast,
    memory_for,
    place,
    resolve_device,
    resolve_precision,
)
from trainables.errors import UserError
from trainables.optim import lr_at, make_optimizer
from trainables.resnet import ResNet18
from trainables.settings import Precision, TrialSettings
from trainables.setups import LOSSES

EVAL_BATCH_SIZE = 500

Step = Callable[[Tensor, Tensor], Tensor]


class SettingsMismatchError(UserError):
    """A training state should go on with other settings than its own."""


@dataclass(frozen=True)
class EpochMetrics:
    """What one epoch of training gave. Accuracies are fractions in [0, 1], losses are in nats.

    Attributes:
        epoch: epochs done, from 1.
        lr: learning rate of the last step.
        train_loss: what was minimized, over the epoch's images as they were trained on: augmented, in train mode,
            before each step. The cross-entropy, with the label smoothing of the trial, and what its setup adds. Where
            it diverged, over the images until then.
        train_accuracy: of as many training images as there are validation images (always the same ones), as they are
            and in eval mode, after the epoch: what to compare ``val_accuracy`` with. NaN where it diverged.
        val_loss: mean cross-entropy over the validation images, after the epoch, in eval mode. NaN where it diverged.
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
    average: ResNet18 | None
    scaler: torch.amp.GradScaler
    epoch: int = 0
    metrics: EpochMetrics | None = None

    @property
    def network(self) -> ResNet18:
        """The network to validate and to use: the average of the weights where there is one."""
        return self.average or self.model


def split_validation(data: ImageData, fraction: float, seed: int) -> tuple[ImageData, ImageData]:
    """Hold out a stratified, seeded ``fraction`` of the training images for validation."""
    train_indices, val_indices = stratified_split(data.labels, fraction, seed)
    return data.subset(train_indices), data.subset(val_indices)


def new_state(settings: TrialSettings, data: ImageData, device: torch.device) -> TrainingState:
    """Return an untrained network and its optimizer; initialization depends on ``settings.seed`` alone."""
    mean, std = data.channel_statistics() if settings.normalize else ((0.0,) * 3, (1.0,) * 3)
    torch.manual_seed(settings.seed)
    model = ResNet18(len(data.class_names), settings.width, settings.dropout, mean, std)
    return make_state(settings, data.class_names, model, device)


def make_state(
    settings: TrialSettings, class_names: tuple[str, ...], model: ResNet18, device: torch.device
) -> TrainingState:
    """Return the state before the first step of a network, which is moved to the device."""
    model = place(model, device)
    average = copy.deepcopy(model) if settings.ema_decay else None
    scaler = torch.amp.GradScaler(device.type, enabled=resolve_precision(device, settings.precision) == "fp16")
    return TrainingState(settings, class_names, model, make_optimizer(model, settings), average, scaler)


def to_input(images: Tensor, resolution: int | None = None) -> Tensor:
    """Return uint8 images (N, H, W, 3) as floats (N, 3, H, W) in [0, 1], in channels_last.

    Args:
        images: the images.
        resolution: if it is not H, they are resized to so many pixels a side, bilinearly and without aliasing.
    """
    x = images.permute(0, 3, 1, 2).float().div_(255)
    if resolution in (None, x.shape[2]):
        return x
    return F.interpolate(x, size=(resolution, resolution), mode="bilinear", antialias=True)


def _index(device: torch.device) -> tuple[str, int]:
    current = torch.cuda.current_device() if device.type == "cuda" and device.index is None else 0
    return device.type, current if device.index is None else device.index


def to_tensors(data: ImageData, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return images (N, H, W, 3) uint8 and labels (N,) int64 on a device, sharing memory where they can."""
    with warnings.catch_warnings():
        # Arrays out of Ray's object store are read-only; nothing here writes to them.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(data.images).to(device), torch.from_numpy(data.labels).to(device)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, images: Tensor, labels: Tensor, precision: Precision = "auto", resolution: int | None = None
) -> tuple[float, float]:
    """Return mean cross-entropy (nats) and accuracy (fraction) of a model in eval mode; its mode is left as it was.

    Args:
        model: gives logits (N, C) of floats (N, 3, H, W) in [0, 1].
        images: (N, H, W, 3) uint8, on the model's device.
        labels: (N,) int64, on the model's device.
        precision: see :func:`autocast`.
        resolution: see :func:`to_input`.
    """
    was_training = model.training
    model.eval()
    loss = torch.zeros((), device=images.device)
    correct = torch.zeros((), device=images.device)
    try:
        for x, y in zip(images.split(EVAL_BATCH_SIZE), labels.split(EVAL_BATCH_SIZE), strict=True):
            with autocast(images.device, precision):
                logits = model(to_input(x, resolution))
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

    Order of images, augmentation and whatever else is chance are functions of (seed, epoch), so a run that goes on from
    a loaded state is the run that was never interrupted. The global random state of torch is set.

    Validation is at the resolution of the epoch.

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
        OutOfMemoryError: if the device's memory does not suffice.
        SettingsMismatchError: if the state belongs to other settings, classes or another device.
    """
    target = resolve_device(device)
    if state and state.settings != settings:
        raise SettingsMismatchError("the state to go on from was trained with other settings; give it its own")
    if state and state.class_names != train_data.class_names:
        raise SettingsMismatchError("the state to go on from was trained on other classes; give it its own images")
    if state and _index(next(state.model.parameters()).device) != _index(target):
        raise SettingsMismatchError(f"the state to go on from is not on {target}; load it there")
    with memory_for(settings, target):
        state = state or new_state(settings, train_data, target)
        images, labels = to_tensors(train_data, target)
        val_images, val_labels = to_tensors(val_data, target)
        # Of the images it is trained on, some to see how well it knows them.
        some = torch.from_numpy(stratified_subset(train_data.labels, _num_to_know(train_data, val_data), seed=0))
        known = images[some.to(target)], labels[some.to(target)]
        step = _make_step(state, target)
        while state.epoch < settings.max_epochs and not (state.metrics and state.metrics.diverged):
            start = time.perf_counter()
            train_loss, lr, seen = _train_epoch(state, images, labels, step)
            train_seconds = time.perf_counter() - start
            diverged = not math.isfinite(train_loss)
            train_accuracy = val_loss = val_accuracy = math.nan
            if not diverged:
                how = settings.precision, settings.resolution_at(state.epoch + 1)
                val_loss, val_accuracy = evaluate(state.network, val_images, val_labels, *how)
                if not math.isfinite(val_loss):
                    diverged, val_accuracy = True, math.nan
                else:
                    train_accuracy = evaluate(state.network, *known, *how)[1]
            state.epoch += 1
            state.metrics = EpochMetrics(
                epoch=state.epoch,
                lr=lr,
                train_loss=train_loss,
                train_accuracy=train_accuracy,
                val_loss=val_loss,
                val_accuracy=val_accuracy,
                epoch_seconds=time.perf_counter() - start,
                images_per_second=seen / train_seconds,
                diverged=diverged,
            )
            yield state.metrics, state


def _num_to_know(train_data: ImageData, val_data: ImageData) -> int:
    return max(len(np.unique(train_data.labels)), min(len(train_data), len(val_data)))


def _make_step(state: TrainingState, device: torch.device) -> Step:
    """Return forward and backward of a batch: inputs (N, 3, H, W), labels (N,) -> loss ()."""
    settings = state.settings

    loss_of = LOSSES[settings.setup]

    def step(x: Tensor, y: Tensor) -> Tensor:
        with autocast(device, settings.precision):
            loss = loss_of(state.model, x, y, settings.label_smoothing)
        state.scaler.scale(loss).backward()
        return loss.detach()

    return GraphedStep(step, state.model, settings.batch_size) if device.type == "cuda" else step


def _update_average(average: ResNet18, model: ResNet18, decay: float, step: int) -> None:
    """Move the average of weights and running statistics towards the model's.

    The decay rises to its value over the first steps, so that the average forgets the random weights it began with.
    """
    both = [[*network.parameters(), *network.buffers()] for network in (average, model)]
    old, new = ([tensor for tensor in tensors if tensor.is_floating_point()] for tensors in both)
    get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))(old, new, step)


def _train_epoch(state: TrainingState, images: Tensor, labels: Tensor, step: Step) -> tuple[float, float, int]:
    """Train one epoch; return the mean loss, the last learning rate, and of how many images that is.

    These are all, unless the loss diverged: then the epoch ends early. On an accelerator the host never waits for it
    before the epoch's end (but once a step in fp16 with muon, which torch's loss scaling does not know).
    """
    settings, optimizer, device = state.settings, state.optimizer, images.device
    # Two streams for each (seed, epoch); 63 bits because torch takes signed 64-bit seeds.
    seeds = np.random.SeedSequence([settings.seed, state.epoch]).generate_state(2, np.uint64) >> 1
    torch.manual_seed(int(seeds[0]))  # dropout, and what a setup leaves to chance
    generator = torch.Generator().manual_seed(int(seeds[1]))
    order = torch.randperm(len(labels), generator=generator).to(device)
    draws = draw(len(labels), images.shape[1], settings.augmentation, generator).to(device)
    resolution = settings.resolution_at(state.epoch + 1)

    steps_per_epoch = math.ceil(len(labels) / settings.batch_size)
    loss_sum, lr, stop = torch.zeros((), device=device), math.nan, 0
    state.model.train()
    for i in range(steps_per_epoch):
        lr = lr_at(state.epoch * steps_per_epoch + i, steps_per_epoch, settings)
        for group in optimizer.param_groups:
            group["lr"] = lr
        start, stop = i * settings.batch_size, min((i + 1) * settings.batch_size, len(labels))
        chosen = order[start:stop]
        x, y = images[chosen], labels[chosen]
        if settings.augmentation != "none" or settings.cutout:
            x = augment(x, draws.batch(start, stop), settings.cutout)
        optimizer.zero_grad(set_to_none=True)
        loss = step(to_input(x, resolution), y)
        state.scaler.step(optimizer)
        state.scaler.update()
        if state.average:
            _update_average(state.average, state.model, settings.ema_decay, state.epoch * steps_per_epoch + i)
        loss_sum += loss * len(y)
        # On an accelerator this would wait for every step; there the epoch's end is soon enough.
        if device.type == "cpu" and not torch.isfinite(loss):
            break
    return loss_sum.item() / stop, lr, stop
