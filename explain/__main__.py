"""The command ``python -m explain``: what a run's network sees in anyone's pictures.

This is an entry, not part of the library: it may import what the package itself may not.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from analysis.compare import top_trials
from analysis.remote import RunPath, fetch_checkpoint, run_path
from analysis.trials import load_trials
from explain.maps import explain
from explain.render import save_explanation
from trainables.checkpoint import load_model
from trainables.data import DataError, read_image
from trainables.device import resolve_device
from trainables.errors import UserError
from trainables.train import to_input


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m explain",
        description="Show what a run's network sees in pictures: for each one a PNG with the prediction, saliency and "
        "Grad-CAM.",
        epilog="example: python -m explain runs/demo --images cat.jpg holiday/*.png",
    )
    parser.add_argument("run", type=run_path, metavar="RUN", help="run directory, or its URI")
    parser.add_argument("--trial", metavar="ID", help="whose network; by default the best trial's")
    parser.add_argument("--images", nargs="+", type=Path, required=True, metavar="FILE", help="pictures, any size")
    parser.add_argument("--output", type=Path, default=Path("maps"), metavar="DIR", help="where to write [maps]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [auto]")
    return parser


def _checkpoint(run: RunPath, trial_id: str | None) -> Path:
    trials = load_trials(run)
    usable = trials[trials["checkpoint"].notna()]
    if usable.empty:
        raise UserError(f"{run}: no trial has a checkpoint here")
    have = ", ".join(usable["trial_id"])
    if trial_id is None:
        best = top_trials(trials, 1)
        if best.empty:  # all fresh seeds diverged of what was confirmed
            raise UserError(f"{run}: no configuration has a network that speaks for it; with --trial one of {have}")
        return Path(best["checkpoint"].iloc[0])
    found = usable[usable["trial_id"] == trial_id]
    if found.empty:
        raise UserError(f"--trial {trial_id!r}: no trial with a checkpoint; there are {have}")
    return Path(found["checkpoint"].iloc[0])


def _explain(args: argparse.Namespace) -> int:
    model, about = load_model(fetch_checkpoint(_checkpoint(args.run, args.trial)), args.device)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {args.output}: cannot be made ({error.strerror})") from error
    skipped = 0
    written: set[str] = set()
    for file in args.images:
        try:
            image = read_image(file)
        except DataError as error:
            print(f"skipped: {error}", file=sys.stderr)
            skipped += 1
            continue
        pixels = torch.from_numpy(np.array(image))[None].to(resolve_device(args.device))
        seen = to_input(pixels, about["settings"].resolution_at(about["epoch"]))
        maps = explain(model, seen, dtype=torch.float32)
        probabilities = maps.logits[0].softmax(0).cpu().numpy()
        name = next(n for n in (file.stem, *(f"{file.stem}-{i}" for i in range(2, 10_000))) if n not in written)
        written.add(name)
        target = args.output / f"{name}.png"
        if target.exists() and any(file.exists() and target.samefile(file) for file in args.images):
            raise UserError(f"--output {args.output}: {target} is one of the pictures to explain; give another folder")
        picture = (seen[0].permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy()
        saliency, cam = maps.saliency[0].cpu().numpy(), maps.cam[0].cpu().numpy()
        try:
            save_explanation(target, picture, saliency, cam, about["class_names"], probabilities)
        except OSError as error:
            raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error
        best = int(probabilities.argmax())
        print(f"{file}: {about['class_names'][best]} ({100 * probabilities[best]:.1f} %) -> {target}")
    if skipped:
        print(f"{skipped} of {len(args.images)} files were skipped", file=sys.stderr)
    return 2 if skipped else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, or 2 if something cannot be used or a picture was skipped."""
    args = _parser().parse_args(argv)
    try:
        return _explain(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
