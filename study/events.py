"""The log of a run: what started, what ended and why, one JSON object a line."""

import json
import os
import time
from pathlib import Path
from typing import Any


class EventLog:
    """Appends events to ``RUN/events.jsonl``. Each is on disk when :meth:`append` returns.

    What stands there is all that analysis and later attempts know of epochs and decisions, so each line says one thing
    whole: an epoch's metrics and what ASHA decided on them are one event.

    Events: ``attempt_started`` (attempt, pid, host), ``attempt_ended`` (attempt, reason), ``changed`` (what, since the
    study began); and with ``trial_id``: ``trial_started`` (attempt, settings), ``epoch`` (the metrics of
    :class:`trainables.train.EpochMetrics`, ``objective``, ``device``, ``host``, ``checkpoint``; at a rung of ASHA
    ``rung``, ``cutoff`` and ``stop``; ``passed_over``, why checkpoints could not be gone on from), ``trial_ended``,
    ``trial_retried`` (error of the trial, which is begun again), ``trial_lost`` (error of its worker, node, storage or
    GPU: it is begun again), ``trial_failed`` (error; whether it was lost once too often, which resume tries again).
    Beside an error that a worker raised stands its ``traceback``.
    """

    def __init__(self, run: Path) -> None:
        self.file = run / "events.jsonl"

    def append(self, event: str, **fields: Any) -> None:
        """Append one event with the present time (seconds since 1970, UTC)."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields})
        with self.file.open("ab+") as out:
            # A line that a crash left half written must not swallow the next.
            if out.tell():
                out.seek(-1, os.SEEK_END)
                if out.read(1) != b"\n":
                    out.write(b"\n")
            out.write(line.encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())
