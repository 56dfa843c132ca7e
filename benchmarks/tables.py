"""What the benchmarks have in common: tables on the terminal and in JSON, with the machine and the versions."""

import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd

from trainables.device import describe_machine
from trainables.errors import UserError


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a benchmark as a command: what the user can mend is one sentence, as is Ctrl-C."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    machine = describe_machine()
    where = ", ".join([f"{machine['cores']} x {machine['processor']}", *machine["gpus"]])
    print(f"\n{title} ({where}; torch {version('torch')})")
    print(pd.DataFrame(rows).to_string(index=False) if rows else "not on this machine", flush=True)


def where() -> dict[str, Any]:
    """Return the machine and the versions, which figures depend on."""
    versions = {"python": platform.python_version(), **{p: version(p) for p in ("torch", "torchvision", "ray")}}
    return {"machine": describe_machine(), "versions": versions}


def save(file: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Put rows into a JSON file under their name, beside what stands there, with where and when they were measured."""
    if not rows:
        return
    content = json.loads(file.read_text()) if file.exists() else {}
    content[name] = {"date": time.strftime("%Y-%m-%d", time.gmtime()), **where(), "rows": rows}
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {file}")
