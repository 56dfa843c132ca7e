"""Do the measures of maps measure what they say? Networks for which it is known where the evidence lies.

python -m benchmarks.calibration     about three quarters of an hour on two cores

Networks are trained on the variants of shapes100: on ``clean`` only the object tells the class, on ``biased`` the
background tells it too (in train, not in test), on ``scene`` nothing but the background does. Prints a table and keeps
it in benchmarks/calibration.json. A picture of the variants is drawn to results/shapes100.png.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from analysis.explanations import compute_explanation
from analysis.intervals import bootstrap_interval, mean_interval
from analysis.measures import CONTROLS, OWN
from benchmarks.tables import run_main, save, show
from trainables import TrialSettings, load_data, resolve_device, split_validation, to_input, train
from trainables.data import DatasetName
from trainables.resnet import ResNet18
from trainables.shapes import TEST_SIZE, TRAIN_SIZE, Variant, draw_shapes

Rows = list[dict[str, Any]]
VARIANTS: dict[Variant, DatasetName] = {"clean": "shapes100", "biased": "shapes100-biased", "scene": "shapes100-scene"}
SETTINGS = TrialSettings(optimizer="muon", lr=0.01, weight_decay=0.1, width=16, max_epochs=3, augmentation="flip+crop")
MAPS = (*OWN, *CONTROLS)


def calibrate(variant: Variant, seed: int, train_size: int, device: str) -> tuple[dict[str, float], pd.DataFrame]:
    """Train one network; return how it does, and the measures of its maps."""
    name = VARIANTS[variant]
    settings = SETTINGS.model_copy(update={"seed": seed})
    parts = split_validation(load_data(name, "train", size=train_size), 0.02, seed=0)
    test = load_data(name, "test")
    for metrics, state in train(settings, *parts, device=device):
        print(f"  {variant}, seed {seed}, epoch {metrics.epoch}: {metrics.val_accuracy:.3f}", flush=True)
        network = state.network
    swapped, labels, _ = draw_shapes(TEST_SIZE, "test", 0, variant, backgrounds=1)
    assert (labels == test.labels).all()
    network.eval()
    before, after = (_predictions(network, images, device) for images in (test.images, swapped))
    _, measures = compute_explanation(network, {"settings": settings, "epoch": settings.max_epochs}, test, device)
    energy = measures[measures["measure"] == "energy_on_object"].groupby("map", observed=True)["value"].mean()
    shares = {"accuracy": before == test.labels, "kept_under_swap": before == after}
    found = {name: float(share.mean()) for name, share in shares.items()} | energy.to_dict()
    print("  " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()), flush=True)
    return found, measures


@torch.no_grad()
def _predictions(network: ResNet18, images: np.ndarray, device: str) -> np.ndarray:
    where = resolve_device(device)
    batches = torch.from_numpy(images).to(where).split(500)
    return torch.cat([network(to_input(batch)).argmax(dim=1) for batch in batches]).cpu().numpy()


def table(found: list[dict[str, float]], measures: pd.DataFrame, variant: Variant) -> Rows:
    """One row for each kind of map: energy on the object, with 95 % intervals over images and over networks."""
    masks = load_data(VARIANTS[variant], "test").masks
    assert masks is not None
    of_measure = measures[measures["measure"] == "energy_on_object"]
    rows = []
    for name in MAPS:
        images = of_measure[of_measure["map"] == name].groupby("image")["value"].mean()
        mean, low, high = bootstrap_interval(images.to_numpy())
        _, least, most = mean_interval([f[name] for f in found])
        rows.append(
            {
                "variant": variant,
                "accuracy": [round(f["accuracy"], 4) for f in found],
                "kept_under_swap": [round(f["kept_under_swap"], 4) for f in found],
                "object_area": round(float(masks[images.index].mean()), 4),
                "map": name,
                "energy_on_object": round(mean, 4),
                "low": round(low, 4),
                "high": round(high, 4),
                "low_of_networks": round(least, 4),
                "high_of_networks": round(most, 4),
                "images": len(images),
                "networks": len(found),
            }
        )
    return rows


def verdicts(tables: dict[Variant, Rows]) -> Rows:
    """Whether the measures measure what they say, each condition with the figures that decide it."""
    by_map = {variant: {row["map"]: row for row in rows} for variant, rows in tables.items()}
    found: Rows = []

    def decide_that(condition: str, ours: float, theirs: float) -> None:
        found.append({"condition": condition, "holds": ours > theirs, "low": ours, "must exceed": theirs})

    for name in OWN:
        if "clean" in by_map:
            clean = by_map["clean"]
            decide_that(f"clean: {name} lies on the object", clean[name]["low"], clean[name]["object_area"])
            for control in CONTROLS:
                decide_that(f"clean: {name} beats {control}", clean[name]["low"], clean[control]["high"])
            if "biased" in by_map:
                for interval in ("", "_of_networks"):
                    low, high = clean[name][f"low{interval}"], by_map["biased"][name][f"high{interval}"]
                    decide_that(f"biased: {name} lies on it less than on clean{interval}".replace("_", " "), low, high)
        if "scene" in by_map:
            scene = by_map["scene"][name]
            decide_that(f"scene: {name} lies off the object", scene["object_area"], scene["high"])
    if "clean" in by_map:
        decide_that("clean: predictions survive a swap", min(by_map["clean"][OWN[0]]["kept_under_swap"]), 0.99)
    return found


def time_drawing(variant: Variant) -> dict[str, Any]:
    """Seconds to draw train and test."""
    start = time.perf_counter()
    images = sum(len(draw_shapes(n, split, 0, variant)[0]) for split, n in (("train", TRAIN_SIZE), ("test", TEST_SIZE)))
    return {"variant": variant, "images": images, "seconds": round(time.perf_counter() - start, 1)}


def draw_variants(file: Path) -> None:
    """Draw a row of images for each variant, and one of the first row's objects before other backgrounds."""
    of_four_classes = [c + i for c in (0, 27, 48, 87) for i in range(0, 500, 100)]  # five of each
    of_four_superclasses = [c + i for c in (0, 20, 45, 85) for i in range(5)]
    of_four_kinds = [c + i for c in (0, 5, 9, 16) for i in range(0, 100, 20)]
    rows: list[tuple[str, Variant, str, int, list[int]]] = [
        ("clean", "clean", "train", 0, of_four_classes),
        ("swapped", "clean", "train", 1, of_four_classes),
        ("biased", "biased", "train", 0, of_four_superclasses),
        ("scene", "scene", "train", 0, of_four_kinds),
    ]
    figure, axes = plt.subplots(len(rows), figsize=(10, 2.25), layout="constrained")
    for axis, (title, variant, split, backgrounds, chosen) in zip(axes, rows, strict=True):
        images = draw_shapes(500, split, 0, variant, backgrounds)[0][chosen]
        framed = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
        axis.imshow(np.concatenate(list(framed), axis=1), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_ylabel(title, rotation=0, ha="right", va="center")
    figure.savefig(file, dpi=160)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-size", type=int, default=50_000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    args = parser.parse_args()
    file = Path(__file__).with_suffix(".json")
    draw_variants(Path(__file__).parents[1] / "results" / "shapes100.png")
    figures: dict[str, Rows] = {"drawing": [time_drawing(variant) for variant in args.variants]}
    energies: dict[Variant, Rows] = {}
    for variant in args.variants:
        found, tables = [], []
        for seed in range(args.seeds):
            network, measures = calibrate(variant, seed, args.train_size, args.device)
            found.append(network)
            tables.append(measures.assign(trial_id=f"seed-{seed}"))
        whole = pd.concat(tables, ignore_index=True)
        energies[variant] = table(found, whole, variant)
        figures[f"{variant}: energy on object"] = energies[variant]
    if set(energies) == set(VARIANTS):
        figures["verdicts"] = verdicts(energies)
    for name, rows in figures.items():
        show(name, rows)
        save(file, name, rows)


if __name__ == "__main__":
    run_main(main)
