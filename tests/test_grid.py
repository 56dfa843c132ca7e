import math

import pytest
import torch

from explain import explain
from explain.grid import choose_grids, grid_pointing, tile
from trainables import ResNet18


def random(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def confident(predicted: list[int], by: list[float], classes: int = 4) -> torch.Tensor:
    """Logits (N, C) of images: zero but for the predicted class."""
    logits = torch.zeros(len(predicted), classes)
    logits[range(len(predicted)), predicted] = torch.tensor(by)
    return logits


LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize(
    ("predicted", "n", "expected"),
    [
        ([0, 1, 2, 3, 0, 1], 2, [[4, 1, 2, 3]]),  # the second 0 and the second 1 are too few for another grid
        ([0, 1, 2, 3, 1, 1], 2, [[1, 2, 0, 3]]),  # the most confident is wrong
        ([0, 1, 2, 0, 0, 1], 2, []),  # three classes for four cells
        ([1, 2, 3, 0, 1, 2], 2, []),
        ([1, 2, 3, 0, 1, 2], 1, []),
        ([0, 1, 2, 3, 0, 1], 1, [[4], [1], [2], [0], [3], [5]]),
        ([0, 1, 2, 3, 0, 1], 3, []),
    ],
)
def test_grids_are_those_chosen_by_hand(predicted, n, expected):
    grids = choose_grids(confident(predicted, [3.0, 5.0, 4.0, 2.0, 6.0, 1.0]), LABELS, n)
    assert grids.tolist() == expected
    assert grids.shape == (len(expected), n * n)
    assert grids.dtype == torch.int64


def test_no_images_give_no_grids_and_none_can_be_tiled():
    grids = choose_grids(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert grids.shape == (0, 4)
    wrong = choose_grids(confident([1], [1.0]), torch.tensor([0]))
    assert tile(random(1, 3, 8, 8), wrong).shape == (0, 3, 16, 16)
    assert grid_pointing(torch.zeros(0, 4, 16, 16)).shape == (0, 4)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_grids_hold_right_predictions_of_distinct_classes_and_no_image_twice(n, dtype):
    labels = (random(400) ** 2 * 12).long()  # some classes have many more images than others
    logits = torch.randn(400, 12, generator=torch.Generator().manual_seed(1))
    logits[range(400), labels] += 1.5
    logits = logits.to(dtype)
    grids = choose_grids(logits, labels, n)
    confidence, predicted = logits.float().softmax(1).max(1)
    right = (predicted == labels).nonzero()[:, 0].tolist()
    assert 100 < len(right) < 350
    used = grids.flatten().tolist()
    assert len(used) > len(right) / 3
    assert len(set(used)) == len(used)
    assert set(used) <= set(right)
    assert all(len(set(row)) == n * n for row in labels[grids].tolist())
    assert (confidence[grids].diff(dim=1) <= 0).all()
    assert (confidence[grids].mean(1).diff() <= 1e-6).all()


def test_of_each_class_the_most_confident_images_are_taken():
    labels = torch.arange(40) % 4
    confidences = random(40) * 5
    grids = choose_grids(confident(labels.tolist(), confidences.tolist()), labels)
    assert len(grids) == 10
    ranked = {c: sorted(range(c, 40, 4), key=lambda i: -confidences[i].item()) for c in range(4)}
    # With as many images of each class, the r-th grid is made of the r-th of each.
    assert [set(row) for row in grids.tolist()] == [set(row) for row in zip(*ranked.values(), strict=True)]


def test_equal_confidence_keeps_the_order_of_the_images():
    logits = confident([3, 2, 1, 0, 0, 1, 2, 3], [200.0] * 8)  # all of probability 1
    assert choose_grids(logits, torch.tensor([3, 2, 1, 0, 0, 1, 2, 3])).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_tiles_are_placed_row_by_row():
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 2, 1, 2)
    grids = torch.tensor([[4, 1, 0, 2], [3, 0, 1, 2]])
    first, second = [[4, 4, 1, 1], [0, 0, 2, 2]], [[3, 3, 0, 0], [1, 1, 2, 2]]
    assert tile(images, grids).tolist() == [[first] * 2, [second] * 2]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_each_cell_is_its_image_unchanged(n):
    images = random(12, 3, 5, 4)
    grids = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(i))[: n * n] for i in range(2)])
    tiled = tile(images, grids)
    assert tiled.shape == (2, 3, 5 * n, 4 * n)
    for g in range(2):
        for cell, image in enumerate(grids[g].tolist()):
            top, left = 5 * (cell // n), 4 * (cell % n)
            assert torch.equal(tiled[g, :, top : top + 5, left : left + 4], images[image])


def test_grid_pointing_is_the_share_of_the_positive_part_in_the_own_cell():
    own = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    maps = torch.stack([own, own, own, own - 3])[None]
    torch.testing.assert_close(grid_pointing(maps), torch.tensor([[0.1, 0.2, 0.3, 1.0]]))


def test_cells_of_several_pixels_are_summed():
    maps = torch.zeros(1, 4, 4, 6)
    maps[0, :, 0, 0] = 1  # in the first cell,
    maps[0, :, 1, 3] = 2  # the second,
    maps[0, :, 2, 2] = 3  # the third,
    maps[0, :, 3, 5] = 4  # and the last
    maps[0, :, 3, 3] = -5
    torch.testing.assert_close(grid_pointing(maps), torch.tensor([[0.1, 0.2, 0.3, 0.4]]))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_uniform_map_points_by_chance_and_one_in_its_own_cell_perfectly(n):
    torch.testing.assert_close(grid_pointing(torch.full((2, n * n, 6, 12), 0.3)), torch.full((2, n * n), 1 / n**2))
    perfect = torch.full((1, n * n, 6, 12), -1.0)
    for cell in range(n * n):
        top, left = 6 // n * (cell // n), 12 // n * (cell % n)
        perfect[0, cell, top : top + 6 // n, left : left + 12 // n] = 0.7
    torch.testing.assert_close(grid_pointing(perfect), torch.ones(1, n * n))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_grid_pointing_does_not_depend_on_the_scale_nor_on_what_else_is_in_the_batch(scale):
    maps = random(3, 4, 8, 8) - 0.4
    expected = torch.cat([grid_pointing(one[None]) for one in maps])
    torch.testing.assert_close(grid_pointing(maps * scale), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_grid_pointing_takes_maps_of_other_types(dtype):
    maps = random(3, 4, 8, 8) - 0.4
    torch.testing.assert_close(grid_pointing(maps.to(dtype)), grid_pointing(maps), rtol=0, atol=0.01, check_dtype=False)


def test_a_map_that_is_nowhere_positive_points_nowhere():
    maps = torch.ones(1, 4, 2, 2)
    maps[0, 1], maps[0, 2] = 0, -1
    assert grid_pointing(maps).isnan().tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (1, 4, 5, 4), (1, 4, 4, 5), (2, 9, 4, 6)])
def test_maps_that_make_no_grid_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(G, n \* n, H, W\).*not \(" + ", ".join(map(str, shape))):
        grid_pointing(torch.ones(shape))


def test_maps_of_all_cells_of_a_grid_come_in_one_call():
    torch.manual_seed(0)
    model, images = ResNet18(num_classes=5, width=4).eval(), random(20, 3, 32, 32)
    with torch.no_grad():
        logits = model(images)
    labels = torch.arange(20) % 5
    logits[range(20), labels] += 100.0  # as if the network had learned these images
    grids = choose_grids(logits, labels)
    assert grids.shape == (4, 4)
    tiled, targets = tile(images, grids), labels[grids]
    maps = explain(model, tiled, targets)
    assert [tuple(t.shape) for t in vars(maps).values()] == [(4, 5), (4, 4), (4, 4, 64, 64), (4, 4, 8, 8)]
    for cell in range(4):
        alone = explain(model, tiled, targets[:, cell])
        torch.testing.assert_close(maps.saliency[:, cell], alone.saliency, rtol=0, atol=1e-6)
        torch.testing.assert_close(maps.cam[:, cell], alone.cam, rtol=0, atol=1e-6)
    assert (maps.cam[:, 0] - maps.cam[:, 1]).abs().max() > 1e-3
    for shares in (grid_pointing(maps.saliency), grid_pointing(maps.cam.relu())):
        assert shares.shape == (4, 4)
        known = shares[~shares.isnan()]
        assert ((known >= 0) & (known <= 1)).all()
    assert math.isclose(grid_pointing(maps.saliency).mean().item(), 0.25, abs_tol=0.05)  # it knows no class
