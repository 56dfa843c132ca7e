"""Checkpoints: what goes in comes out, and what is broken is refused in one sentence."""

import dataclasses
import itertools
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from trainables import (
    CheckpointError,
    DeviceError,
    ImageData,
    OutOfMemoryError,
    ResNet18,
    TrainingState,
    TrialSettings,
    load_checkpoint,
    load_model,
    save_checkpoint,
    train,
)
from trainables.train import new_state

SETTINGS = TrialSettings(width=4, batch_size=16, max_epochs=2, precision="fp32", dropout=0.1, lr=0.02)
OPTIMIZERS = ("sgd", "adam", "adamw", "muon")
FILES = {"checkpoint.json", "weights.pt", "training.pt"}


def two_classes(n: int) -> ImageData:
    labels = np.arange(n) % 2
    images = np.random.default_rng(0).integers(0, 150, (n, 32, 32, 3)) + 100 * labels[:, None, None, None]
    return ImageData(images.astype(np.uint8), labels, ("dark", "light"))


def trained(settings: TrialSettings = SETTINGS) -> TrainingState:
    data = two_classes(32)
    _, state = next(train(settings, data, data, device="cpu"))
    return state


@pytest.fixture(scope="module")
def state() -> TrainingState:
    return trained()


@pytest.fixture(scope="module")
def averaged() -> TrainingState:
    return trained(SETTINGS.model_copy(update={"ema_decay": 0.9}))


@pytest.fixture
def folder(state, tmp_path) -> Path:
    save_checkpoint(tmp_path / "point", state)
    return tmp_path / "point"


def assert_same(one: object, other: object) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    else:
        assert one == other


def tensors_of(content: object) -> list[torch.Tensor]:
    if isinstance(content, dict | list):
        return [
            tensor
            for part in (content.values() if isinstance(content, dict) else content)
            for tensor in tensors_of(part)
        ]
    return [content] if isinstance(content, torch.Tensor) else []


def refused(load: Callable, folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load(folder, "cpu")
    message = str(error.value)
    assert str(folder) in message
    assert message.isprintable()  # neither line breaks nor colours
    assert not re.search(r"[.!?]\s", message.replace(str(folder), "")), message
    return message


# ---- What goes in comes out


@pytest.mark.parametrize("average", [0.0, 0.9])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_checkpoint_brings_everything_back(optimizer, average, tmp_path):
    before = trained(SETTINGS.model_copy(update={"optimizer": optimizer, "ema_decay": average}))
    save_checkpoint(tmp_path / "a/b", before)
    after = load_checkpoint(str(tmp_path / "a/b"), "cpu")
    assert (after.settings, after.class_names, after.epoch) == (before.settings, ("dark", "light"), 1)
    assert after.metrics == before.metrics
    assert_same(after.model.state_dict(), before.model.state_dict())
    assert_same(after.network.state_dict(), before.network.state_dict())
    assert (after.network is after.model) == (average == 0)
    assert type(after.optimizer) is type(before.optimizer)
    assert tensors_of(after.optimizer.state_dict())
    assert_same(after.optimizer.state_dict(), before.optimizer.state_dict())
    assert after.model.dropout.p == after.network.dropout.p == 0.1
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in after.model.parameters() if p.ndim == 4)


def test_loss_scale_comes_back(tmp_path):
    before = trained(SETTINGS.model_copy(update={"precision": "fp16"}))
    before.scaler.update(4096.0)
    save_checkpoint(tmp_path, before)
    after = load_checkpoint(tmp_path, "cpu").scaler
    assert after.is_enabled()
    assert after.get_scale() == 4096
    assert after.state_dict() == before.scaler.state_dict()
    assert after.state_dict()["_growth_tracker"] > 0


@pytest.mark.parametrize(("there", "here"), [("fp32", "fp16"), ("fp16", "fp32"), ("bf16", "fp16")])
def test_checkpoint_goes_on_where_automatic_precision_is_another(there, here, tmp_path, monkeypatch):
    """From a GPU that multiplies bf16 to an older one, or back."""
    module = sys.modules["trainables.train"]
    monkeypatch.setattr(module, "resolve_precision", lambda *_: there)
    save_checkpoint(tmp_path, trained(SETTINGS.model_copy(update={"precision": "auto"})))
    monkeypatch.setattr(module, "resolve_precision", lambda *_: here)
    assert load_checkpoint(tmp_path, "cpu").scaler.is_enabled() == (here == "fp16")


def test_untrained_state_comes_back_without_metrics(tmp_path):
    save_checkpoint(tmp_path, new_state(SETTINGS, two_classes(32), torch.device("cpu")))
    after = load_checkpoint(tmp_path, "cpu")
    assert (after.epoch, after.metrics) == (0, None)


def test_metrics_of_a_diverged_trial_come_back(state, tmp_path):
    metrics = dataclasses.replace(state.metrics, train_loss=float("inf"), val_loss=float("nan"), diverged=True)
    save_checkpoint(tmp_path, dataclasses.replace(state, metrics=metrics))
    after = load_checkpoint(tmp_path, "cpu").metrics
    assert (after.train_loss, after.diverged, after.epoch) == (float("inf"), True, 1)
    assert after.val_loss != after.val_loss


def test_checkpoint_is_three_files_and_readable(folder, state):
    assert {file.name for file in folder.iterdir()} == FILES
    about = json.loads((folder / "checkpoint.json").read_text())
    assert (about["format"], about["epoch"], about["class_names"]) == (2, 1, ["dark", "light"])
    assert about["settings"] == SETTINGS.model_dump()
    assert about["metrics"]["val_accuracy"] == state.metrics.val_accuracy
    weights = torch.load(folder / "weights.pt", weights_only=True)
    assert_same(weights, dict(state.model.state_dict()))


def test_averaged_network_is_the_one_to_use_and_the_trained_one_is_kept(averaged, tmp_path):
    save_checkpoint(tmp_path, averaged)
    network, trained_on = (dict(model.state_dict()) for model in (averaged.network, averaged.model))
    assert not torch.equal(network["head.weight"], trained_on["head.weight"])
    assert_same(torch.load(tmp_path / "weights.pt", weights_only=True), network)
    assert_same(torch.load(tmp_path / "training.pt", weights_only=True)["model"], trained_on)
    assert_same(load_model(tmp_path, "cpu")[0].state_dict(), network)
    assert {file.name for file in tmp_path.iterdir()} == FILES


def test_checkpoint_replaces_an_earlier_one(folder):
    later = trained(SETTINGS.model_copy(update={"seed": 9}))
    save_checkpoint(folder, later)
    assert {file.name for file in folder.iterdir()} == FILES
    assert load_checkpoint(folder, "cpu").settings.seed == 9
    assert_same(load_checkpoint(folder, "cpu").model.state_dict(), later.model.state_dict())


def test_interrupted_first_save_leaves_no_checkpoint(state, tmp_path, monkeypatch):
    real = os.replace

    def interrupted(source, target):
        if Path(target).name == "training.pt":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, state)
    assert "no checkpoint here" in refused(load_checkpoint, tmp_path)


def test_network_alone_is_loaded_for_use(folder, state):
    model, about = load_model(folder, "cpu")
    assert not any(module.training for module in model.modules())
    assert_same(model.state_dict(), state.model.state_dict())
    assert set(about) >= {"epoch", "settings", "class_names", "metrics"}
    assert (about["epoch"], about["settings"], about["class_names"]) == (1, SETTINGS, ("dark", "light"))
    assert about["metrics"] == dataclasses.asdict(state.metrics)
    x = torch.rand(3, 3, 32, 32)
    was_training = state.model.training
    torch.testing.assert_close(model(x), state.model.eval()(x))
    state.model.train(was_training)


def test_network_alone_needs_no_optimizer(folder):
    (folder / "training.pt").unlink()
    assert load_model(folder, "cpu")[1]["epoch"] == 1
    assert "training.pt" in refused(load_checkpoint, folder)


def test_absent_device_is_refused(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for load in (load_checkpoint, load_model):
        with pytest.raises(DeviceError, match="'cuda'"):
            load(folder, "cuda")


# ---- What is broken is refused


def edit(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        about = json.loads((folder / "checkpoint.json").read_text())
        (folder / "checkpoint.json").write_text(json.dumps({**about, **changes}))

    return change


def drop(key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        about = json.loads((folder / "checkpoint.json").read_text())
        del about[key]
        (folder / "checkpoint.json").write_text(json.dumps(about))

    return change


def keep(name: str, share: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return change


def hollow(name: str) -> Callable[[Path], None]:
    """As after a power cut, when a file's length is on the disk and a part of its content is not."""

    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        middle = len(content) // 2
        content[middle : middle + 512] = bytes(512)
        (folder / name).write_bytes(content)

    return change


def content(name: str, text: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(text) and None


def holding(name: str, value: object) -> Callable[[Path], None]:
    return lambda folder: torch.save(value, folder / name)


def with_training(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        torch.save({**torch.load(folder / "training.pt", weights_only=True), **changes}, folder / "training.pt")

    return change


def without(key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        saved = torch.load(folder / "training.pt", weights_only=True)
        del saved[key]
        torch.save(saved, folder / "training.pt")

    return change


def with_settings(**changes: object) -> Callable[[Path], None]:
    return edit(settings={**SETTINGS.model_dump(), **changes})


BROKEN_FOR_BOTH = {
    "no checkpoint.json": (lambda folder: (folder / "checkpoint.json").unlink(), "checkpoint.json is missing"),
    "no folder": (shutil.rmtree, "no checkpoint here"),
    "not JSON": (content("checkpoint.json", b"{'format': 1"), "not readable as JSON"),
    "truncated JSON": (keep("checkpoint.json", 0.5), "not readable as JSON"),
    "not text": (content("checkpoint.json", b"\xff\xfe\x00"), "not readable as JSON"),
    "JSON of a list": (content("checkpoint.json", b"[1, 2]"), "format None"),
    "other format": (edit(format=1), "format 1, but this version reads format 2"),
    "no format": (drop("format"), "format None"),
    "no settings": (drop("settings"), "another version"),
    "unknown setting": (with_settings(momentum=0.8), "momentum"),
    "setting of another kind": (with_settings(resolution=32), "resolution"),
    "setting out of range": (with_settings(width=0), "width"),
    "settings of a list": (edit(settings=[]), "another version"),
    "no class names": (edit(class_names=None), "another version"),
    "epoch of a word": (edit(epoch="two"), "another version"),
    "metrics of a word": (edit(metrics="good"), "another version"),
    "no weights": (lambda folder: (folder / "weights.pt").unlink(), "weights.pt: "),
    "weights cut in half": (keep("weights.pt", 0.5), "weights.pt: truncated"),
    "weights without their end": (keep("weights.pt", 0.99), "weights.pt: truncated"),
    "weights of no bytes": (keep("weights.pt", 0), "weights.pt: truncated"),
    "weights with a hole": (hollow("weights.pt"), "weights.pt: truncated or not a checkpoint (archive/data/"),
    "weights of text": (content("weights.pt", b"these are no weights"), "weights.pt: truncated"),
    "weights of zeros": (content("weights.pt", bytes(2000)), "weights.pt: truncated"),
    "weights of another width": (with_settings(width=5), "ResNet-18, width 5, 2 classes"),
    "weights of other classes": (edit(class_names=["a", "b", "c"]), "ResNet-18, width 4, 3 classes"),
    "weights of another network": (holding("weights.pt", nn.Linear(3, 4).state_dict()), "of another network"),
    "weights of a list": (holding("weights.pt", [1, 2]), "weights.pt: "),
    "weights of numbers": (holding("weights.pt", {"head.weight": 3}), "weights.pt: "),
}
BROKEN_FOR_TRAINING = {
    "training cut in half": (keep("training.pt", 0.5), "training.pt: truncated"),
    "training without its end": (keep("training.pt", 0.99), "training.pt: truncated"),
    "training with a hole": (hollow("training.pt"), "training.pt: truncated"),
    "training of no bytes": (keep("training.pt", 0), "training.pt: truncated"),
    "training of a list": (holding("training.pt", [1, 2]), "training.pt: does not fit"),
    "training of nothing": (holding("training.pt", {}), "training.pt: does not fit"),
    "no optimizer": (without("optimizer"), "training.pt: does not fit"),
    "no loss scale": (without("scaler"), "training.pt: does not fit"),
    "optimizer of nothing": (with_training(optimizer={}), "training.pt: does not fit"),
    "optimizer of a word": (with_training(optimizer="sgd"), "training.pt: does not fit"),
    "optimizer without groups": (
        with_training(optimizer={"state": {}, "param_groups": []}),
        "training.pt: does not fit",
    ),
    "optimizer of another network": (
        with_training(optimizer=torch.optim.SGD(nn.Linear(3, 4).parameters()).state_dict()),
        "training.pt: does not fit",
    ),
    "no averaged weights": (with_settings(ema_decay=0.9), "training.pt: does not fit"),
    "unknown metric": (edit(metrics={"f1": 0.5}), "f1"),
}
BROKEN_AVERAGES = {
    "no trained weights": (without("model"), "training.pt: does not fit"),
    "trained weights of nothing": (with_training(model={}), "training.pt: does not fit"),
    "trained weights of a list": (with_training(model=[1, 2]), "training.pt: does not fit"),
    "trained weights of another width": (with_training(model=ResNet18(2, 5).state_dict()), "training.pt: does not fit"),
    "trained weights of other classes": (with_training(model=ResNet18(3, 4).state_dict()), "training.pt: does not fit"),
}


@pytest.mark.parametrize("load", [load_checkpoint, load_model])
@pytest.mark.parametrize("case", BROKEN_FOR_BOTH)
def test_broken_checkpoint_is_refused(case, load, folder):
    spoil, part = BROKEN_FOR_BOTH[case]
    spoil(folder)
    assert part in refused(load, folder)


@pytest.mark.parametrize("case", BROKEN_FOR_TRAINING)
def test_checkpoint_that_cannot_be_trained_on_is_refused(case, folder):
    spoil, part = BROKEN_FOR_TRAINING[case]
    spoil(folder)
    assert part in refused(load_checkpoint, folder)


@pytest.mark.parametrize("case", BROKEN_AVERAGES)
def test_checkpoint_whose_averages_are_broken_is_refused(case, averaged, tmp_path):
    save_checkpoint(tmp_path, averaged)
    spoil, part = BROKEN_AVERAGES[case]
    spoil(tmp_path)
    assert part in refused(load_checkpoint, tmp_path)
    assert load_model(tmp_path, "cpu")[1]["epoch"] == 1  # what is broken is not needed for that


@pytest.fixture(scope="module")
def states() -> dict[str, TrainingState]:
    return {name: trained(SETTINGS.model_copy(update={"optimizer": name})) for name in OPTIMIZERS}


@pytest.mark.parametrize(("saved", "asked"), [*itertools.permutations(OPTIMIZERS, 2)])
def test_state_of_one_optimizer_does_not_fit_another(saved, asked, states, tmp_path):
    save_checkpoint(tmp_path, states[saved])
    with_settings(optimizer=asked)(tmp_path)
    assert "training.pt: does not fit" in refused(load_checkpoint, tmp_path)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_state_of_another_width_is_refused(optimizer, states, tmp_path):
    save_checkpoint(tmp_path / "wide", trained(SETTINGS.model_copy(update={"optimizer": optimizer, "width": 5})))
    save_checkpoint(tmp_path / "point", states[optimizer])
    shutil.copy(tmp_path / "wide/training.pt", tmp_path / "point/training.pt")
    assert "training.pt: does not fit" in refused(load_checkpoint, tmp_path / "point")


@pytest.mark.parametrize("where", [(nn.Module, "to"), (torch.optim.Optimizer, "load_state_dict")])
def test_a_lack_of_memory_is_not_taken_for_a_broken_checkpoint(where, folder, monkeypatch):
    """Or else a trial would begin anew because its neighbours on the GPU need their memory just now."""

    def fail(*_: object, **more: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(*where, fail)
    with pytest.raises(OutOfMemoryError, match="batch_size 16, width 4"):
        load_checkpoint(folder, "cpu")


def test_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "point").write_text("no folder")
    refused(load_checkpoint, tmp_path / "point")


class Harmful:
    """An object whose unpickling makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["weights.pt", "training.pt"])
@pytest.mark.parametrize("packed", ["bare pickle", "torch.save", "old torch.save", "in a real checkpoint"])
def test_code_in_a_checkpoint_does_not_run(name, packed, folder, tmp_path):
    harmful, file = {"a": Harmful(tmp_path / "marker")}, folder / name
    if packed == "bare pickle":
        file.write_bytes(pickle.dumps(harmful, 2))
    elif packed == "in a real checkpoint":
        with zipfile.ZipFile(file) as archive:
            members = {member: archive.read(member) for member in archive.namelist()}
        with zipfile.ZipFile(file, "w") as archive:
            for member, data in members.items():
                archive.writestr(member, pickle.dumps(harmful, 2) if member.endswith("data.pkl") else data)
    else:
        torch.save(harmful, file, _use_new_zipfile_serialization=packed == "torch.save")
    message = refused(load_checkpoint, folder)
    assert not (tmp_path / "marker").exists()
    assert str(file) in message
    assert "False" not in message  # torch says how to run it after all: weights_only=False
    # The same file does harm where it is trusted: the marker would show.
    if packed == "bare pickle":
        pickle.loads(file.read_bytes())
        assert (tmp_path / "marker").exists()


def test_a_gpu_that_fails_condemns_no_checkpoint(tmp_path, monkeypatch):
    def fail(*_):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    _, state = next(train(SETTINGS, two_classes(32), two_classes(32), device="cpu"))
    save_checkpoint(tmp_path / "one", state)
    monkeypatch.setattr(type(state.optimizer), "load_state_dict", fail)
    with pytest.raises(torch.AcceleratorError, match="unspecified launch failure"):
        load_checkpoint(tmp_path / "one", "cpu")


@pytest.mark.parametrize("file", ["weights.pt", "training.pt", "checkpoint.json"])
def test_files_of_two_epochs_are_not_taken_for_one(file, tmp_path):
    """As after a crash between two of the files of a folder that is written again."""
    folders = tmp_path / "one", tmp_path / "two"
    for epoch, state in train(SETTINGS, two_classes(32), two_classes(32), device="cpu"):
        save_checkpoint(folders[epoch.epoch - 1], state)
        if epoch.epoch == 2:
            break
    shutil.copy(folders[1] / "training.pt", folders[0])
    if file != "training.pt":  # written in this order
        shutil.copy(folders[1] / "weights.pt", folders[0])
    if file == "checkpoint.json":
        shutil.copy(folders[1] / file, folders[0])
        assert load_checkpoint(folders[0], "cpu").epoch == 2
    else:
        with pytest.raises(CheckpointError, match="of another epoch"):
            load_checkpoint(folders[0], "cpu")
