"""Every data source on small fixtures in the official formats, bad input, and the seeded splits."""

import hashlib
import io
import json
import pickle
import re
import shutil
import tarfile
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from explain import centred_gaussian, energy_lift, sobel
from trainables import DataError, ImageData, load_data, read_image, shapes, stratified_split, stratified_subset
from trainables.data import CIFAR100_SUPERCLASSES

CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# CIFAR-100's classes stand in alphabetical order, so do its superclasses; COARSE holds the official
# coarse label of each class, as letters: a is 0, t is 19.
FINE_NAMES = tuple(sorted(" ".join(CIFAR100_SUPERCLASSES.values()).split()))
COARSE = tuple(
    ord(c) - ord("a")
    for c in "eboiaghhsddojshldjhlglfkhgnpdpalbkmoqjlfftiipnorskqerecaresrkdcmmqmbjtckabqmjnpnqtcegtffitsbcpgarion"
)
# The shards on the Hugging Face hub misspell one class (dataset_infos.json of uoft-cs/cifar100).
HUB_FINE_NAMES = tuple("cra" if name == "crab" else name for name in FINE_NAMES)


def noise(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def solid(value: int) -> np.ndarray:
    return np.full((32, 32, 3), value, np.uint8)


def assert_says(message: str, *parts: object) -> None:
    """One sentence that holds every part."""
    for part in parts:
        assert str(part) in message
    assert not re.search(r"\n|[.!?]\s", message), message


def make_data(n: int = 12, classes: int = 3) -> ImageData:
    return ImageData(noise(n), np.arange(n) % classes, tuple("abcdefgh"[:classes]))


# ---- CIFAR as torchvision reads it


def write_batch(file: Path, images: np.ndarray, **labels: list[int]) -> None:
    # Rows of 3072 bytes: all of red, then green, then blue.
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    names = [f"{i}.png" for i in range(len(images))]
    file.write_bytes(pickle.dumps({"data": rows, "filenames": names, "batch_label": "a batch", **labels}, 2))


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Write a small CIFAR-10 or CIFAR-100 and tell torchvision its checksums."""

    def write(dataset: str, labels: list[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        source = CIFAR100 if dataset == "cifar100" else CIFAR10
        folder = tmp_path / source.base_folder
        folder.mkdir()
        images = noise(200)
        if dataset == "cifar100":
            labels = labels or [*range(100)] * 2
            coarse = [COARSE[i % 100] for i in labels]
            write_batch(folder / "train", images, fine_labels=labels, coarse_labels=coarse)
            write_batch(folder / "test", images[::-1], fine_labels=labels[::-1], coarse_labels=coarse[::-1])
            meta = {"fine_label_names": list(FINE_NAMES), "coarse_label_names": list(CIFAR100_SUPERCLASSES)}
        else:
            labels = labels or [*range(10)] * 20
            for i in range(5):
                part = slice(40 * i, 40 * (i + 1))
                write_batch(folder / f"data_batch_{i + 1}", images[part], labels=labels[part])
            write_batch(folder / "test_batch", images[::-1], labels=labels[::-1])
            meta = {"label_names": list(CIFAR10_NAMES), "num_cases_per_batch": 40, "num_vis": 3072}
        (folder / source.meta["filename"]).write_bytes(pickle.dumps(meta, 2))

        def md5(name: str) -> str:
            return hashlib.md5((folder / name).read_bytes()).hexdigest()

        monkeypatch.setattr(source, "train_list", [[name, md5(name)] for name, _ in source.train_list])
        monkeypatch.setattr(source, "test_list", [[name, md5(name)] for name, _ in source.test_list])
        monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5(source.meta["filename"])})
        return images, np.array(labels)

    return write


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_pickled_cifar_is_read_exactly(dataset, cifar, tmp_path, no_network):
    images, labels = cifar(dataset)
    train, test = (load_data(dataset, split, tmp_path) for split in ("train", "test"))
    np.testing.assert_array_equal(train.images, images)
    np.testing.assert_array_equal(train.labels, labels)
    np.testing.assert_array_equal(test.images, images[::-1])
    np.testing.assert_array_equal(test.labels, labels[::-1])
    assert (train.images.dtype, train.labels.dtype) == (np.uint8, np.int64)
    assert train.class_names == test.class_names == (CIFAR10_NAMES if dataset == "cifar10" else FINE_NAMES)
    assert train.masks is None


def test_cifar100_has_the_official_superclasses(cifar, tmp_path, no_network):
    cifar("cifar100")
    data = load_data("cifar100", "train", tmp_path)
    assert data.superclasses == COARSE
    assert data.superclass_names == tuple(sorted(CIFAR100_SUPERCLASSES))
    assert data.superclass_names[data.superclasses[data.class_names.index("crab")]] == "non-insect_invertebrates"


def test_cifar10_has_no_superclasses(cifar, tmp_path, no_network):
    cifar("cifar10")
    data = load_data("cifar10", "test", tmp_path)
    assert (data.superclass_names, data.superclasses) == ((), ())


@pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter extracted tar:DeprecationWarning")
def test_cifar_archive_is_unpacked(cifar, tmp_path, no_network, monkeypatch):
    images, _ = cifar("cifar100")
    archive = tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "cifar-100-python", "cifar-100-python")
    shutil.rmtree(tmp_path / "cifar-100-python")
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    np.testing.assert_array_equal(load_data("cifar100", "train", tmp_path).images, images)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_no_network_says_what_to_do(dataset, tmp_path, no_network):
    with pytest.raises(DataError) as error:
        load_data(dataset, "train", tmp_path)
    folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[dataset]
    assert_says(str(error.value), tmp_path, dataset, "network", folder, "--data-dir")


def test_truncated_cifar_batch_is_refused(cifar, tmp_path, no_network):
    cifar("cifar100")
    file = tmp_path / "cifar-100-python" / "train"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError) as error:
        load_data("cifar100", "train", tmp_path)
    assert_says(str(error.value), tmp_path, "cifar100", "--data-dir")


@pytest.mark.parametrize(("labels", "part"), [([*range(99), 100] * 2, "0 to 99"), ([*range(99), 0] * 2, "worm")])
def test_wrong_cifar_labels_are_refused(labels, part, cifar, tmp_path, no_network):
    cifar("cifar100", labels)
    with pytest.raises(DataError) as error:
        load_data("cifar100", "train", tmp_path)
    assert_says(str(error.value), tmp_path, part)


# ---- Parquet shards as the Hugging Face hub holds them


def write_shard(file: Path, images: list, labels: list, names: tuple[str, ...], label_column: str = "fine_label"):
    cells = [{"bytes": i, "path": None} if isinstance(i, bytes) else i for i in images]
    columns = {"img": pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    columns[label_column] = pa.array(labels, pa.string() if isinstance(labels[0], str) else pa.int64())
    features = {"img": {"_type": "Image"}, label_column: {"names": list(names), "_type": "ClassLabel"}}
    if label_column == "fine_label":
        columns["coarse_label"] = pa.array([0] * len(images), pa.int64())
        features["coarse_label"] = {"names": list(CIFAR100_SUPERCLASSES), "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), file)


def write_two_shards(root: Path) -> np.ndarray:
    """Six train images of cat and dog in two shards, and two test images; return the train images."""
    images = noise(6)
    for shard, part in enumerate((slice(0, 3), slice(3, 6))):
        file = root / f"train-0000{shard}-of-00002.parquet"
        write_shard(file, [png(i) for i in images[part]], [0, 1, 0], ("cat", "dog"))
    write_shard(root / "test-00000-of-00001.parquet", [png(i) for i in images[:2]], [1, 0], ("cat", "dog"))
    return images


def test_parquet_shards_are_read_exactly_and_in_order(tmp_path):
    images = write_two_shards(tmp_path)
    train, test = (load_data("cifar100", split, tmp_path) for split in ("train", "test"))
    np.testing.assert_array_equal(train.images, images)
    np.testing.assert_array_equal(train.labels, [0, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(test.images, images[:2])
    np.testing.assert_array_equal(test.labels, [1, 0])
    assert train.class_names == ("cat", "dog")
    assert train.labels.dtype == np.int64
    assert (train.superclass_names, train.superclasses) == ((), ())


def test_parquet_cifar10_reads_its_label_column(tmp_path):
    images = noise(10)
    write_shard(
        tmp_path / "test-00000-of-00001.parquet", [png(i) for i in images], [*range(10)][::-1], CIFAR10_NAMES, "label"
    )
    data = load_data("cifar10", "test", tmp_path)
    np.testing.assert_array_equal(data.images, images)
    np.testing.assert_array_equal(data.labels, np.arange(10)[::-1])
    assert data.class_names == CIFAR10_NAMES


@pytest.mark.parametrize("names", [FINE_NAMES, HUB_FINE_NAMES], ids=["official", "hub"])
def test_parquet_cifar100_has_the_official_superclasses(names, tmp_path):
    write_shard(tmp_path / "train-00000-of-00001.parquet", [png(i) for i in noise(100)], [*range(100)], names)
    data = load_data("cifar100", "train", tmp_path)
    assert data.superclasses == COARSE
    assert data.superclass_names == tuple(CIFAR100_SUPERCLASSES)


FIRST, SECOND = "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"
PNG = png(solid(7))


def rewrite(images: list | None = None, labels: list | None = None, names=("cat", "dog")) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        write_shard(root / FIRST, images or [PNG] * 3, labels or [0, 1, 0], names)

    return write


def edit_table(edit: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    return lambda root: pq.write_table(edit(pq.read_table(root / FIRST)), root / FIRST)


def truncate(file: str, keep: int) -> Callable[[Path], None]:
    return lambda root: (root / file).write_bytes((root / file).read_bytes()[:keep])


BAD_SHARDS = {
    "truncated shard": (truncate(FIRST, -50), [FIRST, "fetch it again"]),
    "empty shard": (truncate(FIRST, 0), [FIRST, "fetch it again"]),
    "missing label column": (edit_table(lambda t: t.drop_columns("fine_label")), [FIRST, "fine_label", "coarse_label"]),
    "missing image column": (edit_table(lambda t: t.rename_columns(["png", *t.column_names[1:]])), [FIRST, "'img'"]),
    "no metadata": (edit_table(lambda t: t.replace_schema_metadata({})), [FIRST, "huggingface", "fine_label"]),
    "corrupt picture": (rewrite([PNG, b"not a picture", PNG]), [FIRST, "row 1", "fetch the file again"]),
    "truncated picture": (rewrite([PNG, PNG, PNG[:60]]), [FIRST, "row 2", "fetch the file again"]),
    "null picture": (rewrite([None, PNG, PNG]), [FIRST, "row 0", "fetch the file again"]),
    "picture without bytes": (rewrite([PNG, {"bytes": None, "path": "a.png"}, PNG]), [FIRST, "row 1"]),
    "null label": (rewrite(labels=[0, None, 1]), [FIRST, "fine_label", "integer in every row"]),
    "label that is a word": (rewrite(labels=["0", "1", "0"]), [FIRST, "fine_label", "integer in every row"]),
    "label too large": (rewrite(labels=[0, 1, 2]), ["labels run from 0 to 2", "2 class names", "0 to 1"]),
    "label below zero": (rewrite(labels=[0, 1, -1]), ["labels run from -1 to 1", "2 class names", "0 to 1"]),
    "shards of other classes": (rewrite(names=("dog", "cat")), ["class"]),
    "missing shard of two": (lambda root: (root / SECOND).unlink(), ["1 train shards of 2", "fetch the missing"]),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_shards_are_refused(case, tmp_path):
    spoil, parts = BAD_SHARDS[case]
    write_two_shards(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError) as error:
        load_data("cifar100", "train", tmp_path)
    assert_says(str(error.value), tmp_path, *parts)


@pytest.mark.parametrize(
    ("labels", "names", "parts"),
    [([0, 0], ("cat",), ["at least 2 classes", "found 1"]), ([0, 0], ("cat", "dog"), ["'dog'", "no image"])],
)
def test_shards_of_one_class_are_refused(labels, names, parts, tmp_path):
    write_shard(tmp_path / "train-00000-of-00001.parquet", [PNG, PNG], labels, names)
    with pytest.raises(DataError) as error:
        load_data("cifar100", "train", tmp_path)
    assert_says(str(error.value), tmp_path, *parts)


def test_shards_without_the_split_are_refused(tmp_path):
    write_two_shards(tmp_path)
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError) as error:
        load_data("cifar100", "test", tmp_path)
    assert_says(str(error.value), tmp_path, "test-*.parquet", FIRST)


# ---- Image folders


def write_folder(root: Path, names=("cat", "dog"), count: int = 3, start: int = 0) -> dict[str, int]:
    """Write ``count`` one-coloured pictures a class, each of a grey of its own; return the grey of each file."""
    greys = {}
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            greys[f"{name}/{i}.png"] = start + len(greys)
            (root / name / f"{i}.png").write_bytes(png(solid(start + len(greys) - 1)))
    return greys


def test_divided_folder_is_read_exactly(tmp_path):
    images = iter(noise(10))
    written: dict[str, list[np.ndarray]] = {}
    for split, count in (("train", 3), ("test", 2)):
        for name in ("dog", "cat"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                written.setdefault(f"{split}/{name}", []).append(next(images))
                (tmp_path / split / name / f"{i}.png").write_bytes(png(written[f"{split}/{name}"][-1]))
    for split, count in (("train", 3), ("test", 2)):
        data = load_data("folder", split, tmp_path)
        assert data.class_names == ("cat", "dog")
        np.testing.assert_array_equal(data.labels, [0] * count + [1] * count)
        np.testing.assert_array_equal(data.images, written[f"{split}/cat"] + written[f"{split}/dog"])


def test_folder_takes_nested_pictures_of_every_suffix_and_nothing_else(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    (tmp_path / "train/cat/deep/er").mkdir(parents=True)
    Image.fromarray(solid(99)).save(tmp_path / "train/cat/deep/er/x.BMP")
    (tmp_path / "train/cat/notes.txt").write_text("not a picture")
    (tmp_path / "train/README").write_text("not a class")
    for hidden in (".thumbnails/0.png", "deep/.cache/er/0.png", ".0.png"):
        (tmp_path / "train/cat" / hidden).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(solid(98)).save(tmp_path / "train/cat" / hidden)
    data = load_data("folder", "train", tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.images[:, 0, 0, 0].tolist() == [0, 1, 2, 99, 3, 4, 5]
    assert data.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_undivided_folder_is_split_by_the_seed(tmp_path):
    greys = write_folder(tmp_path, count=20)
    splits = []
    for seed in (0, 0, 1):
        train, test = (load_data("folder", split, tmp_path, seed=seed) for split in ("train", "test"))
        assert Counter(test.labels.tolist()) == {0: 4, 1: 4}
        shown = [sorted(data.images[:, 0, 0, 0].tolist()) for data in (train, test)]
        assert sorted(shown[0] + shown[1]) == sorted(greys.values())
        for data in (train, test):
            np.testing.assert_array_equal(data.images[:, 0, 0, 0] >= 20, data.labels == 1)
        splits.append(shown)
    assert splits[0] == splits[1] != splits[2]


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root / name)


def empty(name: str) -> Callable[[Path], None]:
    return lambda root: [file.unlink() for file in (root / name).iterdir()] and None


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(content) and None


def keep_one_class(root: Path) -> None:
    for split in ("train", "test"):
        shutil.rmtree(root / split / "dog")


def remove_classes(root: Path) -> None:
    for name in ("cat", "dog"):
        shutil.rmtree(root / "train" / name)


BAD_FOLDERS = {
    "corrupt picture": (overwrite("train/cat/1.png", b"not a picture"), ["train/cat/1.png"], "replace|remove|delete"),
    "truncated picture": (overwrite("train/cat/1.png", PNG[:60]), ["train/cat/1.png"], "replace|remove|delete"),
    "empty picture": (overwrite("train/dog/2.png", b""), ["train/dog/2.png"], "replace|remove|delete"),
    "empty class folder": (empty("train/cat"), ["train/cat"], r"holds no picture \(.*\.png"),
    "one class only": (keep_one_class, ["cat"], "at least 2 classes"),
    "train without test": (remove("test"), ["no test/"], "add test/"),
    "a class in train only": (remove("test/dog"), ["'dog'"], "same classes"),
    "a class in test only": (lambda root: write_folder(root / "test", ("bird",)), ["'bird'"], "same classes"),
    "no class folders": (remove_classes, ["train"], "folder of its own"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_refused(case, tmp_path):
    spoil, parts, way_out = BAD_FOLDERS[case]
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    spoil(tmp_path)
    with pytest.raises(DataError) as error:
        load_data("folder", "train", tmp_path)
    assert_says(str(error.value), tmp_path, *parts)
    assert re.search(way_out, str(error.value)), str(error.value)


@pytest.mark.parametrize("case", ["train without test", "a class in train only", "a class in test only"])
def test_bad_folders_are_refused_as_test_images_too(case, tmp_path):
    spoil, parts, way_out = BAD_FOLDERS[case]
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    spoil(tmp_path)
    with pytest.raises(DataError, match=way_out) as error:
        load_data("folder", "test", tmp_path)
    assert_says(str(error.value), tmp_path, *parts)


def test_undivided_folder_with_a_single_picture_is_refused(tmp_path):
    write_folder(tmp_path)
    write_folder(tmp_path, ("bird",), 1)
    with pytest.raises(DataError) as error:
        load_data("folder", "train", tmp_path)
    assert_says(str(error.value), tmp_path, "1 image", "at least 2")


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "folder"])
def test_missing_directory_is_refused(dataset, tmp_path):
    with pytest.raises(DataError) as error:
        load_data(dataset, "train", tmp_path / "nowhere")
    assert_says(str(error.value), tmp_path / "nowhere", "no such directory", "--data-dir")


def test_missing_default_directory_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        load_data("folder", "train")
    assert_says(str(error.value), tmp_path / "data", "no such directory", "--data-dir")


def test_unknown_data_set_is_refused(tmp_path):
    with pytest.raises(DataError) as error:
        load_data("cifar1000", "train", tmp_path)
    assert_says(
        str(error.value), "'cifar1000'", "shapes100, shapes100-biased, shapes100-scene, cifar100, cifar10, folder"
    )


# ---- One picture


def exif_rotated(image: np.ndarray, file: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter to stand upright
    Image.fromarray(image).save(file, exif=exif)


def test_lossless_picture_of_the_right_size_comes_through_exactly(tmp_path):
    image = noise(1)[0]
    for suffix in ("png", "bmp", "tiff", "ppm"):
        Image.fromarray(image).save(tmp_path / f"x.{suffix}")
        np.testing.assert_array_equal(read_image(tmp_path / f"x.{suffix}"), image)
    np.testing.assert_array_equal(read_image(io.BytesIO(png(image))), image)


def test_grey_picture_has_three_equal_channels(tmp_path):
    grey = noise(1)[0, :, :, 0]
    Image.fromarray(grey).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), np.repeat(grey[..., None], 3, 2))


def test_bilevel_picture_is_black_and_white(tmp_path):
    bits = noise(1)[0, :, :, 0] > 127
    Image.fromarray(bits).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.mode == "1"
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), np.repeat(bits[..., None], 3, 2) * np.uint8(255))


@pytest.mark.parametrize("transparent", [False, True])
def test_palette_picture_has_its_colours_and_white_where_transparent(transparent, tmp_path):
    index = noise(1)[0, :, :, 0] % 4
    colours = np.array([[255, 0, 0], [10, 200, 30], [0, 0, 255], [1, 2, 3]], np.uint8)
    picture = Image.fromarray(index)
    picture.putpalette(colours.tobytes())
    assert picture.mode == "P"
    picture.save(tmp_path / "x.png", **({"transparency": 2} if transparent else {}))
    if transparent:
        colours[2] = 255
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), colours[index])


def test_rgba_picture_is_laid_on_white(tmp_path):
    rgba = np.concatenate([noise(1)[0], noise(1, seed=1)[0, :, :, :1]], 2)
    Image.fromarray(rgba).save(tmp_path / "x.png")
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(read_image(tmp_path / "x.png") - expected).max() <= 1
    rgba[..., 3] = 0
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    np.testing.assert_array_equal(read_image(tmp_path / "clear.png"), solid(255))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_picture_of_16_bits_is_scaled_and_not_clipped(suffix, tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (32, 32), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    with Image.open(tmp_path / f"x.{suffix}") as picture:
        assert picture.mode == "I;16"
    expected = np.repeat((values / 257).round().astype(np.uint8)[..., None], 3, 2)
    np.testing.assert_array_equal(read_image(tmp_path / f"x.{suffix}"), expected)


def test_cmyk_picture_becomes_rgb(tmp_path):
    cmyk = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    Image.fromarray(cmyk, "CMYK").save(tmp_path / "x.tiff")
    expected = (255.0 - cmyk[..., :3]) * (255.0 - cmyk[..., 3:]) / 255
    assert np.abs(read_image(tmp_path / "x.tiff") - expected).max() <= 1


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.fromarray(solid(value)) for value in (50, 150, 250)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "x.gif") as picture:
        assert picture.n_frames == 3
    np.testing.assert_array_equal(read_image(tmp_path / "x.gif"), solid(50))


def test_exif_rotation_is_undone(tmp_path):
    image = noise(1)[0]
    exif_rotated(image, tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), np.rot90(image, -1))


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (31, 33), (64, 64), (100, 40), (3, 500)])
def test_picture_of_any_size_keeps_its_colour(size, tmp_path):
    Image.new("RGB", size, (12, 200, 99)).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), np.broadcast_to([12, 200, 99], (32, 32, 3)))


@pytest.mark.parametrize("axis", [0, 1])
def test_long_picture_is_cropped_to_its_central_square(axis, tmp_path):
    thirds = noise(3)
    (tmp_path / "x.png").write_bytes(png(np.concatenate(list(thirds), axis)))
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), thirds[1])


def test_large_picture_is_smoothed_and_not_sampled(tmp_path):
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    (tmp_path / "x.png").write_bytes(png(board))
    image = read_image(tmp_path / "x.png").astype(int)
    assert np.abs(image[1:-1, 1:-1] - 127.5).max() < 2  # at the margin the filter sees one half only


def test_pictures_of_all_modes_stand_in_one_folder(tmp_path):
    for split in ("train", "test"):
        for name, value in (("dark", 0), ("light", 255)):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for mode in ("1", "L", "RGB", "P", "LA", "RGBA"):
                Image.new("RGB", (40, 50), (value,) * 3).convert(mode).save(folder / f"{mode}.png")
            Image.new("RGB", (40, 50), (value,) * 3).convert("CMYK").save(folder / "CMYK.jpg", quality=100)
            Image.fromarray(np.full((20, 20), value * 257, np.uint16)).save(folder / "I16.png")
            other = Image.new("RGB", (32, 32), (127, 0, 0))
            Image.fromarray(solid(value)).save(folder / "a.gif", save_all=True, append_images=[other])
            exif_rotated(np.full((8, 9, 3), value, np.uint8), folder / "exif.jpg")
    data = load_data("folder", "test", tmp_path)
    assert len(data) == 20
    assert np.abs(data.images - np.array([0, 255])[data.labels][:, None, None, None]).max() <= 2


# ---- shapes100


def test_shapes_are_a_function_of_seed_and_split():
    first, again, other_seed, test = (
        shapes.draw_shapes(200, split, seed) for split, seed in (("train", 0), ("train", 0), ("train", 1), ("test", 0))
    )
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    drawn = [{image.tobytes() for image in images} for images, _, _ in (first, other_seed, test)]
    assert len(drawn[0] | drawn[1] | drawn[2]) == 600


def test_fewer_shapes_are_a_prefix_of_more():
    many = shapes.draw_shapes(1150, "train", 3)
    for count in (1, 130, 500, 501, 1000):
        for few, all_of_them in zip(shapes.draw_shapes(count, "train", 3), many, strict=True):
            np.testing.assert_array_equal(few, all_of_them[:count])


def test_shapes_are_balanced_and_their_names_say_what_is_drawn():
    data = load_data("shapes100", "test", size=600, seed=5)
    assert (np.bincount(data.labels) == 6).all()
    assert len(data.class_names) == len(set(data.class_names)) == 100
    assert (len(data.superclass_names), len(data.superclasses)) == (20, 100)
    for name, superclass in zip(data.class_names, data.superclasses, strict=True):
        pattern, shape = name.split(" ")
        assert (pattern in shapes.PATTERNS, shape) == (True, data.superclass_names[superclass])
    np.testing.assert_array_equal(data.images, shapes.draw_shapes(600, "test", 5)[0])


def test_masks_stand_on_the_object():
    images, labels, masks = shapes.draw_shapes(1000, "train", 0)
    assert (masks.shape, masks.dtype) == ((1000, 32, 32), np.bool_)
    share = masks.mean((1, 2))
    assert share.min() > 0.03
    assert share.max() < 0.25
    # Where all eight neighbours are inside too, a solid object has one colour and sensor noise, a pattern has two.
    padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
    inside = np.logical_and.reduce([padded[:, i : i + 32, j : j + 32] for i in range(3) for j in range(3)])
    assert inside.any((1, 2)).all()
    is_solid = np.array([name.startswith("solid ") for name in shapes.CLASS_NAMES])[labels]
    spread = np.array([image[where].std(0).max() for image, where in zip(images, inside, strict=True)])
    assert spread[is_solid].max() < 10
    assert np.quantile(spread[~is_solid], 0.1) > 20  # the core of a slim object may lie within one stripe
    # The background has another colour.
    solid_ones = zip(images[is_solid], inside[is_solid], masks[is_solid], strict=True)
    contrast = [np.abs(image[core].mean(0) - image[~mask].mean(0)).max() for image, core, mask in solid_ones]
    assert np.median(contrast) > 60


def test_neither_edges_nor_the_middle_tell_much_of_where_the_object_is():
    images, _, masks = shapes.draw_shapes(1000, "test", 0)
    pixels, inside = torch.from_numpy(images).permute(0, 3, 1, 2) / 255, torch.from_numpy(masks)
    for control in (sobel(pixels), centred_gaussian(1000, (32, 32))):
        assert energy_lift(control, inside).mean() < 1.9


def test_no_object_is_cut_by_the_edge_of_the_image():
    _, labels, masks = shapes.draw_shapes(2000, "train", 0)
    edge = np.ones((32, 32), np.bool_)
    edge[1:-1, 1:-1] = False
    cut = (masks & edge).any((1, 2))
    assert not cut.any(), Counter(shapes.SUPERCLASS_NAMES[label // 5] for label in labels[cut])


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_shapes_use_exactly_rounded_arithmetic_only(name):
    used = set()

    class Recorded(np.ndarray):
        def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
            used.add(ufunc.__name__)
            plain = [np.asarray(i) if isinstance(i, Recorded) else i for i in inputs]
            return getattr(ufunc, method)(*plain, **kwargs).view(Recorded)

    x, y = np.linspace(-1, 1, 18, dtype=np.float32).reshape(2, 9).view(Recorded)
    shapes.SHAPES[name](x, y)
    exact = {"add", "subtract", "multiply", "divide", "sqrt", "square", "negative", "absolute", "maximum", "minimum"}
    assert used
    assert used <= exact  # IEEE 754 asks for correct rounding of these; power and sine differ between machines


@pytest.mark.parametrize("dataset", ["shapes100", "shapes100-biased", "shapes100-scene"])
@pytest.mark.parametrize(("split", "size"), [("train", 99), ("train", 50_001), ("test", 10_001)])
def test_impossible_number_of_shapes_is_refused(split, size, dataset):
    with pytest.raises(DataError) as error:
        load_data(dataset, split, size=size)
    assert_says(str(error.value), size, f"of {dataset} {split}", "100 to")


def eroded(masks: np.ndarray, reach: int) -> np.ndarray:
    """Where all pixels so far to each side are True too."""
    side = 2 * reach + 1
    padded = np.pad(masks, ((0, 0), (reach, reach), (reach, reach)))
    return np.logical_and.reduce([padded[:, i : i + 32, j : j + 32] for i in range(side) for j in range(side)])


FINE = 0.136  # of the way from one colour to the other, from a pixel to the next


def seen_scenes(images: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Tell the kind of background from the pixels alone: its two colours, and how much neighbours differ."""
    palette = np.array([shapes._COLOURS[name.split(" ")[1]] for name in shapes.SCENE_NAMES[::2]])
    line = palette[:, 1] - palette[:, 0]
    kinds = []
    for image, where in zip(images / 255.0, eroded(~masks, 1), strict=True):
        pixels = image[where]
        # For each kind, how far each pixel is on the way between its colours, and what is seen near the ends of it.
        shares = ((pixels - palette[:, :1]) * line[:, None]).sum(2) / (line**2).sum(1)[:, None]
        ends = [[pixels[near].mean(0) if near.any() else [9] * 3 for near in (s < 0.3, s > 0.7)] for s in shares]
        own = np.linalg.norm(np.array(ends) - palette, axis=2).sum(1).argmin()
        along = image @ line[own] / (line[own] ** 2).sum()
        steps = np.diff(along, axis=1)[where[:, 1:] & where[:, :-1]]
        kinds.append(2 * own + (np.abs(steps).mean() > FINE))
    return np.array(kinds)


@pytest.mark.parametrize("backgrounds", [0, 1])
def test_in_biased_train_the_background_is_that_of_the_superclass(backgrounds):
    images, labels, masks = shapes.draw_shapes(300, "train", 0, "biased", backgrounds)
    np.testing.assert_array_equal(labels, np.arange(300) % 100)
    assert (seen_scenes(images, masks) == labels // 5).mean() > 0.9


@pytest.mark.parametrize("backgrounds", [0, 1])
def test_in_biased_test_the_background_tells_nothing_of_the_superclass(backgrounds):
    images, labels, masks = shapes.draw_shapes(1000, "test", 0, "biased", backgrounds)
    counts = np.zeros((20, 20))
    np.add.at(counts, (labels // 5, seen_scenes(images, masks)), 1)
    expected = counts.sum(1, keepdims=True) * counts.sum(0) / 1000
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_squared - 19 * 19) < 4 * np.sqrt(2 * 19 * 19)
    assert np.trace(counts) / 1000 == pytest.approx(1 / 20, abs=0.03)
    assert counts.sum(0).min() > 20  # of 50: every kind is there


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("backgrounds", [0, 1])
def test_in_scene_the_background_is_the_class(split, backgrounds):
    images, labels, masks = shapes.draw_shapes(300, split, 0, "scene", backgrounds)
    np.testing.assert_array_equal(labels, np.arange(300) % 20)
    assert (seen_scenes(images, masks) == labels).mean() > 0.9


def test_in_scene_the_object_tells_nothing_of_the_class(monkeypatch):
    def numbered(objects: np.ndarray, *_: object) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.broadcast_to(objects[:, None, None, None].astype(np.uint8), (500, 32, 32, 3))
        return pixels, np.zeros((500, 32, 32), np.bool_)

    monkeypatch.setattr(shapes, "_draw_block", numbered)
    images, labels, _ = shapes.draw_shapes(10_000, "train", 0, "scene")
    objects = images[:, 0, 0, 0]
    counts = np.zeros((20, 100))
    np.add.at(counts, (labels, objects), 1)
    assert abs(((counts - 5) ** 2 / 5).sum() - 1999) < 4 * np.sqrt(2 * 1999)
    assert len(np.unique(objects.reshape(20, 500), axis=0)) == 20  # every block has its own
    np.testing.assert_array_equal(shapes.draw_shapes(10_000, "train", 0, "scene", 7)[0], images)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("variant", ["clean", "biased", "scene"])
def test_other_backgrounds_stand_behind_the_same_objects(variant, split):
    images, labels, masks = shapes.draw_shapes(200, split, 3, variant)
    other, other_labels, other_masks = shapes.draw_shapes(200, split, 3, variant, 1)
    np.testing.assert_array_equal(labels, other_labels)
    np.testing.assert_array_equal(masks, other_masks)
    changed, inside = (images != other).any(3), eroded(masks, 1)
    assert inside.any((1, 2)).all()
    # Between the lobes of a heart a little shines through: the cleft is narrower than a pixel.
    assert (changed & inside).sum() < inside.sum() / 1000
    if variant != "scene":
        hearts = labels // 5 == shapes.SUPERCLASS_NAMES.index("heart")
        assert not (changed & inside)[~hearts].any()
    # The distractor stays too, on 55 pixels at most.
    share = (changed & ~masks).sum((1, 2)) / (~masks).sum((1, 2))
    assert share.min() > 0.8
    assert np.median(share) > 0.95


@pytest.mark.parametrize("variant", ["clean", "biased", "scene"])
def test_the_same_number_gives_the_same_backgrounds_and_another_others(variant):
    first, again, other = (shapes.draw_shapes(50, "test", 0, variant, number)[0] for number in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    own = shapes.draw_shapes(50, "test", 0, variant)[0]
    other_seed = shapes.draw_shapes(50, "test", 1, variant, 1)[0]
    assert len({image[0].tobytes() for images in (own, first, other, other_seed) for image in images}) == 4 * 50


@pytest.mark.parametrize(("variant", "backgrounds"), [("clean", 2), ("biased", 0), ("biased", 2), ("scene", 0)])
def test_fewer_shapes_of_a_variant_are_a_prefix_of_more(variant, backgrounds):
    many = shapes.draw_shapes(600, "test", 3, variant, backgrounds)
    for count in (1, 500, 501):
        for few, all_of_them in zip(shapes.draw_shapes(count, "test", 3, variant, backgrounds), many, strict=True):
            np.testing.assert_array_equal(few, all_of_them[:count])


def test_biased_shapes_are_the_clean_ones_before_other_backgrounds_in_train_and_the_same_in_test():
    for split, same in (("train", False), ("test", True)):
        biased, clean = (load_data(f"shapes100{suffix}", split, size=200, seed=5) for suffix in ("-biased", ""))
        for name in ("class_names", "superclass_names", "superclasses"):
            assert getattr(biased, name) == getattr(clean, name)
        drawn = shapes.draw_shapes(200, split, 5, "biased")
        for found, expected in zip((biased.images, biased.labels, biased.masks), drawn, strict=True):
            np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(biased.masks, clean.masks)
        differ = (biased.images != clean.images).any(3)
        assert (differ[~clean.masks].mean() > 0.9) != same
        assert differ.any() != same


def test_scenes_are_loaded_with_their_kinds_as_classes():
    data = load_data("shapes100-scene", "test", size=200, seed=5)
    assert data.class_names == shapes.SCENE_NAMES
    assert len(set(data.class_names)) == 20
    assert (data.superclass_names, data.superclasses) == ((), ())
    assert (np.bincount(data.labels) == 10).all()
    drawn = shapes.draw_shapes(200, "test", 5, "scene")
    for found, expected in zip((data.images, data.labels, data.masks), drawn, strict=True):
        np.testing.assert_array_equal(found, expected)


# ---- ImageData


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"images": noise(12).astype(np.float32)}, ["uint8", "float32"]),
        ({"images": noise(12)[:, :16]}, ["(N, 32, 32, 3)", "(12, 16, 32, 3)"]),
        ({"images": noise(11)}, ["11 images", "12 labels"]),
        ({"class_names": ("a",), "labels": np.zeros(12, np.int64)}, ["at least 2 classes"]),
        ({"class_names": ("a", "b")}, ["0 to 2", "2 class names"]),
        ({"labels": np.arange(12) % 3 - 1}, ["-1 to 1"]),
        ({"class_names": ("a", "b", "c", "d")}, ["'d'", "no image"]),
        ({"images": noise(0), "labels": np.zeros(0, np.int64)}, ["'a'", "no image"]),
    ],
)
def test_inconsistent_image_data_is_refused(changes, parts):
    with pytest.raises(DataError) as error:
        replace(make_data(), **changes)
    assert_says(str(error.value), *parts)


def test_subset_takes_images_in_order_with_labels_and_masks():
    data = replace(make_data(), masks=noise(12)[..., 0] > 100, superclass_names=("x",), superclasses=(0, 0, 0))
    indices = np.array([5, 0, 7])
    part = data.subset(indices)
    assert len(part) == 3
    for name in ("images", "labels", "masks"):
        np.testing.assert_array_equal(getattr(part, name), getattr(data, name)[indices])
    assert (part.class_names, part.superclass_names, part.superclasses) == (data.class_names, ("x",), (0, 0, 0))
    part.images[:] = 0
    assert data.images[indices].any()


def test_fingerprint_depends_on_every_pixel_label_and_class_name():
    data = make_data()
    images, labels = data.images.copy(), data.labels.copy()
    images[11, 31, 31, 2] ^= 1
    labels[11] = 0
    changes = [{"images": images}, {"labels": labels}, {"class_names": ("a", "b", "d")}]
    prints = [data.fingerprint(), *(replace(data, **change).fingerprint() for change in changes)]
    assert len(set(prints)) == 4
    assert all(re.fullmatch("[0-9a-f]{16}", p) for p in prints)
    same = replace(data, images=np.asfortranarray(data.images), labels=data.labels.copy())
    assert same.fingerprint() == prints[0]


def test_channel_statistics_are_numpys():
    images = noise(12)
    images[..., 1] //= 3
    mean, std = replace(make_data(), images=images).channel_statistics()
    pixels = images.reshape(-1, 3) / 255.0
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-12)


def test_constant_channel_has_a_deviation_that_can_be_divided_by():
    images = noise(12)
    images[..., 2] = 51
    mean, std = replace(make_data(), images=images).channel_statistics()
    assert mean[2] == pytest.approx(0.2)
    assert std[2] == 1 / 255


# ---- Splits and subsets

UNEVEN = np.repeat([0, 1, 2, 3], [50, 2, 7, 41])


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.25, 0.5, 0.999])
def test_split_is_disjoint_complete_and_stratified(fraction):
    labels = np.random.default_rng(0).permutation(UNEVEN)
    first, second = stratified_split(labels, fraction, 7)
    np.testing.assert_array_equal(np.sort(np.concatenate([first, second])), np.arange(100))
    for part in (first, second):
        np.testing.assert_array_equal(part, np.sort(part))
    expected = [min(max(round(n * fraction), 1), n - 1) for n in (50, 2, 7, 41)]
    assert np.bincount(labels[second]).tolist() == expected
    assert (np.bincount(labels[first]) >= 1).all()


def test_split_is_seeded():
    splits = [stratified_split(UNEVEN, 0.3, seed)[1].tolist() for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


def test_split_of_a_single_image_is_refused():
    with pytest.raises(DataError) as error:
        stratified_split(np.array([0, 0, 1]), 0.5, 0)
    assert_says(str(error.value), "class number 1", "1 image", "at least 2")


@pytest.mark.parametrize("size", [4, 5, 13, 50, 73, 99, 100])
def test_subset_has_the_size_and_the_class_shares(size):
    labels = np.random.default_rng(1).permutation(UNEVEN)
    chosen = stratified_subset(labels, size, 0)
    assert len(chosen) == len(np.unique(chosen)) == size
    np.testing.assert_array_equal(chosen, np.sort(chosen))
    taken = np.bincount(labels[chosen], minlength=4)
    exact = np.array([50, 2, 7, 41]) * size / 100
    assert taken.min() >= 1
    if exact.min() >= 1:
        assert np.abs(taken - exact).max() < 1
    else:  # the small classes have their one image, the large ones share the rest
        assert taken[exact < 1].tolist() == [1] * int((exact < 1).sum())


def test_subset_of_balanced_classes_is_balanced_and_seeded():
    labels = np.arange(1000) % 10
    subsets = [stratified_subset(labels, 200, seed) for seed in (0, 0, 1)]
    assert all((np.bincount(labels[s]) == 20).all() for s in subsets)
    assert subsets[0].tolist() == subsets[1].tolist() != subsets[2].tolist()


@pytest.mark.parametrize("size", [0, 3, 101])
def test_impossible_subset_is_refused(size):
    with pytest.raises(DataError) as error:
        stratified_subset(UNEVEN, size, 0)
    assert_says(str(error.value), f"cannot take {size} ", "images", "4", "100")


def test_loading_takes_a_seeded_subset(tmp_path):
    write_folder(tmp_path / "train", count=10)
    write_folder(tmp_path / "test")
    loaded = [load_data("folder", "train", tmp_path, size=6, seed=seed) for seed in (0, 0, 1)]
    assert all(np.bincount(data.labels).tolist() == [3, 3] for data in loaded)
    prints = [data.fingerprint() for data in loaded]
    assert prints[0] == prints[1] != prints[2]
    with pytest.raises(DataError, match=r"cannot take 21 .*20"):
        load_data("folder", "train", tmp_path, size=21)


def test_every_machine_draws_the_same():
    images, labels, masks = shapes.draw_shapes(500, "train", 0)
    digest = hashlib.sha256(images.tobytes() + labels.tobytes() + masks.tobytes()).hexdigest()
    assert digest == "bae8707592090fe71a1f51b6fba00420d6c99c94039d44ef2008869b7fc00659"


@pytest.mark.parametrize(
    ("variant", "backgrounds", "expected"),
    [
        ("biased", 0, "66908a14d6e33e5db44ca2c4d83977efb355186668d6c2a7429365f1cbb3d89c"),
        ("biased", 1, "af621bc5a293e416fed2ae94f7555fc8f1f3a456048815ea7ad13214df788c53"),
        ("scene", 0, "4ada03dcb98e0aca0bda086d8e72d8c4d935686fea4656b4bfa4ed416891a0a4"),
        ("scene", 1, "aa4d1d8fd0b7d97ef15cd06a540373ee171f403882e9fa7f51ea98279f56a8e6"),
    ],
)
def test_every_machine_draws_the_same_variants(variant, backgrounds, expected):
    drawn = shapes.draw_shapes(500, "test", 0, variant, backgrounds)
    assert hashlib.sha256(b"".join(part.tobytes() for part in drawn)).hexdigest() == expected
