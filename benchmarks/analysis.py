"""What the DataFrames and the report of a large study cost, against Ray Tune's own.

python -m benchmarks.analysis                    all figures, about three minutes on two cores
python -m benchmarks.analysis --only frames      one of: frames, scaling, report

Run directories are made up: trials x epochs of plausible numbers in the files that a study leaves. For Ray Tune the
same numbers lie as its own files do, and are read by its ResultGrid. Each figure is of a fresh process. Prints tables
and merges them into benchmarks/analysis.json.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from trainables import TrialSettings

Rows = list[dict[str, Any]]
OPTIMIZERS, AUGMENTATIONS = ("sgd", "adam"), ("none", "flip", "crop", "flip+crop")


def make_run(run: Path, num_trials: int, num_epochs: int) -> None:
    """Write the files of a finished study: learning curves that rise to what optimizer, rate and augmentation allow."""
    rng = np.random.default_rng(0)
    run.mkdir(parents=True)
    data = {"dataset": "made-up", "num_train_images": 45000, "num_val_images": 5000, "fingerprint": "0" * 16,
            "class_names": [f"class {i}" for i in range(100)]}  # fmt: skip
    settings = {"dataset": "cifar100", "data_dir": None, "train_size": None, "val_fraction": 0.1, "search": "random",
                "seed": 0, "max_epochs": num_epochs, "num_trials": num_trials, "early_stopping": "none"}  # fmt: skip
    machine = {"processor": "none", "cores": 2, "gpus": [], "system": "none"}
    study = {"name": run.name, "created": "2026-01-01", "command": "none", "settings": settings, "data": data,
             "machine": machine, "versions": {}}  # fmt: skip
    (run / "study.yaml").write_text(yaml.safe_dump(study))
    trials, lines = [], [{"time": 0.0, "event": "attempt_started", "attempt": 1}]
    for i in range(num_trials):
        settings = TrialSettings(
            optimizer=OPTIMIZERS[i % 2],
            augmentation=AUGMENTATIONS[i // 2 % 4],
            lr=float(10 ** rng.uniform(-3, -0.5)),
            seed=i % 3,
            max_epochs=num_epochs,
        ).model_dump(mode="json")
        name = f"{i:010x}"
        trials.append({"trial_id": name, "settings": settings})
        lines.append({"event": "trial_started", "trial_id": name, "attempt": 1, "settings": settings, "time": float(i)})
        height = 0.5 + 0.05 * (i // 2 % 4) + 0.05 * (i % 2) + rng.normal(0, 0.02)
        for epoch in range(1, num_epochs + 1):
            accuracy = round(float(height * (1 - np.exp(-epoch / 8)) + rng.normal(0, 0.004)), 4)
            lines.append(
                {"time": i + epoch / 2, "event": "epoch", "trial_id": name, "epoch": epoch, "lr": settings["lr"],
                 "train_loss": 4.6 - 4 * accuracy, "train_accuracy": min(1.0, accuracy * 1.2), "diverged": False,
                 "val_loss": 4.6 - 4 * accuracy, "val_accuracy": accuracy, "epoch_seconds": 10.692714903000024,
                 "images_per_second": 151.81268571693056, "objective": accuracy, "device": "cpu", "host": "node",
                 "checkpoint": f"tune/attempt-1/{name}/checkpoint_{epoch - 1:06d}"}
            )  # fmt: skip
        lines.append({"time": i + num_epochs / 2, "event": "trial_ended", "trial_id": name})
    (run / "manifest.json").write_text(json.dumps({"trials": trials}))
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
