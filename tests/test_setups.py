"""What the setups minimize, against loops over images and pixels, and what a step of theirs costs."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from trainables import ResNet18
from trainables import saliency_guided as module
from trainables.attention_consistency import attention_consistency_loss
from trainables.saliency_guided import saliency_guided_loss
from trainables.settings import Setup, TrialSettings
from trainables.setups import FORWARDS, LOSSES, epochs_of_equal_compute


class Pointwise(nn.Module):
    """A network that sees one pixel at a time: its features are rectified weighted sums of channels."""

    def __init__(self, weights: list[list[float]], head: list[list[float]]) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.tensor(weights))  # (features, channels)
        self.head = nn.Linear(len(head[0]), len(head))
        self.head.weight.data, self.head.bias.data = torch.tensor(head), torch.zeros(len(head))

    def features(self, x: Tensor) -> Tensor:
        return torch.einsum("fc,nchw->nfhw", self.mix, x).relu()

    def classify(self, features: Tensor) -> Tensor:
        return self.head(features.mean(dim=(2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))


class Seeing(nn.Module):
    """Logits whose gradient towards the pixels is known; what it is shown is kept."""

    def __init__(self, gradient: Tensor, classes: int = 3) -> None:
        super().__init__()
        self.gradient = nn.Parameter(torch.stack([gradient * (c + 1) for c in range(classes)]))
        self.shown: list[tuple[Tensor, bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shown.append((x.detach().clone(), self.training, x.requires_grad))
        return torch.einsum("kchw,nchw->nk", self.gradient, x)


def network(dropout: float = 0.0, classes: int = 5) -> ResNet18:
    torch.manual_seed(0)
    return ResNet18(classes, 4, dropout, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3)).train()


def batch(n: int = 6, side: int = 16, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, side, side, generator=generator), torch.arange(n) % classes


def cross_entropy_of(logits: Tensor, y: Tensor, smoothing: float = 0.0) -> float:
    total = 0.0
    for row, label in zip(logits.tolist(), y.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(value) for value in row))
        for k, value in enumerate(row):
            target = smoothing / len(row) + (1 - smoothing) * (k == label)
            total += target * (log_sum - value)
    return total / len(y)


def divergence_of(logits: Tensor, others: Tensor) -> float:
    total = 0.0
    for p, q in zip(logits.double().softmax(1).tolist(), others.double().softmax(1).tolist(), strict=True):
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return total / len(logits)


def shown_to(loss: partial | object, side: int = 8, n: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, their changed version, and the pixels that were masked, (N, H, W)."""
    x, y = batch(n, side, 3)
    generator = torch.Generator().manual_seed(2)
    model = Seeing(torch.randn(3, side, side, generator=generator)).train()
    torch.manual_seed(3)
    loss(model, x, y)
    changed = model.shown[-1][0]
    return x, changed, (changed != x).any(dim=1)


# ---- Saliency Guided Training


def test_pixels_of_lowest_gradient_are_replaced_and_no_others():
    x, changed, masked = shown_to(saliency_guided_loss)
    assert masked.flatten(1).sum(1).tolist() == [32] * 20  # half of 8 x 8
    gradient = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(2))
    saliency = [max(abs(gradient[c, i, j].item()) for c in range(3)) for i in range(8) for j in range(8)]
    lowest = sorted(range(64), key=saliency.__getitem__)[:32]
    expected = torch.zeros(64, dtype=torch.bool)
    expected[lowest] = True
    assert all(torch.equal(image.flatten(), expected) for image in masked)
    assert torch.equal(changed[~masked[:, None].expand_as(x)], x[~masked[:, None].expand_as(x)])


def test_noise_fills_the_range_of_the_image_and_channel():
    scale = torch.tensor([0.1, 0.5, 1.0]).view(3, 1, 1)
    shift = torch.linspace(0, 3, 40).view(40, 1, 1, 1)
    x = torch.rand(40, 3, 16, 16) * scale + shift
    model = Seeing(torch.rand(3, 16, 16)).train()
    saliency_guided_loss(model, x, torch.zeros(40, dtype=torch.int64))
    for image, changed in zip(x, model.shown[-1][0], strict=True):
        for before, after in zip(image, changed, strict=True):
            low, high = before.min(), before.max()
            place = (after[after != before] - low) / (high - low)  # of 128 pixels
            assert len(place) >= 120
            assert place.min() >= -1e-5
            assert place.max() <= 1 + 1e-5
            assert 0.3 < place.mean() < 0.7
            assert place.std() > 0.2


def test_gradient_is_of_the_label_in_eval_mode_and_the_rest_in_train_mode():
    x, y = batch(4, 8, 3)
    model = Seeing(torch.rand(3, 8, 8)).train()
    saliency_guided_loss(model, x, y)
    assert [(mode, needs) for _, mode, needs in model.shown] == [(False, True), (True, False), (True, False)]
    assert torch.equal(model.shown[0][0], x)
    assert torch.equal(model.shown[1][0], x)
    assert not x.requires_grad
    # Each label has its own lowest half: the logit of class k rises with the pixels that k has for itself.
    quarters = torch.zeros(2, 3, 4, 4)
    quarters[0, :, :2], quarters[1, :, 2:] = 1, 1
    model.gradient.data = quarters
    x = torch.rand(2, 3, 4, 4)
    saliency_guided_loss(model, x, torch.tensor([0, 1]))
    masked = (model.shown[-1][0] != x).any(dim=1)
    assert masked[0].tolist() == [[False] * 4] * 2 + [[True] * 4] * 2
    assert masked[1].tolist() == [[True] * 4] * 2 + [[False] * 4] * 2


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("random_mask", [False, True])
def test_saliency_loss_is_cross_entropy_and_divergence_written_out(random_mask, smoothing):
    x, y = batch()
    model, seen = network(), []
    hook = model.register_forward_hook(lambda m, given, logits: seen.append((m.training, given[0].detach(), logits)))
    loss = saliency_guided_loss(model, x, y, smoothing, random_mask=random_mask)
    hook.remove()
    (_, _, logits), (_, changed, of_changed) = [call for call in seen if call[0]]
    expected = cross_entropy_of(logits, y, smoothing) + divergence_of(logits, of_changed)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert divergence_of(logits, of_changed) > 1e-3
    reference = network()
    torch.testing.assert_close(reference(x), logits)
    torch.testing.assert_close(reference(changed), of_changed)
    if random_mask:
        return
    # Gradients image by image, of a copy whose running statistics are those before the step.
    slow = network().eval()
    for image, label, now in zip(x, y.tolist(), changed, strict=True):
        pixels = image[None].clone().requires_grad_()
        slow(pixels)[0, label].backward()
        saliency = pixels.grad[0].abs().amax(0)
        masked = (now != image).any(dim=0)
        assert masked.sum() == 128
        assert saliency[masked].max() <= saliency[~masked].min() * (1 + 1e-3)


def test_control_masks_a_random_half_and_takes_no_gradient_of_pixels(monkeypatch):
    monkeypatch.setattr(module, "_saliency", None)  # not to be called
    control = partial(saliency_guided_loss, random_mask=True)
    x, changed, masked = shown_to(control, side=16, n=100)
    assert masked.flatten(1).sum(1).tolist() == [128] * 100
    gradient = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(2)).abs().amax(0).flatten()
    lowest = gradient.argsort()[:128]
    assert 0.47 < masked.flatten(1)[:, lowest].float().mean() < 0.53
    assert len({tuple(mask.flatten().tolist()) for mask in masked}) == 100  # each image has its own
    assert torch.equal(changed[~masked[:, None].expand_as(x)], x[~masked[:, None].expand_as(x)])


def test_image_of_one_color_is_left_as_it_is_and_costs_cross_entropy_alone():
    model = network()
    x, y = torch.rand(4, 3, 1, 1).expand(4, 3, 16, 16).contiguous(), torch.arange(4)
    loss = saliency_guided_loss(model, x, y)
    assert loss.item() == pytest.approx(cross_entropy_of(network()(x), y), rel=1e-4)


# ---- Visual Attention Consistency


def test_consistency_loss_is_the_one_worked_out_by_hand():
    # One image of one row, and a network that does not commute with mirroring.
    class Left(Pointwise):
        def features(self, x: Tensor) -> Tensor:
            return super().features(x) * torch.tensor([1.0, 0.0])  # blind on the right

    model = Left([[1.0], [2.0]], [[1.0, -1.0], [3.0, 1.0]])
    x, y = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([1])
    # A_1 = (1, 0), A_2 = (2, 0): M_1 = (3 A_1 + A_2) / 2 = (2.5, 0). Mirrored: A = (2, 0), (4, 0): (5, 0), back (0, 5).
    # Logits: means of (-1, 0) and (5, 0): (-0.5, 2.5); mirrored (-1, 5).
    entropies = math.log(1 + math.exp(-3)) + math.log(1 + math.exp(-6))
    assert attention_consistency_loss(model, x, y, weight=0.0).item() == pytest.approx(entropies, rel=1e-4)
    assert attention_consistency_loss(model, x, y).item() == pytest.approx(entropies + (6.25 + 25) / 2)
    assert attention_consistency_loss(model, x, y, weight=0.1).item() == pytest.approx(entropies + 1.5625)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_consistency_loss_is_both_cross_entropies_and_the_maps_written_out(weight, smoothing):
    x, y = batch()
    loss = attention_consistency_loss(network(), x, y, smoothing, weight=weight)
    model = network()
    mirrored = x[:, :, :, list(range(15, -1, -1))]
    activations = model.features(torch.cat([x, mirrored]))
    logits = activations.mean(dim=(2, 3)) @ model.head.weight.T + model.head.bias
    expected = cross_entropy_of(logits[:6], y, smoothing) + cross_entropy_of(logits[6:], y, smoothing)
    a, w = activations.detach().double(), model.head.weight.detach().double()
    squares = []
    for n, label in enumerate(y.tolist()):
        for i in range(2):
            for j in range(2):
                here = sum(w[label, k] * a[n, k, i, j] for k in range(32))
                there = sum(w[label, k] * a[n + 6, k, i, 1 - j] for k in range(32))
                squares.append((here - there).item() ** 2 / 4**2)
    assert loss.item() == pytest.approx(expected + weight * sum(squares) / len(squares), rel=1e-4)
    assert sum(squares) > 1e-3


def test_network_that_commutes_with_mirroring_pays_nothing_for_its_maps():
    torch.manual_seed(0)
    model = Pointwise(torch.randn(4, 3).tolist(), torch.randn(3, 4).tolist())
    x, y = batch(5, 8, 3)
    symmetric = x + x.flip(3)
    for images in (x, symmetric):
        both, maps = (attention_consistency_loss(model, images, y, weight=weight) for weight in (0.0, 1.0))
        assert maps.item() == pytest.approx(both.item(), rel=1e-6)


def test_map_of_a_symmetric_image_is_compared_with_its_own_mirror_image():
    x, y = batch()
    x = x + x.flip(3)
    both, maps = (attention_consistency_loss(network(), x, y, weight=weight) for weight in (0.0, 1.0))
    model = network()
    cam = torch.einsum("nk,nkhw->nhw", model.head.weight[y], model.features(torch.cat([x, x]))[:6]) / 4
    assert (maps - both).item() == pytest.approx(((cam - cam.flip(2)) ** 2).mean().item(), rel=1e-3)


# ---- What holds for all of them


def test_every_setup_has_a_loss_and_a_cost():
    assert set(LOSSES) == set(FORWARDS) == set(Setup.__args__)
    assert TrialSettings().setup == "augmentation"


@pytest.mark.parametrize("setup", LOSSES)
def test_gradients_reach_all_parameters_at_backward_and_none_before(setup):
    model = network()
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    x, y = batch()
    loss = LOSSES[setup](model, x, y, 0.1)
    assert loss.shape == ()
    assert all((p.grad == 2).all() for p in model.parameters())
    assert x.grad is None
    model.zero_grad()
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("setup", LOSSES)
def test_mode_and_all_buffers_but_running_statistics_stay(setup):
    model, x, y = network(dropout=0.3), *batch()
    model.layer1.eval()  # somebody froze it
    modes = [m.training for m in model.modules()]
    before, images = copy.deepcopy(model.state_dict()), x.clone()
    LOSSES[setup](model, x, y, 0.0)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(x, images)
    assert not x.requires_grad
    forwards = 2 if setup.startswith("saliency") else 1  # mirrored images stand in one batch with the others
    for name, value in model.state_dict().items():
        if "running" in name and "layer1" not in name:
            assert not torch.equal(value, before[name]), name
        elif "tracked" in name and "layer1" not in name:
            assert value == forwards, name
        else:
            assert torch.equal(value, before[name]), name


class Operations(TorchDispatchMode):
    """Counts by torch's formulas, whose own FlopCounterMode refuses autograd.grad in a module."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.count += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("setup", LOSSES)
def test_what_a_step_computes_is_what_the_table_says(setup):
    x, y = batch(4, 32)
    torch.manual_seed(0)
    model = ResNet18(5, 8).train()
    counts = []
    for step in (lambda: model(x), lambda: LOSSES[setup](model, x, y, 0.0).backward()):
        with Operations() as counter:
            step()
        counts.append(counter.count)
    assert counts[1] / counts[0] == pytest.approx(FORWARDS[setup], rel=0.1)


@pytest.mark.parametrize(
    ("setup", "max_epochs", "expected"),
    [
        ("plain", 16, 16),
        ("augmentation", 16, 16),
        ("saliency", 16, 6),
        ("saliency", 30, 11),  # 11.25
        ("saliency_control", 16, 8),
        ("gradcam", 16, 8),
        ("gradcam_control", 10, 5),
        ("saliency", 1, 1),
        ("saliency", 2, 1),  # 0.75
    ],
)
def test_epochs_of_equal_compute_are_those_worked_out_by_hand(setup, max_epochs, expected):
    assert epochs_of_equal_compute(setup, max_epochs) == expected
