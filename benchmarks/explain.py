"""Maps a second, against captum and pytorch-grad-cam, on the same network and the same images in one run.

python -m benchmarks.explain --data-dir DIR                  all figures, about ten minutes on two cores
python -m benchmarks.explain --data-dir DIR --only speed     one of: speed, stream

Prints tables and merges them into benchmarks/explain.cpu.json, or explain.cuda.json.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from captum.attr import LayerGradCam, Saliency
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor

from benchmarks.tables import run_main, save, show
from explain import explain, grad_cam, stream, upsample
from trainables import ResNet18, load_data, resolve_device, to_input
from trainables.device import place

Rows = list[dict[str, Any]]
BATCH = 250


def network(device: torch.device) -> ResNet18:
    """The reference network with random weights: a map costs the same, whatever it shows."""
    torch.manual_seed(0)
    return ResNet18(100).to(device).eval()


def with_captum(model: ResNet18, x: Tensor, target: Tensor) -> None:
    """Both maps as captum's documentation makes them."""
    Saliency(model).attribute(x.clone().requires_grad_(), target)
    upsample(LayerGradCam(model, model.layer4).attribute(x, target)[:, 0].detach(), (x.shape[2], x.shape[3]))


def with_pytorch_grad_cam(model: ResNet18, x: Tensor, target: Tensor) -> None:
    """Saliency by captum and Grad-CAM by pytorch-grad-cam, as their documentation makes them."""
    Saliency(model).attribute(x.clone().requires_grad_(), target)
    with GradCAM(model, [model.layer4]) as cam:
        cam(x, [ClassifierOutputTarget(int(c)) for c in target])


@torch.no_grad()
def forward(model: ResNet18, x: Tensor, target: Tensor) -> None:
    """What no map can cost less than."""
    model(x)


def speed(pixels: Tensor, device: torch.device, rounds: int) -> Rows:
    """All ways in turns, so that what else the machine does falls on each."""
    x = to_input(pixels[:BATCH].to(device))
    plain, fast = x.contiguous(), x  # NCHW as in the other packages' documentation, and channels_last
    own, own_fast = network(device), place(network(device), device)
    target = torch.arange(len(x), device=device) % 100
    fp32 = torch.float32

    def both(model: ResNet18, images: Tensor, dtype: torch.dtype | None) -> Callable[[], object]:
        return lambda: explain(model, images, target, dtype=dtype)

    ways: dict[str, Callable[[], object]] = {
        "plain forward, fp32": lambda: forward(own, plain, target),
        "Grad-CAM alone, fp32": lambda: grad_cam(own, plain, target=target, dtype=fp32),
        "both maps, fp32": both(own, plain, fp32),
        "captum + captum, fp32": lambda: with_captum(own, plain, target),
        "captum + pytorch-grad-cam, fp32": lambda: with_pytorch_grad_cam(own, plain, target),
        "both maps, fp32 channels_last": both(own_fast, fast, fp32),
        "captum + captum, fp32 channels_last": lambda: with_captum(own_fast, fast, target),
        "captum + pytorch-grad-cam, fp32 channels_last": lambda: with_pytorch_grad_cam(own_fast, fast, target),
        "both maps, default": both(own_fast, fast, None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            _wait(device)
            start = time.perf_counter()
            way()
            _wait(device)
            if turn:  # the first is for caches
                seconds[name].append(time.perf_counter() - start)

    def ratio(of: str, to: str) -> str:
        ratios = [a / b for a, b in zip(seconds[of], seconds[to], strict=True)]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"

    first, *_ = ways
    return [
        {
            "way": name,
            "images_per_second": round(len(x) / statistics.median(own_seconds), 1),
            "forwards": ratio(name, first),
            "captum + captum takes": ratio("captum + captum, fp32", name),
            "captum + pytorch-grad-cam takes": ratio("captum + pytorch-grad-cam, fp32", name),
            "n": rounds,
        }
        for name, own_seconds in seconds.items()
    ]


def streaming(pixels: Tensor, device: torch.device) -> Rows:
    """Images a second and memory over more and more images, each number in a process of its own."""
    rows = []
    for count in (1_000, 10_000, 50_000):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(_stream, (pixels, str(device), count)))
    return rows


def _stream(pixels: Tensor, name: str, count: int) -> dict[str, Any]:
    device = torch.device(name)
    model = place(network(device), device)
    pixels.sum()  # their pages are shared, and would count as they are first read
    batches = (to_input(pixels[start : start + BATCH].to(device)) for start in range(0, count, BATCH))
    total = torch.zeros((), device=device)
    for i, maps in enumerate(stream(model, batches)):
        total += maps.saliency.sum() + maps.cam.sum()
        if i == 1:  # two batches for caches
            _wait(device)
            before, start = _memory(device), time.perf_counter()
    assert torch.isfinite(total)
    seconds = time.perf_counter() - start
    speed = (count - 2 * BATCH) / seconds
    return {
        "images": count,
        "images_per_second": round(speed, 1),
        "peak_mb": round(_memory(device)),
        "growth_mb": round(_memory(device) - before),
    }


def _memory(device: torch.device) -> float:
    """Peak memory so far, in MB: of the device, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="CIFAR-100")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", choices=["speed", "stream"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = resolve_device(args.device)
    pixels = torch.from_numpy(load_data("cifar100", "train", args.data_dir).images)
    figures = {"speed": lambda: speed(pixels, device, args.rounds), "stream": lambda: streaming(pixels, device)}
    for name, measure in figures.items():
        if args.only in (None, name):
            rows = measure()
            show(name, rows)
            save(Path(__file__).with_name(f"explain.{device.type}.json"), name, rows)


if __name__ == "__main__":
    run_main(main)
