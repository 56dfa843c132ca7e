"""What a person sees while a study runs: a live view in a terminal, plain lines elsewhere."""

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

ENDED_STYLES = {"completed": "green", "stopped": "yellow", "diverged": "magenta", "failed": "red"}
SHOWN_RUNNING, SHOWN_ENDED = 12, 5
QUIET_SECONDS = 60  # after so long without a line, an epoch is worth one where there is no live view


def duration(seconds: float) -> str:
    """Return a time as people say it: ``42 s``, ``3 min 10 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


@dataclass
class _Shown:
    recipe: str
    epoch: int = 0
    val_accuracy: float = float("nan")
    images_per_second: float = 0.0


class Progress:
    """Follows a study by the calls below and shows it; a context manager.

    Args:
        title: of the study.
        num_trials: trials asked for.
        max_epochs: epochs of a trial that is not stopped.
        varied: the hyperparameters that tell trials apart.
        console: where to show; standard output by default.
    """

    def __init__(
        self,
        title: str,
        num_trials: int,
        max_epochs: int,
        varied: Sequence[str],
        console: Console | None = None,
    ) -> None:
        self._title, self._num_trials, self._max_epochs, self._varied = title, num_trials, max_epochs, list(varied)
        self._console = console or Console(soft_wrap=False)
        self._ended: Counter[str] = Counter()
        self._running: dict[str, _Shown] = {}
        self._last: deque[tuple[str, _Shown, str]] = deque(maxlen=SHOWN_ENDED)
        self._best: tuple[float, str] | None = None
        self._epochs_here = 0  # epochs run in this attempt
        self._ended_epochs: list[int] = []  # epochs of each trial that ended in this attempt
        self._start = self._told = time.monotonic()
        self._live = (
            Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            if self._console.is_terminal
            else None
        )

    def resume(self, ended: Sequence[str], trials: pd.DataFrame) -> None:
        """Take over what earlier attempts did: the statuses of trials that ended, and the trials' table."""
        self._ended.update(ended)
        scored = trials[trials["val_accuracy"].notna()].sort_values("val_accuracy")
        if len(scored):
            best = scored.iloc[-1]
            text = f"{self._recipe(best)}  (epoch {best['best_epoch']}, trial {best['trial_id']})"
            self._best = (best["val_accuracy"], text)

    def _recipe(self, settings: Mapping[str, Any] | pd.Series) -> str:
        return "  ".join(f"{name}={settings[name]}" for name in self._varied) or "the one configuration"

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def trial_started(self, trial_id: str, settings: dict[str, Any]) -> None:
        """A trial starts or starts again."""
        self._running[trial_id] = _Shown(self._recipe(settings))

    def epoch_done(self, trial_id: str, result: dict[str, Any]) -> None:
        """A trial reports an epoch."""
        shown = self._running[trial_id]
        shown.epoch, shown.val_accuracy = result["epoch"], result["val_accuracy"]
        shown.images_per_second = result["images_per_second"]
        self._epochs_here += 1
        if not shown.val_accuracy <= (self._best[0] if self._best else -1.0) and not result["diverged"]:
            self._best = (shown.val_accuracy, f"{shown.recipe}  (epoch {shown.epoch}, trial {trial_id})")
        if time.monotonic() - self._told >= QUIET_SECONDS and shown.epoch < self._max_epochs:  # else it ends now
            self._tell(trial_id, shown, "running")

    def trial_ended(self, trial_id: str, status: str) -> None:
        """A trial ends as completed, stopped, diverged or failed."""
        shown = self._running.pop(trial_id, _Shown("never started"))
        self._ended[status] += 1
        self._ended_epochs.append(shown.epoch)
        self._last.append((trial_id, shown, status))
        self._tell(trial_id, shown, status)

    def _tell(self, trial_id: str, shown: _Shown, status: str) -> None:
        if self._live:
            return
        self._told = time.monotonic()
        best = f"best {self._best[0]:.3f}" if self._best else "none yet"
        self._console.print(
            f"{self._ended.total():>4}/{self._num_trials}  {trial_id}  {shown.recipe}  {status} at epoch "
            f"{shown.epoch}, validation accuracy {shown.val_accuracy:.3f}; {best}; {self._time_line()}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    def _time_line(self) -> str:
        elapsed = time.monotonic() - self._start
        left = self._seconds_left(elapsed)
        return duration(elapsed) + (f", about {duration(left)} left" if left else "")

    def _epochs_left(self) -> float:
        # Trials to come are taken to run as many epochs as those that ended did on average.
        mean = sum(self._ended_epochs) / len(self._ended_epochs) if self._ended_epochs else self._max_epochs
        waiting = self._num_trials - self._ended.total() - len(self._running)
        return waiting * mean + sum(max(0.0, mean - shown.epoch) for shown in self._running.values())

    def _seconds_left(self, elapsed: float) -> float | None:
        return elapsed / self._epochs_here * self._epochs_left() if self._epochs_here else None

    def _render(self) -> Panel:
        waiting = self._num_trials - self._ended.total() - len(self._running)
        counts = Text.assemble(
            (f"{len(self._running)} running", "bold cyan"),
            *((f"   {self._ended[s]} {s}", style) for s, style in ENDED_STYLES.items() if self._ended[s]),
            (f"   {waiting} waiting", "dim"),
        )
        done = Table.grid(padding=(0, 2))
        left = self._epochs_left()
        bar = ProgressBar(total=max(self._epochs_here + left, 1), completed=self._epochs_here, width=32)
        done.add_row(bar, f"{self._epochs_here} epochs of about {self._epochs_here + left:.0f}", self._time_line())
        best = Text(f"best so far {self._best[0]:.3f}   {self._best[1]}" if self._best else "no result yet", "bold")

        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("trial", "recipe", "epoch", "", "val. accuracy", "images/s", ""):
            table.add_column(name, justify="right" if name in ("val. accuracy", "images/s") else "left", no_wrap=True)
        for trial_id, shown in list(self._running.items())[:SHOWN_RUNNING]:
            bar = ProgressBar(total=self._max_epochs, completed=shown.epoch, width=12)
            speed = f"{shown.images_per_second:,.0f}" if shown.epoch else ""
            accuracy = f"{shown.val_accuracy:.3f}" if shown.epoch else ""
            epoch = f"{shown.epoch}/{self._max_epochs}"
            table.add_row(trial_id, Text(shown.recipe), epoch, bar, accuracy, speed, Text("running", "cyan"))
        if len(self._running) > SHOWN_RUNNING:
            table.add_row("", f"and {len(self._running) - SHOWN_RUNNING} more")
        for trial_id, shown, status in reversed(self._last):
            epoch, accuracy = f"{shown.epoch}/{self._max_epochs}", f"{shown.val_accuracy:.3f}"
            table.add_row(trial_id, Text(shown.recipe), epoch, "", accuracy, "", Text(status, ENDED_STYLES[status]))
        return Panel(
            Group(counts, done, best, Text(), table), title=Text(self._title), title_align="left", padding=(1, 2)
        )
