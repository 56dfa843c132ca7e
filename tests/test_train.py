"""The network, its optimizer and schedules, and the training loop: what it computes and how it goes on."""

import copy
import dataclasses
import math
import re
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainables import (
    DeviceError,
    ImageData,
    ResNet18,
    TrainingState,
    TrialSettings,
    UserError,
    autocast,
    evaluate,
    load_checkpoint,
    load_data,
    resolve_device,
    save_checkpoint,
    shapes,
    split_validation,
    to_input,
    to_tensors,
    train,
)
from trainables.optim import lr_at, make_optimizer
from trainables.train import new_state

TINY = {"width": 4, "batch_size": 16, "max_epochs": 4, "precision": "fp32"}
TIMES = ("epoch_seconds", "images_per_second")


def two_classes(n: int, seed: int = 0) -> ImageData:
    """Noise in two classes, one lighter than the other."""
    labels = np.arange(n) % 2
    images = np.random.default_rng(seed).integers(0, 150, (n, 32, 32, 3)) + 100 * labels[:, None, None, None]
    return ImageData(images.astype(np.uint8), labels, ("dark", "light"))


TRAIN, VAL = two_classes(56), two_classes(24, seed=1)  # the last batch of 16 holds 8


def run(settings: TrialSettings, state: TrainingState | None = None, data: ImageData = TRAIN):
    """Train to the end on the CPU; return the metrics of all epochs without the times, and the weights."""
    metrics = []
    for epoch, reached in train(settings, data, VAL, device="cpu", state=state):
        metrics.append({k: v for k, v in dataclasses.asdict(epoch).items() if k not in TIMES})
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
    model = new_state(TrialSettings(**TINY), TRAIN, torch.device("cpu")).model
    torch.testing.assert_close(model.normalize.mean.flatten(), torch.tensor(mean))
    torch.testing.assert_close(model.normalize.std.flatten(), torch.tensor(std))
    assert mean[0] > 0.3


def test_network_without_normalization_has_mean_0_and_deviation_1():
    for _, state in train(TrialSettings(**{**TINY, "max_epochs": 1}, normalize=False), TRAIN, VAL, device="cpu"):
        assert state.model.normalize.mean.flatten().tolist() == [0, 0, 0]
        assert state.model.normalize.std.flatten().tolist() == [1, 1, 1]


def test_initialization_depends_on_the_seed_alone():
    cpu = torch.device("cpu")
    weights = [
        new_state(TrialSettings(**{**TINY, **changes}), TRAIN, cpu).model.state_dict()
        for changes in ({}, {"lr": 0.3, "augmentation": "none", "optimizer": "adam", "dropout": 0.3}, {"seed": 1})
    ]
    assert same(weights[0], weights[1])
    assert not torch.equal(weights[0]["stem.0.weight"], weights[2]["stem.0.weight"])


# ---- Optimizer and schedules

# 10 epochs of 10 steps; learning rates worked out by hand.
SCHEDULES = [
    ("constant", 0, {0: 1.0, 50: 1.0, 99: 1.0}),
    ("constant", 2, {0: 0.05, 9: 0.5, 19: 1.0, 20: 1.0, 99: 1.0}),
    ("constant", 0.5, {0: 0.2, 4: 1.0, 5: 1.0}),
    ("constant", 0.05, {0: 1.0}),  # less than a step
    ("wsd", 0, {0: 1.0, 70: 1.0, 71: 29 / 30, 85: 0.5, 99: 1 / 30}),
    ("wsd", 1, {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 70: 1.0, 91: 0.3}),
    ("wsd", 10, {0: 0.01, 69: 0.7, 85: 0.86 * 0.5, 99: 1 / 30}),
    ("cosine", 0, {0: 1.0, 25: 0.5 + 0.25 * 2**0.5, 50: 0.5, 75: 0.5 - 0.25 * 2**0.5, 99: 0.000246719818}),
    ("cosine", 2, {0: 0.05, 19: 1.0, 20: 1.0, 40: 0.5 + 0.25 * 2**0.5, 60: 0.5, 80: 0.5 - 0.25 * 2**0.5}),
    ("cosine", 10, {0: 0.01, 99: 1.0}),
]


@pytest.mark.parametrize(("schedule", "warmup", "expected"), SCHEDULES)
def test_learning_rate_is_the_one_worked_out_by_hand(schedule, warmup, expected):
    settings = TrialSettings(lr=0.4, schedule=schedule, warmup_epochs=warmup, max_epochs=10)
    for step, factor in expected.items():
        assert lr_at(step, 10, settings) == pytest.approx(0.4 * factor, rel=1e-9), step
    rates = [lr_at(step, 10, settings) for step in range(100)]
    assert min(rates) > 0
    assert max(rates) <= 0.4


def test_reported_learning_rate_is_that_of_the_last_step():
    settings = TrialSettings(**TINY, lr=0.2, schedule="cosine")
    rates = [metrics["lr"] for metrics in run(settings)[0]]
    assert rates == [lr_at(4 * epoch - 1, 4, settings) for epoch in (1, 2, 3, 4)]


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_optimizer_decays_weights_but_neither_norms_nor_biases(name, kind):
    model = ResNet18(10, 4)
    optimizer = make_optimizer(model, TrialSettings(optimizer=name, lr=0.3, weight_decay=0.01))
    assert type(optimizer) is kind
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert decay == {id(p): 0.01 if p.ndim >= 2 else 0.0 for p in model.parameters()}
    assert sum(value == 0.01 for value in decay.values()) == 21  # 20 convolutions and the head
    assert {group["lr"] for group in optimizer.param_groups} == {0.3}


def test_sgd_has_nesterov_momentum():
    for group in make_optimizer(ResNet18(2, 4), TrialSettings(optimizer="sgd")).param_groups:
        assert (group["nesterov"], group["momentum"], group["dampening"]) == (True, 0.9, 0)


def test_adam_has_its_published_betas():
    for group in make_optimizer(ResNet18(2, 4), TrialSettings(optimizer="adam")).param_groups:
        assert group["betas"] == (0.9, 0.999)
        assert not group["amsgrad"]


# ---- Training


def test_first_step_is_that_of_plain_pytorch():
    settings = TrialSettings(**{**TINY, "batch_size": 56, "max_epochs": 1}, augmentation="none", warmup_epochs=0)
    state = new_state(settings, TRAIN, torch.device("cpu"))
    model = copy.deepcopy(state.model).train()
    logits = model(torch.tensor(TRAIN.images).permute(0, 3, 1, 2) / 255)
    labels = torch.tensor(TRAIN.labels)
    loss = nn.functional.cross_entropy(logits, labels)
    loss.backward()
    ((metrics, trained),) = train(settings, TRAIN, VAL, device="cpu", state=state)
    assert metrics.train_loss == pytest.approx(loss.item(), rel=1e-4)
    assert metrics.train_accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    for before, after in zip(model.parameters(), trained.model.parameters(), strict=True):
        gradient = before.grad + (settings.weight_decay * before if before.ndim >= 2 else 0)
        # Nesterov's first step from rest: the velocity is the gradient, and it is looked ahead along once more.
        step = -settings.lr * 1.9 * gradient
        assert (after - before - step).norm() < 0.02 * step.norm()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resumed_run_is_the_uninterrupted_one(optimizer, tmp_path):
    settings = TrialSettings(**TINY, optimizer=optimizer, lr=0.01, dropout=0.3, augmentation="flip+crop")
    metrics, weights = run(settings)
    assert [m["epoch"] for m in metrics] == [1, 2, 3, 4]
    for reached, state in train(settings, TRAIN, VAL, device="cpu"):
        if reached.epoch == 2:
            save_checkpoint(tmp_path, state)
            break
    torch.rand(7)  # whatever else happened in between
    loaded = load_checkpoint(tmp_path, "cpu")
    assert (loaded.epoch, loaded.metrics) == (2, reached)
    resumed, resumed_weights = run(settings, loaded)
    assert resumed == metrics[2:]
    assert same(resumed_weights, weights)


def test_same_seed_gives_the_same_run_and_another_seed_another():
    settings = TrialSettings(**{**TINY, "max_epochs": 2}, dropout=0.2)
    first, again, other = (run(settings.model_copy(update={"seed": seed})) for seed in (3, 3, 4))
    assert first[0] == again[0]
    assert same(first[1], again[1])
    assert first[0] != other[0]
    assert not same(first[1], other[1])


def test_every_epoch_sees_each_image_once_in_an_order_of_its_own(monkeypatch):
    module, shown = sys.modules["trainables.train"], []

    def recorded(images: Tensor) -> Tensor:
        shown.extend(image.numpy().tobytes() for image in images)
        return to_input(images)

    monkeypatch.setattr(module, "to_input", recorded)
    monkeypatch.setattr(module, "evaluate", lambda *_: (0.0, 0.0))
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
    assert math.isfinite(last.epoch_seconds)
    assert last.lr == 100


def test_diverged_trial_stays_ended_when_resumed(tmp_path):
    settings = TrialSettings(**{**TINY, "max_epochs": 50}, lr=100, schedule="constant", warmup_epochs=0)
    *_, (metrics, state) = train(settings, TRAIN, VAL, device="cpu")
    assert metrics.diverged
    save_checkpoint(tmp_path, state)
    assert list(train(settings, TRAIN, VAL, device="cpu", state=load_checkpoint(tmp_path, "cpu"))) == []


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
        loss, accuracy = evaluate(state.model, *to_tensors(VAL, torch.device("cpu")), "fp32")
        assert (metrics.val_loss, metrics.val_accuracy) == (loss, accuracy)


def test_inputs_are_scaled_to_one_and_lie_channels_last():
    images, labels = to_tensors(TRAIN, torch.device("cpu"))
    x = to_input(images[:4])
    assert x.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(x.numpy(), (TRAIN.images[:4].transpose(0, 3, 1, 2) / 255).astype(np.float32))
    assert images.data_ptr() == TRAIN.images.ctypes.data
    assert labels.tolist() == TRAIN.labels.tolist()


def test_validation_is_held_out_stratified_and_seeded():
    first, val = split_validation(TRAIN, 0.25, 0)
    assert (np.bincount(first.labels).tolist(), np.bincount(val.labels).tolist()) == ([21, 21], [7, 7])
    seen = [image.tobytes() for data in (first, val) for image in data.images]
    assert sorted(seen) == sorted(image.tobytes() for image in TRAIN.images)
    assert split_validation(TRAIN, 0.25, 0)[1].fingerprint() == val.fingerprint()
    assert split_validation(TRAIN, 0.25, 1)[1].fingerprint() != val.fingerprint()


# ---- Evaluation and precision


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
    images, labels = to_tensors(VAL, torch.device("cpu"))
    assert evaluate(model, images, labels) == evaluate(model, images, labels)
    assert modes == [(False, False)] * 2
    assert all(module.training == mode for module in model.modules())
    assert same(model.state_dict(), before)
    assert torch.is_grad_enabled()


def test_evaluation_leaves_the_mode_also_after_an_error():
    model = ResNet18(2, 4).train()
    images, labels = to_tensors(VAL, torch.device("cpu"))
    with pytest.raises(RuntimeError):
        evaluate(model, images[..., :2], labels)
    assert model.training


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_the_products(precision, dtype):
    with autocast(torch.device("cpu"), precision):
        assert (torch.rand(4, 4) @ torch.rand(4, 4)).dtype == dtype
    assert (torch.rand(4, 4) @ torch.rand(4, 4)).dtype == torch.float32


@pytest.mark.parametrize("native", [True, False])
def test_automatic_precision_follows_the_hardware(native, monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native)
    with autocast(torch.device("cpu"), "auto"):
        assert torch.is_autocast_enabled("cpu") == native


def test_half_precision_trains_float_weights():
    (*_, last), weights = run(TrialSettings(**{**TINY, "precision": "bf16"}, augmentation="none"))
    assert last["val_accuracy"] > 0.9
    assert {value.dtype for value in weights.values()} == {torch.float32, torch.int64}


# ---- Devices


@pytest.fixture
def bare_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7", "mps", "meta"])
def test_absent_device_is_refused(device, bare_machine):
    with pytest.raises(DeviceError) as error:
        next(train(TrialSettings(**TINY), TRAIN, VAL, device=device))
    assert re.fullmatch(rf"device '{device}': this machine has none; use device=auto or device=cpu", str(error.value))


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "CPU!", "cuda:-1"])
def test_nonsense_device_is_refused(device, bare_machine):
    with pytest.raises(DeviceError) as error:
        resolve_device(device)
    assert f"device {device!r}: not a device; allowed are auto, cpu, cuda, cuda:N, mps" in str(error.value)
    assert "\n" not in str(error.value)


def test_automatic_device_is_the_fastest_there_is(bare_machine, monkeypatch):
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device() == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device() == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(DeviceError):
        resolve_device("cuda:2")


# ---- Documentation


def test_example_of_the_module_runs(tmp_path, monkeypatch, capsys):
    _, example = sys.modules["trainables.train"].__doc__.split("\n\n", 1)
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


def test_a_state_goes_on_with_its_own_settings_only():
    settings = TrialSettings(width=4, max_epochs=1)
    data = load_data("shapes100", "train", size=200)
    *_, (_, state) = train(settings, *split_validation(data, 0.5, 0), device="cpu")
    with pytest.raises(UserError, match="other settings"):
        next(train(settings.model_copy(update={"max_epochs": 5}), *split_validation(data, 0.5, 0), state=state))
