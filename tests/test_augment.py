"""The batched augmentation against one image at a time, and what chance decides."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as tv

from trainables.augment import CROP_PADDING, Draws, augment, draw

AUGMENTATIONS = ("none", "flip", "crop", "flip+crop")


def some_images(n: int, dtype: torch.dtype, height: int = 32, width: int = 32) -> Tensor:
    values = torch.randint(1, 256, (n, height, width, 3), generator=torch.Generator().manual_seed(1))
    return values.to(dtype) if dtype == torch.uint8 else values.to(dtype) / 255


def some_draws(n: int, augmentation: str, seed: int = 0) -> Draws:
    return draw(n, augmentation, torch.Generator().manual_seed(seed))


def one_at_a_time(images: Tensor, draws: Draws) -> Tensor:
    """The plain way: lay each image into zeros, cut out the crop, turn its rows round."""
    _, height, width, channels = images.shape
    out = []
    for image, flip, top, left in zip(images, draws.flip, draws.top, draws.left, strict=True):
        padded = torch.zeros(height + 8, width + 8, channels, dtype=images.dtype)
        padded[4 : 4 + height, 4 : 4 + width] = image
        crop = padded[top : top + height, left : left + width]
        out.append(crop.flip(1) if flip else crop)
    return torch.stack(out)


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
    draws = Draws(flips.bool(), tops, lefts)
    images = some_images(1, torch.uint8).expand(162, -1, -1, -1)
    out = augment(images, draws)
    assert torch.equal(out, one_at_a_time(images, draws))
    assert len({image.numpy().tobytes() for image in out}) == 162


def test_result_is_a_copy_also_where_nothing_changes():
    images = some_images(3, torch.uint8)
    out = augment(images, some_draws(3, "none"))
    out.zero_()
    assert images.min() > 0


def test_half_of_the_images_are_flipped_and_crops_are_uniform():
    n = 18_000
    draws = some_draws(n, "flip+crop")
    assert abs(draws.flip.float().mean() - 0.5) < 4 * 0.5 / n**0.5
    for offsets in (draws.top, draws.left):
        assert (offsets.min(), offsets.max()) == (0, 2 * CROP_PADDING)
        counts = torch.bincount(offsets).double()
        assert ((counts - n / 9) ** 2 / (n / 9)).sum() < 31.8  # chi-square of 8 degrees, exceeded once in 10,000
    together = torch.corrcoef(torch.stack([draws.flip.double(), draws.top.double(), draws.left.double()]))
    assert (together - torch.eye(3)).abs().max() < 4 / n**0.5


def test_what_an_augmentation_leaves_out_is_neutral():
    none, flip, crop = (some_draws(100, name) for name in ("none", "flip", "crop"))
    for draws in (none, crop):
        assert not draws.flip.any()
    for draws in (none, flip):
        assert (draws.top == CROP_PADDING).all()
        assert (draws.left == CROP_PADDING).all()
    assert flip.flip.any()
    assert (crop.top != CROP_PADDING).any()
    assert (crop.left != CROP_PADDING).any()


def test_draws_are_a_function_of_the_seed():
    first, again, other = (some_draws(100, "flip+crop", seed) for seed in (0, 0, 1))
    for name in ("flip", "top", "left"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_trials_of_different_augmentation_share_their_draws():
    both = some_draws(100, "flip+crop")
    assert torch.equal(some_draws(100, "flip").flip, both.flip)
    assert torch.equal(some_draws(100, "crop").top, both.top)
    assert torch.equal(some_draws(100, "crop").left, both.left)
    states = []
    for augmentation in AUGMENTATIONS:
        generator = torch.Generator().manual_seed(0)
        draw(100, augmentation, generator)
        states.append(generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)


def test_batch_takes_the_draws_of_its_images():
    images, draws = some_images(20, torch.uint8), some_draws(20, "flip+crop")
    whole = augment(images, draws)
    parts = [augment(images[i : i + 8], draws.batch(i, i + 8).to(torch.device("cpu"))) for i in (0, 8, 16)]
    assert [len(part) for part in parts] == [8, 8, 4]
    assert torch.equal(torch.cat(parts), whole)
