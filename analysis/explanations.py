"""Top trials -> test predictions and maps, each computed once and kept under ``RUN/explanations/``.

RUN/explanations/TRIAL/about.json     what was computed, from which checkpoint, on which test images
RUN/explanations/TRIAL/arrays.npz     logits (N, C) of all test images; image indices (M,), saliency (M, 32, 32)
                                      and Grad-CAM before its ReLU (M, h, w) of a seeded choice of them
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from analysis.remote import fetch_checkpoint, source
from analysis.trials import RunError, read_study
from explain.maps import explain, upsample
from explain.measures import energy_on_object
from trainables.checkpoint import load_model
from trainables.data import ImageData, load_data
from trainables.device import autocast, resolve_device
from trainables.train import to_input, to_tensors

NUM_MAPS = 1000  # images with maps; seeded, the same for all trials of a run
BATCH = 250


@dataclass(frozen=True)
class Explanation:
    """What one trial's network does on the test images.

    Attributes:
        trial_id: whose network.
        logits: (N, C) float32, all N test images.
        labels: (N,) int64, the truth.
        indices: (M,) int64, the test images that have maps.
        saliency: (M, 32, 32) float32, of the predicted class's logit.
        cam: (M, h, w) float32, Grad-CAM of the same before the ReLU; 4 x 4 at 32 pixels.
    """

    trial_id: str
    logits: NDArray[np.float32]
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]
    saliency: NDArray[np.float32]
    cam: NDArray[np.float32]

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


def explain_trial(run: Path, trial: pd.Series, data: ImageData, device: str = "auto") -> Explanation:
    """Return a trial's test predictions and maps; they are computed once and then read.

    Args:
        run: run directory.
        trial: a row of :func:`analysis.load_trials` with a checkpoint.
        data: the test images.
        device: where to compute.

    Raises:
        CheckpointError: if the checkpoint cannot be used.
    """
    folder = run / "explanations" / str(trial["trial_id"])
    about: dict[str, Any] = {
        "format": 2,
        "checkpoint": os.path.relpath(trial["checkpoint"], run),
        "epoch": int(trial["best_epoch"]),
        "test_fingerprint": data.fingerprint(),
        "num_test_images": len(data),
        "num_maps": min(NUM_MAPS, len(data)),
        "score": "logit of the predicted class",
    }
    stored = _read(folder, about)
    if stored is None:
        stored = _compute(Path(trial["checkpoint"]), data, about["num_maps"], device)
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / ".arrays.npz"
        np.savez_compressed(draft, **stored)  # type: ignore[arg-type]
        os.replace(draft, folder / "arrays.npz")
        (folder / "about.json").write_text(json.dumps(about, indent=1))
    arrays = {name: stored[name].astype(np.float32) for name in ("logits", "saliency", "cam")}
    return Explanation(str(trial["trial_id"]), labels=data.labels, indices=stored["indices"], **arrays)


def _read(folder: Path, about: dict[str, Any]) -> dict[str, NDArray[Any]] | None:
    try:
        if json.loads((folder / "about.json").read_text()) != about:
            return None
        with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
            return {name: arrays[name] for name in ("logits", "indices", "saliency", "cam")}
    except (OSError, ValueError, KeyError):
        return None  # absent, half written or of another format: it is computed again


def _compute(checkpoint: Path, data: ImageData, num_maps: int, device: str) -> dict[str, NDArray[Any]]:
    model, about = load_model(fetch_checkpoint(checkpoint), device)
    where = resolve_device(device)
    images, _ = to_tensors(data, where)
    settings, size = about["settings"], images.shape[1]
    resolution = settings.resolution_at(about["epoch"])  # as in the validation that chose this epoch
    with torch.no_grad(), autocast(where, settings.precision):
        logits = [model(to_input(batch, resolution)).float().cpu() for batch in images.split(BATCH)]
    # Maps in fp32: gradients of a bf16 network are visibly quantized.
    indices = np.sort(np.random.default_rng(0).permutation(len(data))[:num_maps])
    all_logits = torch.cat(logits)
    chosen = torch.from_numpy(indices).to(where)
    # The class explained is the one predicted above, also where fp32 would narrowly predict another.
    batches = zip(images[chosen].split(BATCH), all_logits.argmax(1).to(where)[chosen].split(BATCH), strict=True)
    maps = [explain(model, to_input(batch, resolution), target) for batch, target in batches]
    return {
        "logits": all_logits.numpy().astype(np.float32),
        "indices": indices,
        "saliency": upsample(torch.cat([m.saliency for m in maps]), (size, size)).cpu().numpy().astype(np.float32),
        "cam": torch.cat([m.cam for m in maps]).cpu().numpy().astype(np.float32),
    }


def map_measures(explanation: Explanation, data: ImageData) -> pd.DataFrame:
    """Return measures of each explained image's maps; only where the data has object masks.

    Returns:
        One row an image: ``image``, ``correct``, ``saliency_energy_on_object``, ``gradcam_energy_on_object`` and
        ``object_area``, the energy of a map that points nowhere, all as shares in [0, 1].
    """
    if data.masks is None:
        return pd.DataFrame()
    masks = torch.from_numpy(data.masks[explanation.indices])
    cam = upsample(torch.from_numpy(explanation.cam).relu(), (masks.shape[1], masks.shape[2]))
    return pd.DataFrame(
        {
            "image": explanation.indices,
            "correct": explanation.correct[explanation.indices],
            "saliency_energy_on_object": energy_on_object(torch.from_numpy(explanation.saliency), masks).numpy(),
            "gradcam_energy_on_object": energy_on_object(cam, masks).numpy(),
            "object_area": masks.double().mean(dim=(1, 2)).numpy(),
        }
    )
