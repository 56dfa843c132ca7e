"""The network and the training loop: what it computes, and how it goes on."""

import copy
import dataclasses
import math
import re
import sys
import textwrap

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainables import (
    ImageData,
    OutOfMemoryError,
    ResNet18,
    SettingsMismatchError,
    TrainingState,
    TrialSettings,
    UserError,
    evaluate,
    load_checkpoint,
    load_data,
    save_checkpoint,
    shapes,
    split_validation,
    to_input,
    to_tensors,
    train,
)
from trainables.data import stratified_subset
from trainables.device import memory_for
from trainables.optim import lr_at
from trainables.settings import MIN_RESOLUTION
from trainables.train import new_state

TINY = {"width": 4, "batch_size": 16, "max_epochs": 4, "precision": "fp32"}
TIMES = ("epoch_seconds", "images_per_second")
CPU = torch.device("cpu")
MODULE = sys.modules["trainables.train"]  # trainables.train is the function


def two_classes(n: int, seed: int = 0) -> ImageData:
    """Noise in two classes, one lighter than the other."""
    labels = np.arange(n) % 2
    images = np.random.default_rng(seed).integers(0, 150, (n, 32, 32, 3)) + 100 * labels[:, None, None, None]
    return ImageData(images.astype(np.uint8), labels, ("dark", "light"))


TRAIN, VAL = two_classes(56), two_classes(24, seed=1)  # the last batch of 16 holds 8


def without_times(metrics: object) -> dict[str, object]:
    return {k: v for k, v in dataclasses.asdict(metrics).items() if k not in TIMES}


def run(settings: TrialSettings, state: TrainingState | None = None, data: ImageData = TRAIN):
    """Train to the end on the CPU; return the metrics of all epochs without the times, and the weights."""
    metrics = []
    for epoch, reached in train(settings, data, VAL, device="cpu", state=state):
        metrics.append(without_times(epoch))
        state = reached
    return metrics, copy.deepcopy(state.model.state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- The network


def test_reference_network_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in ResNet18().parameters()) == 11_220_132


@pytest.mark.parametrize(("width", "classes"), [(4, 2), (8, 100)])
def test_features_and_logits_have_the_documented_shapes(width, classes):
    model = ResNet18(classes, width).eval()
    x = torch.rand(3, 3, 32, 32)
    features = model.features(x)
    assert features.shape == (3, 8 * width, 4, 4)
    assert features.min() >= 0
    assert model(x).shape == (3, classes)


@pytest.mark.parametrize("mode", [True, False])
def test_forward_is_the_head_over_pooled_features(mode):
    torch.manual_seed(0)
    model = ResNet18(10, 4, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)).train(mode)
    x = torch.rand(5, 3, 32, 32)
    expected = model.features(x).mean(dim=(2, 3)) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01


def test_dropout_stands_before_the_head_and_in_training_only():
    torch.manual_seed(0)
    model = ResNet18(10, 4, dropout=0.5).train()
    seen = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.rand(64, 3, 32, 32)
    model(x)
    pooled = model.features(x).mean(dim=(2, 3))
    dropped = seen[0] == 0
    assert 0.4 < dropped[pooled > 0].float().mean() < 0.6
    torch.testing.assert_close(seen[0], torch.where(dropped, 0, 2 * pooled), rtol=1e-4, atol=1e-5)
    model.eval()
    assert torch.equal(model(x), model(x))
    assert (seen[1] == 0).sum() == (model.features(x).mean(dim=(2, 3)) == 0).sum()


def test_network_standardizes_its_input():
    torch.manual_seed(0)
    plain, shifted = ResNet18(3, 4).eval(), ResNet18(3, 4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.2)).eval()
    weights = {name: value for name, value in plain.state_dict().items() if not name.startswith("normalize")}
    shifted.load_state_dict(weights, strict=False)
    x = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.4, 0.2]).view(3, 1, 1)
    torch.testing.assert_close(shifted(x), plain((x - mean) / std))


def test_new_network_carries_the_statistics_of_its_images():
    mean, std = TRAIN.channel_statistics()
    model = new_state(TrialSettings(**TINY), TRAIN, CPU).model
    torch.testing.assert_close(model.normalize.mean.flatten(), torch.tensor(mean))
    torch.testing.assert_close(model.normalize.std.flatten(), torch.tensor(std))
    assert mean[0] > 0.3


def test_network_without_normalization_has_mean_0_and_deviation_1():
    for _, state in train(TrialSettings(**{**TINY, "max_epochs": 1}, normalize=False), TRAIN, VAL, device="cpu"):
        assert state.model.normalize.mean.flatten().tolist() == [0, 0, 0]
        assert state.model.normalize.std.flatten().tolist() == [1, 1, 1]


def test_initialization_depends_on_the_seed_alone():
    weights = [
        new_state(TrialSettings(**{**TINY, **changes}), TRAIN, CPU).model.state_dict()
        for changes in ({}, {"lr": 0.3, "augmentation": "none", "optimizer": "adam", "dropout": 0.3}, {"seed": 1})
    ]
    assert same(weights[0], weights[1])
    assert not torch.equal(weights[0]["stem.0.weight"], weights[2]["stem.0.weight"])


# ---- Training


def test_first_step_is_that_of_plain_pytorch():
    settings = TrialSettings(**{**TINY, "batch_size": 56, "max_epochs": 1}, augmentation="none", warmup_epochs=0)
    state = new_state(settings, TRAIN, CPU)
    model = copy.deepcopy(state.model).train()
    logits = model(torch.tensor(TRAIN.images).permute(0, 3, 1, 2) / 255)
    labels = torch.tensor(TRAIN.labels)
    loss = nn.functional.cross_entropy(logits, labels)
    loss.backward()
    ((metrics, trained),) = train(settings, TRAIN, VAL, device="cpu", state=state)
    assert metrics.train_loss == pytest.approx(loss.item(), rel=1e-4)
    for before, after in zip(model.parameters(), trained.model.parameters(), strict=True):
        gradient = before.grad + (settings.weight_decay * before if before.ndim >= 2 else 0)
        # Nesterov's first step from rest: the velocity is the gradient, and it is looked ahead along once more.
        step = -settings.lr * 1.9 * gradient
        assert (after - before - step).norm() < 0.05 * step.norm()  # the images stand in another order


def test_reported_learning_rate_is_that_of_the_last_step():
    settings = TrialSettings(**TINY, lr=0.2, schedule="cosine")
    rates = [metrics["lr"] for metrics in run(settings)[0]]
    assert rates == [lr_at(4 * epoch - 1, 4, settings) for epoch in (1, 2, 3, 4)]


def test_every_epoch_sees_each_image_once_in_an_order_of_its_own(monkeypatch):
    shown = []

    def recorded(images: Tensor, resolution: int) -> Tensor:
        shown.extend(image.numpy().tobytes() for image in images)
        return to_input(images, resolution)

    monkeypatch.setattr(MODULE, "to_input", recorded)
    monkeypatch.setattr(MODULE, "evaluate", lambda *_: (0.0, 0.0))
    run(TrialSettings(**TINY, augmentation="none"))
    assert len(shown) == 4 * len(TRAIN)
    epochs = [shown[i : i + len(TRAIN)] for i in range(0, len(shown), len(TRAIN))]
    assert all(sorted(epoch) == sorted(image.tobytes() for image in TRAIN.images) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_network_put_into_eval_mode_meanwhile_is_trained_all_the_same():
    settings = TrialSettings(**{**TINY, "max_epochs": 2}, dropout=0.3)
    for _, state in train(settings, TRAIN, VAL, device="cpu"):
        state.model.eval()
    assert same(state.model.state_dict(), run(settings)[1])


def test_finished_state_is_not_trained_further():
    settings = TrialSettings(**TINY)
    *_, (_, state) = train(settings, TRAIN, VAL, device="cpu")
    before = copy.deepcopy(state.model.state_dict())
    assert list(train(settings, TRAIN, VAL, device="cpu", state=state)) == []
    assert same(state.model.state_dict(), before)


def test_network_learns_to_tell_dark_from_light():
    metrics, _ = run(TrialSettings(**TINY, augmentation="flip+crop"), data=two_classes(128))
    assert metrics[-1]["val_accuracy"] > 0.95
    assert metrics[-1]["train_accuracy"] > 0.9
    assert metrics[-1]["val_loss"] < 0.3
    assert metrics[0]["train_loss"] > metrics[-1]["train_loss"]


def test_network_learns_shapes_by_heart():
    images, labels, _ = shapes.draw_shapes(500, "train", 0)
    chosen = labels < 10  # two shapes in all patterns, five of each
    data = ImageData(images[chosen], labels[chosen] // 5, shapes.SUPERCLASS_NAMES[:2])
    settings = TrialSettings(
        **{**TINY, "width": 8, "batch_size": 10, "max_epochs": 12}, optimizer="adam", lr=0.01, augmentation="none"
    )
    *_, (metrics, _) = train(settings, data, data, device="cpu")
    assert metrics.val_accuracy > 0.9


def test_training_touches_nothing_but_its_network():
    data, val = two_classes(32), two_classes(16)
    prints = data.fingerprint(), val.fingerprint()
    for array in (data.images, data.labels, val.images, val.labels):
        array.setflags(write=False)  # as Ray hands them out
    for metrics, state in train(TrialSettings(**{**TINY, "max_epochs": 2}), data, val, device="cpu"):
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert all(p.requires_grad and p.grad is not None for p in state.model.parameters())
        assert not any(b.requires_grad or b.grad_fn for b in state.model.buffers())
        assert all(not isinstance(value, Tensor) for value in dataclasses.asdict(metrics).values())
    assert (data.fingerprint(), val.fingerprint()) == prints


def test_metrics_say_what_the_epoch_was():
    settings = TrialSettings(**TINY)
    for count, (metrics, state) in enumerate(train(settings, TRAIN, VAL, device="cpu"), 1):
        assert (metrics.epoch, state.epoch, state.metrics) == (count, count, metrics)
        assert (state.settings, state.class_names) == (settings, ("dark", "light"))
        assert 0 < len(TRAIN) / metrics.images_per_second <= metrics.epoch_seconds
        loss, accuracy = evaluate(state.model, *to_tensors(VAL, CPU), "fp32")
        assert (metrics.val_loss, metrics.val_accuracy) == (loss, accuracy)


def test_validation_is_held_out_stratified_and_seeded():
    first, val = split_validation(TRAIN, 0.25, 0)
    assert (np.bincount(first.labels).tolist(), np.bincount(val.labels).tolist()) == ([21, 21], [7, 7])
    seen = [image.tobytes() for data in (first, val) for image in data.images]
    assert sorted(seen) == sorted(image.tobytes() for image in TRAIN.images)
    assert split_validation(TRAIN, 0.25, 0)[1].fingerprint() == val.fingerprint()
    assert split_validation(TRAIN, 0.25, 1)[1].fingerprint() != val.fingerprint()


# ---- Evaluation


class MeanColour(nn.Module):
    """Logits are 10 times the mean of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return 10 * x.mean(dim=(2, 3))


@pytest.mark.parametrize("n", [1, 499, 500, 501, 1203])
def test_evaluation_is_the_mean_over_all_images(n):
    rng = np.random.default_rng(0)
    colours, labels = rng.integers(0, 256, (n, 1, 1, 3), dtype=np.uint8), rng.integers(0, 3, n)
    logits = colours[:, 0, 0] / 25.5
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    images = torch.tensor(np.tile(colours, (1, 2, 2, 1)))
    loss, accuracy = evaluate(MeanColour(), images, torch.tensor(labels), "fp32")
    assert loss == pytest.approx(-log_probabilities[np.arange(n), labels].mean(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == labels).mean(), abs=1e-9)


@pytest.mark.parametrize("mode", [True, False])
def test_evaluation_runs_in_eval_mode_and_leaves_the_mode_and_the_network(mode):
    model = ResNet18(2, 4, dropout=0.5).train(mode)
    modes = []
    model.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    before = copy.deepcopy(model.state_dict())
    images, labels = to_tensors(VAL, CPU)
    assert evaluate(model, images, labels) == evaluate(model, images, labels)
    assert modes == [(False, False)] * 2
    assert all(module.training == mode for module in model.modules())
    assert same(model.state_dict(), before)
    assert torch.is_grad_enabled()


def test_evaluation_leaves_the_mode_also_after_an_error():
    model = ResNet18(2, 4).train()
    images, labels = to_tensors(VAL, CPU)
    with pytest.raises(RuntimeError):
        evaluate(model, images[..., :2], labels)
    assert model.training


# ---- Images and targets


def test_inputs_are_scaled_to_one_and_lie_channels_last():
    images, labels = to_tensors(TRAIN, CPU)
    x = to_input(images[:4])
    assert x.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(x.numpy(), (TRAIN.images[:4].transpose(0, 3, 1, 2) / 255).astype(np.float32))
    assert images.data_ptr() == TRAIN.images.ctypes.data
    assert labels.tolist() == TRAIN.labels.tolist()


def triangle_filter(length: int, size: int) -> NDArray[np.float64]:
    """(size, length): each output as a weighted mean of inputs, the weights falling linearly over an output's width."""
    scale = length / size
    centres, places = (np.arange(size) + 0.5) * scale, np.arange(length) + 0.5
    weights = np.maximum(0, 1 - np.abs(places - centres[:, None]) / max(scale, 1))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("resolution", [8, 16, 24, 31])
def test_smaller_inputs_are_bilinear_without_aliasing(resolution):
    images = torch.tensor(TRAIN.images[:4])
    x = to_input(images, resolution)
    kernel = triangle_filter(32, resolution)
    expected = np.einsum("ah,bw,nhwc->ncab", kernel, kernel, TRAIN.images[:4] / 255)
    np.testing.assert_allclose(x.numpy(), expected, rtol=0, atol=2e-6)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert images.dtype == torch.uint8
    assert torch.equal(
        x, nn.functional.interpolate(to_input(images), (resolution,) * 2, mode="bilinear", antialias=True)
    )


@pytest.mark.parametrize("resolution", [8, 15, 24])
def test_smaller_inputs_stay_in_range_and_keep_what_is_even(resolution):
    checks = np.indices((32, 32)).sum(0)[..., None].repeat(3, 2) % 2 * 255
    images = torch.tensor(np.stack([checks, np.full_like(checks, 255), np.full_like(checks, 77)]).astype(np.uint8))
    x = to_input(images, resolution)
    assert x.min() >= 0
    assert x.max() <= 1 + 1e-6
    assert (x[1] - 1).abs().max() < 1e-6
    assert (x[2] - 77 / 255).abs().max() < 1e-6


@pytest.mark.parametrize("resolution", [None, 32])
def test_inputs_of_the_right_size_are_left_alone(resolution):
    images = torch.tensor(TRAIN.images[:4])
    assert torch.equal(to_input(images, resolution), to_input(images))


@pytest.mark.parametrize(
    ("resolution", "expected"),
    [
        ("32", [32, 32, 32]),
        ("16,32", [16, 16, 16, 32, 32]),
        ("16,24,32", [16, 24, 32]),
        ("16,24,32", [16, 16, 24, 32]),
        ("12,16,24,32", [12, 12, 16, 24, 24, 32]),
        ("32,16", [32, 16]),
    ],
)
def test_resolutions_share_the_epochs_as_worked_out_by_hand(resolution, expected):
    settings = TrialSettings(resolution=resolution, max_epochs=len(expected))
    assert [settings.resolution_at(epoch) for epoch in range(1, len(expected) + 1)] == expected


def test_each_epoch_trains_and_validates_at_its_resolution():
    settings = TrialSettings(**{**TINY, "max_epochs": 5}, resolution="12,16", cutout=8)
    state, shown = new_state(settings, TRAIN, CPU), []
    state.model.register_forward_pre_hook(lambda model, inputs: shown.append((model.training, *inputs[0].shape)))
    for metrics, reached in train(settings, TRAIN, VAL, device="cpu", state=state):
        size = 12 if metrics.epoch <= 3 else 16
        batches = [(True, n, 3, size, size) for n in (16, 16, 16, 8)]
        assert shown == [*batches, *2 * [(False, 24, 3, size, size)]]  # validation, then as many training images
        val = evaluate(reached.network, *to_tensors(VAL, CPU), "fp32", size)
        assert (metrics.val_loss, metrics.val_accuracy) == val
        shown.clear()


def test_last_batch_of_one_image_is_trained_at_the_smallest_resolution():
    settings = TrialSettings(**{**TINY, "max_epochs": 1}, resolution=str(MIN_RESOLUTION))
    (metrics,), _ = run(settings, data=two_classes(33))
    assert math.isfinite(metrics["train_loss"])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_loss_of_a_batch_is_the_one_worked_out_by_hand(smoothing):
    settings = TrialSettings(
        **{**TINY, "batch_size": 56, "max_epochs": 1}, augmentation="none", label_smoothing=smoothing
    )
    state, seen = new_state(settings, TRAIN, CPU), []
    model = copy.deepcopy(state.model).train()
    state.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    ((metrics, _),) = train(settings, TRAIN, VAL, device="cpu", state=state)

    shown = (seen[0] * 255).round().byte().permute(0, 2, 3, 1).numpy()
    known = {image.tobytes(): label for image, label in zip(TRAIN.images, TRAIN.labels, strict=True)}
    labels = np.array([known[image.tobytes()] for image in shown])
    targets = (1 - smoothing) * np.eye(2)[labels] + smoothing / 2
    logits = model(seen[0]).detach().double().numpy()
    losses = np.log(np.exp(logits).sum(1)) - (targets * logits).sum(1)
    assert metrics.train_loss == pytest.approx(losses.mean(), rel=1e-5)


def test_validation_knows_neither_smoothing_nor_augmentation():
    settings = TrialSettings(**{**TINY, "max_epochs": 1}, label_smoothing=0.3, cutout=16, dropout=0.5)
    ((metrics, state),) = train(settings, TRAIN, VAL, device="cpu")
    with torch.no_grad():
        logits = state.model.eval()(torch.tensor(VAL.images).permute(0, 3, 1, 2) / 255)
    loss = nn.functional.cross_entropy(logits, torch.tensor(VAL.labels))
    assert metrics.val_loss == pytest.approx(loss.item(), rel=1e-4)


def test_training_accuracy_is_of_unchanged_images_in_eval_mode_after_the_epoch():
    settings = TrialSettings(**{**TINY, "max_epochs": 3}, ema_decay=0.5, label_smoothing=0.3, cutout=32, dropout=0.9)
    known = TRAIN.subset(stratified_subset(TRAIN.labels, len(VAL), seed=0))
    assert len(known) == 24
    for metrics, state in train(settings, TRAIN, VAL, device="cpu"):
        assert metrics.train_accuracy == evaluate(state.network, *to_tensors(known, CPU), "fp32")[1]


def test_training_accuracy_is_of_as_many_images_as_are_validated_and_of_each_class(monkeypatch):
    shown, real = [], evaluate

    def recorded(model: nn.Module, images: Tensor, labels: Tensor, *how: object) -> tuple[float, float]:
        shown.append((images.numpy().copy(), labels.tolist()))
        return real(model, images, labels, *how)

    monkeypatch.setattr(MODULE, "evaluate", recorded)
    settings = TrialSettings(**{**TINY, "max_epochs": 2})
    of_training = {image.tobytes() for image in TRAIN.images}
    for val, expected in ((VAL, 24), (VAL.subset(np.array([0, 1])), 2), (two_classes(80, seed=1), 56)):
        shown.clear()
        list(train(settings, TRAIN, val, device="cpu"))
        assert [len(labels) for _, labels in shown] == [len(val), expected] * 2
        (images, labels), again = shown[1], shown[3]
        assert {image.tobytes() for image in images} <= of_training
        assert labels.count(0) == labels.count(1) == expected // 2
        assert np.array_equal(images, again[0])  # always the same ones


# ---- Averaged weights


def test_averaged_network_is_the_average_over_the_steps_worked_out_by_hand(monkeypatch):
    settings = TrialSettings(**{**TINY, "max_epochs": 2}, ema_decay=0.8)
    state, steps = new_state(settings, TRAIN, CPU), []
    real = state.optimizer.step

    def recorded() -> None:
        real()
        steps.append({name: value.double() for name, value in state.model.state_dict().items()})

    initial = {name: value.double() for name, value in state.model.state_dict().items()}
    monkeypatch.setattr(state.optimizer, "step", recorded)
    for metrics, _ in train(settings, TRAIN, VAL, device="cpu", state=state):
        average = initial
        for i, step in enumerate(steps):
            decay = min(0.8, (1 + i) / (10 + i))  # it hardly remembers the initialization: 0.1, 2/11, 3/12, ...
            average = {name: decay * average[name] + (1 - decay) * step[name] for name in step}
        for name, value in state.network.state_dict().items():
            if value.is_floating_point():  # weights, running statistics; not the counts of batches
                torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-6)
        val = to_tensors(VAL, CPU)
        assert evaluate(state.network, *val, "fp32") == (metrics.val_loss, metrics.val_accuracy)
        assert evaluate(state.model, *val, "fp32")[0] != metrics.val_loss
    assert len(steps) == 8


def test_averaging_leaves_the_training_as_it_is():
    settings = TrialSettings(**{**TINY, "max_epochs": 2}, dropout=0.3)
    plain, weights = run(settings)
    averaged, same_weights = run(settings.model_copy(update={"ema_decay": 0.9}))
    assert same(weights, same_weights)
    assert [m["train_loss"] for m in plain] == [m["train_loss"] for m in averaged]
    assert [m["val_loss"] for m in plain] != [m["val_loss"] for m in averaged]


def test_network_to_use_is_the_trained_one_without_averaging():
    state = new_state(TrialSettings(**TINY), TRAIN, CPU)
    assert state.average is None
    assert state.network is state.model
    averaged = new_state(TrialSettings(**TINY, ema_decay=0.9), TRAIN, CPU)
    assert averaged.network is not averaged.model
    assert isinstance(averaged.network, ResNet18)
    assert same(averaged.network.state_dict(), state.model.state_dict())


# ---- Half precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_float_weights(precision):
    (*_, last), weights = run(TrialSettings(**{**TINY, "precision": precision, "max_epochs": 3}, augmentation="none"))
    assert last["val_accuracy"] > 0.9
    assert {value.dtype for value in weights.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize(("precision", "scaled"), [("fp32", False), ("bf16", False), ("fp16", True)])
def test_losses_are_scaled_in_fp16_alone(precision, scaled):
    assert new_state(TrialSettings(**{**TINY, "precision": precision}), TRAIN, CPU).scaler.is_enabled() == scaled


def test_loss_scale_does_not_show_in_loss_or_steps():
    settings = TrialSettings(**{**TINY, "precision": "fp16", "max_epochs": 1}, augmentation="none", lr=0.01)
    runs = []
    for scale in (1.0, 1024.0):
        state = new_state(settings, TRAIN, CPU)
        state.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        runs.append(run(settings, state))
    assert runs[0][0][0]["train_loss"] == pytest.approx(runs[1][0][0]["train_loss"], rel=0.01)
    for name, value in runs[0][1].items():
        torch.testing.assert_close(value, runs[1][1][name], rtol=0.02, atol=0.01)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "muon"])
def test_step_whose_scaled_gradients_overflow_is_skipped_without_a_trace(optimizer, monkeypatch):
    settings = TrialSettings(**{**TINY, "precision": "fp16", "max_epochs": 2}, optimizer=optimizer, lr=0.01)
    state = new_state(settings, TRAIN, CPU)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = {name: value.clone() for name, value in state.model.named_parameters()}
    # Memory that nobody initialized may hold anything.
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *given, **how: empty_like(*given, **how).fill_(math.nan))
    epochs = train(settings, TRAIN, VAL, device="cpu", state=state)
    metrics, _ = next(epochs)
    assert same(dict(state.model.named_parameters()), before)
    assert state.scaler.get_scale() == 2.0**96  # halved at each of four steps
    assert not metrics.diverged
    state.scaler.update(1024.0)
    metrics, _ = next(epochs)
    assert not metrics.diverged
    assert all(p.isfinite().all() and not torch.equal(p, before[name]) for name, p in state.model.named_parameters())


# ---- Trials that fail


@pytest.mark.parametrize("width", [4, 8])
def test_diverged_trial_says_so_once_and_ends(width):
    settings = TrialSettings(
        **{**TINY, "width": width, "batch_size": 8, "max_epochs": 50}, lr=100, schedule="constant", warmup_epochs=0
    )
    metrics = [metrics for metrics, _ in train(settings, TRAIN, VAL, device="cpu")]
    assert len(metrics) < 20
    assert [m.diverged for m in metrics] == [False] * (len(metrics) - 1) + [True]
    assert [m.epoch for m in metrics] == list(range(1, len(metrics) + 1))
    assert all(math.isfinite(m.train_loss) and math.isfinite(m.val_loss) for m in metrics[:-1])
    last = metrics[-1]
    assert math.isnan(last.val_loss)
    assert math.isnan(last.val_accuracy)
    assert math.isnan(last.train_accuracy)
    assert math.isfinite(last.epoch_seconds)
    assert last.lr == 100


def test_diverged_trial_stays_ended_when_resumed(tmp_path):
    settings = TrialSettings(**{**TINY, "max_epochs": 50}, lr=100, schedule="constant", warmup_epochs=0)
    *_, (metrics, state) = train(settings, TRAIN, VAL, device="cpu")
    assert metrics.diverged
    save_checkpoint(tmp_path, state)
    assert list(train(settings, TRAIN, VAL, device="cpu", state=load_checkpoint(tmp_path, "cpu"))) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_ends_the_trial_in_the_same_step(value):
    settings = TrialSettings(**TINY, ema_decay=0.9)
    state, modes = new_state(settings, TRAIN, CPU), []

    def spoiled(model: nn.Module, _: object, logits: Tensor) -> Tensor:
        modes.append(model.training)
        return logits * value if len(modes) == 3 else logits

    state.model.register_forward_hook(spoiled)
    ((metrics, _),) = train(settings, TRAIN, VAL, device="cpu", state=state)
    assert modes == [True] * 3  # of four steps, and without validation
    assert (metrics.diverged, metrics.epoch, metrics.lr) == (True, 1, lr_at(2, 4, settings))
    assert not math.isfinite(metrics.train_loss)
    assert metrics.images_per_second * metrics.epoch_seconds == pytest.approx(3 * 16, rel=0.2)  # not of all 64
    assert math.isnan(metrics.val_loss)
    assert math.isnan(metrics.val_accuracy)
    assert math.isnan(metrics.train_accuracy)


def test_validation_that_is_not_finite_ends_the_trial():
    settings = TrialSettings(**TINY)
    state = new_state(settings, TRAIN, CPU)
    state.model.register_forward_hook(lambda model, _, logits: logits if model.training else logits * math.nan)
    ((metrics, _),) = train(settings, TRAIN, VAL, device="cpu", state=state)
    assert metrics.diverged
    assert math.isfinite(metrics.train_loss)
    assert math.isnan(metrics.val_loss)
    assert math.isnan(metrics.val_accuracy)
    assert math.isnan(metrics.train_accuracy)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "raised",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation."),
        RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError("std::bad_alloc"),
    ],
    ids=["torch's own", "CUDA", "cuBLAS", "CPU", "C++"],
)
def test_memory_that_does_not_suffice_is_told_in_one_sentence(raised, training, monkeypatch):
    real = ResNet18.forward

    def forward(self: ResNet18, x: Tensor) -> Tensor:
        if self.training == training:
            raise raised
        return real(self, x)

    monkeypatch.setattr(ResNet18, "forward", forward)
    with pytest.raises(OutOfMemoryError) as error:
        next(train(TrialSettings(**TINY), TRAIN, VAL, device="cpu"))
    message = str(error.value)
    assert re.search(r"\bcpu\b.*\bbatch_size 16\b.*\bwidth 4\b.*\bfewer trials at once\b", message)
    assert message.isprintable()
    assert not re.search(r"[.!?]\s", message)
    assert isinstance(error.value, UserError)
    assert error.value.__cause__ is raised


def test_on_a_gpu_packing_is_named_also_where_another_error_came_after():
    """As when the capture of a CUDA graph, which is broken off, fails in its turn."""

    def capture() -> None:
        with memory_for(TrialSettings(), torch.device("cuda:1")):
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                raise RuntimeError("the capture was invalidated")

    with pytest.raises(OutOfMemoryError, match=r"cuda:1 ran out .*pack fewer trials onto a GPU \(gpus_per_trial\)"):
        capture()


def test_other_errors_of_torch_are_not_taken_for_a_lack_of_memory(monkeypatch):
    def forward(self: ResNet18, x: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(ResNet18, "forward", forward)
    with pytest.raises(RuntimeError, match="cannot be multiplied") as error:
        next(train(TrialSettings(**TINY), TRAIN, VAL, device="cpu"))
    assert not isinstance(error.value, UserError)


def test_state_of_other_classes_is_refused():
    _, state = next(train(TrialSettings(**TINY), TRAIN, VAL, device="cpu"))
    renamed = dataclasses.replace(TRAIN, class_names=("light", "dark"))
    with pytest.raises(SettingsMismatchError, match="trained on other classes"):
        next(train(TrialSettings(**TINY), renamed, VAL, device="cpu", state=state))


def test_state_on_another_device_is_refused():
    settings = TrialSettings(**TINY)
    state = new_state(settings, TRAIN, torch.device("meta"))
    with pytest.raises(SettingsMismatchError, match="is not on cpu; load it there"):
        next(train(settings, TRAIN, VAL, device="cpu", state=state))


def test_logits_are_not_rounded_to_half_precision():
    """In bf16 the two best of 100 classes are often equal, and the accuracy depends on the order of the classes."""
    torch.manual_seed(0)
    model = ResNet18(100, 4).eval()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.rand(64, 3, 32, 32))
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16().float()).float().mean() > 0.9


# ---- Going on, and doing it again

# Each feature at least once, and those together that could disturb each other.
TRIALS = {
    "sgd": {},
    "adam, cosine, growing, average": {
        "optimizer": "adam",
        "schedule": "cosine",
        "resolution": "12,16,32",
        "ema_decay": 0.99,
    },
    "adamw, linear, smoothing": {
        "optimizer": "adamw",
        "schedule": "linear",
        "warmup_epochs": 1.0,
        "label_smoothing": 0.1,
    },
    "muon, flip, cutout, average": {"optimizer": "muon", "augmentation": "flip", "cutout": 8, "ema_decay": 0.9},
    "muon, growing, dropout": {"optimizer": "muon", "resolution": "12,16,24", "dropout": 0.3},
    "constant, dropout, average": {"schedule": "constant", "warmup_epochs": 0.0, "dropout": 0.5, "ema_decay": 0.5},
    "shrinking, smoothing": {"resolution": "32,16", "label_smoothing": 0.2},
    "adamw, dropout, average": {"optimizer": "adamw", "dropout": 0.1, "ema_decay": 0.8},
    "bf16, adam, cutout, plain": {
        "precision": "bf16",
        "optimizer": "adam",
        "augmentation": "none",
        "cutout": 16,
        "normalize": False,
    },
    "fp16, average": {"precision": "fp16", "ema_decay": 0.9},
    "fp16, muon": {"precision": "fp16", "optimizer": "muon"},
    "saliency, dropout": {"setup": "saliency", "dropout": 0.3},
    "random mask, growing": {"setup": "saliency_control", "resolution": "12,16"},
    "gradcam, augmented, average": {"setup": "gradcam", "augmentation": "flip+crop", "ema_decay": 0.9},
    "gradcam, bf16": {"setup": "gradcam", "precision": "bf16"},
    "saliency, fp16": {"setup": "saliency", "precision": "fp16"},
    "maps not compared": {"setup": "gradcam_control"},
    "plain": {"setup": "plain"},
}
FEW, FEWER = two_classes(12), two_classes(4, seed=1)  # of two batches of 8, the last holds 4


def trial(name: str) -> TrialSettings:
    return TrialSettings(**{**TINY, "batch_size": 8, "lr": 0.02, **TRIALS[name]})


def all_of(state: TrainingState) -> dict[str, object]:
    """All that a state is, in a copy."""
    return copy.deepcopy(
        {
            "model": state.model.state_dict(),
            "network": state.network.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "metrics": without_times(state.metrics) if state.metrics else None,
        }
    )


def assert_same(one: object, other: object, where: str = "") -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}/{i}")
    else:
        assert one == other, where


def epochs_of(settings: TrialSettings, state: TrainingState | None = None) -> list[dict[str, object]]:
    """All that the state is after each epoch of a run."""
    return [all_of(reached) for _, reached in train(settings, FEW, FEWER, device="cpu", state=state)]


@pytest.mark.parametrize("name", TRIALS)
def test_run_interrupted_after_every_epoch_is_the_uninterrupted_one(name, tmp_path):
    settings = trial(name)
    uninterrupted = [all_of(new_state(settings, FEW, CPU)), *epochs_of(settings)]
    assert len(uninterrupted) == 5
    save_checkpoint(tmp_path, new_state(settings, FEW, CPU))
    for epoch, expected in enumerate(uninterrupted):
        torch.rand(7)  # whatever else happened in between
        state = load_checkpoint(tmp_path, "cpu")
        assert state.epoch == epoch
        assert_same(all_of(state), expected)
        if epoch < 4:
            save_checkpoint(tmp_path, next(train(settings, FEW, FEWER, device="cpu", state=state))[1])


@pytest.mark.parametrize("name", ["muon, growing, dropout", "adamw, dropout, average"])
def test_run_that_goes_on_to_its_end_is_the_uninterrupted_one(name, tmp_path):
    settings = trial(name)
    uninterrupted = epochs_of(settings)
    save_checkpoint(tmp_path, next(train(settings, FEW, FEWER, device="cpu"))[1])
    assert_same(epochs_of(settings, load_checkpoint(tmp_path, "cpu")), uninterrupted[1:])


def test_trials_that_take_turns_in_a_process_are_those_that_ran_alone():
    one, other = (trial(name) for name in ("constant, dropout, average", "adamw, dropout, average"))
    alone = epochs_of(one), epochs_of(other)
    turns = [train(settings, FEW, FEWER, device="cpu") for settings in (one, other)]
    together = [(all_of(a), all_of(b)) for (_, a), (_, b) in zip(*turns, strict=True)]
    for trained, expected in zip(zip(*together, strict=True), alone, strict=True):
        assert_same(list(trained), expected)


def test_same_seed_gives_the_same_run_and_another_seed_another():
    settings = TrialSettings(**{**TINY, "max_epochs": 2}, dropout=0.2)
    first, again, other = (run(settings.model_copy(update={"seed": seed})) for seed in (3, 3, 4))
    assert first[0] == again[0]
    assert same(first[1], again[1])
    assert first[0] != other[0]
    assert not same(first[1], other[1])


def test_a_state_goes_on_with_its_own_settings_only():
    settings = TrialSettings(width=4, max_epochs=1)
    data = load_data("shapes100", "train", size=200)
    *_, (_, state) = train(settings, *split_validation(data, 0.5, 0), device="cpu")
    with pytest.raises(UserError, match="other settings"):
        next(train(settings.model_copy(update={"max_epochs": 5}), *split_validation(data, 0.5, 0), state=state))


# ---- Documentation


def test_example_of_the_module_runs(tmp_path, monkeypatch, capsys):
    _, example = MODULE.__doc__.split("\n\n", 1)
    for large, small in (("size=5000", "size=200"), ("width=16", "width=4"), ("max_epochs=5", "max_epochs=2")):
        assert large in example
        example = example.replace(large, small)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(textwrap.dedent(example), names)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [epoch for epoch, _ in printed] == ["1", "2"]
    assert all(0 <= float(accuracy) <= 1 for _, accuracy in printed)
    saved = load_checkpoint(tmp_path / "my-checkpoint")
    assert saved.epoch == 2
    assert same(saved.model.state_dict(), names["state"].model.state_dict())
