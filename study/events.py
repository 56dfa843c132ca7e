"""The log of a run: what started, what ended and why, one JSON object a line."""

import json
import os
import time
from pathlib import Path
from typing import Any


class EventLog:
    """Appends events to ``RUN/events.jsonl``. Each is on disk when :meth:`append` returns.

    Events: ``attempt_started`` (attempt, pid, host), ``attempt_ended`` (attempt, reason), ``trial_started`` (attempt,
    settings), ``rung`` (one decision of ASHA: epoch, rung, value, cutoff, stop), ``trial_ended``, ``trial_failed``
    (error). All but the first two carry ``trial_id``.
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
