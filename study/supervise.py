"""Carries a study through what ends an attempt at it: faults, signals, lost machines."""

import contextlib
import fcntl
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from analysis.ray_session import ClusterError
from analysis.remote import RemoteError, RunPath, TakenError, end_life, is_run_elsewhere, is_uri, show_life, source
from analysis.run_log import load_faults, read_log
from analysis.study_file import RunError
from analysis.trials import ENDED, load_trials
from trainables.errors import UserError

# Attempts in a row that may fail without one more epoch, or the end of one more trial.
MAX_RESTARTS = 5
_CLAIM_SECONDS = 1.0
_WAIT_SECONDS = 2.0  # before the first of them; twice as long before each further one


class AttemptError(Exception):
    """Ray Tune gave up; what is finished is on disk, and another attempt may go on."""


class StudyError(UserError):
    """A study that cannot be started or did not come to its end; what is finished is on disk."""


@contextlib.contextmanager
def holding(run: Path) -> Iterator[None]:
    """Hold a run directory, so that no other process runs the study. The system lets go of it if this process dies.

    Raises:
        StudyError: if another process holds it.
    """
    elsewhere = StudyError(
        f"{source(run)}: is running now, in another process; python -m study status {source(run)} shows it"
    )
    if is_run_elsewhere(run):
        raise elsewhere
    try:
        lock = (run / "lock").open("a")
    except OSError as error:
        raise StudyError(f"{run / 'lock'}: cannot be written ({error.strerror}), so nothing can go on there") from error
    with lock:
        for patience in (0.2, 0.4, 0.8, None):  # `status` holds it too, for an instant
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if patience is None:
                    raise elsewhere from error
                time.sleep(patience)
            except OSError as error:
                raise StudyError(
                    f"{run / 'lock'}: cannot be locked ({error.strerror}), so that two processes could run the study; "
                    "give an --out on a file system with locks"
                ) from error
        if is_uri(source(run)):
            try:
                for wait in (_CLAIM_SECONDS, 0.0):  # of two that claim it at once, the later one's sign is there then
                    show_life(run, source(run))
                    time.sleep(wait)
            except TakenError as error:
                raise elsewhere from error
        try:
            yield
        finally:
            if is_uri(source(run)):
                end_life(run, source(run))


@dataclass
class Interruption:
    """Whether this process was asked to end: by Ctrl-C, a scheduler (SIGTERM) or a closed terminal (SIGHUP).

    Attributes:
        asked: it was, while it was heeded.
        heeded: whether someone looks at ``asked``; while nobody does, and the second time, KeyboardInterrupt is raised.
    """

    asked: bool = False
    heeded: bool = False


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Take over the signals that ask this process to end."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def interrupt(number: int, frame: object) -> None:
        if not interruption.heeded or interruption.asked:
            raise KeyboardInterrupt
        interruption.asked = True

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup, and in background jobs
            before[number] = signal.signal(number, interrupt)
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def supervise(run: Path, attempt: Callable[[bool], str], tell: Callable[[str], None]) -> bool:
    """Attempt a study until it ends, is interrupted, or fails over and over without getting on.

    Args:
        run: the run directory.
        attempt: see :func:`study.attempt.run_attempt`; called with whether trials are to run one at a time, as they do
            after a failure: they leave each other room, and whose fault the next one is will be known.
        tell: where to say that it begins again.

    Returns:
        Whether all trials ended; False after an interruption.

    Raises:
        StudyError: if attempt after attempt failed.
        UserError: of the first attempt, or of any that another one would repeat.
    """
    failures, before, first = 0, _progress(run), True
    while True:
        try:
            outcome = attempt(failures > 0)
            reasons = {"alone": "side by side", "searched": "the best of the search, with fresh seeds"}
            reason = reasons.get(outcome, "trials were lost with their worker or node")
        except AttemptError as error:
            outcome, reason = "failed", str(error)
        except (ClusterError, RemoteError, RunError) as error:
            if first:  # a mistake, not a fault
                raise
            outcome, reason = "failed", str(error)
        except OSError as error:
            if first:
                raise StudyError(f"{source(run)}: {error}") from error
            outcome, reason = "failed", str(error)
        if outcome in ("finished", "interrupted"):
            return outcome == "finished"
        now, first = before, False
        with contextlib.suppress(RunError, OSError):  # storage that is away, with what was got on
            now = max(before, _progress(run))
        failures, before = (0 if now > before else failures + 1), now
        if failures > MAX_RESTARTS:
            if outcome != "failed":  # the log knows why
                reason = _last_error(run) or reason
            raise StudyError(
                f"{source(run)}: gave up after {failures} attempts without another epoch ({reason}); "
                f"what is finished is kept: mend that and go on by python -m study resume {source(run)}"
            )
        tell(f"beginning again: {reason}")
        time.sleep(_WAIT_SECONDS * 2 ** max(0, failures - 1))


def _progress(run: Path) -> int:
    """Return the number of epochs and of trials that have ended; those that were given up as lost are no progress."""
    if not (run / "study.yaml").exists():
        return 0
    trials = load_trials(run)
    return int(trials["epochs"].sum() + trials["status"].isin(ENDED).sum()) - len(lost_trials(run))


def lost_trials(run: RunPath) -> list[str]:
    """Return the ids of trials that were given up for what they lost, and that ``resume`` tries again."""
    trials, faults = load_trials(run), load_faults(run)
    return [name for name in trials["trial_id"][trials["status"] == "failed"] if faults[name].losses]


def _last_error(run: Path) -> str:
    with contextlib.suppress(RunError, OSError):
        return read_log(run).last_error
    return ""
