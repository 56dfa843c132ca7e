"""Tables as text and files."""

import json
import math
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from trainables.errors import UserError

Format = Literal["table", "csv", "json", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)


def as_text(table: pd.DataFrame, max_width: int = 60) -> str:
    """Return a table for the terminal: one line a row, what is missing left empty, accuracies with four digits.

    Texts longer than ``max_width`` characters are cut, unless there is but one column.
    """

    def show(value: Any) -> str:
        if pd.isna(value):
            return ""
        if isinstance(value, float):
            if 1000 <= abs(value) < 1e9:
                return f"{value:.0f}"
            return f"{value:.4g}" if abs(value) < 1e-3 or abs(value) >= 100 else f"{value:.4f}".rstrip("0").rstrip(".")
        text = str(value)
        return text if len(text) <= max_width else text[: max_width - 1] + "…"

    if table.shape[1] == 1:
        max_width = sys.maxsize
    if table.empty:
        return f"no rows; columns: {', '.join(map(str, table.columns))}"
    shown = table.astype(object).map(show)
    widths = [max(len(str(name)), int(shown[name].str.len().max())) for name in shown]
    numeric = [pd.api.types.is_numeric_dtype(dtype) for dtype in table.dtypes]
    lines = []
    for row in [list(map(str, shown.columns)), *shown.to_numpy().tolist()]:
        cells = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def percent(value: float, digits: int = 1) -> str:
    """Return a share as people read it, or a dash where it is not known."""
    return "–" if pd.isna(value) else f"{100 * value:.{digits}f} %"


def signed(value: float, digits: int = 1) -> str:
    """Return a number with its sign, as people read it; what rounds to zero has a plus."""
    return f"{value:+z.{digits}f}".replace("-", "−")


def interval(value: float, low: float, high: float) -> str:
    """Return a share with its 95 % interval, in percent."""
    return percent(value) if pd.isna(low) else f"{percent(value)} ({100 * low:.1f} to {100 * high:.1f})"


def write_table(table: pd.DataFrame, fmt: Format, output: Path | None) -> None:
    """Write a table to a file, or to standard output.

    CSV and JSON keep missing values as empty and ``null``, and numbers to their last digit; JSON is a list of records,
    one a line, in which infinities are ``null`` too, for it has no word for them.

    Raises:
        UserError: if the file cannot be written, or Parquet should go to a terminal.
    """
    if fmt == "parquet":
        if output is None:
            raise UserError("--format parquet is binary: give --output FILE")
        try:
            table.to_parquet(output, index=False)
        except OSError as error:
            raise UserError(f"{output}: cannot be written ({error.strerror or error})") from error
    elif fmt == "csv":
        write_text(table.to_csv(index=False), output)
    elif fmt == "json":
        records = table.astype(object).to_dict("records")
        lines = [json.dumps({name: _plain(value) for name, value in record.items()}) for record in records]
        write_text("[\n" + ",\n".join(lines) + "\n]\n", output)
    else:
        write_text(as_text(table) + "\n", output)


def _plain(value: Any) -> Any:
    """Return a cell of a table as JSON has it."""
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(entry) for entry in value]
    value = value.item() if isinstance(value, np.generic) else value
    if pd.isna(value) or (isinstance(value, float) and math.isinf(value)):
        return None
    return value


def write_text(text: str, output: Path | None) -> None:
    """Write text to a file, or to standard output.

    Raises:
        UserError: if the file cannot be written.
    """
    if output is None:
        sys.stdout.write(text)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from error
