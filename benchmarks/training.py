"""How fast a trial trains, against the way most scripts train.

python -m benchmarks.training --data-dir DIR                     all figures that this machine can give
python -m benchmarks.training --data-dir DIR --only throughput   one of: throughput, overhead, setups, accuracy, packing

Prints tables and merges them into benchmarks/training.cpu.json or benchmarks/training.cuda.json. Accuracies are of the
10,000 test images, which are looked at once a run, at its end, without test-time augmentation. The clock of a run is
that of a fresh process with torch imported: it loads the data, trains, and tests.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.tables import run_main, save, show, where
from trainables import (
    ImageData,
    TrialSettings,
    evaluate,
    load_data,
    resolve_device,
    save_checkpoint,
    split_validation,
    stratified_subset,
    to_tensors,
    train,
)
from trainables.setups import FORWARDS
from trainables.train import Step, TrainingState, _make_step, _train_epoch, new_state, to_input

Rows = list[dict[str, Any]]

MUON = {"optimizer": "muon", "lr": 0.01, "weight_decay": 0.1, "batch_size": 256}
# What the times to an accuracy are of.
RECIPES = {
    "0.71": TrialSettings(**MUON, max_epochs=12, resolution="16,16,20,24,28"),
    "0.75": TrialSettings(**MUON, label_smoothing=0.1, max_epochs=18, resolution="16,20,24,28"),
}


class PlainImages(Dataset):
    """CIFAR images as torchvision's data sets serve them: PIL, one at a time."""

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


def plain_epochs(data: ImageData, device: torch.device, workers: int) -> Iterator[float]:
    """Train as weiaicunzai/pytorch-cifar100 does, fp32 and NCHW; yield images a second of each pass over the data.

    What the script does beyond this, it is spared here: rotation, printing, TensorBoard, and testing every epoch.
    """
    model = torchvision.models.resnet18(num_classes=len(data.class_names))
    model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = torch.nn.Identity()
    model = model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(PlainImages(data), 128, shuffle=True, num_workers=workers, drop_last=True)
    while True:
        start, count = time.perf_counter(), 0
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            loss.item()  # as the script does, for its log
            count += len(y)
        yield count / (time.perf_counter() - start)


def our_epochs(data: ImageData, device: str, settings: TrialSettings, resolution: str) -> Iterator[float]:
    """Train with this project's loop; yield images a second of each epoch."""
    endless = settings.model_copy(update={"max_epochs": 1000, "resolution": resolution})
    few = data.subset(stratified_subset(data.labels, 100, seed=0))
    for metrics, _ in train(endless, data, few, device=device):
        yield metrics.images_per_second


def throughput(data: ImageData, device: str, rounds: int) -> Rows:
    """Both ways side by side, in turns, so that what else the machine does falls on both."""
    target = resolve_device(device)
    on_gpu = target.type == "cuda"
    part = data.subset(stratified_subset(data.labels, 20_480 if on_gpu else 1_280, seed=0))
    ways: dict[str, Iterator[float]] = {
        f"plain script, 32 px, {workers} workers": plain_epochs(part, target, workers) for workers in (0, 4)
    }
    plain = list(ways)
    for batch in (128, 256, 512, 1024) if on_gpu else (128,):
        ways[f"sgd, batch {batch}, 32 px"] = our_epochs(part, device, TrialSettings(batch_size=batch), "32")
    if on_gpu:
        settings = TrialSettings(**MUON, label_smoothing=0.1, cutout=8, ema_decay=0.98)
        ways["muon, batch 256, averaged weights, cutout, 32 px"] = our_epochs(part, device, settings, "32")
    chosen = {} if on_gpu else RECIPES  # which save arithmetic, for two cores
    for name, recipe in chosen.items():
        for size in sorted(set(recipe.resolutions)):
            ways[f"recipe {name}, {size} px"] = our_epochs(part, device, recipe, str(size))
    seconds: dict[str, list[float]] = {name: [] for name in ways}  # an image
    for i in range(rounds + 1):
        for name, epochs in ways.items():
            speed = next(epochs)
            if i:  # the first is for caches, and captures
                seconds[name].append(1 / speed)
    for name, recipe in chosen.items():
        # Each size has an equal share of the epochs, so the times of an image add up.
        parts = [seconds[f"recipe {name}, {size} px"] for size in recipe.resolutions]
        seconds[f"recipe {name}, whole run: {recipe.resolution} px"] = [
            statistics.mean(turn) for turn in zip(*parts, strict=True)
        ]
    rival = min(plain, key=lambda name: statistics.median(seconds[name]))
    rows = []
    for name, own in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds[rival], own, strict=True)]
        speed = 1 / statistics.median(own)
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        rows.append(
            {
                "way": name,
                "images_per_second": round(speed, 1),
                "ratio": round(statistics.median(ratios), 2),
                "ratio_range": spread,
                "n": rounds,
            }
        )
    return rows


def overhead(data: ImageData, device: str, rounds: int) -> Rows:
    """Share of a training epoch outside of forward, backward and optimizer; validation and checkpoint beside it.

    On a CPU by a stopwatch around those three. On a GPU, which works on while the host prepares, by training on one
    batch over and over.
    """
    target = resolve_device(device)
    part = data.subset(stratified_subset(data.labels, 25_600 if target.type == "cuda" else 2_560, seed=0))
    val_data = part.subset(stratified_subset(part.labels, len(part) // 10, seed=0))
    return [_overhead_at(resolution, part, val_data, target, rounds) for resolution in ("16", "32")]


class Stopwatch:
    """Wraps calls and adds up what they take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            result = call(*args)
            self.seconds += time.perf_counter() - start
            return result

        return timed


def _overhead_at(
    resolution: str, data: ImageData, val_data: ImageData, target: torch.device, rounds: int
) -> dict[str, Any]:
    settings = TrialSettings(max_epochs=1000, resolution=resolution)
    state = new_state(settings, data, target)
    (images, labels), val = to_tensors(data, target), to_tensors(val_data, target)
    known = images[: len(val_data)], labels[: len(val_data)]
    watch, step, optimize = Stopwatch(), _make_step(state, target), state.scaler.step
    first = to_input(images[: settings.batch_size], int(resolution)), labels[: settings.batch_size]

    def one_batch_over_and_over() -> None:
        for _ in range(len(data) // settings.batch_size):
            state.optimizer.zero_grad()
            step(*first)
            optimize(state.optimizer)
            state.scaler.update()

    timed_step = step
    if target.type == "cpu":
        timed_step, state.scaler.step = watch.around(step), watch.around(optimize)
    shares, evaluation, saving = [], [], []

    def evaluate_both() -> None:
        for some in (val, known):
            evaluate(state.network, *some, "auto", int(resolution))

    for i in range(rounds + 1):
        watch.seconds = 0.0
        whole = _seconds(partial(_train_epoch, state, images, labels, timed_step), target)
        inside = watch.seconds if target.type == "cpu" else _seconds(one_batch_over_and_over, target)
        evaluated = _seconds(evaluate_both, target)
        with TemporaryDirectory() as folder:
            saved = _seconds(partial(save_checkpoint, folder, state), target)
        state.epoch += 1
        if i:
            shares.append(1 - inside / whole)
            evaluation.append(evaluated / whole)
            saving.append(saved)
    return {
        "resolution": resolution,
        "share_outside": round(statistics.median(shares), 4),
        "evaluation_of_two_tenths": round(statistics.median(evaluation), 4),
        "checkpoint_seconds": round(statistics.median(saving), 3),
        "n": rounds,
    }


def setups(data: ImageData, device: str, rounds: int) -> Rows:
    """What a step of each setup costs, as forward passes are counted and as measured against plain training, in turns.

    Args:
        data: images to take a batch of.
        device: where to.
        rounds: how often each is measured, after once for caches and captures.
    """
    target = resolve_device(device)
    images, labels = to_tensors(data.subset(stratified_subset(data.labels, 128, seed=0)), target)
    steps = {}
    for setup in FORWARDS:
        state = new_state(TrialSettings(setup=setup), data, target)
        steps[setup] = partial(_one_step, state, _make_step(state, target), to_input(images), labels)
    seconds: dict[str, list[float]] = {setup: [] for setup in steps}
    for i in range(rounds + 1):
        for setup, step in steps.items():
            taken = _seconds(step, target)
            if i:
                seconds[setup].append(taken)
    rows = []
    for setup, own in seconds.items():
        ratios = [ours / plain for ours, plain in zip(own, seconds["plain"], strict=True)]
        rows.append(
            {
                "setup": setup,
                "forwards": FORWARDS[setup],
                "expected": round(FORWARDS[setup] / FORWARDS["plain"], 2),
                "ratio": round(statistics.median(ratios), 2),
                "ratio_range": f"{min(ratios):.2f}-{max(ratios):.2f}",
                "milliseconds": round(1000 * statistics.median(own)),
                "n": rounds,
            }
        )
    return rows


def _one_step(state: TrainingState, step: Step, x: Tensor, y: Tensor) -> None:
    state.model.train()
    state.optimizer.zero_grad()
    step(x, y)
    state.scaler.step(state.optimizer)
    state.scaler.update()


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return how long a call takes, and what it left the device to do."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _settings(recipe: str, seed: int) -> TrialSettings:
    return RECIPES[recipe].model_copy(update={"seed": seed})


def run_recipe(name: str, seed: int, data_dir: Path, device: str) -> dict[str, Any]:
    """Train a recipe from start to end, and look at the test images once; return its row."""
    settings = _settings(name, seed)
    start = time.perf_counter()
    # A few images held out show that it goes well; what is measured is the test images.
    train_data, val_data = split_validation(load_data("cifar100", "train", data_dir), 0.02, seed=0)
    test = to_tensors(load_data("cifar100", "test", data_dir), resolve_device(device))
    loaded = time.perf_counter()
    for metrics, state in train(settings, train_data, val_data, device=device):
        passed = time.perf_counter() - start
        print(f"  {name}, seed {seed}, epoch {metrics.epoch}: {passed:.0f} s, {metrics.val_accuracy:.3f}", flush=True)
        network = state.network
    if metrics.diverged:
        raise SystemExit(f"recipe {name}, seed {seed} diverged")
    trained = time.perf_counter()
    _, reached = evaluate(network, *test, settings.precision, settings.resolution_at(settings.max_epochs))
    end = time.perf_counter()
    parts = {"load_seconds": loaded - start, "train_seconds": trained - loaded, "test_seconds": end - trained}
    return {
        "recipe": name,
        "seed": seed,
        "test_accuracy": reached,
        "minutes": round((end - start) / 60, 2),
        **{part: round(seconds, 1) for part, seconds in parts.items()},
        "settings": settings.model_dump(),
    }


def accuracy(data_dir: Path, device: str, seeds: int, names: list[str], file: Path) -> Rows:
    """Train each recipe with each seed, each in a fresh process, and save after each.

    Those of this machine and its versions that are already in the file are not run again; those of another give way.
    """
    have = json.loads(file.read_text()).get("accuracy", {}) if file.exists() else {}
    rows: Rows = have["rows"] if have == have | where() else []
    for name in names:
        for seed in range(seeds):
            if not any(_is_of(row, name, seed) for row in rows):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    row = pool.apply(run_recipe, (name, seed, data_dir, device))
                rows = [r for r in rows if (r["recipe"], r["seed"]) != (name, seed)] + [row]
                save(file, "accuracy", rows)
    return rows


def _is_of(row: dict[str, Any], recipe: str, seed: int) -> bool:
    """Whether a row is of a recipe as it is now. A hyperparameter that is newer than it was at its default."""
    settings, fields = _settings(recipe, seed).model_dump(), TrialSettings.model_fields
    same = all(row["settings"].get(name, fields[name].default) == value for name, value in settings.items())
    return same and row["recipe"] == recipe


def _packed_trial(data: ImageData, epochs: int, barrier: Any, spans: Any) -> None:
    few = data.subset(stratified_subset(data.labels, 100, seed=0))
    for metrics, _ in train(TrialSettings(max_epochs=epochs + 1), data, few, device="cuda"):
        now = time.time()
        if metrics.epoch == 1:
            barrier.wait(timeout=300)
        else:
            spans.put((now - metrics.epoch_seconds, now, len(data)))


def packing(data: ImageData, rounds: int) -> Rows:
    """Images a second of 1, 2 and 4 trials together, each a process on the same GPU, at batch 128, 32 px.

    Counted is the time in which all of them train.
    """
    context = multiprocessing.get_context("spawn")
    rows: Rows = []
    for count in (1, 2, 4):
        barrier, spans = context.Barrier(count), context.Queue()
        arguments = (data, rounds, barrier, spans)
        trials = [context.Process(target=_packed_trial, args=arguments, daemon=True) for _ in range(count)]
        for trial in trials:
            trial.start()
        seen = [spans.get(timeout=300) for _ in range(rounds * count)]
        for trial in trials:
            trial.join()
        starts, ends = sorted(span[0] for span in seen), sorted(span[1] for span in seen)
        # From the last one's first epoch to the first one's last.
        begin, end = starts[count - 1], ends[-count]
        images = sum(n * max(0.0, min(e, end) - max(s, begin)) / (e - s) for s, e, n in seen)
        speed = images / (end - begin)
        alone = rows[0]["images_per_second"] if rows else speed
        rows.append({"trials": count, "images_per_second": round(speed), "ratio": round(speed / alone, 2)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of CIFAR-100")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", choices=["throughput", "overhead", "setups", "packing", "accuracy"])
    parser.add_argument("--recipe", choices=list(RECIPES), help="of accuracy: only this one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    kind = resolve_device(args.device).type
    file = Path(__file__).with_suffix(f".{kind}.json")
    data = load_data("cifar100", "train", args.data_dir)
    recipes = [args.recipe] if args.recipe else list(RECIPES)
    figures: dict[str, Callable[[], Rows]] = {
        "throughput": lambda: throughput(data, args.device, args.rounds),
        "overhead": lambda: overhead(data, args.device, args.rounds),
        "setups": lambda: setups(data, args.device, args.rounds),
        "packing": lambda: packing(data, args.rounds) if kind == "cuda" else [],
        "accuracy": lambda: accuracy(args.data_dir, args.device, args.seeds, recipes, file),
    }
    for name, measure in figures.items():
        if args.only in (None, name):
            rows = measure()
            show(name, [{k: v for k, v in row.items() if k != "settings"} for row in rows])
            missed = [row for row in rows if name == "accuracy" and row["test_accuracy"] < float(row["recipe"])]
            if missed:
                print(f"below their name: {', '.join(sorted({row['recipe'] for row in missed}))}")
            if name != "accuracy":  # those are saved as they come
                save(file, name, rows)


if __name__ == "__main__":
    run_main(main)
