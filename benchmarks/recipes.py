"""What each part of a recipe brings on its own: one change at a time against a plain baseline, paired by seed.

python -m benchmarks.recipes --data-dir DIR [--seeds 3] [--budget short|long]

CIFAR-100 at a small scale: ResNet-18 of width 16 at 16 pixels (other sizes where they are the change). `short` is 6
epochs over 15,000 images, `long` 40 epochs over 5,000. Accuracies are of 5,000 validation images held out of the
training images; the test images are not looked at. Trials run two at a time with a thread each; those that stand in
benchmarks/recipes.json already are not run again; to measure on another machine or torch, move that file away. Rows
there of variants that are no longer here (alternating flip, mixup, cutmix) were measured before these were dropped,
because none of them paid measurably in either budget.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from analysis.intervals import mean_interval
from benchmarks.tables import run_main, show
from trainables import ImageData, TrialSettings, load_data, resolve_device, split_validation, stratified_subset, train
from trainables.device import describe_machine
from trainables.errors import UserError
from trainables.train import new_state

FILE = Path(__file__).with_suffix(".json")
BUDGETS = {"short": {"images": 15_000, "max_epochs": 6}, "long": {"images": 5_000, "max_epochs": 40}}
BASELINE: dict[str, Any] = {"width": 16, "resolution": "16", "lr": 0.1, "schedule": "wsd"}
# name -> what differs from the baseline
VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "muon": {"optimizer": "muon", "lr": 0.01, "weight_decay": 0.1},
    "label smoothing 0.1": {"label_smoothing": 0.1},
    "one-cycle": {"schedule": "linear", "warmup_epochs": 0.25},
    "cosine schedule": {"schedule": "cosine"},
    "ema 0.99": {"ema_decay": 0.99},
    "cutout 8": {"cutout": 8},
    "adam": {"optimizer": "adam", "lr": 3e-3},
    "adamw": {"optimizer": "adamw", "lr": 5e-3, "weight_decay": 0.05},
    "decay of norms and biases": {},
    "no augmentation": {"augmentation": "none"},
    "constant lr": {"schedule": "constant"},
    "constant lr, ema 0.99": {"schedule": "constant", "ema_decay": 0.99},
    "batch size 256": {"batch_size": 256},
    "32 px": {"resolution": "32"},
    "16,24,32 px": {"resolution": "16,24,32"},
}


def run(
    data: tuple[ImageData, ImageData], variant: str, seed: int, budget: str, changes: dict[str, Any]
) -> dict[str, Any]:
    """Train one trial; return its row."""
    torch.set_num_threads(1)
    epochs = BUDGETS[budget]["max_epochs"]
    values = {**BASELINE, **changes, "max_epochs": epochs, "seed": seed}
    if "warmup_epochs" in changes:  # there as a share
        values["warmup_epochs"] = changes["warmup_epochs"] * epochs
    settings = TrialSettings(**values)
    state = new_state(settings, data[0], resolve_device())
    if variant == "decay of norms and biases":
        state.optimizer.param_groups[1]["weight_decay"] = settings.weight_decay
    start = time.perf_counter()
    for metrics, _ in train(settings, *data, state=state):
        last = metrics
    return {
        "budget": budget,
        "variant": variant,
        "seed": seed,
        "val_accuracy": last.val_accuracy,
        "train_loss": last.train_loss,
        "seconds": round(time.perf_counter() - start, 1),
        "settings": {**changes},
    }


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return, for each budget and variant, accuracy and its difference to the baseline's of the same seed."""
    frame = pd.DataFrame(rows)
    out = []
    for (budget, variant), part in frame.groupby(["budget", "variant"], sort=False):
        base = frame[(frame["budget"] == budget) & (frame["variant"] == "baseline")].set_index("seed")["val_accuracy"]
        own = part.set_index("seed")["val_accuracy"]
        differences = (own - base).dropna().to_numpy()
        mean, low, high = mean_interval(differences) if len(differences) > 1 else (np.nan,) * 3
        out.append(
            {
                "budget": budget,
                "variant": variant,
                "accuracy": round(100 * own.mean(), 1),
                "difference": round(100 * mean, 1),
                "low": round(100 * low, 1),
                "high": round(100 * high, 1),
                "seconds": round(statistics.median(part["seconds"])),
                "n": len(own),
            }
        )
    return pd.DataFrame(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of CIFAR-100; without it the table of what was measured")
    parser.add_argument("--budget", choices=list(BUDGETS), default="short")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    args = parser.parse_args()
    content = json.loads(FILE.read_text()) if FILE.exists() else {"rows": []}
    if args.data_dir:
        here = {"machine": describe_machine(), "torch": torch.__version__}
        if content["rows"] and here != {name: content.get(name) for name in here}:
            raise UserError(f"{FILE}: was measured on another machine or torch; move it away to measure all of it here")
        whole, val_data = split_validation(load_data("cifar100", "train", args.data_dir), 0.1, seed=0)
        train_data = whole.subset(stratified_subset(whole.labels, BUDGETS[args.budget]["images"], seed=0))
        have = {(row["budget"], row["variant"], row["seed"]) for row in content["rows"]}
        wanted = [(v, s) for s in range(args.seeds) for v in args.variants if (args.budget, v, s) not in have]
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            data = (train_data, val_data)
            runs = [pool.submit(run, data, v, s, args.budget, VARIANTS[v]) for v, s in wanted]
            for done in as_completed(runs):
                row = done.result()
                print({k: row[k] for k in ("variant", "seed", "val_accuracy", "seconds")}, flush=True)
                content["rows"].append(row)
                content |= here
                FILE.write_text(json.dumps(content, indent=1) + "\n")
    show("recipes", table(content["rows"]).to_dict("records"))


if __name__ == "__main__":
    run_main(main)
