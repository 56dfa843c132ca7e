"""The batched augmentation against one image at a time, mixtures against plain sums, and what chance decides."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as tv

from trainables import TrialSettings
from trainables.augment import CROP_PADDING, Draws, augment, draw, mix

AUGMENTATIONS = ("none", "flip", "crop", "flip+crop")
NAMES = [field.name for field in dataclasses.fields(Draws)]


def some_images(n: int, dtype: torch.dtype, height: int = 32, width: int = 32) -> Tensor:
    values = torch.randint(1, 256, (n, height, width, 3), generator=torch.Generator().manual_seed(1))
    return values.to(dtype) if dtype == torch.uint8 else values.to(dtype) / 255


def some_draws(n: int, augmentation: str, seed: int = 0, size: int = 32, **settings: object) -> Draws:
    """Draws of a first epoch that shows the images as they stand."""
    trial = TrialSettings(augmentation=augmentation, **settings)
    return draw(torch.arange(n), size, 1, trial, torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("flip", ["random", "alternating"])
def test_what_an_augmentation_leaves_out_is_neutral(flip):
    none, flips, crops = (some_draws(100, name, flip=flip) for name in ("none", "flip", "crop"))
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


def test_trials_of_different_settings_share_their_draws():
    both = some_draws(100, "flip+crop")
    assert torch.equal(some_draws(100, "flip").flip, both.flip)
    alternating = some_draws(100, "flip+crop", flip="alternating", cutout=8, mixing="cutmix")
    for name in set(NAMES) - {"flip"}:
        assert torch.equal(getattr(alternating, name), getattr(both, name))
    states = []
    for augmentation in AUGMENTATIONS:
        for flip in ("random", "alternating"):
            generator = torch.Generator().manual_seed(0)
            draw(torch.arange(100), 32, 1, TrialSettings(augmentation=augmentation, flip=flip), generator)
            states.append(generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)


def mirrored(n: int, epoch: int, **settings: object) -> Tensor:
    """Whether each image, not each place, is mirrored in an epoch of an order and a generator of its own."""
    generator = torch.Generator().manual_seed(100 + epoch)
    order = torch.randperm(n, generator=generator)
    trial = TrialSettings(augmentation="flip", flip="alternating", **settings)
    flips = draw(order, 32, epoch, trial, generator).flip
    return torch.zeros(n, dtype=torch.bool).scatter(0, order, flips)


def test_alternating_flips_mirror_each_image_in_every_second_epoch_whatever_the_order():
    epochs = [mirrored(1000, epoch) for epoch in range(1, 7)]
    for epoch, later in itertools.pairwise(epochs):
        assert torch.equal(later, ~epoch)


def test_alternating_flips_begin_with_half_of_the_images_and_depend_on_the_seed():
    n = 10_000
    one, other = mirrored(n, 1, seed=0), mirrored(n, 1, seed=1)
    for flips in (one, other, one ^ other):
        assert abs(flips.float().mean() - 0.5) < 4 * 0.5 / n**0.5
    assert torch.equal(mirrored(n, 1, seed=0, cutout=8, lr=0.3), one)


# ---- Mixtures


def chosen(monkeypatch, *values: float) -> None:
    """Let chance decide on these share, row and column."""
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(values, dtype=torch.float64))


def numbered(n: int, size: int = 32) -> Tensor:
    """Images whose every pixel is the image's number."""
    return torch.arange(float(n))[:, None, None, None].expand(n, 3, size, size).contiguous()


def test_no_mixing_leaves_images_and_chance_alone():
    images, generator = numbered(4), torch.Generator().manual_seed(0)
    before = generator.get_state()
    mixed, share = mix(images, "none", generator)
    assert mixed is images
    assert share == 1
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_mixup_is_the_weighted_mean_with_the_reversed_batch(n):
    images = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(n))
    before = images.clone()
    mixed, share = mix(images, "mixup", torch.Generator().manual_seed(5))
    assert 0.05 < share < 0.95
    for i in range(n):
        torch.testing.assert_close(mixed[i], share * before[i] + (1 - share) * before[n - 1 - i])
    assert torch.equal(images, before)


def test_mixup_of_all_or_nothing_is_one_of_the_two(monkeypatch):
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for share, expected in ((1.0, images), (0.0, images.flip(0))):
        chosen(monkeypatch, share, 0.5, 0.5)
        mixed, returned = mix(images, "mixup", torch.Generator())
        assert torch.equal(mixed, expected)
        assert returned == share


@pytest.mark.parametrize("size", [8, 32])
def test_cutmix_pastes_one_rectangle_of_the_reversed_batch_and_returns_the_share_that_is_left(size):
    generator, shares = torch.Generator().manual_seed(2), []
    for _ in range(50):
        images = numbered(6, size)
        mixed, share = mix(images, "cutmix", generator)
        assert torch.equal(images, numbered(6, size))
        pasted = mixed[0, 0] == 5
        for i in range(6):
            for channel in mixed[i]:
                assert torch.equal(channel, torch.where(pasted, 5.0 - i, float(i)))
        rows, columns = (torch.nonzero(pasted.any(axis)).flatten().tolist() for axis in (1, 0))
        for places in (rows, columns):
            assert places == list(range(min(places, default=0), max(places, default=-1) + 1))
        assert pasted.sum() == len(rows) * len(columns)
        assert share == pytest.approx(1 - len(rows) * len(columns) / size**2, abs=1e-12)
        shares.append(share)
    assert max(shares) - min(shares) > 0.6


@pytest.mark.parametrize(
    ("share", "row", "column", "rows", "columns"),
    [
        (1.0, 0.5, 0.5, (), ()),
        (0.0, 0.5, 0.5, range(32), range(32)),
        (0.75, 0.5, 0.5, range(8, 24), range(8, 24)),  # half of each side: a quarter of the area
        (0.75, 0.0, 0.5, range(8), range(8, 24)),  # clipped at the top
        (0.75, 0.25, 1.0, range(16), range(24, 32)),  # at the top's edge, clipped at the right
        (0.0, 0.0, 0.0, range(16), range(16)),
    ],
)
def test_rectangle_of_cutmix_is_the_one_worked_out_by_hand(share, row, column, rows, columns, monkeypatch):
    chosen(monkeypatch, share, row, column)
    mixed, returned = mix(numbered(2), "cutmix", torch.Generator())
    assert [place for place in range(32) if (mixed[0, 0, place] == 1).any()] == list(rows)
    assert [place for place in range(32) if (mixed[0, 0, :, place] == 1).any()] == list(columns)
    assert returned == 1 - len(rows) * len(columns) / 1024


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_mixture_is_drawn_anew_for_every_batch_from_its_generator_alone(mixing):
    generator = torch.Generator().manual_seed(0)
    shares = [mix(numbered(2), mixing, generator)[1] for _ in range(400)]
    again = torch.Generator().manual_seed(0)
    torch.manual_seed(99)
    assert [mix(numbered(2), mixing, again)[1] for _ in range(3)] == shares[:3]
    if mixing == "mixup":  # uniform; cutmix loses what lies outside the image
        assert abs(sum(shares) / 400 - 0.5) < 4 * (1 / 12 / 400) ** 0.5
        assert 0 <= min(shares) < 0.05
        assert 0.95 < max(shares) <= 1


def test_mixtures_stay_channels_last():
    images = torch.rand(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    for mixing in ("none", "mixup", "cutmix"):
        mixed, _ = mix(images, mixing, torch.Generator().manual_seed(0))
        assert mixed.is_contiguous(memory_format=torch.channels_last)
