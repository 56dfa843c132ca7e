"""shapes100: a procedural data set of 100 classes whose object masks are exact.

A class is one of 20 shapes (the superclass) filled with one of 5 patterns. Colours, size, position, rotation, a
distractor blob and which of 20 kinds of background it stands before are chance and tell nothing of the class: that is
the variant ``clean``. In ``biased`` the background is that of the object's superclass in train, and any in test, where
its images are those of ``clean``; in ``scene`` the background is the class, and the object is chance. So it is known
where the evidence lies that a network can use; the idea is that of BAM (Yang & Kim, 2019). Backgrounds have edges
almost as strong as the objects', and these lie rather aside, so that edges and the middle of the image tell less of
where the object is than the evidence does: per area there is 1.5 times as much of the Sobel gradient on it, and 1.8
times as much of a bell in the middle.

Only additions, products, quotients, square roots and comparisons are applied to pixels, and the angles are rounded to
1/4096, so that every machine draws the same images.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.floating[Any]]
Variant = Literal["clean", "biased", "scene"]

SIZE = 32
BLOCK = 500  # images drawn at once; a block depends on the seed, the split and its own number only
TRAIN_SIZE, TEST_SIZE = 50_000, 10_000  # as in CIFAR-100
PATTERNS = ("solid", "rows", "columns", "checks", "rings")
_SPLITS = {"train": 0, "test": 1}


def _box(x: Floats, y: Floats, half_x: float, half_y: float, at_x: float = 0.0, at_y: float = 0.0) -> Floats:
    return np.maximum(np.abs(x - at_x) - half_x, np.abs(y - at_y) - half_y)


def _disc(x: Floats, y: Floats, radius: float, at_x: float = 0.0, at_y: float = 0.0) -> Floats:
    return np.sqrt((x - at_x) ** 2 + (y - at_y) ** 2) - radius


def _convex(x: Floats, y: Floats, *planes: tuple[float, float, float]) -> Floats:
    """Intersection of half planes a x + b y <= c, with unit normals (a, b)."""
    out = planes[0][0] * x + planes[0][1] * y - planes[0][2]
    for a, b, c in planes[1:]:
        out = np.maximum(out, a * x + b * y - c)
    return out


def _star(x: Floats, y: Floats) -> Floats:
    # The five-pointed star is the set of points that lie outside at most one of the pentagon's five lines.
    normals = ((0.0, -1.0), (0.951, -0.309), (0.588, 0.809), (-0.588, 0.809), (-0.951, -0.309))
    distances = np.sort(np.stack([a * x + b * y - 0.36 for a, b in normals]), axis=0)
    return np.maximum(distances[-2], _disc(x, y, 1.15))


def _flower(x: Floats, y: Floats) -> Floats:
    r = np.sqrt(x * x + y * y) + np.float32(1e-6)
    c = x / r
    c2 = c * c
    return r - (0.7 + 0.3 * c * (16 * c2 * c2 - 20 * c2 + 5))  # cos 5t = 16 c^5 - 20 c^3 + 5 c for c = cos t


def _heart(x: Floats, y: Floats) -> Floats:
    lobes = np.minimum(_disc(x, y, 0.5, -0.45, -0.35), _disc(x, y, 0.5, 0.45, -0.35))
    tip = _convex(x, y, (0.74, 0.67, 0.6), (-0.74, 0.67, 0.6), (0.0, -1.0, 0.06))  # its sides touch the lobes
    return np.minimum(np.minimum(lobes, tip), _box(x, y, 0.45, 0.4, 0.0, -0.15))


def _drop(x: Floats, y: Floats) -> Floats:
    return np.minimum(_disc(x, y, 0.6, 0.0, 0.35), _convex(x, y, (0.87, -0.5, 0.43), (-0.87, -0.5, 0.43), (0, 1, 0.1)))


def _arrow(x: Floats, y: Floats) -> Floats:
    head = _convex(x, y, (0.707, -0.707, 0.707), (-0.707, -0.707, 0.707), (0, 1, 0.0))
    return np.minimum(head, _box(x, y, 0.3, 0.6, 0.0, 0.35))


# Each gives, for coordinates in units of the object's radius (x to the right, y down), the distance to the outline in
# the same units, negative inside.
SHAPES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "arrow": _arrow,
    "circle": lambda x, y: _disc(x, y, 0.92),
    "crescent": lambda x, y: np.maximum(_disc(x, y, 1.0), -_disc(x, y, 0.78, 0.5, 0.0)),
    "diamond": lambda x, y: (np.abs(x) * 0.8 + np.abs(y) * 0.6) - 0.62,
    "drop": _drop,
    "flower": _flower,
    "frame": lambda x, y: np.maximum(_box(x, y, 0.85, 0.85), -_box(x, y, 0.42, 0.42)),
    "half_disc": lambda x, y: np.maximum(_disc(x, y, 1.0, 0.0, 0.4), y - 0.4),
    "heart": _heart,
    "hourglass": lambda x, y: np.maximum(np.abs(x) * 0.78 - np.abs(y) * 0.62 - 0.12, _box(x, y, 0.85, 0.9)),
    "letter_h": lambda x, y: np.minimum(
        np.minimum(_box(x, y, 0.28, 0.95, -0.6), _box(x, y, 0.28, 0.95, 0.6)), _box(x, y, 0.6, 0.28)
    ),
    "letter_l": lambda x, y: np.minimum(_box(x, y, 0.32, 0.95, -0.5), _box(x, y, 0.8, 0.32, 0.0, 0.63)),
    "letter_t": lambda x, y: np.minimum(_box(x, y, 0.95, 0.32, 0.0, -0.63), _box(x, y, 0.32, 0.95)),
    "plus": lambda x, y: np.minimum(_box(x, y, 0.95, 0.33), _box(x, y, 0.33, 0.95)),
    "ring": lambda x, y: np.maximum(_disc(x, y, 1.0), -_disc(x, y, 0.48)),
    "saltire": lambda x, y: np.minimum(
        _box((x + y) * 0.7071, (x - y) * 0.7071, 1.05, 0.3), _box((x + y) * 0.7071, (x - y) * 0.7071, 0.3, 1.05)
    ),
    "square": lambda x, y: _box(x, y, 0.8, 0.8),
    "star": _star,
    "triangle": lambda x, y: _convex(x, y, (0.87, -0.5, 0.48), (-0.87, -0.5, 0.48), (0.0, 1.0, 0.7)),
    "trapezoid": lambda x, y: _convex(x, y, (0.92, -0.39, 0.55), (-0.92, -0.39, 0.55), (0, 1, 0.55), (0, -1, 0.55)),
}
CLASS_NAMES = tuple(f"{pattern} {shape}" for shape in SHAPES for pattern in PATTERNS)
SUPERCLASS_NAMES = tuple(SHAPES)
SUPERCLASSES = tuple(i // len(PATTERNS) for i in range(len(CLASS_NAMES)))

# Each kind of background has two colours and a grain.
_COLOURS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "sand": ((0.92, 0.82, 0.58), (0.55, 0.42, 0.25)),
    "sea": ((0.08, 0.26, 0.46), (0.50, 0.76, 0.80)),
    "forest": ((0.08, 0.22, 0.12), (0.46, 0.60, 0.28)),
    "snow": ((0.95, 0.96, 0.98), (0.48, 0.56, 0.70)),
    "dusk": ((0.18, 0.10, 0.32), (0.86, 0.52, 0.48)),
    "clay": ((0.76, 0.44, 0.30), (0.30, 0.14, 0.12)),
    "meadow": ((0.30, 0.46, 0.18), (0.80, 0.84, 0.48)),
    "slate": ((0.14, 0.16, 0.20), (0.60, 0.62, 0.64)),
    "heather": ((0.76, 0.60, 0.80), (0.34, 0.22, 0.42)),
    "straw": ((0.94, 0.88, 0.64), (0.52, 0.52, 0.22)),
}
_GRAINS = {"coarse": 6, "fine": 12}  # patches across an image
_PALETTE = np.array(list(_COLOURS.values()), dtype=np.float32)
SCENE_NAMES = tuple(f"{grain} {colours}" for colours in _COLOURS for grain in _GRAINS)

# Evenly spread hues at full saturation; a colour is one of them, moved towards a grey of its own.
_HUES = np.array(
    [
        [1, 0.15, 0.1],
        [1, 0.6, 0],
        [0.85, 0.85, 0],
        [0.1, 0.75, 0.15],
        [0, 0.7, 0.8],
        [0.1, 0.3, 1],
        [0.6, 0.2, 0.9],
        [1, 0.3, 0.7],
    ],
    dtype=np.float32,
)


def _smooth_noise(rng: np.random.Generator, n: int, cells: int) -> Floats:
    """Return (n, SIZE, SIZE) values in [0, 1]: uniform noise on a coarse grid, linearly interpolated."""
    grid = rng.random((n, cells + 1, cells + 1), dtype=np.float32)
    position = np.arange(SIZE, dtype=np.float32) * np.float32(cells / SIZE)
    low = position.astype(np.int64)
    weight = position - low
    rows = grid[:, low] * (1 - weight)[:, None] + grid[:, low + 1] * weight[:, None]
    return rows[:, :, low] * (1 - weight) + rows[:, :, low + 1] * weight


def _uniform(rng: np.random.Generator, n: int, low: float, high: float) -> Floats:
    return (low + (high - low) * rng.random((n, 1, 1), dtype=np.float32)).astype(np.float32)


def _pattern_weight(x: Floats, y: Floats, pattern: int) -> Floats:
    """Return the share of the second colour at pixel coordinates relative to the object's centre."""
    if pattern == 0:
        return np.zeros_like(x)

    def wave(t: Floats) -> Floats:  # a triangle wave of period 4 pixels between -1 and 1: stripes without a sine
        return np.abs((t / 4.0) % 1.0 - 0.5) * 4 - 1

    if pattern == 1:
        value = wave(y)
    elif pattern == 2:
        value = wave(x)
    elif pattern == 3:
        value = 2 * wave(x) * wave(y)
    else:
        value = wave(np.sqrt(x * x + y * y))
    return np.clip(0.5 + 1.5 * value, 0.0, 1.0).astype(np.float32)


def _draw_backgrounds(rng: np.random.Generator, scenes: NDArray[np.int64]) -> Floats:
    """Draw (N, SIZE, SIZE, 3), patches in roughly the two colours of each one's kind."""
    n = len(scenes)
    palette, grain = np.divmod(scenes, len(_GRAINS))
    colours = _PALETTE[palette].swapaxes(0, 1)[:, :, None, None]
    colours = colours + np.float32(0.16) * (rng.random((2, n, 1, 1, 3), dtype=np.float32) - np.float32(0.5))
    noise = np.stack([_smooth_noise(rng, n, cells) for cells in _GRAINS.values()])[grain, np.arange(n)]
    patches = np.clip(4 * noise - 1.5, 0.0, 1.0)
    return colours[0] + (colours[1] - colours[0]) * patches[..., None]


def _draw_block(
    objects: NDArray[np.int64],
    scenes: NDArray[np.int64],
    rng: np.random.Generator,
    swapped: np.random.Generator | None,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Draw objects on backgrounds: uint8 (N, 32, 32, 3) and the objects' masks, bool (N, 32, 32)."""
    n = len(objects)
    axis = np.arange(SIZE, dtype=np.float32) - np.float32(SIZE / 2 - 0.5)
    column, row = axis[None, None, :], axis[None, :, None]

    images = _draw_backgrounds(rng, scenes)
    if swapped:  # the first ones were drawn nevertheless, so that all that follows is the same
        images = _draw_backgrounds(swapped, scenes)

    # Distractor: a small ellipse somewhere, in a bright colour.
    hues = rng.integers(0, len(_HUES), (2, n))
    hues[1] = (hues[0] + 2 + hues[1] % (len(_HUES) - 3)) % len(_HUES)  # two hues that are never neighbours
    at_x, at_y = _uniform(rng, n, -14, 14), _uniform(rng, n, -14, 14)
    radius_x, radius_y = _uniform(rng, n, 1.5, 3.5), _uniform(rng, n, 1.5, 3.5)
    blob = np.sqrt(((column - at_x) / radius_x) ** 2 + ((row - at_y) / radius_y) ** 2)
    alpha = np.clip((1.2 - blob) * 2, 0.0, 1.0)[..., None]
    blob_color = _HUES[rng.integers(0, len(_HUES), n)][:, None, None, :] * 0.85
    images = images * (1 - alpha) + blob_color * alpha

    # Object: rotated by at most about 15 degrees, wholly inside the image.
    radius = _uniform(rng, n, 6.5, 9.0)
    room = SIZE / 2 - 0.5 - 1.18 * radius  # the widest shape, turned, reaches 1.17 radii from its centre
    aside = [_uniform(rng, n, -1, 1), _uniform(rng, n, -1, 1)]
    centre_x, centre_y = (np.sign(u) * np.sqrt(np.abs(u)) * room for u in aside)  # rather aside than in the middle
    sine = (np.round(_uniform(rng, n, -0.26, 0.26) * 4096) / 4096).astype(np.float32)
    cosine = np.sqrt(1 - sine * sine)
    x = (column - centre_x) * cosine + (row - centre_y) * sine
    y = (row - centre_y) * cosine - (column - centre_x) * sine
    shade = _uniform(rng, n, 0.75, 1.0)[..., None]
    first, second = _HUES[hues[0]][:, None, None, :] * shade, _HUES[hues[1]][:, None, None, :] * shade
    dark = (rng.random((n, 1, 1, 1), dtype=np.float32) < 0.5).astype(np.float32)
    second = second * (0.25 + 0.2 * dark) + (1 - dark) * 0.75  # one colour light, one dark: contrast in grey too

    distance = np.empty((n, SIZE, SIZE), dtype=np.float32)
    weight = np.empty((n, SIZE, SIZE), dtype=np.float32)
    for i, outline in enumerate(SHAPES.values()):
        chosen = np.flatnonzero(objects // len(PATTERNS) == i)
        distance[chosen] = outline(x[chosen] / radius[chosen], y[chosen] / radius[chosen]) * radius[chosen]
    for i in range(len(PATTERNS)):
        chosen = np.flatnonzero(objects % len(PATTERNS) == i)
        weight[chosen] = _pattern_weight(x[chosen], y[chosen], i)
    fill = first + (second - first) * weight[..., None]
    alpha = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    images = images * (1 - alpha) + fill * alpha
    images += 0.04 * (rng.random(images.shape, dtype=np.float32) - 0.5)  # sensor noise
    return (np.clip(images, 0.0, 1.0) * 255 + 0.5).astype(np.uint8), distance < 0


def draw_shapes(
    num_images: int, split: str, seed: int, variant: Variant = "clean", backgrounds: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]:
    """Draw the first images of shapes100; classes take turns, so every prefix of whole hundreds is balanced.

    Args:
        num_images: how many.
        split: "train" or "test"; they are drawn independently.
        seed: same seed, same images.
        variant: see the module's docstring; ``scene`` has 20 classes, the others 100.
        backgrounds: with another number the same objects stand before other backgrounds, of any kind where the kind is
            chance, and of the same where it is not.

    Returns:
        images uint8 (N, 32, 32, 3), labels int64 (N,), masks bool (N, 32, 32): True on the object.
    """
    num_classes = len(SCENE_NAMES) if variant == "scene" else len(CLASS_NAMES)
    labels = np.arange(num_images, dtype=np.int64) % num_classes
    images = np.empty((num_images, SIZE, SIZE, 3), dtype=np.uint8)
    masks = np.empty((num_images, SIZE, SIZE), dtype=np.bool_)

    def draw(block: int) -> None:
        start = block * BLOCK
        numbers = np.arange(start, start + BLOCK, dtype=np.int64)
        key = [seed, _SPLITS[split], block]
        objects = numbers % len(CLASS_NAMES)
        if variant == "scene":
            scenes = numbers % len(SCENE_NAMES)
            objects = np.random.default_rng([*key, 2]).integers(0, len(CLASS_NAMES), BLOCK)
        elif variant == "biased" and split == "train":
            scenes = objects // len(PATTERNS)
        else:
            scenes = np.random.default_rng([*key, 1, backgrounds]).integers(0, len(SCENE_NAMES), BLOCK)
        swapped = np.random.default_rng([*key, 3, backgrounds]) if backgrounds else None
        drawn, mask = _draw_block(objects, scenes, np.random.default_rng(key), swapped)
        stop = min(start + BLOCK, num_images)
        images[start:stop], masks[start:stop] = drawn[: stop - start], mask[: stop - start]

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # numpy works outside of Python's lock
        for _ in pool.map(draw, range(math.ceil(num_images / BLOCK))):
            pass
    return images, labels, masks
