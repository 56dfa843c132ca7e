import math

import pytest
import torch

from explain import energy_on_object


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
    torch.testing.assert_close(energy + energy_on_object(maps, ~masks), torch.ones(50, dtype=torch.float64))
    assert energy_on_object(maps, torch.ones_like(masks)).tolist() == [1.0] * 50


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_energy_does_not_depend_on_the_scale_of_a_map(scale):
    maps, masks = random(3, 8, 8), random(3, 8, 8) > 0.5
    torch.testing.assert_close(energy_on_object(maps * scale, masks), energy_on_object(maps, masks), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [1e-6, 1.0, 300.0])
def test_a_uniform_map_scores_the_area_of_the_object(value):
    masks = random(4, 6, 5) > 0.7
    energy = energy_on_object(torch.full((4, 6, 5), value), masks)
    torch.testing.assert_close(energy, masks.double().mean((1, 2)))


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
