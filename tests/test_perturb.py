import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from explain import explain
from explain.perturb import (
    blurred,
    deletion,
    insertion,
    max_sensitivity,
    patch_drops,
    patch_fidelity,
    randomisation_check,
)
from trainables import ResNet18


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class Weighing(nn.Module):
    """Two logits: the sum of weighted pixels, and 0. The first's probability is that sum's sigmoid."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        score = (x * self.weights).sum((1, 2, 3))
        return torch.stack([score, torch.zeros_like(score)], dim=1)


class Raising(ResNet18):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise RuntimeError("forward gave up")


def resnet(kind: type[ResNet18] = ResNet18) -> ResNet18:
    torch.manual_seed(0)
    return kind(num_classes=5, width=4, dropout=0.5)


def by_loop(model: nn.Module, begin: Tensor, end: Tensor, scores: Tensor, target: int) -> float:
    """The area for one image (C, H, W), a pixel at a time."""
    height, width = scores.shape
    pixels = sorted(((i, j) for i in range(height) for j in range(width)), key=lambda p: -scores[p].item())
    now, curve = begin.clone(), []
    for pixel in [None, *pixels]:
        if pixel is not None:
            now[:, pixel[0], pixel[1]] = end[:, pixel[0], pixel[1]]
        with torch.no_grad():
            curve.append(model(now[None]).softmax(1)[0, target].item())
    return sum((a + b) / 2 for a, b in pairwise(curve)) / len(pixels)


# Of a white image the odds are 3 * 2 * 1 * 1 = 6, so the probability is 6 / 7; black pixels are odds of 1.
ODDS = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
GOOD, BAD = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]), torch.tensor([[[2.0, 1.0], [0.0, 3.0]]])


@pytest.mark.parametrize(
    ("maps", "steps", "curve"),
    [
        (GOOD, 4, [6 / 7, 2 / 3, 1 / 2, 1 / 2, 1 / 2]),
        (BAD, 4, [6 / 7, 6 / 7, 6 / 7, 3 / 4, 1 / 2]),
        (GOOD, 2, [6 / 7, 1 / 2, 1 / 2]),
        (BAD, 2, [6 / 7, 6 / 7, 1 / 2]),
        (GOOD, 1, [6 / 7, 1 / 2]),
        (-1000 * BAD, 4, [6 / 7, 2 / 3, 1 / 2, 1 / 2, 1 / 2]),
    ],
)
@pytest.mark.parametrize("target", [0, 1])
def test_deletion_of_a_tiny_network_is_that_computed_by_hand(maps, steps, curve, target):
    found = deletion(Weighing(ODDS.log()), torch.ones(1, 1, 2, 2), maps, torch.tensor([target]), steps)
    area = sum((a + b) / 2 for a, b in pairwise(curve)) / steps
    torch.testing.assert_close(found, torch.tensor([[area, 1 - area][target]]))


@pytest.mark.parametrize(("maps", "after"), [([[4.0, 3.0], [2.0, 1.0]], 1), ([[1.0, 2.0], [3.0, 4.0]], 4)])
def test_insertion_of_a_tiny_network_is_that_computed_by_hand(maps, after):
    # Mirrored, a row 1, 0 is 0, 1, 0, 1; under weights e, 1, e its first pixel becomes 1 / (1 + 2 e).
    image = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    begin = 1 / (1 + 3 ** (-1 / (1 + 2 * math.exp(-1 / 50))))
    curve = [begin] * after + [3 / 4] * (5 - after)
    model = Weighing(torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log())
    found = insertion(model, image, torch.tensor([maps]), torch.tensor([0]), steps=4)
    torch.testing.assert_close(found, torch.tensor([sum((a + b) / 2 for a, b in pairwise(curve)) / 4]))


@pytest.mark.parametrize("measure", [deletion, insertion])
@pytest.mark.parametrize("signed", [False, True])
def test_areas_are_those_of_one_pixel_after_the_other(measure, signed):
    images, maps, target = random(3, 3, 4, 5), random(3, 4, 5, seed=1) - 0.5 * signed, torch.tensor([4, 0, 2])
    maps[1] = (maps[1] * 4).floor()  # with ties
    model = resnet().eval()
    found = measure(model, images, maps, target, steps=20)
    pairs = [(image, torch.zeros_like(image)) for image in images]
    if measure is insertion:
        pairs = list(zip(blurred(images), images, strict=True))
    expected = [by_loop(model, *pairs[i], maps[i], int(target[i])) for i in range(3)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-5)
    single = [measure(model, images[i : i + 1], maps[i : i + 1], target[i : i + 1], 20) for i in range(3)]
    torch.testing.assert_close(found, torch.cat(single), rtol=0, atol=1e-5)


def test_a_good_order_beats_its_reverse_and_noise_lies_between():
    weights, images = torch.linspace(-1, 1, 64).view(8, 8), random(5, 3, 8, 8)
    model, target = Weighing(weights), torch.zeros(5, dtype=torch.int64)
    good = (images.sum(1) * weights).expand(5, 8, 8)
    noise = random(5, 8, 8, seed=2)
    assert (deletion(model, images, good, target) < deletion(model, images, noise, target)).all()
    assert (deletion(model, images, noise, target) < deletion(model, images, -good, target)).all()
    better = ((images - blurred(images)).sum(1) * weights).expand(5, 8, 8)
    assert (insertion(model, images, better, target) > insertion(model, images, noise, target)).all()
    assert (insertion(model, images, noise, target) > insertion(model, images, -better, target)).all()


@pytest.mark.parametrize("measure", [deletion, insertion])
def test_of_equal_values_those_further_up_and_left_come_first(measure):
    images, target, model = random(2, 3, 4, 4), torch.tensor([0, 1]), Weighing(random(4, 4, seed=3))
    falling = torch.arange(16.0, 0, -1).view(1, 4, 4).expand(2, 4, 4)
    found = measure(model, images, torch.full((2, 4, 4), 0.3), target)
    assert torch.equal(found, measure(model, images, falling, target))
    assert not torch.equal(found, measure(model, images, -falling, target))


def test_ties_of_a_large_map_go_up_left_first_too():
    model = Weighing(torch.zeros(32, 32))
    deletion(model, torch.ones(1, 3, 32, 32), torch.zeros(1, 32, 32), torch.tensor([0]), steps=32)
    for step, x in enumerate(model.seen):
        assert not x[..., :step, :].any()
        assert x[..., step:, :].all()


@pytest.mark.parametrize("steps", [1, 7, 16, 32, 100])
def test_each_step_changes_as_many_pixels_as_the_others(steps):
    model, maps = Weighing(torch.zeros(8, 8)), random(2, 8, 8)
    deletion(model, torch.ones(2, 3, 8, 8), maps, torch.tensor([0, 0]), steps)
    assert len(model.seen) == steps + 1
    black = torch.stack([(x == 0).all(1).sum((1, 2)) for x in model.seen])
    assert black[0].tolist() == [0, 0]
    assert black[-1].tolist() == [64, 64]
    torch.testing.assert_close(black.diff(dim=0).float(), torch.full((steps, 2), 64 / steps), rtol=0, atol=1)


def test_insertion_goes_from_the_blurred_image_to_the_image():
    model, images = Weighing(torch.zeros(8, 8)), random(2, 3, 8, 8)
    insertion(model, images, random(2, 8, 8), torch.tensor([0, 0]))
    assert torch.equal(model.seen[0], blurred(images))
    assert torch.equal(model.seen[-1], images)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 2, 5), (1, 3, 32, 32), (1, 4, 50, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blurring_keeps_one_colour(shape, dtype):
    images = torch.full(shape, 0.3, dtype=dtype)
    torch.testing.assert_close(blurred(images), images)


def test_a_blurred_point_is_a_gaussian():
    images = torch.zeros(1, 2, 25, 31)
    images[0, 1, 12, 15] = 2
    squares = (torch.arange(25.0)[:, None] - 12) ** 2, (torch.arange(31.0) - 15) ** 2
    bell = (-(squares[0] + squares[1]) / (2 * 1.5**2)).exp() * ((squares[0] <= 16) & (squares[1] <= 16))
    found = blurred(images, sigma=1.5)
    # Pixels further away than 3 sigma, which is rounded to 4 pixels, are left out.
    torch.testing.assert_close(found, torch.stack([torch.zeros(25, 31), 2 * bell / bell.sum()])[None])


def test_blurring_mirrors_at_the_borders():
    image = random(1, 3, 12, 10)
    padded = np.pad(image.double().numpy(), ((0, 0), (0, 0), (6, 6), (6, 6)), mode="reflect")
    weights = np.exp(-(np.arange(-6, 7) ** 2) / 8)
    kernel = np.outer(weights, weights) / weights.sum() ** 2
    windows = np.lib.stride_tricks.sliding_window_view(padded, (13, 13), axis=(2, 3))
    expected = torch.from_numpy((windows * kernel).sum((-2, -1)))
    torch.testing.assert_close(blurred(image, sigma=2.0), expected, rtol=0, atol=1e-6, check_dtype=False)


def test_a_batch_is_blurred_as_its_images_one_by_one():
    images = random(3, 3, 16, 12)
    torch.testing.assert_close(blurred(images), torch.cat([blurred(image[None]) for image in images]))


def test_patch_drops_are_the_sums_of_a_linear_network_over_patches():
    image = torch.tensor([[1.0, 2.0, 0.0, 1.0], [3.0, 4.0, 1.0, 0.0]]).expand(1, 1, 2, 4)
    weights = torch.tensor([[1.0, 1.0, 5.0, -2.0], [1.0, 0.5, 3.0, 7.0]])
    model = Weighing(weights)
    assert patch_drops(model, image, torch.tensor([0]), 2).tolist() == [[8.0, 1.0]]
    assert patch_drops(model, image, torch.tensor([1]), 2).tolist() == [[0.0, 0.0]]
    assert patch_drops(model, image, torch.tensor([0]), 1).tolist() == [[1.0, 2.0, 0.0, -2.0, 3.0, 2.0, 3.0, 0.0]]


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patch_fidelity_of_a_linear_network_is_exact(patch):
    images, weights = random(4, 3, 8, 12), random(8, 12, seed=1) - 0.5
    model, target = Weighing(weights), torch.tensor([0, 0, 0, 0])
    true = images.sum(1) * weights
    drops = patch_drops(model, images, target, patch)
    assert drops.shape == (4, 96 // patch**2)
    sums = true.view(4, 8 // patch, patch, 12 // patch, patch).sum((2, 4)).flatten(1)
    torch.testing.assert_close(drops, sums, rtol=0, atol=1e-4)
    apart = sums.sort(dim=1).values.diff(dim=1).min()
    assert apart > 1e-5, "ranks would hang on rounding"
    torch.testing.assert_close(patch_fidelity(true, drops), torch.ones(4))
    torch.testing.assert_close(patch_fidelity(-true, drops), -torch.ones(4))
    torch.testing.assert_close(patch_fidelity(true * 1e20, drops * 1e-20), torch.ones(4))
    assert patch_fidelity(random(4, 8, 12, seed=2), drops).abs().max() < 0.9


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_patch_fidelity_takes_maps_of_other_types(dtype):
    maps, drops = torch.arange(16.0).view(1, 4, 4), torch.tensor([[1.0, 2.0, 4.0, 3.0]])
    torch.testing.assert_close(patch_fidelity(maps.to(dtype), drops), torch.tensor([0.8]))  # 1 - 6 * 2 / (4 * 15)


def test_patch_fidelity_where_all_patches_are_alike_is_nan():
    maps, drops = random(2, 4, 4), random(2, 4)
    drops[0] = 0.5
    maps[1] = 0.25
    assert patch_fidelity(maps, drops).isnan().all()


@pytest.mark.parametrize(("patch", "height", "width"), [(3, 8, 9), (3, 9, 8), (16, 8, 8)])
def test_patches_that_do_not_fill_the_image_are_refused(patch, height, width):
    with pytest.raises(ValueError, match=f"patches of {patch} pixels do not fill images of {height} x {width}"):
        patch_drops(resnet(), random(1, 3, height, width), torch.tensor([0]), patch)


def test_patch_drops_of_a_batch_are_those_of_its_images_one_by_one():
    model, images, target = resnet(), random(3, 3, 16, 8), torch.tensor([4, 0, 2])
    single = [patch_drops(model, images[i : i + 1], target[i : i + 1], 4) for i in range(3)]
    torch.testing.assert_close(patch_drops(model, images, target, 4), torch.cat(single), rtol=0, atol=1e-5)


def state(model: nn.Module) -> dict[str, object]:
    return {
        "training": [module.training for module in model.modules()],
        "grad": [p.grad for p in model.parameters()],
        "tensors": {name: t.tolist() for name, t in model.state_dict().items()},
        "grad mode": torch.is_grad_enabled(),
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("ask", ["deletion", "insertion", "patch_drops"])
@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("training", [False, True, "mixed"])
def test_a_network_is_asked_in_eval_mode_and_is_afterwards_as_it_was(ask, raises, training):
    model = resnet(Raising if raises else ResNet18).train(bool(training))
    if training == "mixed":
        model.layer1.eval()
    images, maps, target = random(2, 3, 8, 8), random(2, 8, 8), torch.tensor([1, 3])
    call = {
        "deletion": lambda m: deletion(m, images, maps, target, 3),
        "insertion": lambda m: insertion(m, images, maps, target, 3),
        "patch_drops": lambda m: patch_drops(m, images, target, 4),
    }[ask]
    before, pixels = copy.deepcopy(state(model)), images.clone()
    if raises:
        with pytest.raises(RuntimeError, match="forward gave up"):
            call(model)
    else:
        found = call(model)
        assert not found.requires_grad
    assert state(model) == before
    assert torch.equal(images, pixels)
    if not raises:
        assert torch.equal(found, call(resnet().eval()))


def test_a_map_that_does_not_change_has_no_sensitivity():
    found = max_sensitivity(lambda x: torch.ones_like(x[:, 0]), random(3, 3, 4, 4))
    assert found.tolist() == [0.0, 0.0, 0.0]


def test_sensitivity_is_the_largest_relative_change_over_draws():
    seen = []

    def make_maps(x: Tensor) -> Tensor:
        seen.append(x)
        return x.mean(1) ** 2

    images = random(3, 3, 4, 5)
    found = max_sensitivity(make_maps, images, radius=0.1, draws=6)
    assert len(seen) == 7
    assert torch.equal(seen[0], images)
    maps = [(x.double().mean(1) ** 2).flatten(1).numpy() for x in seen]
    changes = [np.linalg.norm(m - maps[0], axis=1) / np.linalg.norm(maps[0], axis=1) for m in maps[1:]]
    assert found.tolist() == pytest.approx(np.max(changes, axis=0).tolist(), rel=1e-4)
    noise = torch.stack(seen[1:]) - images
    assert 0.098 < noise.max() < 0.1001
    assert -0.1001 < noise.min() < -0.098
    assert noise.mean().abs() < 0.01
    assert len({x.sum().item() for x in noise}) == 6


def test_sensitivity_of_a_map_that_is_zero_everywhere_is_nan_or_infinite():
    images = torch.zeros(2, 3, 4, 4)
    images[1] = 1
    assert max_sensitivity(lambda x: x[:, 0], images)[0] == math.inf
    assert max_sensitivity(lambda x: 0 * x[:, 0], images).isnan().all()
    assert max_sensitivity(lambda x: x[:, 0], images)[1].isfinite()


def test_sensitivity_of_a_linear_map_grows_with_the_radius_and_lies_within_its_bounds():
    images = 1 + random(4, 3, 8, 8)
    length = images[:, 0].flatten(1).norm(dim=1)
    small, large = (max_sensitivity(lambda x: x[:, 0], images, radius) for radius in (0.01, 0.04))
    torch.testing.assert_close(large, 4 * small, rtol=1e-3, atol=0)
    assert (small <= 0.01 * 8 / length).all()
    # Noise of one draw has a root mean square of radius / sqrt(3); the largest of ten is a little above.
    assert (small > 0.01 * 8 / length / 3**0.5).all()
    scaled = max_sensitivity(lambda x: -1e6 * x[:, 0], images, 0.01)
    torch.testing.assert_close(scaled, small, rtol=1e-4, atol=0)


def test_sensitivity_depends_on_the_seed_alone():
    images, rng = random(2, 3, 4, 4), torch.get_rng_state()
    first = max_sensitivity(lambda x: x[:, 0], images, seed=1)
    assert torch.equal(torch.get_rng_state(), rng)
    torch.rand(7)
    assert torch.equal(max_sensitivity(lambda x: x[:, 0], images, seed=1), first)
    assert not torch.equal(max_sensitivity(lambda x: x[:, 0], images, seed=2), first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_of_other_types_keep_them(dtype):
    images, maps, target = random(2, 3, 8, 8), random(2, 8, 8), torch.tensor([0, 1])
    rough = images.to(dtype)
    model = Weighing(torch.ones(8, 8, dtype=dtype) / 64)
    fine = Weighing(torch.ones(8, 8) / 64)
    for measure in (deletion, insertion):
        model.seen.clear()
        found = measure(model, rough, maps, target)
        assert {x.dtype for x in model.seen} == {dtype}
        torch.testing.assert_close(found, measure(fine, images, maps, target), rtol=0, atol=0.01, check_dtype=False)
    found = max_sensitivity(lambda x: x[:, 0], rough, radius=0.2)
    expected = max_sensitivity(lambda x: x[:, 0], images, radius=0.2)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01, check_dtype=False)


PARTS = ["head", "layer4", "layer3", "layer2", "layer1", "stem"]


def saliency(network: nn.Module) -> Tensor:
    return explain(network, random(3, 3, 16, 16), torch.tensor([0, 1, 2])).saliency


def test_parts_are_randomised_from_the_top_and_stay_so():
    model, seen = resnet(), []

    def make_maps(network: nn.Module) -> Tensor:
        seen.append({name: t.clone() for name, t in network.state_dict().items()})
        return random(2, 4, 4)

    assert list(randomisation_check(model, make_maps)) == PARTS
    assert len(seen) == 7
    weights = [name for name, p in model.named_parameters() if p.ndim > 1 or name == "head.bias"]
    for step, network in enumerate(seen):
        for name in weights:
            new = name.split(".")[0] in PARTS[:step]
            assert torch.equal(network[name], model.state_dict()[name]) != new
            if step > 0 and name.split(".")[0] in PARTS[: step - 1]:
                assert torch.equal(network[name], seen[step - 1][name])


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_randomised_network_is_a_copy(raises, training):
    model = resnet().train(training)
    with torch.no_grad():
        model.stem[1].running_mean.fill_(0.3)
    before = copy.deepcopy(state(model))

    def give_up(network: nn.Module) -> Tensor:
        if not torch.equal(network.head.weight, model.head.weight):
            raise RuntimeError("maps gave up")
        return saliency(network)

    if raises:
        with pytest.raises(RuntimeError, match="maps gave up"):
            randomisation_check(model, give_up)
    else:
        randomisation_check(model, saliency)
    assert state(model) == before


def test_maps_that_need_the_network_change_with_it_and_others_do_not():
    model = resnet()
    of_network = randomisation_check(model, saliency)
    assert list(of_network) == PARTS
    assert all(r.shape == (3,) for r in of_network.values())
    assert of_network["stem"].abs().max() < 0.5
    assert of_network["head"].mean() > of_network["stem"].mean()
    of_image = randomisation_check(model, lambda network: random(3, 8, 8))
    assert list(of_image) == PARTS
    for r in of_image.values():
        torch.testing.assert_close(r, torch.ones(3))


def test_randomisation_depends_on_the_seed_alone():
    first = randomisation_check(resnet(), saliency, seed=1)
    model = resnet()
    torch.manual_seed(99)
    again, other = randomisation_check(model, saliency, seed=1), randomisation_check(model, saliency, seed=2)
    for name in PARTS:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


def test_similarity_is_the_rank_correlation_with_the_maps_of_the_network_as_it_was():
    ranks = {0: [1.0, 2.0, 3.0, 4.0], 1: [1.0, 2.0, 4.0, 3.0], 2: [4.0, 3.0, 2.0, 1.0]}
    calls = iter(range(3))
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    found = randomisation_check(model, lambda network: torch.tensor([ranks[next(calls)]]).view(1, 2, 2))
    assert list(found) == ["2", "0"]
    torch.testing.assert_close(torch.cat(list(found.values())), torch.tensor([0.8, -1.0]))


class Own(nn.Module):
    """A part with a parameter of its own, which nothing initializes anew."""

    def __init__(self, deep: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.norm = nn.LayerNorm(4)
        self.below = Own() if deep else nn.Identity()


class Half(Own):
    """It initializes its own parameter anew, and not those of its parts."""

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)


def not_called(network: nn.Module) -> Tensor:
    raise AssertionError("maps were made of a network that cannot be randomised")


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Own(), "Own: cannot initialize scale anew"),
        (nn.Sequential(nn.Linear(4, 4), Own(deep=True)), r"Sequential: .* 1\.scale, 1\.below\.scale anew"),
        (nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4)), r"0\.in_proj_weight, 0\.in_proj_bias anew"),
        (nn.Sequential(Half(deep=True)), r"Sequential: cannot initialize 0\.below\.scale anew"),
        (nn.Sequential(Own().requires_grad_(False)), r"Sequential: cannot initialize 0\.scale anew"),
    ],
)
def test_a_network_with_parameters_that_cannot_be_initialized_is_refused_naming_them(model, names):
    before = copy.deepcopy(state(model))
    with pytest.raises(ValueError, match=names):
        randomisation_check(model, not_called)
    assert state(model) == before


def test_a_parameter_of_two_layers_is_initialized_with_these():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert list(randomisation_check(model, lambda network: network[0].weight.detach()[None])) == ["2", "0"]


def test_a_network_with_layers_of_its_own_that_can_be_initialized_is_randomised():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4))

        def reset_parameters(self) -> None:
            nn.init.normal_(self.weight)

    model, seen = nn.Sequential(nn.Linear(4, 4), Scale()), []

    def make_maps(network: nn.Module) -> Tensor:
        seen.append(network[1].weight.detach().clone())
        return random(2, 4, 4)

    assert list(randomisation_check(model, make_maps)) == ["1", "0"]
    assert not seen[0].any()
    assert seen[1].any()
    assert torch.equal(seen[2], seen[1])


def test_maps_that_are_nan_of_one_image_have_no_similarity_for_it():
    def make_maps(network: nn.Module) -> Tensor:
        maps = random(3, 4, 4)
        maps[1, 2, 2] = math.nan
        return maps

    for r in randomisation_check(resnet(), make_maps).values():
        assert r.isnan().tolist() == [False, True, False]
