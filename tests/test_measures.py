import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from explain.measures import (
    energy_lift,
    energy_on_object,
    entropy,
    gini,
    high_frequency_share,
    pointing_game,
    rank_accuracy,
    rank_correlation,
    total_variation,
)

ON_OBJECT = [energy_on_object, energy_lift, pointing_game, partial(pointing_game, tolerance=1), rank_accuracy]
OF_MAP = [gini, entropy, total_variation, high_frequency_share]


def random(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def test_energy_is_the_share_of_the_sum_that_lies_on_the_object():
    maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 5.0]], [[0.0, 0.0], [0.0, 5.0]]])
    masks = torch.tensor([[[1, 0], [0, 1]], [[0, 0], [0, 1]], [[1, 1], [1, 0]]], dtype=torch.bool)
    assert energy_on_object(maps, masks).tolist() == [0.5, 1.0, 0.0]


def test_energy_lies_between_0_and_1_and_the_rest_on_the_background():
    maps, masks = random(50, 8, 8) ** 4, random(50, 1, 8).expand(50, 8, 8) > 0.6
    energy = energy_on_object(maps, masks)
    assert ((energy >= 0) & (energy <= 1)).all()
    torch.testing.assert_close(energy + energy_on_object(maps, ~masks), torch.ones(50))
    assert energy_on_object(maps, torch.ones_like(masks)).tolist() == [1.0] * 50


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_energy_does_not_depend_on_the_scale_of_a_map(scale):
    maps, masks = random(3, 8, 8), random(3, 8, 8) > 0.5
    torch.testing.assert_close(energy_on_object(maps * scale, masks), energy_on_object(maps, masks), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [1e-6, 1.0, 300.0])
def test_a_uniform_map_scores_the_area_of_the_object(value):
    masks = random(4, 6, 5) > 0.7
    energy = energy_on_object(torch.full((4, 6, 5), value), masks)
    torch.testing.assert_close(energy, masks.float().mean((1, 2)))


def test_a_map_that_is_zero_everywhere_has_no_energy():
    maps = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)])
    energy = energy_on_object(maps, torch.ones(2, 4, 4, dtype=torch.bool))
    assert math.isnan(energy[0])
    assert energy[1] == 1


@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        (torch.ones(2, 4, 4), torch.ones(2, 8, 8, dtype=torch.bool), r"\(2, 4, 4\) and masks \(2, 8, 8\)"),
        (torch.ones(1, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool), r"\(1, 4, 4\) and masks \(2, 4, 4\)"),
        (torch.tensor([[[1.0, -0.1]]]), torch.ones(1, 1, 2, dtype=torch.bool), "negative"),
    ],
)
def test_maps_that_do_not_fit_are_refused(maps, masks, message):
    with pytest.raises(ValueError, match=message):
        energy_on_object(maps, masks)


def mask(*rows: list[int]) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.bool)


def measured(measure, maps: torch.Tensor) -> torch.Tensor:
    """Any of the measures of these maps, with the same masks each time where it takes some."""
    masks = torch.rand(maps.shape, generator=torch.Generator().manual_seed(1)) > 0.7
    return measure(maps, masks) if measure in ON_OBJECT else measure(maps)


@pytest.mark.parametrize(
    ("masks", "lift"),
    [
        (mask([1, 0], [0, 1]), 1.0),  # half of the energy on half of the image
        (mask([0, 0], [0, 1]), 1.6),
        (mask([1, 0], [0, 0]), 0.4),
        (mask([1, 1], [1, 1]), 1.0),
    ],
)
def test_lift_is_energy_over_the_area_of_the_object(masks, lift):
    torch.testing.assert_close(energy_lift(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), masks), torch.tensor([lift]))


def test_a_uniform_map_has_a_lift_of_1_and_one_on_the_object_alone_the_inverse_of_its_area():
    masks = random(4, 6, 5) > 0.7
    torch.testing.assert_close(energy_lift(torch.full((4, 6, 5), 0.3), masks), torch.ones(4))
    torch.testing.assert_close(energy_lift(masks * random(4, 6, 5), masks), 30 / masks.sum((1, 2)))


@pytest.mark.parametrize(
    ("masks", "hit"),
    [
        (mask([0, 0, 0], [0, 0, 1]), 0.5),  # one of two equal maxima
        (mask([0, 1, 0], [0, 0, 1]), 1.0),
        (mask([1, 0, 1], [1, 1, 0]), 0.0),
    ],
)
def test_the_pointing_game_asks_where_the_maximum_lies_and_shares_among_equals(masks, hit):
    assert pointing_game(torch.tensor([[[1.0, 4.0, 2.0], [0.0, 3.0, 4.0]]]), masks).tolist() == [hit]


@pytest.mark.parametrize("measure", [energy_on_object, energy_lift, pointing_game, rank_accuracy])
def test_without_an_object_or_with_an_infinite_value_nothing_is_known(measure):
    maps, inside = torch.ones(3, 4, 4), torch.ones(3, 4, 4, dtype=torch.bool)
    maps[0, 1, 1], inside[1] = float("inf"), False
    assert measure(maps, inside).isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("measure", [energy_on_object, energy_lift, pointing_game, rank_accuracy])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_masks_that_are_not_bool_are_refused(measure, dtype):
    with pytest.raises(ValueError, match=f"masks must be bool, not {dtype}"):
        measure(torch.ones(1, 4, 4), torch.full((1, 4, 4), 255).to(dtype))


@pytest.mark.parametrize(("tolerance", "hit"), [(0, 0.0), (1, 0.0), (2, 1.0), (3, 1.0)])
def test_tolerance_widens_the_object_on_all_sides_and_diagonally(tolerance, hit):
    maps, masks = torch.zeros(4, 7, 7), torch.zeros(4, 7, 7, dtype=torch.bool)
    masks[:, 3, 3] = True
    for i, (row, column) in enumerate([(1, 1), (1, 5), (5, 1), (5, 5)]):
        maps[i, row, column] = 1
    assert pointing_game(maps, masks, tolerance).tolist() == [hit] * 4


@pytest.mark.parametrize(
    ("masks", "share"),
    [
        (mask([1, 1], [0, 0]), 0.75),  # of the two highest, 4 is inside; of the two 3s, one counts, and half are inside
        (mask([0, 1], [1, 0]), 0.5),
        (mask([0, 0], [0, 1]), 0.0),
        (mask([1, 0], [0, 0]), 1.0),
        (mask([1, 1], [1, 0]), 1.0),
        (mask([1, 1], [1, 1]), 1.0),
        (mask([0, 0], [0, 0]), math.nan),
    ],
)
def test_rank_accuracy_is_the_share_of_as_many_highest_pixels_as_the_object_has(masks, share):
    found = rank_accuracy(torch.tensor([[[4.0, 3.0], [3.0, 1.0]]]), masks)
    torch.testing.assert_close(found, torch.tensor([share]), equal_nan=True)


def test_rank_accuracy_with_ties_is_that_of_random_orders_of_them_on_average():
    maps, masks = (random(1, 4, 4) * 3).floor() + 1, random(1, 4, 4).flip(1) > 0.6
    generator = torch.Generator().manual_seed(0)
    untied = maps + 0.5 * torch.rand(20_000, 4, 4, generator=generator)
    expected = rank_accuracy(untied, masks.expand(20_000, 4, 4))
    assert expected.unique().numel() > 1
    torch.testing.assert_close(rank_accuracy(maps, masks)[0], expected.mean(), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("measure", "maps", "expected"),
    [
        (gini, [[1.0, 2.0], [3.0, 4.0]], 0.25),  # (-3 * 1 - 1 * 2 + 1 * 3 + 3 * 4) / 4 / 10
        (gini, [[4.0, 1.0], [3.0, 2.0]], 0.25),
        (gini, [[0.0, 1.0], [1.0, 0.0]], 0.5),
        (entropy, [[1.0, 1.0], [2.0, 0.0]], 0.75),  # 1.5 bits of 2
        (entropy, [[1.0, 0.0], [0.0, 1.0]], 0.5),
        (total_variation, [[1.0, 2.0], [3.0, 4.0]], 1.2),  # (1 + 2) / 2.5
        (total_variation, [[0.0, 0.0, 3.0], [0.0, 6.0, 0.0]], 4.5),  # (15 / 4 + 9 / 3) / 1.5
        (high_frequency_share, [[1.0, 2.0, 3.0, 4.0]], 0.2),  # powers 8, 4, 8 at frequencies 1/4, 1/2, -1/4
    ],
)
def test_measures_of_small_maps_are_those_computed_by_hand(measure, maps, expected):
    torch.testing.assert_close(measure(torch.tensor([maps])), torch.tensor([expected]))


def test_what_counts_as_a_high_frequency_can_be_chosen():
    maps = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    found = [high_frequency_share(maps, above).item() for above in (0.0, 0.24, 0.25, 0.5)]
    assert found == pytest.approx([1.0, 1.0, 0.2, 0.0])


def test_gini_is_half_the_relative_mean_difference_of_two_pixels():
    values = random(5, 6, 7).double() ** 3
    flat = values.flatten(1)
    expected = (flat[:, :, None] - flat[:, None]).abs().mean((1, 2)) / (2 * flat.mean(1))
    torch.testing.assert_close(gini(values), expected, rtol=0, atol=1e-7)


def test_entropy_and_frequencies_are_those_of_numpy():
    maps = random(3, 6, 9) ** 2
    rows, columns = np.fft.fftfreq(6), np.fft.fftfreq(9)
    for one, found, share in zip(maps.double().numpy(), entropy(maps), high_frequency_share(maps), strict=True):
        p = one / one.sum()
        assert found.item() == pytest.approx(-(p * np.log(p)).sum() / np.log(54), abs=1e-6)
        power = np.abs(np.fft.fft2(one)) ** 2
        power[0, 0] = 0
        high = [(i, j) for i in range(6) for j in range(9) if np.hypot(rows[i], columns[j]) > 0.25]
        assert share.item() == pytest.approx(sum(power[i, j] for i, j in high) / power.sum(), abs=1e-6)


@pytest.mark.parametrize("shape", [(2, 2), (5, 7), (32, 32)])
def test_one_pixel_and_all_pixels_alike_are_the_limits_of_gini_and_entropy(shape):
    one = torch.zeros(1, *shape)
    one[0, -1, 0] = 0.3
    alike = torch.full((1, *shape), 0.3)
    pixels = shape[0] * shape[1]
    assert [gini(one).item(), entropy(one).item()] == pytest.approx([1 - 1 / pixels, 0.0], abs=1e-6)
    assert [gini(alike).item(), entropy(alike).item()] == pytest.approx([0.0, 1.0], abs=1e-6)
    between = 0.01 + random(20, *shape)
    assert ((gini(between) > 0) & (gini(between) < 1 - 1 / pixels)).all()
    assert ((entropy(between) > 0) & (entropy(between) < 1)).all()


def test_a_checkerboard_is_of_high_frequency_a_wave_of_low_and_a_ramp_nearly():
    steps = torch.arange(32)
    checkerboard = ((steps[:, None] + steps) % 2).float()
    wave = 1 + (2 * math.pi * steps / 32).cos().expand(32, 32)
    ramp = steps.float().expand(32, 32)
    share = high_frequency_share(torch.stack([checkerboard, wave, ramp]))
    torch.testing.assert_close(share[:2], torch.tensor([1.0, 0.0]), rtol=0, atol=1e-6)
    # The power of a ramp at frequency k / n is in proportion to 1 / sin^2 of pi k / n, as it is taken to repeat itself.
    power = [1 / math.sin(math.pi * k / 32) ** 2 for k in range(1, 32)]
    assert share[2].item() == pytest.approx(sum(power[8:23]) / sum(power), abs=1e-5)
    assert share[2] < 0.07


@pytest.mark.parametrize("value", [1e-6, 0.1, 1 / 3, 1.0, 300.7])
@pytest.mark.parametrize("shape", [(5, 6), (7, 7), (32, 32)])
def test_a_map_of_one_value_does_not_vary_and_has_no_frequencies(shape, value):
    maps = torch.full((1, *shape), value)
    assert total_variation(maps).tolist() == [0.0]
    assert math.isnan(high_frequency_share(maps))


@pytest.mark.parametrize("measure", [*ON_OBJECT, *OF_MAP])
def test_every_measure_of_a_map_that_is_zero_everywhere_is_nan(measure):
    maps = random(3, 6, 6)
    maps[1] = 0
    assert measured(measure, maps).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("measure", [*ON_OBJECT, *OF_MAP])
@pytest.mark.parametrize("place", [(0, 0), (2, 3), (5, 5), ...])
def test_every_measure_of_a_map_with_nan_anywhere_is_nan(measure, place):
    maps = random(4, 6, 6)
    maps[1][place] = maps[3][place] = math.nan
    maps[3, 0, 1] = math.nan
    assert measured(measure, maps).isnan().tolist() == [False, True, False, True]
    torch.testing.assert_close(measured(measure, maps)[::2], measured(measure, random(4, 6, 6))[::2])


@pytest.mark.parametrize("measure", ON_OBJECT)
def test_every_measure_on_the_object_is_nan_also_where_nan_lies_on_the_background(measure):
    maps, masks = random(2, 6, 6), torch.zeros(2, 6, 6, dtype=torch.bool)
    masks[:, :2, :2] = True
    maps[0, 5, 5] = maps[1, 0, 0] = math.nan
    assert measure(maps, masks).isnan().all()


@pytest.mark.parametrize("measure", [*ON_OBJECT, *OF_MAP])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-10, 1e10, 1e20, 1e30])
def test_no_measure_depends_on_the_scale_of_a_map(measure, scale):
    maps = random(3, 8, 8)
    torch.testing.assert_close(measured(measure, maps * scale), measured(measure, maps), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("measure", [*ON_OBJECT, *OF_MAP])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-5), (torch.bfloat16, 0.05)])
def test_measures_take_maps_of_other_types(measure, dtype, atol):
    maps = random(3, 8, 8) ** 2
    found = measured(measure, maps.to(dtype))
    assert found.dtype in (torch.float32, torch.float64)  # sums of hundreds of pixels in bf16 would be rough
    torch.testing.assert_close(found, measured(measure, maps.to(dtype).float()), rtol=0, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(found, measured(measure, maps), rtol=0.02, atol=atol, check_dtype=False)


@pytest.mark.parametrize("measure", [*ON_OBJECT, *OF_MAP])
def test_a_batch_measures_as_its_maps_one_by_one(measure):
    maps, masks = random(4, 6, 9), random(4, 9, 6).transpose(1, 2) > 0.6
    batch = (maps, masks) if measure in ON_OBJECT else (maps,)
    single = [measure(*(t[i : i + 1] for t in batch)) for i in range(4)]
    assert measure(*batch).shape == (4,)
    torch.testing.assert_close(measure(*batch), torch.cat(single))


@pytest.mark.parametrize("measure", [*ON_OBJECT, *OF_MAP])
def test_every_measure_refuses_negative_maps_and_wrong_shapes(measure):
    with pytest.raises(ValueError, match="must not be negative; take Grad-CAM after its ReLU"):
        measured(measure, torch.tensor([[[1.0, -0.1], [0.0, 2.0]]]))
    for shape in ((4, 4), (1, 1, 4, 4)):
        with pytest.raises(ValueError, match=r"must be \(N, H, W\), not \(" + ", ".join(map(str, shape))):
            measured(measure, torch.ones(shape))


@pytest.mark.parametrize("measure", ON_OBJECT)
def test_every_measure_on_the_object_refuses_masks_of_another_shape(measure):
    with pytest.raises(ValueError, match=r"\(2, 4, 4\) and masks \(2, 4, 5\) must have the same shape"):
        measure(torch.ones(2, 4, 4), torch.ones(2, 4, 5, dtype=torch.bool))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1.0, 2.0, 3.0], [10.0, 20.0, 1000.0], 1.0),
        ([1.0, 2.0, 3.0], [-1.0, -2.0, -2.5], -1.0),
        ([1.0, 2.0, 3.0], [1.0, 3.0, 2.0], 0.5),  # 1 - 6 * 2 / (3 * 8)
        ([1.0, 1.0, 2.0], [1.0, 2.0, 3.0], 3**0.5 / 2),  # ranks 1.5, 1.5, 3: 1.5 / sqrt(1.5 * 2)
        ([1.0, 2.0, 1.0], [1.0, 0.0, 1.0], -1.0),
    ],
)
def test_rank_correlation_is_that_computed_by_hand(first, second, expected):
    found = rank_correlation(torch.tensor([first]), torch.tensor([second]))
    torch.testing.assert_close(found, torch.tensor([expected]))


@pytest.mark.parametrize("levels", [3, 20, 10**6])
def test_rank_correlation_is_that_of_pandas_with_ties_too(levels):
    maps, others = (random(2, 4, 7, 9) * levels).floor() - levels / 2
    others = others + maps.roll(1, 0) - maps
    expected = [
        pd.DataFrame({"a": a.flatten().numpy(), "b": b.flatten().numpy()}).corr("spearman").loc["a", "b"]
        for a, b in zip(maps, others, strict=True)
    ]
    assert rank_correlation(maps, others).tolist() == pytest.approx(expected, abs=1e-5)


def test_rank_correlation_does_not_change_with_any_increasing_function():
    maps, others = random(3, 6, 6), random(6, 6, 3).permute(2, 0, 1)
    torch.testing.assert_close(rank_correlation(maps.exp() * 1e20, others**3 - 7), rank_correlation(maps, others))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rank_correlation_takes_maps_of_other_types(dtype):
    maps, others = random(2, 3, 6, 6).to(dtype)
    torch.testing.assert_close(rank_correlation(maps, others), rank_correlation(maps.float(), others.float()))


@pytest.mark.parametrize("side", [2, 8, 32, 100, 225])
def test_rank_correlation_with_a_constant_is_nan(side):
    maps = random(1, side, side)
    constant = torch.zeros(1, side, side)
    for pair in ((maps, constant), (constant, maps), (constant, constant + 1)):
        assert math.isnan(rank_correlation(*pair))
    assert rank_correlation(maps, maps).item() == pytest.approx(1, abs=1e-6)


def test_rank_correlation_with_nan_anywhere_is_nan():
    maps, others = random(4, 6, 6), random(6, 6, 4).permute(2, 0, 1).clone()
    expected = rank_correlation(maps, others)
    others[0, 5, 5] = maps[1, 0, 0] = maps[2, 3, 3] = others[2, 3, 3] = math.nan
    found = rank_correlation(maps, others)
    assert found.isnan().tolist() == [True, True, True, False]
    assert torch.equal(found[3], expected[3])


@pytest.mark.parametrize(("low", "high"), [(-math.inf, math.inf), (-1e30, math.inf)])
def test_rank_correlation_takes_infinity_for_the_highest_value(low, high):
    maps = torch.tensor([[low, 1.0, 2.0, high]])
    others = torch.tensor([[high, 1.0, 2.0, low]])
    ranks = torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    torch.testing.assert_close(rank_correlation(maps, others), rank_correlation(*ranks))


def test_rank_correlation_refuses_maps_of_different_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\) must have the same shape"):
        rank_correlation(torch.ones(2, 3), torch.ones(2, 4))
