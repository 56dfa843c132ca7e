"""Steps replayed as a CUDA graph against steps that are simply taken; what needs a GPU is skipped without one."""

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainables import ImageData, ResNet18, TrainingState, TrialSettings, load_checkpoint, save_checkpoint, train
from trainables.cuda_graph import GraphedStep
from trainables.optim import lr_at
from trainables.train import new_state

MODULE = sys.modules["trainables.train"]  # trainables.train is the function
SETTINGS = {"width": 4, "batch_size": 16, "max_epochs": 4, "precision": "fp32", "lr": 0.02}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def two_classes(n: int, seed: int = 0) -> ImageData:
    """Noise in two classes, one lighter than the other."""
    labels = np.arange(n) % 2
    images = np.random.default_rng(seed).integers(0, 150, (n, 32, 32, 3)) + 100 * labels[:, None, None, None]
    return ImageData(images.astype(np.uint8), labels, ("dark", "light"))


TRAIN, VAL = two_classes(56), two_classes(24, seed=1)  # the last batch of 16 holds 8

Step = Callable[[Tensor, Tensor], Tensor]


def step_of(model: nn.Module) -> Step:
    """Forward and backward, as the training loop has them."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    return step


def batches(sizes: list[tuple[int, int]], device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """A batch of each (images, pixels a side)."""
    generator = torch.Generator().manual_seed(0)
    for n, side in sizes:
        x = torch.rand(n, 3, side, side, generator=generator).contiguous(memory_format=torch.channels_last)
        yield x.to(device), torch.randint(0, 2, (n,), generator=generator).to(device)


def trained(model: nn.Module, step: Step, sizes: list[tuple[int, int]], device: str = "cpu") -> list[float]:
    """Train on the batches; return the loss of each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    torch.manual_seed(1)  # dropout
    results = []
    for x, y in batches(sizes, device):
        optimizer.zero_grad(set_to_none=True)
        loss = step(x, y)
        optimizer.step()
        results.append(loss.item())
    return results


# ---- Without a GPU: the same calls, of a graph that repeats on the CPU what it was captured with


@pytest.fixture
def graphs(monkeypatch) -> list[object]:
    """Stand in for CUDA's graphs, streams and random state; return the graphs that are captured."""
    captured: list[object] = []

    class Stream:
        def __init__(self, *_: object) -> None: ...
        def wait_stream(self, _: object) -> None: ...

    class Graph:
        def __init__(self) -> None:
            captured.append(self)

        def replay(self) -> None:
            """Write into the tensors of the capture, as a replay does, from its inputs as they are now."""
            gradients = [p.grad for p in self.model.parameters()]
            for p in self.model.parameters():
                p.grad = None
            self.loss.copy_(self.step(*self.inputs))
            for held, p, before in zip(self.gradients, self.model.parameters(), gradients, strict=True):
                held.copy_(p.grad)
                p.grad = before

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, *_: torch.set_rng_state(state))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    return captured


def capturable(model: nn.Module, monkeypatch) -> tuple[Step, list[int]]:
    """Return a step that the graphs of the fixture can capture, and the sizes of the batches it is called with."""
    plain, calls, sizes = step_of(model), [], []

    def step(*inputs: Tensor) -> Tensor:
        sizes.append(len(inputs[1]))
        loss = plain(*inputs)
        calls.append((inputs, loss))
        return loss

    @contextlib.contextmanager
    def capture(graph: object, *_: object, **__: object) -> Iterator[None]:
        assert all(p.grad is None for p in model.parameters())  # else each replay would add to what is there
        yield
        graph.model, graph.step = model, plain
        graph.inputs, graph.loss = calls[-1]
        graph.gradients = [p.grad for p in model.parameters()]

    monkeypatch.setattr(torch.cuda, "graph", capture)
    return step, sizes


def test_replayed_steps_are_the_steps_that_were_simply_taken(graphs, monkeypatch):
    torch.manual_seed(0)
    model = ResNet18(2, 4, dropout=0.3)
    other = copy.deepcopy(model)
    step, _ = capturable(model, monkeypatch)
    sizes = [(8, 16), (8, 16), (3, 16), (8, 16), (8, 24), (8, 24), (5, 24), (8, 16)]
    results = trained(model, GraphedStep(step, model, 8), sizes)
    assert results == trained(other, step_of(other), sizes)
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
    assert len(graphs) == 3  # 16 pixels, 24 pixels, 16 pixels again


def test_batches_of_another_size_are_run_as_they_are(graphs, monkeypatch):
    model = ResNet18(2, 4)
    step, sizes = capturable(model, monkeypatch)
    trained(model, GraphedStep(step, model, 8), [(5, 16), (3, 16), (9, 16)])
    assert sizes == [5, 3, 9]
    assert graphs == []


# ---- With a GPU


def run(settings: TrialSettings, device: str = "cuda", state: TrainingState | None = None):
    """Train to the end; return the losses and accuracies of all epochs, and the state."""
    metrics = []
    for epoch, reached in train(settings, TRAIN, VAL, device=device, state=state):
        metrics.append([epoch.train_loss, epoch.train_accuracy, epoch.val_loss, epoch.val_accuracy])
        state = reached
    return metrics, state


@pytest.fixture
def exact(monkeypatch) -> None:
    """Arithmetic that can be repeated: no TF32, no algorithm that depends on timing."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def assert_close_networks(one: TrainingState, other: TrainingState, tolerance: float) -> None:
    for part in ("model", "network"):
        weights = getattr(other, part).state_dict()
        for name, value in getattr(one, part).state_dict().items():
            torch.testing.assert_close(value, weights[name], rtol=tolerance, atol=tolerance, msg=f"{part}: {name}")


# All have a ragged last batch.
GRAPHED = {
    "two sizes, dropout": ({"resolution": "16,32", "dropout": 0.3}, 1e-3),
    "average, adam": ({"ema_decay": 0.9, "optimizer": "adam", "lr": 0.001}, 1e-2),
    "smoothing, cutout": ({"label_smoothing": 0.1, "cutout": 8}, 1e-3),
    "muon": ({"optimizer": "muon", "lr": 0.005}, 2e-2),
    "fp16": ({"precision": "fp16", "dropout": 0.2}, 3e-2),
    "bf16": ({"precision": "bf16"}, 5e-2),
    "saliency": ({"setup": "saliency", "dropout": 0.2}, 1e-2),
    "saliency, random mask": ({"setup": "saliency_control"}, 1e-2),
    "gradcam": ({"setup": "gradcam", "resolution": "16,32"}, 1e-2),
}


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", GRAPHED)
def test_graphed_run_is_the_ungraphed_one(name, exact, monkeypatch):
    changes, tolerance = GRAPHED[name]
    settings = TrialSettings(**{**SETTINGS, **changes})
    replays, real = [], torch.cuda.CUDAGraph.replay

    def replay(graph: torch.cuda.CUDAGraph) -> None:
        replays.append(graph)
        real(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replay)
    metrics, state = run(settings)
    assert len(replays) == 4 * 3  # of four batches an epoch, the last is ragged
    monkeypatch.setattr(MODULE, "GraphedStep", lambda step, *_: step)
    ungraphed, expected = run(settings)
    assert len(replays) == 4 * 3
    np.testing.assert_allclose(np.array(metrics)[:, [0, 2]], np.array(ungraphed)[:, [0, 2]], rtol=10 * tolerance)
    assert_close_networks(state, expected, tolerance)


@needs_gpu
@pytest.mark.gpu
def test_capture_leaves_running_statistics_and_random_state_alone(exact):
    torch.manual_seed(0)
    model = ResNet18(2, 4, dropout=0.5).to("cuda", memory_format=torch.channels_last)
    other = copy.deepcopy(model)
    results = trained(model, GraphedStep(step_of(model), model, 8), [(8, 32)], "cuda")
    random_state = torch.cuda.get_rng_state()
    expected = trained(other, step_of(other), [(8, 32)], "cuda")
    assert results == pytest.approx(expected, rel=1e-4)  # the same dropout
    assert torch.equal(torch.cuda.get_rng_state(), random_state)
    assert int(model.stem[1].num_batches_tracked) == 1
    for (name, value), after in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, after, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture
def _quiet_synchronization() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.gpu
@pytest.mark.usefixtures("_quiet_synchronization")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize(
    "changes",
    [
        {"augmentation": "flip+crop", "cutout": 8},
        {"resolution": "16", "optimizer": "adam", "dropout": 0.1},
        {"optimizer": "muon"},
        {"precision": "fp16"},
        {"ema_decay": 0.9},
        {"setup": "saliency"},
        {"setup": "gradcam"},
    ],
    ids=lambda changes: ", ".join(map(str, changes.values())),
)
def test_host_never_waits_within_a_step(changes, monkeypatch):
    settings = TrialSettings(**{**SETTINGS, "max_epochs": 2, **changes})
    state = new_state(settings, TRAIN, torch.device("cuda"))
    watched = []

    def begin(step: int, steps_per_epoch: int, settings: TrialSettings) -> float:
        if step >= steps_per_epoch:  # the graph is captured in the first epoch
            torch.cuda.set_sync_debug_mode("error")
            watched.append(step)
        return lr_at(step, steps_per_epoch, settings)

    part, name = (MODULE, "_update_average") if state.average else (state.scaler, "update")
    last = getattr(part, name)

    def end(*given: object) -> None:
        last(*given)
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(MODULE, "lr_at", begin)
    monkeypatch.setattr(part, name, end)
    run(settings, state=state)
    assert watched == [4, 5, 6, 7]


@needs_gpu
@pytest.mark.gpu
def test_run_that_goes_on_is_the_uninterrupted_one_on_a_gpu(exact, tmp_path):
    settings = TrialSettings(**SETTINGS, resolution="16,32", ema_decay=0.9, dropout=0.2)
    metrics, state = run(settings)
    for epoch, reached in train(settings, TRAIN, VAL, device="cuda"):
        if epoch.epoch == 1:
            save_checkpoint(tmp_path, reached)
            break
    resumed, again = run(settings, state=load_checkpoint(tmp_path, "cuda"))
    np.testing.assert_allclose(np.array(resumed)[:, [0, 2]], np.array(metrics)[1:, [0, 2]], rtol=1e-2)
    assert_close_networks(again, state, 1e-3)


@needs_gpu
@pytest.mark.gpu
def test_trial_begun_on_a_gpu_goes_on_without_one(tmp_path):
    settings = TrialSettings(**SETTINGS, ema_decay=0.9)
    save_checkpoint(tmp_path, next(train(settings, TRAIN, VAL, device="cuda"))[1])
    metrics, state = run(settings, "cpu", load_checkpoint(tmp_path, "cpu"))
    assert len(metrics) == 3
    assert np.isfinite(metrics).all()
    assert {p.device.type for p in (*state.model.parameters(), *state.network.parameters())} == {"cpu"}


@needs_gpu
@pytest.mark.gpu
def test_diverged_trial_ends_with_its_epoch_on_a_gpu():
    settings = TrialSettings(**{**SETTINGS, "max_epochs": 50, "lr": 100}, schedule="constant", warmup_epochs=0)
    epochs = [metrics for metrics, _ in train(settings, TRAIN, VAL, device="cuda")]
    assert len(epochs) < 20
    assert [m.diverged for m in epochs] == [False] * (len(epochs) - 1) + [True]
    assert np.isnan(dataclasses.astuple(epochs[-1])[4:6]).all()


@needs_gpu
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_trial_on_the_second_gpu_is_the_trial_on_the_first(exact):
    settings = TrialSettings(**SETTINGS, dropout=0.2)
    (first, one), (second, other) = run(settings, "cuda:0"), run(settings, "cuda:1")
    np.testing.assert_allclose(np.array(second)[:, [0, 2]], np.array(first)[:, [0, 2]], rtol=1e-2)
    assert {p.device.index for p in other.model.parameters()} == {1}
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name].to(value.device), value, rtol=1e-3, atol=1e-3)
