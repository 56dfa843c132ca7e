import math

import pytest
import torch
import torch.nn.functional as F

from explain.controls import centred_gaussian, pooled, random_maps, sobel
from explain.maps import upsample
from explain.measures import high_frequency_share, total_variation


def random(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def test_pooled_maps_are_means_of_blocks_enlarged_again():
    maps = torch.tensor([[[1.0, 3.0, 0.0, 4.0], [5.0, 7.0, 8.0, 0.0]]])
    # The blocks' means are 4 and 3; bilinearly, the pixels between their centres lie a quarter of the way from each.
    assert pooled(maps, (1, 2)).tolist() == [[[4.0, 3.75, 3.25, 3.0]] * 2]


def test_pooled_maps_at_their_own_resolution_are_the_maps():
    maps = random(2, 6, 5)
    torch.testing.assert_close(pooled(maps, (6, 5)), maps)


def test_pooled_maps_keep_their_shape_and_a_batch_is_its_maps_one_by_one():
    maps = random(3, 12, 8)
    found = pooled(maps, (3, 4))
    assert found.shape == maps.shape
    blocks = maps.view(3, 3, 4, 4, 2).mean((2, 4))
    expected = F.interpolate(blocks[:, None], (12, 8), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found, torch.cat([pooled(maps[i : i + 1], (3, 4)) for i in range(3)]))


def test_random_maps_are_uniform_noise_enlarged():
    maps = random_maps(500, (4, 4), (4, 4), seed=3)
    assert maps.shape == (500, 4, 4)
    assert ((maps >= 0) & (maps < 1)).all()
    assert maps.mean().item() == pytest.approx(1 / 2, abs=0.02)
    assert maps.var().item() == pytest.approx(1 / 12, abs=0.005)
    torch.testing.assert_close(random_maps(500, (4, 4), (32, 24), seed=3), upsample(maps, (32, 24)))


def test_random_maps_depend_on_the_seed_alone():
    torch.manual_seed(0)
    first, state = random_maps(2, (4, 4), (8, 8), seed=1), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(random_maps(2, (4, 4), (8, 8), seed=1), first)
    assert not torch.equal(random_maps(2, (4, 4), (8, 8), seed=2), first)
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("measure", [total_variation, high_frequency_share])
def test_coarse_noise_looks_smooth_although_it_shows_nothing(measure):
    coarse, fine = random_maps(20, (4, 4), (32, 32)), random_maps(20, (32, 32), (32, 32))
    assert measure(coarse).max() < measure(fine).min()
    assert measure(coarse).mean() < 0.3 * measure(fine).mean()
    # So does the fine noise itself once it is as coarse, which is what pooled is for.
    assert measure(pooled(fine, (4, 4))).mean() < 0.3 * measure(fine).mean()


@pytest.mark.parametrize("transposed", [False, True])
def test_sobel_finds_an_edge_and_its_height(transposed):
    image = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(3, 4, 4)
    expected = torch.tensor([0.0, 4.0, 4.0, 0.0]).expand(1, 4, 4)  # 1 + 2 + 1 times the step
    if transposed:
        image, expected = image.mT, expected.mT
    torch.testing.assert_close(sobel(image[None]), expected)
    torch.testing.assert_close(sobel(0.5 - image[None] / 4), expected / 4)


def test_sobel_of_a_point_is_the_length_of_the_gradient():
    image = torch.zeros(1, 3, 5, 5)
    image[:, 0, 2, 2] = 3  # a mean over channels of 1
    ring = [[2**0.5, 2.0, 2**0.5], [2.0, 0.0, 2.0], [2**0.5, 2.0, 2**0.5]]
    expected = F.pad(torch.tensor([ring]), (1, 1, 1, 1))
    torch.testing.assert_close(sobel(image), expected)


def test_sobel_of_a_ramp_is_its_slope_and_of_one_colour_zero():
    down, across = torch.arange(6.0)[:, None], torch.arange(7.0)
    ramp = (3 * across + 4 * down).expand(1, 3, 6, 7)
    torch.testing.assert_close(sobel(ramp)[:, 1:-1, 1:-1], torch.full((1, 4, 5), 8 * 5.0))
    assert sobel(torch.full((2, 3, 6, 7), 0.25)).tolist() == torch.zeros(2, 6, 7).tolist()


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1)])
def test_controls_keep_the_type_they_are_given(dtype, atol):
    images = random(2, 3, 8, 8)
    for found, expected in (
        (sobel(images.to(dtype)), sobel(images)),
        (pooled(images[:, 0].to(dtype), (2, 2)), pooled(images[:, 0], (2, 2))),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=atol, check_dtype=False)


def test_sobel_of_a_batch_is_that_of_its_images_one_by_one():
    images = random(3, 3, 8, 6)
    torch.testing.assert_close(sobel(images), torch.cat([sobel(image[None]) for image in images]))


def test_the_centred_gaussian_is_a_bell_in_the_middle():
    found = centred_gaussian(2, (2, 4), sigma=0.25)
    # Centres of pixels lie 1/4 from the middle in rows and 3/8 and 1/8 in columns: 1, 1.5 and 0.5 sigma.
    outer, inner = math.exp(-(1 + 2.25) / 2), math.exp(-(1 + 0.25) / 2)
    torch.testing.assert_close(found, torch.tensor([outer, inner, inner, outer]).expand(2, 2, 4))


def test_the_centred_gaussian_has_the_spread_asked_for_and_its_maximum_in_the_middle():
    for sigma in (0.05, 0.1):
        (bell,) = centred_gaussian(1, (101, 51), sigma)
        assert bell.argmax() == 50 * 51 + 25
        assert bell.max() == 1
        torch.testing.assert_close(bell, bell.flip(0, 1))
        rows = bell.sum(1) / bell.sum()
        spread = (rows * (torch.arange(101) - 50).square()).sum().sqrt() / 101
        assert spread.item() == pytest.approx(sigma, rel=1e-3)
