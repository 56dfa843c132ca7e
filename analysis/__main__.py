"""The command ``python -m analysis``: tables of runs, explain, export, report."""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.claims import decide
from analysis.compare import by_budget, compare_recipes, top_trials
from analysis.effects import asha_savings, importance, isolation, pareto_front
from analysis.explanations import explain_trials, load_measures, load_test_data
from analysis.health import search_space_health
from analysis.in_words import claims_as_text
from analysis.optuna_study import export_optuna
from analysis.predictions import calibration, class_accuracy, confused_pairs, load_predictions
from analysis.remote import local_run, run_path, source
from analysis.report import write_report
from analysis.study_file import RunError, read_study
from analysis.tables import FORMATS, write_table, write_text
from analysis.trials import (
    HYPERPARAMETERS,
    check_comparable,
    command_of,
    load_epochs,
    load_timeline,
    load_trials,
    varied,
)
from trainables.errors import UserError

# What a terminal shows of trials and recipes unless --columns says otherwise; files get every column.
KEY_COLUMNS = {
    "trials": ("run", "trial_id", "status", "epochs", "best_epoch", "val_accuracy", "test_accuracy", "train_accuracy",
               "train_seconds"),
    "recipes": ("budget", "recipe", "num_seeds", "confirmed", "censored", "epochs", "val_accuracy", "val_low",
                "val_high", "test_accuracy", "generalization_gap", "train_seconds"),
}  # fmt: skip
# Tables of sentences and commands, which a terminal shows whole.
AS_LINES: dict[str, Callable[[pd.DataFrame], str]] = {
    "claims": claims_as_text,
    "commands": lambda table: "\n".join(table["command"]),
    "health": lambda table: "\n".join(table["text"]) or "nothing to warn of",
}


def _folders(runs: Any) -> list[Path]:
    return [local_run(run) for run in (runs if isinstance(runs, list) else [runs])]


def _num_val_images(runs: Any) -> int:
    """Return the validation images of a run, or of several that can stand beside each other."""
    folders = _folders(runs)
    check_comparable(folders)
    return int(read_study(folders[0])["data"]["num_val_images"])


def _recipes(runs: Any) -> pd.DataFrame:
    num_val_images = _num_val_images(runs)
    tables = zip(("equal epochs", "equal compute"), by_budget(load_trials(runs)), strict=True)
    compared = [(budget, compare_recipes(trials, num_val_images)) for budget, trials in tables]
    found = [table.assign(budget=budget) for budget, table in compared if len(table)]
    if not found:
        raise RunError(f"{', '.join(map(source, _folders(runs)))}: no trial has a finished epoch yet")
    return pd.concat(found, ignore_index=True)


def _claims(runs: Any) -> pd.DataFrame:
    check_comparable(_folders(runs), same_epochs=True)
    return decide(load_measures(runs), load_trials(runs), load_epochs(runs))


def _health(runs: Any) -> pd.DataFrame:
    num_val_images = _num_val_images(runs)
    return search_space_health(by_budget(load_trials(runs))[0], num_val_images)


def _searched(table: Callable[[pd.DataFrame, pd.DataFrame], pd.DataFrame]) -> Callable[[Any], pd.DataFrame]:
    """Return a function of runs that gives a table of their trials and epochs, if these can stand beside each other."""

    def of_runs(runs: Any) -> pd.DataFrame:
        check_comparable(_folders(runs))
        return table(load_trials(runs), load_epochs(runs))

    return of_runs


def _tested(table: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Any], pd.DataFrame]:
    """Return a function of runs over the same data that gives a table of what explained trials' networks predict."""

    def of_runs(runs: Any) -> pd.DataFrame:
        check_comparable(_folders(runs))
        return table(load_predictions(runs))

    return of_runs


def _commands(runs: Any) -> pd.DataFrame:
    trials = load_trials(runs)
    trials = trials[trials["seed"].notna()]  # a search that chooses as it goes has trials without settings yet
    studies = {str(run): read_study(run) for run in (runs if isinstance(runs, list) else [runs])}
    of = trials["run"] if "run" in trials else pd.Series(next(iter(studies)), trials.index)
    commands = [
        command_of(row, studies[run], str(row["trial_id"])) for run, (_, row) in zip(of, trials.iterrows(), strict=True)
    ]
    return trials[[name for name in ("run", "trial_id") if name in trials]].assign(command=commands)


def _classes(predictions: pd.DataFrame) -> pd.DataFrame:
    tables = [class_accuracy(predictions)]
    if "superclass" in predictions:
        tables.append(class_accuracy(predictions, "superclass"))
    named = [table.rename(columns={table.columns[0]: "name"}).assign(kind=table.columns[0]) for table in tables]
    return pd.concat([table.astype({"name": "str"}) for table in named], ignore_index=True)


TABLES: dict[str, tuple[Callable[..., pd.DataFrame], str]] = {
    "trials": (load_trials, "trial asked for"),
    "epochs": (load_epochs, "epoch of each trial"),
    "commands": (_commands, "trial, with the command that trains it again, alone and to its last epoch"),
    "measures": (load_measures, "map, measure and test image of each explained trial"),
    "recipes": (_recipes, "recipe, of its best configuration, best recipe first"),
    "claims": (_claims, "comparison that decides a claim, about recipes or about the explained trials' maps"),
    "health": (_health, "warning of what the search space does not say"),
    "isolation": (_searched(isolation), "hyperparameter and value, with its effect, all else being equal"),
    "importance": (_searched(importance), "hyperparameter, with how much it decides which trials are good"),
    "pareto": (_searched(lambda trials, _: pareto_front(trials)), "configuration, with accuracy and what it cost"),
    "savings": (_searched(lambda trials, _: asha_savings(trials)), "epoch at which trials ended, with how many did"),
    "timeline": (load_timeline, "time that a trial was begun, with the slot it held"),
    "predictions": (
        _tested(lambda predictions: predictions),
        "explained trial and test image, with what its network says",
    ),
    "classes": (_tested(_classes), "class and superclass, with its test accuracy over the explained trials"),
    "confused": (_tested(confused_pairs), "class that the explained trials take for another, and how often"),
    "calibration": (_tested(calibration), "bin of confidence, with the accuracy in it"),
}
OF_EXPLAINED = ("measures", "predictions", "classes", "confused", "calibration")
EXAMPLES = {
    "trials": (
        'runs/demo --query "val_accuracy > 0.5 and lr <= 0.01"',
        "runs/demo --sort=-val_accuracy --columns trial_id,lr,val_accuracy",
        "runs/* --format parquet --output trials.parquet",
    ),
    "epochs": (
        'runs/demo --query "epoch == 1" --sort=-val_accuracy',
        "runs/* --format parquet --output epochs.parquet",
    ),
    "commands": ("runs/demo --query \"trial_id == '0123456789'\"",),
    "measures": ("runs/demo --query \"measure == 'gini'\"", "runs/* --format parquet --output measures.parquet"),
    "recipes": ("runs/demo --columns recipe,val_accuracy,val_low,val_high,num_seeds", "runs/a runs/b --format csv"),
    "claims": ("runs/demo --columns claim,verdict", "runs/demo --format csv --output claims.csv"),
    "health": ("runs/demo --columns text",),
    "isolation": ("runs/demo", "runs/demo --query \"hyperparameter == 'lr'\""),
    "importance": ("runs/demo",),
    "pareto": ("runs/demo --query on_front",),
    "savings": ("runs/demo",),
    "timeline": ("runs/demo --columns trial_id,slot,start_seconds,end_seconds,outcome",),
    "predictions": (
        'runs/demo --query "not correct and confidence > 0.9"',
        "runs/demo --format parquet --output p.parquet",
    ),
    "classes": ("runs/demo --query \"kind == 'superclass'\"",),
    "confused": ('runs/demo --query "share > 0.1"',),
    "calibration": ("runs/demo",),
}


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m analysis", description="Query the trials of runs, and report on them.", formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, what) in TABLES.items():
        table = commands.add_parser(
            name,
            help=f"one row for every {what}",
            description=f"One row for every {what}.",
            formatter_class=raw,
            epilog="examples:\n" + "".join(f"  python -m analysis {name} {example}\n" for example in EXAMPLES[name]),
        )
        table.add_argument("runs", nargs="+", type=run_path, metavar="RUN", help="run directory, or its URI")
        table.add_argument("--query", metavar="EXPR", help="keep rows for which it is true (pandas.DataFrame.query)")
        table.add_argument("--sort", metavar="COL", help="sort by a column; --sort=-COL for the highest first")
        table.add_argument(
            "--columns", metavar="A,B", help="these columns only [table: the telling ones; other formats: all]"
        )
        table.add_argument("--format", choices=FORMATS, help="[as F ends, else table]")
        table.add_argument("--output", type=Path, metavar="F", help="write to a file")
    report = commands.add_parser(
        "report",
        help="write the report of a run, or of several over the same data",
        description="Evaluate the top trials on the test images, map what they look at, and write report.html (one\n"
        "file that opens offline), report.md and figures/.",
        formatter_class=raw,
    )
    report.add_argument("runs", nargs="+", type=run_path, metavar="RUN", help="run directory, or its URI")
    report.add_argument(
        "--top",
        type=int,
        default=4,
        metavar="K",
        help="configurations to test and explain, with all their seeds; 0 leaves the test images alone [4]",
    )
    report.add_argument(
        "--output", type=Path, metavar="DIR", help="where to write [report/ in the first run; NAME-report of a URI]"
    )
    explain = commands.add_parser(
        "explain",
        help="measure what the best networks of a run look at",
        description="Compute test predictions, maps and their measures, and keep them in RUN/explanations. They are\n"
        "columns of the run's trials then, such as saliency_energy_on_object, and the report uses them.",
        formatter_class=raw,
    )
    explain.add_argument("run", type=run_path, metavar="RUN", help="run directory, or its URI")
    which = explain.add_mutually_exclusive_group()
    which.add_argument("--top", type=int, default=4, metavar="K", help="configurations, with all their seeds [4]")
    which.add_argument(
        "--all", action="store_true", help="every trial that has a checkpoint and does not run; choose none by it"
    )
    export = commands.add_parser(
        "export",
        help="write a run for another tool",
        description="Write a journal of the run's trials that optuna-dashboard opens: optuna-dashboard FILE.",
        formatter_class=raw,
    )
    export.add_argument("run", type=run_path, metavar="RUN", help="run directory, or its URI")
    export.add_argument("--optuna", type=Path, metavar="FILE", required=True, help="the journal to write")
    for command in (explain, report):
        command.add_argument("--data-dir", type=Path, metavar="P", help="where the data lies, if it was moved")
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [auto]")
        command.add_argument("--address", metavar="A", help="a Ray cluster to do it on, such as auto [here]")
    return parser


def _table(args: argparse.Namespace) -> None:
    load, _ = TABLES[args.command]
    table = load(args.runs[0] if len(args.runs) == 1 else args.runs)
    ending = args.output.suffix.removeprefix(".").lower() if args.output else ""
    fmt = args.format or (ending if ending in FORMATS else "table")
    names = list(map(str, table.columns))
    telling = list(KEY_COLUMNS.get(args.command, ()))
    if args.command == "trials":
        phase = ["phase"] if (table["phase"] == "confirm").any() else []
        telling += [*phase, *varied(table), "stop_reason", "error"]
    if args.command == "recipes":  # whose names say what varies in kind only
        numbers = table.select_dtypes("number")
        telling[2:2] = [name for name in HYPERPARAMETERS if name in numbers]
    if args.query is not None:
        try:
            chosen_rows = table.eval(args.query)
        except Exception as error:  # whatever the expression makes pandas, numexpr or Python raise
            raise UserError(f"--query {args.query!r}: {error}; columns are {', '.join(names)}") from error
        if not isinstance(chosen_rows, pd.Series) or not pd.api.types.is_bool_dtype(chosen_rows):
            raise UserError(f"--query {args.query!r}: is not true or false for each row, as lr > 0.01 is")
        table = table[chosen_rows.fillna(False)]
    if args.sort is not None:
        column = args.sort.removeprefix("-")
        _check([column], names, "--sort")
        table = table.sort_values(column, ascending=not args.sort.startswith("-"), kind="stable")
    if args.columns is not None:
        chosen = list(dict.fromkeys(name.strip() for name in args.columns.split(",")))  # each once
        _check(chosen, names, "--columns")
        table = table[chosen]
    elif fmt == "table" and telling:
        table = table[[name for name in telling if name in names and (table.empty or table[name].notna().any())]]
    part_of_claims = args.command == "claims" and (args.query or args.sort)  # some of the rows decide nothing
    unasked = args.columns is None and not part_of_claims and not (args.query and table.empty)
    if fmt == "table" and args.command in AS_LINES and unasked:
        write_text(AS_LINES[args.command](table) + "\n", args.output)
    else:
        write_table(table, fmt, args.output)
    if args.output:
        print(f"{len(table)} rows: {args.output}")
    if table.empty and args.query is None and args.command in OF_EXPLAINED:
        kept = load_trials(args.runs)["checkpoint"].notna().any()
        none = "this is of explained trials, and neither that nor a network to explain is kept here"
        _tell(f"no trial is explained yet: python -m analysis explain {args.runs[0]}" if kept else none)


def _check(chosen: Sequence[str], names: Sequence[str], option: str) -> None:
    for name in chosen:
        if name not in names:
            raise UserError(f"{option} {name!r}: no such column; columns are {', '.join(names)}")


def _report(args: argparse.Namespace) -> None:
    if args.top < 0:
        raise UserError(f"--top {args.top}: must be 0 or more")
    options = {"data_dir": args.data_dir, "device": args.device, "address": args.address, "tell": _tell}
    file = write_report(args.runs, args.output, top=args.top, **options)
    print(f"report: {file}\nas Markdown: {file.with_suffix('.md')}")
    has_network = load_trials(args.runs[0])["checkpoint"].notna().any()
    print(f"next: open {file}" + (f", or python -m explain {args.runs[0]} --images FILE..." if has_network else ""))


def _explain(args: argparse.Namespace) -> None:
    if args.top < 1:
        raise UserError(f"--top {args.top}: must be 1 or more")
    run = local_run(args.run)
    trials = load_trials(run)
    # Of a trial that still runs, the best checkpoint may be another before it is read.
    kept = trials[trials["checkpoint"].notna() & (trials["status"] != "running")]
    chosen = kept if args.all else top_trials(by_budget(trials)[0], args.top)
    if chosen.empty:
        raise UserError(f"{args.run}: no trial has a checkpoint here")
    data = load_test_data(run, args.data_dir)
    explain_trials(run, chosen, data, args.device, args.address, _tell)
    print(f"{len(chosen)} trials are explained: {run / 'explanations'}")
    print(f"next: python -m analysis claims {args.run}, or python -m analysis trials {args.run} --format csv")


def _export(args: argparse.Namespace) -> None:
    trials, name = load_trials(args.run), read_study(args.run)["name"]
    export_optuna(trials, load_epochs(args.run), args.optuna, str(name))
    print(f"{len(trials)} trials: {args.optuna}\nnext: optuna-dashboard {args.optuna} (pip install optuna-dashboard)")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, or 2 for what the user can mend."""
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _tell(f"warning: {message}")
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    try:
        if args.command == "report":
            _report(args)
        elif args.command == "explain":
            _explain(args)
        elif args.command == "export":
            _export(args)
        else:
            _table(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough (| head)
        sys.stderr.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
