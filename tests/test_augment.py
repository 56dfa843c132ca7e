"""The batched augmentation against one image at a time, and what chance decides."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as tv

from trainables.augment import CROP_PADDING, Draws, augment, draw

AUGMENTATIONS = ("none", "flip", "crop", "flip+crop")
NAMES = [field.name for field in dataclasses.fields(Draws)]


def some_images(n: int, dtype: torch.dtype, height: int = 32, width: int = 32) -> Tensor:
    values = torch.randint(1, 256, (n, height, width, 3), generator=torch.Generator().manual_seed(1))
    return values.to(dtype) if dtype == torch.uint8 else values.to(dtype) / 255


def some_draws(n: int, augmentation: str, seed: int = 0, size: int = 32) -> Draws:
    return draw(n, size, augmentation, torch.Generator().manual_seed(seed))


def one_at_a_time(images: Tensor, draws: Draws, cutout: int = 0) -> Tensor:
    """The plain way: lay each image into zeros, cut out the crop, turn its rows round, blacken pixel by pixel."""
    _, height, width, channels = images.shape
    out = []
    for image, *drawn in zip(images, *(getattr(draws, name) for name in NAMES), strict=True):
        flip, top, left, row, column = (int(value) for value in drawn)
        padded = torch.zeros(height + 8, width + 8, channels, dtype=images.dtype)
        padded[4 : 4 + height, 4 : 4 + width] = image
        crop = padded[top : top + height, left : left + width].clone()
        crop = crop.flip(1) if flip else crop
        for y in range(row - cutout // 2, row - cutout // 2 + cutout):
            for x in range(column - cutout // 2, column - cutout // 2 + cutout):
                if 0 <= y < height and 0 <= x < width:
                    crop[y, x] = 0
        out.append(crop)
    return torch.stack(out)


# ---- Flips and crops


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_batch_equals_one_image_at_a_time(augmentation, dtype):
    images, draws = some_images(200, dtype), some_draws(200, augmentation)
    before = images.clone()
    out = augment(images, draws)
    assert out.dtype == dtype
    assert torch.equal(out, one_at_a_time(images, draws))
    assert torch.equal(images, before)
    assert torch.equal(out, images) == (augmentation == "none")


def test_images_need_not_be_square():
    images, draws = some_images(50, torch.uint8, 7, 12), some_draws(50, "flip+crop")
    assert torch.equal(augment(images, draws), one_at_a_time(images, draws))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_batch_agrees_with_torchvision(dtype):
    images, draws = some_images(100, dtype), some_draws(100, "flip+crop")
    for image, out, flip, top, left in zip(
        images, augment(images, draws), draws.flip, draws.top, draws.left, strict=True
    ):
        expected = tv.crop(tv.pad(image.permute(2, 0, 1), [CROP_PADDING]), int(top), int(left), 32, 32)
        assert torch.equal(out.permute(2, 0, 1), tv.hflip(expected) if flip else expected)


def test_every_crop_and_flip_is_the_reference():
    flips, tops, lefts = (grid.flatten() for grid in torch.meshgrid(*map(torch.arange, (2, 9, 9)), indexing="ij"))
    draws = Draws(flips.bool(), tops, lefts, torch.zeros_like(tops), torch.zeros_like(tops))
    images = some_images(1, torch.uint8).expand(162, -1, -1, -1)
    out = augment(images, draws)
    assert torch.equal(out, one_at_a_time(images, draws))
    assert len({image.numpy().tobytes() for image in out}) == 162


def test_result_is_a_copy_also_where_nothing_changes():
    images = some_images(3, torch.uint8)
    out = augment(images, some_draws(3, "none"))
    out.zero_()
    assert images.min() > 0


def test_batch_takes_the_draws_of_its_images():
    images, draws = some_images(20, torch.uint8), some_draws(20, "flip+crop")
    whole = augment(images, draws, 8)
    parts = [augment(images[i : i + 8], draws.batch(i, i + 8).to(torch.device("cpu")), 8) for i in (0, 8, 16)]
    assert [len(part) for part in parts] == [8, 8, 4]
    assert torch.equal(torch.cat(parts), whole)


# ---- Cutout


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("side", [1, 2, 7, 8, 32])
def test_cutout_blackens_the_square_around_each_centre(side, dtype):
    images, draws = some_images(40, dtype), some_draws(40, "flip+crop")
    before = images.clone()
    out = augment(images, draws, side)
    assert torch.equal(out, one_at_a_time(images, draws, side))
    assert torch.equal(images, before)
    assert not torch.equal(out, augment(images, draws))


@pytest.mark.parametrize(("side", "first", "last"), [(1, 0, 0), (2, -1, 0), (3, -1, 1), (4, -2, 1)])
def test_cut_out_square_is_clipped_at_every_border(side, first, last):
    rows, columns = (grid.flatten() for grid in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
    middle = torch.full((25,), CROP_PADDING)
    out = augment(
        torch.ones(25, 5, 5, 3, dtype=torch.uint8), Draws(middle != middle, middle, middle, rows, columns), side
    )
    for image, row, column in zip(out, rows.tolist(), columns.tolist(), strict=True):
        black = [(y, x) for y in range(5) for x in range(5) if first <= y - row <= last and first <= x - column <= last]
        assert torch.nonzero((image == 0).all(2)).tolist() == [list(place) for place in black]
        assert image.sum() == 3 * (25 - len(black))


# ---- What chance decides


def chi_square(values: Tensor, kinds: int) -> float:
    counts, expected = torch.bincount(values, minlength=kinds).double(), len(values) / kinds
    assert len(counts) == kinds
    return float(((counts - expected) ** 2 / expected).sum())


def test_half_of_the_images_are_flipped_and_positions_are_uniform():
    n = 18_000
    draws = some_draws(n, "flip+crop")
    assert abs(draws.flip.float().mean() - 0.5) < 4 * 0.5 / n**0.5
    # Chi-square of 8 and 31 degrees, exceeded once in 10,000.
    assert max(chi_square(draws.top, 2 * CROP_PADDING + 1), chi_square(draws.left, 2 * CROP_PADDING + 1)) < 31.8
    assert max(chi_square(draws.cutout_row, 32), chi_square(draws.cutout_column, 32)) < 69.1
    together = torch.corrcoef(torch.stack([getattr(draws, name).double() for name in NAMES]))
    assert (together - torch.eye(5)).abs().max() < 4.5 / n**0.5


def test_cutout_centres_are_those_of_the_image_size():
    draws = some_draws(500, "none", size=5)
    for centres in (draws.cutout_row, draws.cutout_column):
        assert centres.unique().tolist() == [0, 1, 2, 3, 4]


def test_what_an_augmentation_leaves_out_is_neutral():
    none, flips, crops = (some_draws(100, name) for name in ("none", "flip", "crop"))
    for draws in (none, crops):
        assert not draws.flip.any()
    for draws in (none, flips):
        assert (draws.top == CROP_PADDING).all()
        assert (draws.left == CROP_PADDING).all()
    assert flips.flip.any()
    assert (crops.top != CROP_PADDING).any()
    assert (crops.left != CROP_PADDING).any()


def test_draws_are_a_function_of_the_generator():
    first, again, other = (some_draws(100, "flip+crop", seed) for seed in (0, 0, 1))
    for name in NAMES:
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_trials_of_different_augmentations_share_their_draws():
    flips, crops, both = (some_draws(100, name) for name in ("flip", "crop", "flip+crop"))
    assert torch.equal(flips.flip, both.flip)
    for name in set(NAMES) - {"flip"}:
        assert torch.equal(getattr(crops, name), getattr(both, name))
    states = []
    for augmentation in AUGMENTATIONS:
        generator = torch.Generator().manual_seed(0)
        draws = draw(100, 32, augmentation, generator)
        assert torch.equal(draws.cutout_row, both.cutout_row)
        assert torch.equal(draws.cutout_column, both.cutout_column)
        states.append(generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)
