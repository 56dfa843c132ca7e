"""Top trials -> test predictions and maps, each computed once and kept under ``RUN/explanations/``.

RUN/explanations/TRIAL/about.json         what was computed, from which checkpoint, on which test images
RUN/explanations/TRIAL/arrays.npz         logits (N, C) and labels (N,) of all test images; of a seeded choice of them
                                          indices (M,), saliency (M, H, W) and Grad-CAM before its ReLU (M, h, w)
RUN/explanations/TRIAL/measures.parquet   what these maps show, image by image; see :mod:`analysis.measures`
RUN/explanations/TRIAL/summary.json       test accuracy, and mean, 95 % interval and number of images of each measure of
                                          the network's own maps: columns of the trial DataFrame
"""

import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.intervals import bootstrap_interval
from analysis.measures import DTYPES, NUM_ASKED, NUM_GRIDS, OWN, STEPS, measure_maps
from analysis.remote import RunPath, fetch_checkpoint, source
from analysis.study_file import RunError, check_inside, read_study
from analysis.trials import EXPLANATION_FORMAT, load_trials, over_runs
from explain.grid import choose_grids
from explain.maps import Maps, stream
from trainables.checkpoint import load_model
from trainables.data import ImageData, load_data
from trainables.device import autocast, place, resolve_device
from trainables.resnet import ResNet18
from trainables.train import to_input, to_tensors

NUM_MAPS = 1000  # images with maps; seeded, the same for all trials of a run
BATCH = 250


class UnreadableExplanation(UserWarning):
    """A file of an explained trial is broken, so the trial is left out of a table."""


@dataclass(frozen=True)
class Explanation:
    """What one trial's network does on the test images.

    Attributes:
        trial_id: whose network.
        logits: (N, C) float32, all N test images.
        labels: (N,) int64, the truth.
        indices: (M,) int64, the test images that have maps.
        saliency: (M, H, W) float32, of the predicted class's logit, at the resolution of the network's input.
        cam: (M, h, w) float32, Grad-CAM of the same before the ReLU; 4 x 4 at 32 pixels.
        measures: one row a map, measure and image; see :func:`analysis.measures.measure_maps`.
    """

    trial_id: str
    logits: NDArray[np.float32]
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]
    saliency: NDArray[np.float32]
    cam: NDArray[np.float32]
    measures: pd.DataFrame

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(N,) bool: whether the prediction is right."""
        return np.asarray(self.logits.argmax(1) == self.labels)

    @property
    def accuracy(self) -> float:
        """Share of right predictions."""
        return float(self.correct.mean())


def load_test_data(run: Path, data_dir: Path | None = None) -> ImageData:
    """Load the test images of a run's data set.

    Args:
        run: run directory.
        data_dir: where they lie; by default where the study found its training images.

    Raises:
        DataError: if they cannot be read.
        RunError: if they have other classes than the study.
    """
    study = read_study(run)
    settings = study["settings"]
    directory = data_dir or (Path(settings["data_dir"]) if settings["data_dir"] else None)
    if settings["dataset"] == "folder":
        # Pictures that were added or removed would move training images into an undivided folder's test split.
        train = load_data("folder", "train", directory, seed=settings["seed"], size=settings["train_size"])
        if train.fingerprint() != study["data"]["fingerprint"]:
            raise RunError(f"{source(run)}: the pictures have changed since the study; restore them, or use --top 0")
    data = load_data(settings["dataset"], "test", directory, seed=settings["seed"])
    if list(data.class_names) != study["data"]["class_names"]:
        raise RunError(
            f"{source(run)}: the test images have other classes than the study had; give its data with --data-dir"
        )
    return data


def explain_trials(
    run: Path,
    trials: pd.DataFrame,
    data: ImageData,
    device: str = "auto",
    address: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Explanation]:
    """Return trials' test predictions, maps and measures; they are computed once and then read.

    Args:
        run: run directory.
        trials: rows of :func:`analysis.load_trials` with a checkpoint.
        data: the test images.
        device: where to compute, here or on a worker.
        address: a Ray cluster on which to compute, a trial a GPU where it has any; without it, it is done here.
        tell: is told of each trial that was computed.

    Raises:
        CheckpointError: if a checkpoint cannot be used.
        RunError: if a file cannot be read, or what was computed not be kept.
        UserError: if the cluster cannot be used.
    """
    abouts = [_about(run, trial, data) for _, trial in trials.iterrows()]
    folders = [run / "explanations" / str(trial_id) for trial_id in trials["trial_id"]]
    for folder in folders:
        check_inside(folder, run)
    found = [_read(folder, about, data) for folder, about in zip(folders, abouts, strict=True)]
    missing = [i for i, stored in enumerate(found) if stored is None]
    jobs = (_load_model(run / abouts[i]["checkpoint"]) for i in missing)
    if address and missing:
        from analysis.ray_session import compute_on_cluster

        results = compute_on_cluster(compute_explanation, jobs, (data, device), address, device)
    else:
        results = ((i, compute_explanation(*job, data, device)) for i, job in enumerate(jobs))
    for count, (job, result) in enumerate(results, start=1):
        i = missing[job]
        found[i] = result
        _write(folders[i], abouts[i], *result)
        tell(f"explained {folders[i].name}, {count} of {len(missing)}")
    explanations = []
    for folder, (arrays, measures) in zip(folders, filter(None, found), strict=True):
        explanations.append(Explanation(folder.name, measures=measures, **arrays))
    return explanations


def _about(run: Path, trial: pd.Series, data: ImageData) -> dict[str, Any]:
    return {
        "format": EXPLANATION_FORMAT,
        "checkpoint": os.path.relpath(trial["checkpoint"], run),
        "epoch": int(trial["best_epoch"]),
        "test_fingerprint": data.fingerprint(),
        "num_test_images": len(data),
        "num_maps": min(NUM_MAPS, len(data)),
        "num_asked": NUM_ASKED,
        "num_grids": NUM_GRIDS,
        "steps": STEPS,
        "score": "logit of the predicted class",
    }


def _read(folder: Path, about: dict[str, Any], data: ImageData) -> tuple[dict[str, NDArray[Any]], pd.DataFrame] | None:
    try:
        if json.loads((folder / "about.json").read_text()) != about:
            return None
        with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in ("logits", "labels", "indices", "saliency", "cam")}
        if not _is_of(found, data):
            return None
        return found, pd.read_parquet(folder / "measures.parquet", columns=list(DTYPES)).astype(DTYPES)
    except Exception:  # broken files break their readers in many ways
        return None  # absent, half written or of another format: it is computed again


def _is_of(arrays: dict[str, NDArray[Any]], data: ImageData) -> bool:
    """Return whether arrays are what :func:`compute_explanation` gives of these test images."""
    indices = _with_maps(len(data))
    maps = [arrays["saliency"], arrays["cam"]]
    return (
        np.array_equal(arrays["labels"], data.labels)
        and np.array_equal(arrays["indices"], indices)
        and arrays["logits"].shape == (len(data), len(data.class_names))
        and all(array.ndim == 3 and len(array) == len(indices) and array.size for array in maps)
        and all(array.dtype == np.float32 and np.isfinite(array).all() for array in (arrays["logits"], *maps))
    )


def _with_maps(num_images: int) -> NDArray[np.int64]:
    """Return which test images have maps."""
    return np.sort(np.random.default_rng(0).permutation(num_images)[:NUM_MAPS])


def load_measures(runs: RunPath | Iterable[RunPath]) -> pd.DataFrame:
    """Return what the maps of explained trials show, image by image.

    Args:
        runs: a run directory, or several; then a column ``run`` comes first.

    Returns:
        A DataFrame with ``trial_id``, ``map``, ``measure``, ``image`` and ``value``; see
        :func:`analysis.measures.measure_maps`. No rows if no trial was explained.

    Raises:
        RunError: if a directory is no run.

    Warns:
        UnreadableExplanation: of each trial whose file cannot be read; it has no rows.
    """
    return over_runs(runs, _measure_table)


def _measure_table(run: Path) -> pd.DataFrame:
    kinds = {"trial_id": "str", **DTYPES}

    def read(file: Path, trial_id: str) -> pd.DataFrame:
        return pd.read_parquet(file, columns=list(DTYPES)).assign(trial_id=trial_id).astype(kinds)[list(kinds)]

    nothing = pd.DataFrame(columns=list(kinds)).astype(kinds)
    return pd.concat([nothing, *read_explained(run, "measures.parquet", read)], ignore_index=True).astype(kinds)


def read_explained(run: Path, name: str, read: Callable[[Path, str], pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """Yield what ``read`` makes of a file of each explained trial, given its path and the trial's id.

    Warns:
        UnreadableExplanation: of each that cannot be read, and once of all that are not there; they are passed over.
    """
    trials, missing = load_trials(run), 0
    for trial_id in trials[trials["test_accuracy"].notna()]["trial_id"] if "test_accuracy" in trials else []:
        file = run / "explanations" / trial_id / name
        try:
            with np.errstate(invalid="ignore", over="ignore"):
                table = read(file, trial_id)
            if "confidence" in table and table["confidence"].isna().any():  # what softmax makes of NaN and infinity
                raise ValueError("its logits are not numbers")
        except FileNotFoundError:  # as in a run that was published without them
            missing += 1
        except Exception as error:  # broken files break their readers in many ways
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            text = f"{file}: cannot be read ({reason}); its trial is left out until it is explained again"
            warnings.warn(text, UnreadableExplanation, stacklevel=4)
        else:
            yield table
    if missing:
        text = f"{source(run)}: {missing} explained trials have no {name} here and are left out"
        warnings.warn(text, UnreadableExplanation, stacklevel=4)


def _summary(
    about: dict[str, Any], logits: NDArray[Any], labels: NDArray[Any], measures: pd.DataFrame
) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "format": about["format"],
        "checkpoint": about["checkpoint"],
        "num_test_images": len(labels),
        "test_accuracy": float((logits.argmax(axis=1) == labels).mean()),
    }
    own = measures[measures["map"].isin(OWN)]
    for (name, measure), group in own.groupby(["map", "measure"], observed=True, sort=False):
        values = group["value"].to_numpy()
        mean, low, high = bootstrap_interval(values)
        count = int(np.isfinite(values).sum())
        summary[f"{name}_{measure}"] = {"mean": mean, "low": low, "high": high, "num_images": count}
    return summary


def _load_model(checkpoint: Path) -> tuple[ResNet18, dict[str, Any]]:
    try:
        return load_model(fetch_checkpoint(checkpoint), "cpu")
    except OSError as error:
        raise RunError(f"{checkpoint}: cannot be read ({error.strerror or error})") from error


def _write(
    folder: Path,
    about: dict[str, Any],
    arrays: dict[str, NDArray[Any]],
    measures: pd.DataFrame,
) -> None:
    summary = _summary(about, arrays["logits"], arrays["labels"], measures)
    drafts = folder / f".{secrets.token_hex(4)}"  # another report may write the same now
    try:
        drafts.mkdir(parents=True)
        np.savez_compressed(drafts / "arrays.npz", **arrays)  # type: ignore[arg-type]
        measures.to_parquet(drafts / "measures.parquet", index=False)
        (drafts / "summary.json").write_text(json.dumps(summary, indent=1))
        (drafts / "about.json").write_text(json.dumps(about, indent=1))
        for name in ("arrays.npz", "measures.parquet", "summary.json", "about.json"):  # the last says that all is there
            os.replace(drafts / name, folder / name)
    except OSError as error:
        raise RunError(f"{folder}: what was explained cannot be kept ({error.strerror or error})") from error
    finally:
        shutil.rmtree(drafts, ignore_errors=True)


def compute_explanation(
    model: ResNet18, about: dict[str, Any], data: ImageData, device: str
) -> tuple[dict[str, NDArray[Any]], pd.DataFrame]:
    """Return what of one network is stored: arrays by name, and measures.

    Args:
        model: the network.
        about: its ``settings`` and ``epoch``, as :func:`trainables.checkpoint.load_model` gives them.
        data: the test images.
        device: where to compute.
    """
    where = resolve_device(device)
    model = place(model, where).eval()
    images, labels = to_tensors(data, where)
    settings = about["settings"]
    resolution = settings.resolution_at(about["epoch"])  # as in the validation that chose this epoch

    def pixels(indices: NDArray[np.int64]) -> Tensor:
        return to_input(images[torch.from_numpy(indices).to(where)], resolution)

    with torch.no_grad(), autocast(where, settings.precision):
        logits = torch.cat([model(to_input(batch, resolution)).float() for batch in images.split(BATCH)])
    # Maps in fp32: gradients of a bf16 network are visibly quantized.
    indices = _with_maps(len(data))
    chosen = torch.from_numpy(indices).to(where)
    # The class explained is the one predicted above, also where fp32 would narrowly predict another.
    batches = (to_input(batch, resolution) for batch in images[chosen].split(BATCH))
    parts = list(stream(model, batches, logits.argmax(dim=1)[chosen].split(BATCH), dtype=torch.float32))
    maps = Maps(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("logits", "target", "saliency", "cam"))
    )
    grids = choose_grids(logits, labels)[:NUM_GRIDS].cpu().numpy()
    masks = None if data.masks is None else data.masks[indices]
    arrays = {"logits": logits, "saliency": maps.saliency, "cam": maps.cam}
    found = {name: array.cpu().numpy().astype(np.float32) for name, array in arrays.items()}
    measures = measure_maps(model, pixels, indices, maps, masks, grids, data.labels, BATCH)
    return {**found, "labels": data.labels, "indices": indices}, measures
