"""Optimizers against torch's own and against plain linear algebra; learning rates worked out by hand."""

import copy

import pytest
import torch
from torch import Tensor, nn

from trainables import ResNet18, TrialSettings
from trainables.optim import NEWTON_SCHULZ_STEPS, Muon, lr_at, make_optimizer

KINDS = ("sgd", "adam", "adamw", "muon")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


# ---- Schedules

# 10 epochs of 10 steps; learning rates worked out by hand.
SCHEDULES = [
    ("constant", 0, {0: 1.0, 50: 1.0, 99: 1.0}),
    ("constant", 2, {0: 0.05, 9: 0.5, 19: 1.0, 20: 1.0, 99: 1.0}),
    ("constant", 0.5, {0: 0.2, 4: 1.0, 5: 1.0}),
    ("constant", 0.05, {0: 1.0}),  # less than a step
    ("linear", 0, {0: 1.0, 1: 0.99, 50: 0.5, 75: 0.25, 99: 0.01}),
    ("linear", 2, {0: 0.05, 9: 0.5, 19: 1.0, 20: 1.0, 40: 0.75, 60: 0.5, 80: 0.25, 99: 1 / 80}),
    ("linear", 2.5, {0: 0.04, 24: 1.0, 25: 1.0, 40: 0.8, 85: 0.2, 99: 1 / 75}),  # a quarter: one-cycle
    ("linear", 10, {0: 0.01, 49: 0.5, 99: 1.0}),
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


# ---- A small network with gradients given by hand


def network(layout: str = "contiguous") -> nn.Module:
    """Convolutions wider, taller and 1 x 1, a norm, and a head, in a layout."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1), nn.Conv2d(1, 32, 3), nn.Linear(6, 5)
    )
    return model.to(memory_format=LAYOUTS[layout])


def give_gradients(model: nn.Module, seed: int) -> None:
    """Give each parameter a gradient of its own layout; equal ones to equal networks."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(model, step)
        optimizer.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def settings_of(kind: str, **changes: object) -> TrialSettings:
    return TrialSettings(**{"optimizer": kind, "lr": 0.02, "weight_decay": 0.1, **changes})


def decayed_and_free(model: nn.Module, decay: float = 0.1) -> list[dict]:
    return [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


# ---- Optimizers of torch

PLAIN = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.02, momentum=0.9, nesterov=True, fused=False, foreach=False),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.02, betas=(0.9, 0.999), eps=1e-8, fused=False, foreach=False),
    "adamw": lambda groups: torch.optim.AdamW(
        groups, lr=0.02, betas=(0.9, 0.999), eps=1e-8, fused=False, foreach=False
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", PLAIN)
def test_optimizer_moves_the_network_as_the_plain_one_of_torch_does(kind, layout):
    model, plain = network(layout), network()
    take_steps(model, make_optimizer(model, settings_of(kind)), range(6))
    take_steps(plain, PLAIN[kind](decayed_and_free(plain)), range(6))
    before = network()
    for p, expected, start in zip(model.parameters(), plain.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)
        assert (p - start).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_optimizer_decays_weights_but_neither_norms_nor_biases(name, kind):
    model = ResNet18(10, 4)
    optimizer = make_optimizer(model, TrialSettings(optimizer=name, lr=0.3, weight_decay=0.01))
    assert type(optimizer) is kind
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert decay == {id(p): 0.01 if p.ndim >= 2 else 0.0 for p in model.parameters()}
    assert sum(value == 0.01 for value in decay.values()) == 21  # 20 convolutions and the head
    assert {group["lr"] for group in optimizer.param_groups} == {0.3}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_decoupled_decay_without_gradients_shrinks_weights_alone(kind):
    model, before = network(), network()
    optimizer = make_optimizer(model, settings_of(kind))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, start in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, start * (1 - 0.02 * 0.1) if p.ndim >= 2 else start)


# ---- What holds for all of them


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_trained_once(kind):
    model = ResNet18(10, 4)
    optimizer = make_optimizer(model, TrialSettings(optimizer=kind))
    trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(map(id, model.parameters()))
    give_gradients(model, 0)
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_learning_rate_of_the_groups_is_obeyed(kind):
    model, other, start = network(), network(), network()
    optimizer = make_optimizer(model, settings_of(kind, lr=1.0))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    take_steps(model, optimizer, range(1))
    assert same(model, start)
    optimizer = make_optimizer(model, settings_of(kind, lr=1.0))
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    take_steps(model, optimizer, range(3))
    take_steps(other, make_optimizer(other, settings_of(kind)), range(3))
    assert same(model, other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_optimizer_goes_on_from_its_state_bit_for_bit(kind, layout, tmp_path):
    model = network(layout)
    optimizer = make_optimizer(model, settings_of(kind))
    take_steps(model, optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(model)
    loaded = make_optimizer(other, settings_of(kind))
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    take_steps(model, optimizer, range(3, 6))
    take_steps(other, loaded, range(3, 6))
    assert same(model, other)
    fresh = copy.deepcopy(model)
    take_steps(fresh, make_optimizer(fresh, settings_of(kind)), range(6, 8))
    take_steps(model, optimizer, range(6, 8))
    assert not same(model, fresh)  # the state matters


@pytest.mark.parametrize("kind", KINDS)
def test_learning_rate_travels_with_the_state(kind):
    model = network()
    optimizer = make_optimizer(model, settings_of(kind))
    for group in optimizer.param_groups:
        group["lr"] = 0.003
    take_steps(model, optimizer, range(2))
    other = copy.deepcopy(model)
    loaded = make_optimizer(other, settings_of(kind))
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {group["lr"] for group in loaded.param_groups} == {0.003}
    take_steps(model, optimizer, range(2, 4))
    take_steps(other, loaded, range(2, 4))
    assert same(model, other)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_without_a_gradient_stay(kind):
    model, start = network(), network()
    give_gradients(model, 0)
    still = {"0.weight", "1.weight", "4.weight"}
    for name, p in model.named_parameters():
        if name in still:
            p.grad = None
    make_optimizer(model, settings_of(kind)).step()
    for (name, p), before in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(p, before) == (name in still)


@pytest.mark.parametrize("kind", KINDS)
def test_closure_is_run_with_gradients_and_its_loss_returned(kind):
    model, other = network(), network()
    optimizer = make_optimizer(model, settings_of(kind))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in model.parameters())
        loss.backward()
        return loss

    expected = sum((p**2).sum() for p in other.parameters())
    expected.backward()
    assert optimizer.step(closure).item() == pytest.approx(expected.item())
    make_optimizer(other, settings_of(kind)).step()
    assert same(model, other)


# ---- Muon


def orthogonal(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The singular vectors of a matrix, whose product is the nearest orthogonal matrix: what Newton-Schulz nears."""
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left, right


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("out", "into", "kernel"), [(8, 3, 3), (16, 8, 1), (32, 1, 3)], ids=["wide", "1 x 1", "tall"])
def test_muon_moves_along_the_orthogonalized_momentum(out, into, kernel, layout):
    torch.manual_seed(1)
    convolution = nn.Conv2d(into, out, kernel, bias=False).to(memory_format=LAYOUTS[layout])
    optimizer = Muon([convolution.weight], [{"params": [nn.Parameter(torch.ones(1))]}], lr=0.02, weight_decay=0.0)
    columns = into * kernel**2
    momentum = torch.zeros(out, columns)
    for step in range(4):
        before = convolution.weight.detach().clone()
        give_gradients(convolution, step)
        gradient = convolution.weight.grad.reshape(out, columns).clone()
        optimizer.step()
        # Nesterov's momentum, 0.95, as an average of gradients; its size does not matter.
        momentum = 0.95 * momentum + 0.05 * gradient
        left, right = orthogonal(0.05 * gradient + 0.95 * momentum)
        update = (before - convolution.weight.detach()).reshape(out, columns).double()
        update /= 0.02 * 0.2 * max(out, columns) ** 0.5
        along = left.T @ update @ right.T
        assert (along.diagonal() > 0.5).all()
        assert (along.diagonal() < 1.3).all()
        assert (along - along.diagonal().diag()).norm() < 0.1 * along.diagonal().norm()  # Newton-Schulz is in bf16
        assert (update - left @ along @ right).norm() < 0.05 * update.norm()


def test_muon_of_convolutions_is_that_of_torch_on_matrices():
    model, plain = network("channels_last"), network()
    matrices = [nn.Parameter(p.detach().flatten(1).clone()) for p in plain.parameters() if p.ndim == 4]
    scale = {"adjust_lr_fn": "match_rms_adamw", "ns_steps": NEWTON_SCHULZ_STEPS}
    reference = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, **scale)
    optimizer = make_optimizer(model, settings_of("muon"))
    for step in range(4):
        give_gradients(model, step)
        convolutions = [p for p in model.parameters() if p.ndim == 4]
        for matrix, weight in zip(matrices, convolutions, strict=True):
            matrix.grad = weight.grad.flatten(1).clone()
        optimizer.step()
        reference.step()
        for matrix, weight in zip(matrices, convolutions, strict=True):
            assert torch.equal(weight.flatten(1), matrix)


def test_muon_moves_all_but_convolutions_as_adamw_does():
    model, plain = network(), network()
    take_steps(model, make_optimizer(model, settings_of("muon")), range(5))
    take_steps(plain, PLAIN["adamw"](decayed_and_free(plain)), range(5))
    for p, expected in zip(model.parameters(), plain.parameters(), strict=True):
        if p.ndim == 4:
            assert not torch.allclose(p, expected, rtol=1e-3, atol=1e-3)
        else:
            torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)


def test_muon_does_not_depend_on_the_layout_of_weights_and_gradients():
    models = {layout: network(layout) for layout in LAYOUTS}
    for layout, model in models.items():
        take_steps(model, make_optimizer(model, settings_of("muon")), range(4))
        weight = model[0].weight
        assert weight.is_contiguous(memory_format=LAYOUTS[layout])  # it stays in its layout
    assert same(*models.values())


def test_muon_follows_weights_that_are_changed_between_steps():
    model, other = network("channels_last"), network("channels_last")
    optimizer = make_optimizer(model, settings_of("muon"))
    with torch.no_grad():
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            one.add_(1)
            two.add_(1)
    take_steps(model, optimizer, range(1))
    take_steps(other, make_optimizer(other, settings_of("muon")), range(1))
    assert same(model, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_muon_trains_the_reference_network(layout):
    torch.manual_seed(0)
    model = ResNet18(3, 4).to(memory_format=LAYOUTS[layout])
    optimizer = make_optimizer(model, settings_of("muon"))
    x, y = torch.rand(12, 3, 16, 16), torch.arange(12) % 3
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
