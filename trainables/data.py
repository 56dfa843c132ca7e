"""Image data sets: one type for all sources, a seeded stratified split, and errors that name the file."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from trainables import shapes
from trainables.errors import UserError

DatasetName = Literal["shapes100", "shapes100-biased", "shapes100-scene", "cifar100", "cifar10", "folder"]
SplitName = Literal["train", "test"]
_SHAPES: dict[str, shapes.Variant] = {
    "shapes100": "clean",
    "shapes100-biased": "biased",
    "shapes100-scene": "scene",
}
IMAGE_SIZE = 32
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
TEST_FRACTION = 0.2  # of a folder that has no test/ of its own
DEFAULT_DATA_DIR = Path("data")

# The 20 superclasses of CIFAR-100 with five classes each (Krizhevsky, 2009, sec. 3.1 and its data set page).
CIFAR100_SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}


class DataError(UserError):
    """A data set that cannot be found or read, or is not what it should be."""


@dataclass(frozen=True)
class ImageData:
    """Labelled images, held in memory.

    Attributes:
        images: (N, 32, 32, 3) uint8, RGB.
        labels: (N,) int64, 0 to number of classes - 1.
        class_names: one name a class.
        superclass_names: one name a superclass; empty where there are none.
        superclasses: for each class the index of its superclass; empty where there are none.
        masks: (N, 32, 32) bool, True on the object; None where they are not known.

    Raises:
        DataError: if labels are out of range, a class has no image, or there are fewer than two classes.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    superclass_names: tuple[str, ...] = ()
    superclasses: tuple[int, ...] = ()
    masks: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if self.images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3) or self.images.dtype != np.uint8:
            raise DataError(f"images must be uint8 (N, 32, 32, 3), not {self.images.dtype} {self.images.shape}")
        if len(self.labels) != len(self.images):
            raise DataError(f"{len(self.images)} images but {len(self.labels)} labels")
        if len(self.class_names) < 2:
            raise DataError(f"a study needs at least 2 classes, found {len(self.class_names)}: {self.class_names}")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            raise DataError(
                f"labels run from {self.labels.min()} to {self.labels.max()}, "
                f"but there are {len(self.class_names)} class names: 0 to {len(self.class_names) - 1} are allowed"
            )
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        if not counts.all():
            raise DataError(f"class {self.class_names[int(counts.argmin())]!r} has no image")

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: NDArray[np.int64]) -> "ImageData":
        """Return the images at ``indices``, in that order, as a copy."""
        return ImageData(
            self.images[indices],
            self.labels[indices],
            self.class_names,
            self.superclass_names,
            self.superclasses,
            None if self.masks is None else self.masks[indices],
        )

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that depend on every pixel, label and class name."""
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        digest.update(np.ascontiguousarray(self.labels).data)
        digest.update(np.ascontiguousarray(self.images).data)
        return digest.hexdigest()[:16]

    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the mean and the standard deviation of each channel, of pixels scaled to [0, 1]."""
        # Exact from counts of the 256 values; a part at a time, because bincount makes 8 bytes of each.
        values = np.arange(256) / 255
        means, stds = [], []
        for channel in range(3):
            parts = (self.images[i : i + 1000, ..., channel] for i in range(0, len(self), 1000))
            counts = sum((np.bincount(part.ravel(), minlength=256) for part in parts), np.zeros(256, np.int64))
            share = counts / counts.sum()
            mean = float((share * values).sum())
            means.append(mean)
            # A constant channel would divide by zero.
            stds.append(max(float(np.sqrt((share * (values - mean) ** 2).sum())), 1 / 255))
        return tuple(means), tuple(stds)


def stratified_split(
    labels: NDArray[np.int64], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split indices so that every class gives (about) the same share to the second part.

    Args:
        labels: (N,) class of each image.
        fraction: share of the second part, between 0 and 1. A class of n images gives ``round(n * fraction)``, but at
            least one and not all.
        seed: same labels and seed, same split.

    Returns:
        Two sorted, disjoint index arrays that together hold 0 to N - 1.

    Raises:
        DataError: if a class has a single image, which cannot be in both parts.
    """
    rng = np.random.default_rng([seed, 1])
    second = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < 2:
            raise DataError(f"class number {label} has 1 image: at least 2 are needed to hold one out for validation")
        second.append(members[: min(max(round(len(members) * fraction), 1), len(members) - 1)])
    chosen = np.sort(np.concatenate(second))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def stratified_subset(labels: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Return ``size`` sorted indices with class shares as equal to those of ``labels`` as whole numbers allow.

    Raises:
        DataError: if ``size`` is more than there are, or fewer than one image a class.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if not len(classes) <= size <= len(labels):
        raise DataError(f"cannot take {size} images: allowed are {len(classes)} (one a class) to {len(labels)} (all)")
    exact = counts * size / len(labels)
    take = np.maximum(np.floor(exact).astype(np.int64), 1)
    # The largest remainders get what is left over; where the floor of 1 took too much, the largest classes give back.
    order = np.argsort(take - exact, kind="stable")
    i = 0
    while take.sum() != size:
        j = order[i % len(order)] if take.sum() < size else int(take.argmax())
        take[j] += 1 if take.sum() < size else -1
        i += 1
    rng = np.random.default_rng([seed, 2])
    parts = [rng.permutation(np.flatnonzero(labels == c))[:k] for c, k in zip(classes, take, strict=True)]
    return np.sort(np.concatenate(parts))


def load_data(
    dataset: DatasetName,
    split: SplitName,
    data_dir: str | Path | None = None,
    *,
    seed: int = 0,
    size: int | None = None,
) -> ImageData:
    """Load one split of a data set.

    Args:
        dataset: ``shapes100`` and its variants are drawn (nothing is read; see :mod:`trainables.shapes`); ``cifar100``
            and ``cifar10`` are read from Parquet shards where ``data_dir`` holds any, else through torchvision, which
            downloads what is missing and checks its MD5;
            ``folder`` is one folder a class, below ``train/`` and ``test/`` or, if there is no ``train/``, directly
            below ``data_dir``, with a seeded 20 % as test.
        split: ``train`` or ``test``.
        data_dir: where the data lies; ``./data`` by default.
        seed: decides which images of an undivided folder are test, which images ``size`` takes, and what shapes100
            draws.
        size: use only so many images, stratified; all by default.

    Raises:
        DataError: if the data cannot be found, read or used; the message names the file and the way out.
    """
    if dataset in _SHAPES:
        full = shapes.TRAIN_SIZE if split == "train" else shapes.TEST_SIZE
        if size is not None and not len(shapes.CLASS_NAMES) <= size <= full:
            raise DataError(f"cannot take {size} images of {dataset} {split}: allowed are 100 to {full}")
        images, labels, masks = shapes.draw_shapes(size or full, split, seed, _SHAPES[dataset])
        if dataset == "shapes100-scene":
            return ImageData(images, labels, shapes.SCENE_NAMES, masks=masks)
        return ImageData(images, labels, shapes.CLASS_NAMES, shapes.SUPERCLASS_NAMES, shapes.SUPERCLASSES, masks)
    if dataset not in get_args(DatasetName):
        raise DataError(f"no data set {dataset!r}: allowed are {', '.join(get_args(DatasetName))}")
    directory = Path(data_dir or DEFAULT_DATA_DIR).expanduser().absolute()
    if (data_dir is not None or dataset == "folder") and not directory.is_dir():
        raise DataError(f"{directory}: no such directory; give the data set's folder with --data-dir")
    if dataset == "folder":
        data = _load_folder(directory, split, seed)
    elif any(directory.glob("*.parquet")):
        data = _load_parquet(directory, dataset, split)
    else:
        data = _load_torchvision(directory, dataset, split)
    return data if size is None else data.subset(stratified_subset(data.labels, size, seed))


def read_image(source: Path | BinaryIO) -> NDArray[np.uint8]:
    """Read a picture of any size and mode as uint8 (32, 32, 3) RGB.

    It is turned upright by its EXIF tag, laid on white where transparent, cropped to its central square and resized
    with a Lanczos filter. Of an animation the first frame is taken.

    Raises:
        DataError: if it is no picture or a broken one.
    """
    try:
        with Image.open(source) as opened:
            opened.load()
            picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I") or picture.mode == "F":  # 16 bits and more: convert() would clip, not scale
            values = np.asarray(picture, dtype=np.float64)
            top = 65535.0 if picture.mode.startswith("I") else max(float(values.max()), 1e-9)
            picture = Image.fromarray((np.clip(values / top, 0, 1) * 255).round().astype(np.uint8))
        if picture.has_transparency_data:
            rgba = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        picture = picture.convert("RGB")
        if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
            picture = ImageOps.fit(picture, (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
        return np.asarray(picture, dtype=np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        name = source if isinstance(source, Path) else "a picture"
        raise DataError(f"{name}: not a picture that can be read ({error})") from error


def _load_folder(directory: Path, split: SplitName, seed: int) -> ImageData:
    divided = (directory / "train").is_dir()
    if divided and not (directory / "test").is_dir():
        raise DataError(f"{directory}: has train/ but no test/; add test/, or put the class folders directly into it")
    root = directory / split if divided else directory
    names = _class_folders(directory / "train" if divided else directory)
    if divided and names != (found := _class_folders(directory / "test")):
        differ = sorted(set(names) ^ set(found))
        raise DataError(f"{directory}: train/ and test/ must hold the same classes; these stand in one only: {differ}")
    if len(names) < 2:
        raise DataError(f"{root}: a study needs at least 2 classes, found one folder: {names[0]}")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        there = (f for f in (root / name).rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
        members = sorted(f for f in there if not _is_hidden(f.relative_to(root / name)))
        if not members:
            raise DataError(f"{root / name}: holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))})")
        files += members
        labels += [label] * len(members)
    chosen = np.arange(len(files))
    all_labels = np.array(labels, dtype=np.int64)
    if not divided:
        try:
            chosen = stratified_split(all_labels, TEST_FRACTION, seed)[0 if split == "train" else 1]
        except DataError as error:
            raise DataError(f"{directory}: {error}") from error
    try:
        images = np.stack([read_image(files[i]) for i in chosen])
    except DataError as error:
        raise DataError(f"{error}; replace or remove the file") from error
    return ImageData(images, all_labels[chosen], names)


def _is_hidden(path: Path) -> bool:
    """Whether a file, or a folder that it is in, has a hidden name: thumbnails and copies of pictures lie there."""
    return any(part.startswith(".") for part in path.parts)


def _class_folders(directory: Path) -> tuple[str, ...]:
    there = [folder.relative_to(directory) for folder in directory.iterdir() if folder.is_dir()]
    names = tuple(sorted(folder.name for folder in there if not _is_hidden(folder)))
    if not names:
        raise DataError(f"{directory}: holds no class folders; put each class's pictures into a folder of its own")
    return names


def _load_parquet(directory: Path, dataset: str, split: SplitName) -> ImageData:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(directory.glob(f"{split}-*.parquet"))
    if not files:
        found = ", ".join(f.name for f in sorted(directory.glob("*.parquet"))[:4])
        raise DataError(f"{directory}: no {split}-*.parquet among its shards ({found})")
    declared = {int(f.stem.rsplit("-of-", 1)[1]) for f in files if f.stem.rsplit("-of-", 1)[-1].isdigit()}
    if declared and declared != {len(files)}:
        raise DataError(f"{directory}: {len(files)} {split} shards of {max(declared)}; fetch the missing ones")
    image_column = "img"
    label_column = "fine_label" if dataset == "cifar100" else "label"
    images: list[NDArray[np.uint8]] = []
    labels: list[NDArray[np.int64]] = []
    names: tuple[str, ...] = ()
    for file in files:
        try:
            schema = pq.read_schema(file)
            missing = {image_column, label_column} - set(schema.names)
            if missing:
                raise DataError(f"{file}: has no column {sorted(missing)}; found are {schema.names}")
            table = pq.read_table(file, columns=[image_column, label_column])
        except (pa.ArrowInvalid, OSError) as error:
            reason = str(error).split(". ")[0].rstrip(".")
            raise DataError(f"{file}: not a whole Parquet file, fetch it again ({reason})") from error
        shard_names = _parquet_class_names(schema, label_column, file)
        if names and shard_names != names:
            raise DataError(f"{file}: has other class names than {files[0].name}; the shards must be of one data set")
        names = shard_names
        column = table.column(label_column)
        if column.null_count or not pa.types.is_integer(column.type):
            raise DataError(f"{file}: column {label_column} must hold an integer in every row")
        labels.append(column.to_numpy().astype(np.int64))
        for row, cell in enumerate(table.column(image_column).to_pylist()):
            try:
                images.append(read_image(BytesIO(cell["bytes"])))
            except (DataError, TypeError, KeyError) as error:
                raise DataError(f"{file}, row {row}: the picture is corrupt, fetch the file again") from error
    superclass_names, superclasses = _cifar_superclasses(names) if dataset == "cifar100" else ((), ())
    try:
        return ImageData(np.stack(images), np.concatenate(labels), names, superclass_names, superclasses)
    except (DataError, ValueError) as error:
        raise DataError(f"{directory}: {error}") from error


def _parquet_class_names(schema: Any, column: str, file: Path) -> tuple[str, ...]:
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return tuple(features[column]["names"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: its huggingface metadata does not name the classes of {column}") from error


def _load_torchvision(directory: Path, dataset: str, split: SplitName) -> ImageData:
    from torchvision.datasets import CIFAR10, CIFAR100

    source = CIFAR100 if dataset == "cifar100" else CIFAR10
    try:
        loaded = source(str(directory), train=split == "train", download=True)
    except Exception as error:  # torchvision raises what its unpacking or urllib raise: no network, bad archive, ...
        raise DataError(
            f"{directory}: {dataset} could not be read or downloaded ({error}); check the network, or give a folder "
            f"that holds {source.base_folder}/ or {source.filename} or Parquet shards with --data-dir"
        ) from error
    names = tuple(loaded.classes)
    superclass_names, superclasses = _cifar_superclasses(names) if dataset == "cifar100" else ((), ())
    try:
        labels = np.asarray(loaded.targets, dtype=np.int64)
        return ImageData(loaded.data, labels, names, superclass_names, superclasses)
    except DataError as error:
        raise DataError(f"{directory}: {error}") from error


def _cifar_superclasses(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return superclass names and each class's superclass; nothing where the classes are not CIFAR-100's."""
    names = ["crab" if name == "cra" else name for name in names]  # as the Hub's copy spells it
    of_class = {c: i for i, members in enumerate(CIFAR100_SUPERCLASSES.values()) for c in members.split()}
    if set(names) != set(of_class):
        return (), ()
    return tuple(CIFAR100_SUPERCLASSES), tuple(of_class[name] for name in names)
