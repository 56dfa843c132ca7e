"""How fast a trial trains, against the way most scripts train.

python -m benchmarks.training --data-dir DIR                     all figures that this machine can give
python -m benchmarks.training --data-dir DIR --only throughput   one of: throughput, overhead, accuracy, packing

Prints tables and merges them into benchmarks/training.cpu.json or benchmarks/training.cuda.json. Accuracies are of the
10,000 test images, which are looked at once a run, at its end, without test-time augmentation; the clock of a run goes
from before its data are loaded until its last step is taken.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import trainables.train as loop
from benchmarks.tables import save, show
from trainables import (
    ImageData,
    TrialSettings,
    evaluate,
    load_data,
    resolve_device,
    split_validation,
    to_tensors,
    train,
)
from trainables.train import new_state

# What the time-to-accuracy figures are of. Chosen on validation images; see benchmarks/recipes.py.
RECIPES = {
    "0.71": TrialSettings(
        optimizer="muon",
        lr=0.02,
        weight_decay=0.1,
        batch_size=256,
        schedule="linear",
        warmup_epochs=1.0,
        max_epochs=8,
        resolution="16,16,20,24",
        label_smoothing=0.1,
        flip="alternating",
    ),
}


class PlainImages(Dataset):
    """CIFAR images as torchvision's data sets and weiaicunzai/pytorch-cifar100 serve them: PIL, one at a time."""

    def __init__(self, data: ImageData) -> None:
        transforms = torchvision.transforms
        self._images, self._labels = data.images, data.labels
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(*data.channel_statistics()),
            ]
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._transform(Image.fromarray(self._images[index])), int(self._labels[index])


def plain_epochs(data: ImageData, batch_size: int, device: torch.device, workers: int) -> Iterator[float]:
    """Train as a plain script does, fp32 and NCHW; yield images a second of each pass over the data."""
    model = torchvision.models.resnet18(num_classes=len(data.class_names))
    model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = torch.nn.Identity()
    model = model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(PlainImages(data), batch_size, shuffle=True, num_workers=workers, drop_last=True)
    while True:
        start, count = time.perf_counter(), 0
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            loss.item()  # as such scripts do, for their progress bar
            count += len(y)
        yield count / (time.perf_counter() - start)


def our_epochs(data: ImageData, device: str, **changes: Any) -> Iterator[float]:
    """Train with this project's loop; yield images a second of each epoch."""
    settings = TrialSettings(**{"max_epochs": 1000, **changes})
    few = data.subset(np.arange(100))
    for metrics, _ in train(settings, data, few, device=device):
        yield metrics.images_per_second


def throughput(data: ImageData, device: str, rounds: int) -> list[dict[str, Any]]:
    """Both ways side by side, in turns, so that what else the machine does falls on both."""
    gpu = resolve_device(device).type == "cuda"
    images, workers = (25_600, 8) if gpu else (1_280, 0)
    part = data.subset(np.arange(images))
    ways: dict[str, Iterator[float]] = {"plain script, 32 px": plain_epochs(part, 128, resolve_device(device), workers)}
    sizes = sorted({r for recipe in RECIPES.values() for r in recipe.resolution.split(",")} | {"32"}, key=int)
    for size in sizes:
        ways[f"ours, {size} px"] = our_epochs(part, device, resolution=size)
    if gpu:
        for batch in (512, 1024):
            ways[f"ours, 32 px, batch {batch}"] = our_epochs(part, device, batch_size=batch)
    measured: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, epochs in ways.items():
            speed = next(epochs)
            if i:  # the first is for caches and compilation
                measured[name].append(speed)
    plain = statistics.median(measured["plain script, 32 px"])
    rows = []
    for name, speeds in measured.items():
        rows.append(_speed_row(name, statistics.median(speeds), plain, min(speeds), max(speeds), rounds))
    for name, recipe in RECIPES.items():
        # Each size has an equal share of the epochs, so the times of an image add up.
        medians = [statistics.median(measured[f"ours, {size} px"]) for size in recipe.resolution.split(",")]
        rows.append(
            _speed_row(f"ours, recipe {name}: {recipe.resolution} px", statistics.harmonic_mean(medians), plain)
        )
    return rows


def _speed_row(
    name: str, speed: float, plain: float, low: float | None = None, high: float | None = None, n: int | None = None
) -> dict[str, Any]:
    return {
        "way": name,
        "images_per_second": round(speed, 1),
        "ratio": round(speed / plain, 2),
        "min": low,
        "max": high,
        "n": n,
    }


def overhead(data: ImageData, device: str, rounds: int) -> list[dict[str, Any]]:
    """Share of a training epoch outside of forward, backward and optimizer, by a stopwatch around those."""
    settings = TrialSettings(max_epochs=1000, label_smoothing=0.1)
    target = resolve_device(device)
    part = data.subset(np.arange(25_600 if target.type == "cuda" else 2_560))
    rows = []
    for resolution in ("16", "32"):
        state = new_state(settings.model_copy(update={"resolution": resolution}), part, target)
        images, labels = to_tensors(part, target)
        inside = 0.0

        def timed(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any) -> Any:
                nonlocal inside
                _wait(target)
                start = time.perf_counter()
                result = call(*args)
                _wait(target)
                inside += time.perf_counter() - start
                return result

            return wrapped

        step = timed(loop._make_step(state, target))
        state.scaler.step = timed(state.scaler.step)  # type: ignore[method-assign]
        shares = []
        for i in range(rounds + 1):
            inside, start = 0.0, time.perf_counter()
            loop._train_epoch(state, images, labels, step)
            _wait(target)
            if i:
                shares.append(1 - inside / (time.perf_counter() - start))
            state.epoch += 1
        rows.append({"resolution": resolution, "share_outside": round(statistics.median(shares), 4), "n": rounds})
    return rows


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def accuracy(data_dir: Path, device: str, seeds: int, names: list[str]) -> list[dict[str, Any]]:
    """Train each recipe from start to end, and look at the test images once."""
    rows = []
    for name in names:
        for seed in range(seeds):
            settings = RECIPES[name].model_copy(update={"seed": seed})
            start = time.perf_counter()
            # A few images held out show that it goes well; what is measured is the test images.
            train_data, val_data = split_validation(load_data("cifar100", "train", data_dir), 0.02, seed=0)
            for metrics, state in train(settings, train_data, val_data, device=device):  # noqa: B007
                passed = time.perf_counter() - start
                print(
                    f"  {name} seed {seed} epoch {metrics.epoch}: {passed:.0f} s, val {metrics.val_accuracy:.3f}",
                    flush=True,
                )
            seconds = time.perf_counter() - start
            test = to_tensors(load_data("cifar100", "test", data_dir), resolve_device(device))
            resolution = settings.resolution_at(settings.max_epochs)
            _, reached = evaluate(state.network, *test, settings.precision, resolution)
            rows.append({"recipe": name, "seed": seed, "test_accuracy": reached, "minutes": round(seconds / 60, 2)})
    return rows


def _packed_trial(data: ImageData, seed: int, barrier: Any, speeds: Any) -> None:
    settings = TrialSettings(max_epochs=6, seed=seed)
    for metrics, _ in train(settings, data, data.subset(np.arange(100)), device="cuda"):
        if metrics.epoch == 1:
            barrier.wait()
        elif metrics.epoch in (3, 4):  # while all are training
            speeds.put(metrics.images_per_second)


def packing(data: ImageData, device: str, rounds: int) -> list[dict[str, Any]]:
    """Images a second of 1, 2 and 4 trials together, each a process on the same GPU, at batch 128."""
    if resolve_device(device).type != "cuda":
        return []
    context = multiprocessing.get_context("spawn")
    rows: list[dict[str, Any]] = []
    for count in (1, 2, 4):
        barrier, speeds = context.Barrier(count), context.Queue()
        trials = [context.Process(target=_packed_trial, args=(data, seed, barrier, speeds)) for seed in range(count)]
        for trial in trials:
            trial.start()
        seen = [speeds.get(timeout=300) for _ in range(2 * count)]
        for trial in trials:
            trial.join()
        total = sum(seen) / 2
        rows.append(
            {
                "trials": count,
                "images_per_second": round(total),
                "ratio": round(total / (rows[0]["images_per_second"] if rows else total), 2),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of CIFAR-100")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", choices=["throughput", "overhead", "accuracy", "packing"])
    parser.add_argument("--recipe", choices=list(RECIPES), help="of accuracy: only this one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    data = load_data("cifar100", "train", args.data_dir)
    kind = resolve_device(args.device).type
    figures: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "throughput": lambda: throughput(data, args.device, args.rounds),
        "overhead": lambda: overhead(data, args.device, args.rounds),
        "packing": lambda: packing(data, args.device, args.rounds),
        "accuracy": lambda: accuracy(
            args.data_dir, args.device, args.seeds, [args.recipe] if args.recipe else list(RECIPES)
        ),
    }
    for name, measure in figures.items():
        if args.only in (None, name):
            rows = measure()
            show(name, rows)
            save(Path(__file__).with_suffix(f".{kind}.json"), name, rows)


if __name__ == "__main__":
    main()
