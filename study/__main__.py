"""The command ``python -m study``: run, resume, confirm, status, list, presets, check-cluster."""

import argparse
import contextlib
import errno
import itertools
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
import yaml
from pyarrow import fs

from analysis.remote import RunPath, exists, is_uri, open_storage, run_path
from analysis.run_log import is_running
from analysis.study_file import read_study
from analysis.tables import as_text
from analysis.trials import ENDED, STATUSES, load_trials, varied
from study.check_cluster import check_cluster
from study.run import confirm_study, resume_study, run_study
from study.settings import HYPERPARAMETERS, PRESETS, StudySettings, load_settings, preset_names
from study.space import list_trials
from study.supervise import lost_trials
from trainables.errors import UserError
from trainables.settings import TrialSettings

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def _settings_help() -> str:
    lines = ["settings of a study (key=value):"]
    for name, field in StudySettings.model_fields.items():
        default = "" if field.default is None or name in ("space", "fixed") else f" [{field.default}]"
        lines.append(f"  {name:<18}{field.description}{default}")
    lines += ["", "hyperparameters (space.NAME=[A,B] to vary, fixed.NAME=A to set):"]
    for name in HYPERPARAMETERS:
        field = TrialSettings.model_fields[name]
        lines.append(f"  {name:<18}{field.description} [{field.default}]")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m study", description="Run studies: which training recipe wins?", formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="run a study",
        formatter_class=raw,
        description="Run a study: train every trial of a search space, stop the worst early, keep everything in one\n"
        "run directory. Ctrl-C ends it cleanly; python -m study resume goes on.",
        epilog="examples:\n"
        "  python -m study run --preset demo\n"
        "  python -m study run --preset cifar100 max_epochs=5 'space.lr=[0.1,0.01]' train_size=10000\n"
        "  python -m study run --preset cifar100 --dataset folder --data-dir my-pictures\n"
        "  python -m study run --preset cifar100 --address auto device=cuda      (on a Ray cluster)\n\n"
        + _settings_help(),
    )
    run.add_argument("--preset", default="demo", metavar="NAME|FILE", help="a preset, or a YAML file like one [demo]")
    run.add_argument("--name", help="of the run directory; by default the preset's name and a number")
    run.add_argument(
        "--out", type=run_path, default=Path("runs"), metavar="DIR", help="where runs lie, also s3://bucket/runs [runs]"
    )
    run.add_argument("--dataset", metavar="D", help="shapes100, cifar100, cifar10 or folder; short for dataset=D")
    run.add_argument("--data-dir", type=Path, metavar="P", help="where the data lies; short for data_dir=P")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="any setting, for example max_epochs=5")

    resume = commands.add_parser("resume", help="go on with an interrupted study")
    resume.add_argument("run", type=run_path, metavar="RUN", help="run directory, or its URI")
    resume.add_argument("--force", action="store_true", help="also with changed code, packages or resource settings")
    confirm = commands.add_parser(
        "confirm",
        help="train the best configurations of a finished study again, with fresh seeds",
        description="Train the best configurations of a finished study again, each to its last epoch and with seeds "
        "that the study did not use, as further trials of the run. What was the best of many was also lucky; the mean "
        "over fresh seeds is not. The report then rests on these.",
    )
    confirm.add_argument("run", type=run_path, metavar="RUN", help="run directory, or its URI")
    confirm.add_argument("--top", type=_count, default=3, metavar="K", help="how many configurations [3]")
    confirm.add_argument(
        "--trials", nargs="+", default=[], metavar="ID", help="further trials whose configurations to confirm"
    )
    confirm.add_argument("--seeds", type=_count, default=5, metavar="S", help="fresh seeds of each [5]")
    confirm.add_argument("--force", action="store_true", help="also with changed code, packages or resource settings")
    for sub in (run, resume, confirm):
        sub.add_argument("--address", default="local", metavar="A", help="of a Ray cluster [local: this machine]")
        sub.add_argument("--quiet", action="store_true", help="show no progress")

    status = commands.add_parser("status", help="say how far a study is")
    status.add_argument("run", type=run_path, metavar="RUN", help="run directory, or its URI")
    listing = commands.add_parser("list", help="list the runs in a directory")
    listing.add_argument(
        "directory", type=run_path, nargs="?", default=Path("runs"), metavar="DIR", help="also s3://bucket/runs [runs]"
    )
    commands.add_parser("presets", help="list the presets and what they search")
    check = commands.add_parser("check-cluster", help="check a Ray cluster's YAML file, offline, before ray up")
    check.add_argument("file", type=Path, metavar="FILE", help="for example cluster.yaml")
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what a command line asks for. Settings may stand anywhere in it, which argparse has no word for."""
    parser = _parser()
    args, more = parser.parse_known_args(argv)
    if args.command == "run" and all("=" in word and word[0] != "-" for word in more):
        args.overrides += more
    elif more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    return args


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number above 0")
    return int(text)


def _run(args: argparse.Namespace) -> int:
    overrides = list(args.overrides)
    if args.dataset:
        overrides.append(f"dataset={args.dataset}")
    if args.data_dir:
        # As a YAML string, whatever characters the path has.
        overrides.append(f"data_dir={yaml.safe_dump(str(args.data_dir.expanduser().absolute())).splitlines()[0]}")
    settings = load_settings(args.preset, overrides)
    name = args.name or _free_name(args.out, Path(args.preset).stem)
    if Path(name).name != name or name.startswith("."):
        raise UserError(f"--name {name!r}: must be a plain folder name; use --out for where it lies")
    run = _within(args.out, name)
    command = shlex.join(["python", "-m", "study", *sys.argv[1:]])
    return _attempt(run, lambda: run_study(settings, run, address=args.address, show=not args.quiet, command=command))


def _within(directory: RunPath, name: str) -> RunPath:
    return f"{directory}/{name}" if is_uri(directory) else Path(directory) / name


def _free_name(out: RunPath, stem: str) -> str:
    names = (stem if number == 1 else f"{stem}-{number}" for number in itertools.count(1))
    return next(name for name in names if not exists(_within(out, name)))


class _Output:
    """Standard output that may lose its reader, a terminal or a pipe, without a word: the study goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._heard_or_not():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._heard_or_not():
            self._stream.flush()

    @contextlib.contextmanager
    def _heard_or_not(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # for good, also for what is written when Python exits
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def _attempt(run: RunPath, go: Callable[[], bool]) -> int:
    with contextlib.redirect_stdout(_Output(sys.stdout) if sys.stdout else None):
        try:
            finished = go()
        except KeyboardInterrupt:
            finished = False
        if not exists(_within(run, "study.yaml")):
            print("interrupted before the study began; nothing was written", file=sys.stderr)
            return INTERRUPTED
        _print_summary(run)
        if finished:
            if load_trials(run)["val_accuracy"].isna().all():
                again = f"; python -m study resume {run} tries what was lost again" if lost_trials(run) else ""
                raise UserError(f"{run}: no trial came to an accuracy, so there is nothing to report on{again}")
            print(f"\nrun directory: {run}\n{_next(run)}", flush=True)
            return 0
        print(f"\ninterrupted; every finished epoch is in {run}\ngo on: python -m study resume {run}", flush=True)
        return INTERRUPTED


def _print_summary(run: RunPath) -> None:
    trials = load_trials(run)
    counts = trials["status"].value_counts()
    parts = [f"{counts[status]} {status}" for status in STATUSES if counts.get(status, 0)]
    print(f"{len(trials)} trials: {', '.join(parts)}; {trials['epochs'].sum()} epochs run")
    scored = trials[trials["val_accuracy"].notna()].sort_values("val_accuracy", ascending=False)
    if len(scored):
        best = scored.iloc[0]
        recipe = ", ".join(f"{name}={best[name]}" for name in varied(trials)) or "the one configuration"
        print(
            f"best validation accuracy {best['val_accuracy']:.4f} at epoch {best['best_epoch']}: {recipe} "
            f"(trial {best['trial_id']}, {best['status']}, one seed)"
        )
    for _, row in trials[trials["status"] == "failed"].head(3).iterrows():
        print(f"trial {row['trial_id']} failed: {row['error']}")


def _next(run: RunPath) -> str:
    """Say what to do with a study that ended."""
    lost = f", or python -m study resume {run}, which tries what was lost again" if lost_trials(run) else ""
    return f"next: python -m analysis report {run}{lost}"


def _status(args: argparse.Namespace) -> int:
    study = read_study(args.run)
    settings = study["settings"]
    print(f"{study.get('name')}: {settings.get('dataset')}, {settings.get('search')} search, {study.get('created')}")
    _print_summary(args.run)
    trials = load_trials(args.run)
    phase = ["phase"] if (trials["phase"] == "confirm").any() else []
    columns = ["trial_id", "status", *phase, "epochs", "best_epoch", "val_accuracy", *varied(trials), "stop_reason"]
    print(as_text(trials[columns]))
    over = trials["status"].isin(ENDED).all()
    if over:
        print(_next(args.run))
    elif not is_running(args.run):
        print(f"go on: python -m study resume {args.run}")
    return 0


def _list(args: argparse.Namespace) -> int:
    storage, base = open_storage(args.directory)
    try:
        names = sorted(info.base_name for info in storage.get_file_info(fs.FileSelector(base)))
        files = storage.get_file_info([f"{base}/{name}/study.yaml" for name in names])
    except OSError as error:
        raise UserError(f"{args.directory}: no such directory; python -m study run makes runs/") from error
    rows: list[dict[str, object]] = []
    for run in [_within(args.directory, name) for name, file in zip(names, files, strict=True) if file.is_file]:
        try:
            study, trials = read_study(run), load_trials(run)
        except UserError as error:
            rows.append({"run": str(run), "state": f"unreadable: {error}"})
            continue
        ended = trials["status"].isin(ENDED)
        state = "running" if is_running(run) else "finished" if ended.all() else "interrupted"
        rows.append(
            {
                "run": str(run),
                "state": state,
                "dataset": study["settings"].get("dataset"),
                "trials": f"{ended.sum()}/{len(trials)}",
                "best val. accuracy": trials["val_accuracy"].max(),
                "begun": study.get("created"),
            }
        )
    print(as_text(pd.DataFrame(rows)) if rows else f"no runs in {args.directory}")
    return 0


def _presets(_: argparse.Namespace) -> int:
    for name in preset_names():
        settings = load_settings(name)
        size = settings.num_trials if settings.search == "optuna" else len(list_trials(settings))
        print(
            f"{name}: {settings.dataset}, {size} trials of up to {settings.max_epochs} epochs ({PRESETS / name}.yaml)"
        )
        for parameter, values in settings.space.items():
            print(f"    {parameter}: {values}")
    print("next: python -m study run --preset NAME, or copy a file, change it and give its path")
    return 0


def _check_cluster(args: argparse.Namespace) -> int:
    wrong, to_do = check_cluster(args.file)
    for sentence in wrong:
        print(f"error: {args.file}: {sentence}", file=sys.stderr)
    if wrong:
        return 2
    print(f"{args.file}: nothing is wrong, as far as can be seen offline")
    for sentence in to_do:
        print(f"before ray up: {sentence}")
    print(f"next: ray up {args.file}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, 2 for what the user can mend, 130 after an interruption."""
    args = _parse(argv)
    commands = {
        "run": _run,
        "resume": _resume,
        "confirm": _confirm,
        "status": _status,
        "list": _list,
        "presets": _presets,
        "check-cluster": _check_cluster,
    }
    try:
        return commands[args.command](args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough (| head)
        sys.stderr.close()
        return 0


def _resume(args: argparse.Namespace) -> int:
    return _attempt(
        args.run, lambda: resume_study(args.run, address=args.address, show=not args.quiet, force=args.force)
    )


def _confirm(args: argparse.Namespace) -> int:
    options = {"address": args.address, "show": not args.quiet, "force": args.force}
    chosen = {"top": args.top, "trials": args.trials, "seeds": args.seeds}
    return _attempt(args.run, lambda: confirm_study(args.run, **chosen, **options))


if __name__ == "__main__":
    sys.exit(main())
