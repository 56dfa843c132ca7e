"""Locks, signals, and attempt after attempt until a study ends."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from analysis.ray_session import ClusterError
from analysis.remote import HEARTBEAT, RemoteError
from analysis.run_log import is_running
from analysis.study_file import RunError
from study.__main__ import main
from study.attempt import AttemptError
from study.disk import DiskFullError
from study.supervise import MAX_RESTARTS, StudyError, holding, interruptible, lost_trials, supervise
from trainables import TrialSettings, UserError

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def child(code: str, *arguments: str, through: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """A Python process that is told and asked things by lines, and ended after two minutes at the latest."""
    command = [*through, sys.executable, "-c", code, *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        timer = threading.Timer(120, process.kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()


def hear(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline().strip()


def say(process: subprocess.Popen[str], line: str) -> None:
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


# ---- One process at a time

HOLD = """
import sys, time
from pathlib import Path
from study.supervise import StudyError, holding
for _ in range(2):
    try:
        with holding(Path(sys.argv[1])):
            print("held", flush=True)
            time.sleep(600)
    except StudyError as error:
        print(error, flush=True)
    sys.stdin.readline()
"""


def refusal(run: Path) -> str:
    return f"{run}: is running now, in another process; python -m study status {run} shows it"


def test_a_run_is_held_by_one_process_until_it_ends_or_is_killed(tmp_path):
    with child(HOLD, str(tmp_path)) as other:
        with holding(tmp_path):
            assert hear(other) == refusal(tmp_path)
        say(other, "again")
        assert hear(other) == "held"
        assert is_running(tmp_path)
        with pytest.raises(StudyError) as error, holding(tmp_path):
            pass
        assert str(error.value) == refusal(tmp_path)
        other.send_signal(signal.SIGKILL)
        assert other.wait() == -signal.SIGKILL
    assert not is_running(tmp_path)
    with holding(tmp_path):
        assert is_running(tmp_path)
    assert not is_running(tmp_path)


def test_a_run_is_let_go_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="inside"), holding(tmp_path):
        raise ValueError("inside")
    with holding(tmp_path):
        pass


def test_runs_are_held_one_by_one(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with holding(tmp_path / "a"), holding(tmp_path / "b"):
        assert is_running(tmp_path / "a")
        assert is_running(tmp_path / "b")


def test_a_run_that_nobody_ever_held_is_not_running(tmp_path):
    assert not is_running(tmp_path)
    assert not is_running(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_look_by_status_in_between_does_not_keep_it_from_starting(tmp_path, monkeypatch):
    look = """
import fcntl, sys
with open(sys.argv[1]) as lock:
    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as is_running does
    print("looking", flush=True)
    sys.stdin.readline()
"""
    (tmp_path / "lock").touch()
    with child(look, str(tmp_path / "lock")) as status:
        assert hear(status) == "looking"
        waits = []

        def wait(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 2:
                say(status, "enough")
                status.wait()

        monkeypatch.setattr("study.supervise.time.sleep", wait)
        with holding(tmp_path):
            assert is_running(tmp_path)
        assert len(waits) == 2
        assert 0.5 < sum(waits) < 2  # long enough for a look, short enough for whoever waits


def test_a_look_by_status_sees_a_run_that_is_held_and_leaves_it_so(tmp_path):
    with holding(tmp_path):
        assert is_running(tmp_path)
        with (tmp_path / "lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("copy", "age", "refused"), [("elsewhere", 5, True), ("elsewhere", 300, False), ("here", 5, False)]
)
def test_a_run_at_a_uri_is_held_by_its_signs_of_life(copy, age, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.remote.source", lambda run: "s3://bucket/runs/x")
    (tmp_path / ".id").write_text("here")
    (tmp_path / HEARTBEAT).write_text(json.dumps({"copy": copy, "time": time.time() - age}))
    with pytest.raises(StudyError) if refused else contextlib.nullcontext(), holding(tmp_path):
        pass
    assert is_running(tmp_path) is refused


# ---- Attempt after attempt


class Study:
    """A run directory, and attempts at it that end as they are told to; ``+`` ends one more epoch first."""

    def __init__(self, run: Path, *outcomes: str) -> None:
        run.mkdir(exist_ok=True)
        self.run, self.outcomes, self.told, self.attempts, self.epochs = run, list(outcomes), [], 0, 0
        self.alone = []  # of each attempt, whether trials were to run one at a time
        (run / "study.yaml").write_text(yaml.safe_dump({"settings": {}, "data": {}}))
        settings = TrialSettings(max_epochs=100).model_dump()
        (run / "manifest.json").write_text(json.dumps({"trials": [{"trial_id": "a", "settings": settings}]}))

    def end_epoch(self) -> None:
        self.epochs += 1
        row = {"event": "epoch", "trial_id": "a", "epoch": self.epochs, "lr": 0.1, "train_loss": 1.0, "val_loss": 1.0}
        row |= {"train_accuracy": 0.5, "val_accuracy": 0.5, "epoch_seconds": 1.0, "images_per_second": 1.0}
        with (self.run / "events.jsonl").open("a") as out:
            out.write(json.dumps(row) + "\n")

    def attempt(self, alone: bool) -> str:
        self.attempts += 1
        self.alone.append(alone)
        outcome = self.outcomes.pop(0)
        if outcome.startswith("+"):
            self.end_epoch()
        outcome = outcome.removeprefix("+")
        if outcome in ("finished", "interrupted", "lost", "alone"):
            return outcome
        raise AttemptError(outcome)

    def supervise(self) -> bool:
        return supervise(self.run, self.attempt, self.told.append)


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("study.supervise._WAIT_SECONDS", 0)


@pytest.fixture
def study(tmp_path: Path, no_wait: None) -> Callable[..., Study]:
    return lambda *outcomes: Study(tmp_path / "run", *outcomes)


@pytest.mark.parametrize(("outcome", "finished"), [("finished", True), ("interrupted", False)])
def test_one_attempt_is_enough_if_it_ends(outcome, finished, study):
    one = study(outcome)
    assert one.supervise() is finished
    assert (one.attempts, one.told) == (1, [])


def test_a_study_needs_no_directory_before_its_first_attempt(tmp_path, no_wait):
    assert supervise(tmp_path / "not yet", lambda alone: "finished", pytest.fail)


@pytest.mark.parametrize(("outcome", "finished"), [("finished", True), ("interrupted", False)])
def test_an_attempt_that_failed_is_followed_by_another(outcome, finished, study):
    one = study("a worker died", outcome)
    assert one.supervise() is finished
    assert (one.attempts, one.told) == (2, ["beginning again: a worker died"])


def test_trials_that_were_lost_are_begun_again(study):
    one = study("lost", "+lost", "finished")
    assert one.supervise()
    assert one.told == ["beginning again: trials were lost with their worker or node"] * 2


def gives_up(one: Study) -> str:
    with pytest.raises(StudyError) as error:
        one.supervise()
    message = str(error.value)
    assert message.startswith(f"{one.run}: gave up after ")
    assert message.endswith(f"python -m study resume {one.run}")
    assert "what is finished is kept" in message
    assert message.isprintable()
    return message


@pytest.mark.parametrize("kind", ["no room", "lost"])
def test_attempts_that_get_nowhere_come_to_an_end(kind, study):
    one = study(*[kind] * 10)
    message = gives_up(one)
    assert one.attempts == MAX_RESTARTS + 1
    assert len(one.told) == MAX_RESTARTS  # the last one is told by the error
    assert f"gave up after {MAX_RESTARTS + 1} attempts without another epoch" in message
    assert ("(trials were lost with their worker or node)" if kind == "lost" else "(no room)") in message


def test_the_last_reason_is_the_one_that_is_given(study):
    names = [f"fault {number}" for number in range(MAX_RESTARTS + 2)]
    message = gives_up(study(*names))
    assert f"({names[MAX_RESTARTS]})" in message
    assert names[0] not in message


def test_attempts_that_get_on_are_repeated_as_long_as_they_do(study):
    one = study(*["+a fault"] * 12, "finished")
    assert one.supervise()
    assert one.attempts == 13


def test_failures_are_counted_anew_after_each_epoch(study):
    idle = ["a fault"] * (MAX_RESTARTS - 1)
    one = study(*idle, "+a fault", *idle, "+lost", *idle, "finished")
    assert one.supervise()
    assert one.attempts == 3 * len(idle) + 3


def test_trials_that_are_given_up_as_lost_are_no_progress(study):
    """Else a study would give up trial after trial while storage is away."""
    one = study(*["a fault"] * 10)

    def attempt(alone: bool) -> str:
        with (one.run / "events.jsonl").open("a") as out:
            for event in ("trial_lost", "trial_failed"):
                line = {"event": event, "trial_id": "a", "error": "the storage is away", "lost": True}
                out.write(json.dumps(line) + "\n")
        return one.attempt(alone)

    with pytest.raises(StudyError):
        supervise(one.run, attempt, one.told.append)
    assert one.attempts == MAX_RESTARTS + 1


@pytest.mark.parametrize("outcome", ["lost", "alone"])
def test_a_study_that_gives_up_says_what_its_trials_met(outcome, study):
    one = study(*[outcome] * 10)
    settings = TrialSettings(max_epochs=100).model_dump()
    asked = [{"trial_id": name, "settings": settings} for name in "ab"]
    (one.run / "manifest.json").write_text(json.dumps({"trials": asked}))
    befell = (("trial_failed", "b", "ValueError: long ago"), ("trial_lost", "a", "OSError: the storage is away"))
    with (one.run / "events.jsonl").open("a") as out:
        for kind, name, error in befell:
            out.write(json.dumps({"event": kind, "trial_id": name, "error": error}) + "\n")
    assert "(OSError: the storage is away)" in gives_up(one)


def test_what_was_given_up_as_lost_can_be_gone_on_with(study, capsys):
    one = study()
    for kind, lost in (("trial_lost", {}), ("trial_failed", {"lost": True})):
        with (one.run / "events.jsonl").open("a") as out:
            out.write(json.dumps({"event": kind, "trial_id": "a", "error": "the node is away", **lost}) + "\n")
    assert lost_trials(one.run) == ["a"]
    assert main(["status", str(one.run)]) == 0
    assert f"or python -m study resume {one.run}, which tries what was lost again" in capsys.readouterr().out


def test_what_has_no_epoch_is_listed_without_an_accuracy(study, capsys):
    one = study()
    assert main(["list", str(one.run.parent)]) == 0
    assert "nan" not in capsys.readouterr().out.split()
    one.end_epoch()
    assert main(["list", str(one.run.parent)]) == 0
    assert "0.5" in capsys.readouterr().out.splitlines()[1].split()


def test_epochs_of_an_earlier_run_are_no_progress(study):
    one = study(*["a fault"] * 10)
    for _ in range(5):
        one.end_epoch()
    gives_up(one)
    assert one.attempts == MAX_RESTARTS + 1


def test_as_many_attempts_may_fail_after_an_epoch_as_before_the_first(study):
    one = study("+a fault", *["a fault"] * MAX_RESTARTS, "finished")
    assert one.supervise()


@pytest.mark.parametrize("kind", [UserError, ClusterError, DiskFullError, StudyError])
def test_what_only_the_user_can_mend_is_not_tried_again(kind, study):
    one = study("finished")
    attempts = []

    def attempt(alone: bool) -> str:
        attempts.append(1)
        raise kind("mend me")

    with pytest.raises(kind, match=r"^mend me$"):
        supervise(one.run, attempt, one.told.append)
    assert (len(attempts), one.told) == (1, [])


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ZeroDivisionError])
def test_neither_an_interruption_nor_a_fault_of_ours_is_tried_again(kind, study):
    one = study("a fault")

    def attempt(alone: bool) -> str:
        if one.outcomes:
            return one.attempt(alone)
        raise kind

    with pytest.raises(kind):
        supervise(one.run, attempt, one.told.append)
    assert one.told == ["beginning again: a fault"]


def test_storage_that_is_away_between_attempts_ends_nothing(study):
    one = study("+a fault", "a fault", "finished")
    log, away = one.run / "events.jsonl", one.run / "away"

    def attempt(alone: bool) -> str:
        if away.exists():
            log.rmdir()
            away.rename(log)
        try:
            return one.attempt(alone)
        finally:
            if len(one.outcomes) == 1:  # a log that is there, and cannot be read
                log.rename(away)
                log.mkdir()

    assert supervise(one.run, attempt, one.told.append)
    assert one.told == ["beginning again: a fault"] * 2


def test_between_attempts_it_waits(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr("study.supervise.time.sleep", waits.append)
    one = Study(tmp_path / "run", "a fault", "a fault", "a fault", "+a fault", "a fault", "finished")
    assert one.supervise()
    assert waits == [2.0, 4.0, 8.0, 2.0, 2.0]  # longer while nothing gets better


def test_after_an_attempt_that_got_nowhere_trials_run_one_at_a_time(study):
    one = study("+a fault", "a fault", "lost", "+alone", "finished")
    assert one.supervise()
    assert one.alone == [False, False, True, True, False]
    assert one.told[-1] == "beginning again: side by side"


@pytest.mark.parametrize("kind", [ClusterError, RemoteError, RunError, OSError])
def test_what_was_there_at_the_first_attempt_may_come_back(kind, study):
    one = study("+a fault", "finished")

    def attempt(alone: bool) -> str:
        if len(one.told) in (1, 2):
            one.told.append("away")
            raise kind("cannot be reached")
        return one.attempt(alone)

    assert supervise(one.run, attempt, one.told.append)
    assert one.told.count("beginning again: cannot be reached") == 1


# ---- Signals

LISTEN = """
import signal, sys
from study.supervise import interruptible
if sys.argv[1] == "default":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
before = [signal.getsignal(number) for number in numbers]
for _ in range(2):
    try:
        with interruptible():
            print("listening", flush=True)
            for line in sys.stdin:
                print("heard", line.strip(), flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
print([signal.getsignal(number) for number in numbers] == before, flush=True)
sys.stdin.readline()
"""


def test_schedulers_and_closed_terminals_interrupt_as_ctrl_c_does():
    with child(LISTEN, "default") as process:
        for number in (signal.SIGTERM, signal.SIGHUP):
            assert hear(process) == "listening"
            process.send_signal(number)
            assert hear(process) == "interrupted", number
        assert hear(process) == "True"
        process.send_signal(signal.SIGTERM)  # now it is as before: the process ends
        assert process.wait() == -signal.SIGTERM


def test_what_nohup_ignores_stays_ignored_and_sigterm_works_in_the_background():
    # As a shell starts `nohup python ... &` in a script: both are ignored from the beginning.
    with child(LISTEN, "inherited", through=["sh", "-c", 'trap "" INT HUP; exec "$@"', "sh"]) as process:
        for _ in range(2):
            assert hear(process) == "listening"
            process.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGINT)
            say(process, "still there?")
            assert hear(process) == "heard still there?"
            process.send_signal(signal.SIGTERM)
            assert hear(process) == "interrupted"
        assert hear(process) == "True"
        process.send_signal(signal.SIGHUP)
        say(process, "and now?")
        assert process.wait() == 0


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts back the handlers of the tests' own process."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_heeds_is_asked_once_and_then_interrupted(number):
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.default_int_handler)
    with interruptible() as interruption:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert not interruption.asked
        interruption.heeded = True
        os.kill(os.getpid(), number)
        assert interruption.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_handlers_are_put_back_whatever_happens(error):
    def own(number: int, frame: object) -> None:
        raise AssertionError

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, own)
    inside = []
    with pytest.raises(error) if error else contextlib.nullcontext(), interruptible():
        inside = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
        if error:
            raise error
    assert own not in inside
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == [own, own]


@pytest.mark.usefixtures("handlers")
def test_in_another_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    inside = []

    def work() -> None:
        with interruptible():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]
    assert signal.getsignal(signal.SIGTERM) is before
