import math

import pytest
import torch
import torch.nn.functional as F

from explain.controls import centred_gaussian, pooled, rearranged, sobel
from explain.maps import upsample
from explain.measures import high_frequency_share, total_variation


def random(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def test_rearranged_values_are_highest_where_the_order_is():
    cam = torch.tensor([[[5.0, 0.0, 1.0], [0.0, 7.0, 2.0]]])
    order = torch.tensor([[[-2.0, 30.0, 0.5], [0.25, -1.0, 8.0]]])
    # From the lowest order on: 0, 0, 1, 2, 5, 7.
    assert rearranged(cam, order).tolist() == [[[0.0, 7.0, 2.0], [1.0, 0.0, 5.0]]]


def test_of_equal_places_in_the_order_those_further_up_and_left_get_the_lower_values():
    cam, order = torch.tensor([[[4.0, 3.0], [2.0, 1.0]]]), torch.tensor([[[0.0, 0.0], [0.0, -1.0]]])
    assert rearranged(cam, order).tolist() == [[[2.0, 3.0], [4.0, 1.0]]]


def test_rearranged_maps_have_their_own_values_in_the_order_that_was_given():
    cam, order = random(50, 4, 3).sub(0.5).relu(), random(100, 4, 3)[50:]
    found = rearranged(cam, order)
    assert torch.equal(found.flatten(1).sort().values, cam.flatten(1).sort().values)
    sorted_by_order = found.flatten(1).gather(1, order.flatten(1).argsort())
    assert (sorted_by_order.diff(dim=1) >= 0).all()
    torch.testing.assert_close(rearranged(cam, cam), cam, rtol=0, atol=0)
    assert torch.equal(rearranged(cam, order * 100 - 7), found)
    assert torch.equal(found, torch.cat([rearranged(cam[i : i + 1], order[i : i + 1]) for i in range(50)]))


def test_in_any_order_each_value_comes_to_each_place_equally_often():
    cam = torch.tensor([[0.0, 0.0], [3.0, 1.0]]).expand(4000, 2, 2)
    found = rearranged(cam, random(4000, 2, 2))
    for value in (1.0, 3.0):
        torch.testing.assert_close((found == value).float().mean(0), torch.full((2, 2), 0.25), rtol=0, atol=0.03)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided"])
def test_maps_of_any_layout_are_rearranged(layout):
    cam, order = random(2, 4, 4), random(4, 4, 4)[2:]
    given = {"expanded": cam[:1].expand(2, 4, 4), "transposed": cam.mT, "strided": random(2, 8, 8)[:, ::2, ::2]}[layout]
    before = given.clone()
    assert torch.equal(rearranged(given, order), rearranged(given.contiguous(), order))
    assert torch.equal(rearranged(order, given), rearranged(order, given.contiguous()))
    assert torch.equal(given, before)


def test_pooled_maps_are_the_values_of_grad_cam_in_the_order_of_means_of_blocks():
    maps = torch.tensor([[[1.0, 3.0, 0.0, 4.0], [5.0, 7.0, 8.0, 0.0]]])
    # The blocks' means are 4 and 3, so 10 comes first; enlarged, pixels between lie a quarter of the way from each.
    assert pooled(maps, torch.tensor([[[2.0, 10.0]]])).tolist() == [[[10.0, 8.0, 4.0, 2.0]] * 2]
    assert pooled(maps.flip(2), torch.tensor([[[2.0, 10.0]]])).tolist() == [[[2.0, 4.0, 8.0, 10.0]] * 2]


def test_pooled_maps_of_the_same_order_are_grad_cam_as_it_is_shown():
    cam = random(3, 3, 4)
    blocks = cam.square().repeat_interleave(4, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(pooled(blocks, cam), upsample(cam, (12, 8)))


def test_pooled_maps_keep_their_shape_and_a_batch_is_its_maps_one_by_one():
    maps, cam = random(3, 12, 8), random(6, 3, 4)[3:]
    found = pooled(maps, cam)
    assert found.shape == maps.shape
    places = maps.view(3, 3, 4, 4, 2).mean((2, 4)).flatten(1).argsort(1).argsort(1)
    expected = cam.flatten(1).sort().values.gather(1, places).view(3, 1, 3, 4)
    expected = F.interpolate(expected, (12, 8), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found, torch.cat([pooled(maps[i : i + 1], cam[i : i + 1]) for i in range(3)]))


def test_pooled_maps_may_have_cells_of_no_whole_number_of_pixels():
    maps, cam = random(2, 9, 7), random(4, 4, 3)[2:]
    order = F.adaptive_avg_pool2d(maps, (4, 3))
    torch.testing.assert_close(pooled(maps, cam), upsample(rearranged(cam, order), (9, 7)))


@pytest.mark.parametrize("measure", [total_variation, high_frequency_share])
def test_coarse_maps_look_smooth_although_they_show_nothing(measure):
    fine, cam = random(20, 32, 32), random(40, 4, 4)[20:]
    noise = upsample(rearranged(cam, random(60, 4, 4)[40:]), (32, 32))
    for coarse in (noise, pooled(fine, cam)):
        assert measure(coarse).max() < measure(fine).min()
        assert measure(coarse).mean() < 0.3 * measure(fine).mean()


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
    images, cam = random(2, 3, 8, 8), random(2, 2, 2)
    for found, expected in (
        (sobel(images.to(dtype)), sobel(images)),
        (pooled(images[:, 0].to(dtype), cam.to(dtype)), pooled(images[:, 0], cam)),
        (rearranged(cam.to(dtype), images[:, 0, :2, :2]), rearranged(cam, images[:, 0, :2, :2])),
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
