"""The command ``python -m analysis``: trials, epochs, report."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.remote import run_path
from analysis.report import write_report
from analysis.tables import write_table
from analysis.trials import load_epochs, load_trials, varied
from trainables.errors import UserError

# What a terminal shows of trials unless --columns says otherwise; files get every column.
KEY_COLUMNS = ("run", "trial_id", "status", "epochs", "best_epoch", "val_accuracy", "train_accuracy", "train_seconds")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m analysis", description="Query the trials of runs, and report on them.", formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in (("trials", "trial asked for"), ("epochs", "epoch of each trial")):
        table = commands.add_parser(
            name,
            help=f"print the {name} of runs as a table",
            description=f"One row for every {what}.",
            formatter_class=raw,
            epilog="examples:\n"
            f'  python -m analysis {name} runs/demo --query "val_accuracy > 0.5 and lr <= 0.01"\n'
            f"  python -m analysis {name} runs/demo --sort=-val_accuracy --columns trial_id,lr,val_accuracy\n"
            f"  python -m analysis {name} runs/* --format parquet --output {name}.parquet",
        )
        table.add_argument("runs", nargs="+", type=run_path, metavar="RUN", help="run directory, or its URI")
        table.add_argument("--query", metavar="EXPR", help="keep rows for which it is true (pandas.DataFrame.query)")
        table.add_argument("--sort", metavar="COL", help="sort by a column; --sort=-COL for the highest first")
        table.add_argument(
            "--columns", metavar="A,B", help="these columns only [table: the telling ones; other formats: all]"
        )
        table.add_argument("--format", choices=("table", "csv", "json", "parquet"), default="table", help="[table]")
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
    report.add_argument("--data-dir", type=Path, metavar="P", help="where the data lies, if it was moved")
    report.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [auto]")
    return parser


def _table(args: argparse.Namespace) -> None:
    load = load_trials if args.command == "trials" else load_epochs
    table = load(args.runs[0] if len(args.runs) == 1 else args.runs)
    names = list(map(str, table.columns))
    telling = [*KEY_COLUMNS, *varied(table), *(name for name in ("stop_reason", "error") if name in names)]
    if args.query:
        try:
            chosen_rows = table.eval(args.query)
        except Exception as error:  # whatever the expression makes pandas, numexpr or Python raise
            raise UserError(f"--query {args.query!r}: {error}; columns are {', '.join(names)}") from error
        if not isinstance(chosen_rows, pd.Series) or not pd.api.types.is_bool_dtype(chosen_rows):
            raise UserError(f"--query {args.query!r}: is not true or false for each row, as lr > 0.01 is")
        table = table[chosen_rows.fillna(False)]
    if args.sort:
        column = args.sort.removeprefix("-")
        _check([column], names, "--sort")
        table = table.sort_values(column, ascending=not args.sort.startswith("-"), kind="stable")
    if args.columns:
        chosen = [name.strip() for name in args.columns.split(",")]
        _check(chosen, names, "--columns")
        table = table[chosen]
    elif args.format == "table" and args.command == "trials":
        table = table[[name for name in telling if name in names and table[name].notna().any()]]
    write_table(table, args.format, args.output)
    if args.output:
        print(f"{len(table)} rows: {args.output}")


def _check(chosen: Sequence[str], names: Sequence[str], option: str) -> None:
    for name in chosen:
        if name not in names:
            raise UserError(f"{option} {name!r}: no such column; columns are {', '.join(names)}")


def _report(args: argparse.Namespace) -> None:
    if args.top < 0:
        raise UserError(f"--top {args.top}: must be 0 or more")
    file = write_report(args.runs, args.output, top=args.top, data_dir=args.data_dir, device=args.device)
    print(f"report: {file}\nas Markdown: {file.with_suffix('.md')}")
    print(f"next: open {file}, or python -m explain {args.runs[0]} --images FILE...")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, or 2 for what the user can mend."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "report":
            _report(args)
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
