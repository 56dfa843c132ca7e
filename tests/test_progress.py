import re
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from study import progress as module
from study.progress import Progress, duration

VARIED = ["optimizer", "lr"]
NOTHING = pd.DataFrame({"val_accuracy": []})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time as Progress sees it: seconds in ``now``."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def console(terminal: bool, width: int = 150) -> Console:
    environment = {"TERM": "xterm-256color"}
    return Console(file=StringIO(), force_terminal=terminal, width=width, height=60, _environ=environment)


def settings(**values: Any) -> dict[str, Any]:
    return {"optimizer": "sgd", "lr": 0.1, "width": 64, **values}


def result(epoch: int, val_accuracy: float, **values: Any) -> dict[str, Any]:
    return {"epoch": epoch, "val_accuracy": val_accuracy, "images_per_second": 1234.5, "diverged": False, **values}


def frame(text: str) -> str:
    """The last picture of a live view, without colours and cursor movements."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return plain[plain.rindex("╭") :]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (42.4, "42 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (60, "1 min 00 s"),
        (190, "3 min 10 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (100_000, "27 h 46 min"),
    ],
)
def test_duration_is_as_people_say_it(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize("width", [40, 200])
def test_each_ended_trial_is_one_plain_line(clock, width):
    out = console(False, width)
    with Progress("demo", 4, 10, VARIED, console=out) as progress:
        progress.trial_started("aaaa", settings())
        progress.trial_started("bbbb", settings(optimizer="adam", lr=0.001))
        for epoch in range(1, 11):
            progress.epoch_done("aaaa", result(epoch, 0.6 if epoch == 5 else 0.25))
        assert out.file.getvalue() == ""
        clock.now += 100  # 10 epochs: 10 s each; about 10 for each of two trials to come, and bbbb
        progress.trial_ended("aaaa", "completed")
        progress.epoch_done("bbbb", result(1, 0.5))
        progress.epoch_done("bbbb", result(2, 0.1))
        clock.now += 20  # 12 epochs in 120 s; trials are taken to last 6 epochs each
        progress.trial_ended("bbbb", "stopped")
    assert out.file.getvalue().splitlines() == [
        "   1/4  aaaa  optimizer=sgd  lr=0.1  completed at epoch 10, validation accuracy 0.250; best 0.600; "
        "1 min 40 s, about 5 min 00 s left",
        "   2/4  bbbb  optimizer=adam  lr=0.001  stopped at epoch 2, validation accuracy 0.100; best 0.600; "
        "2 min 00 s, about 2 min 00 s left",
    ]


def test_a_long_trial_is_heard_of_once_a_minute(clock):
    out = console(False)
    with Progress("demo", 1, 6, VARIED, console=out) as progress:
        progress.trial_started("aaaa", settings())
        for epoch in range(1, 7):
            clock.now += 25
            progress.epoch_done("aaaa", result(epoch, epoch / 10))
        progress.trial_ended("aaaa", "completed")
    assert out.file.getvalue().splitlines() == [
        "   0/1  aaaa  optimizer=sgd  lr=0.1  running at epoch 3, validation accuracy 0.300; best 0.300; "
        "1 min 15 s, about 1 min 15 s left",
        "   1/1  aaaa  optimizer=sgd  lr=0.1  completed at epoch 6, validation accuracy 0.600; best 0.600; 2 min 30 s",
    ]


def test_the_best_of_earlier_attempts_is_not_forgotten():
    out = console(False)
    row = {"trial_id": "old", "best_epoch": 7, "val_accuracy": 0.8} | dict.fromkeys(VARIED, "x")
    with Progress("demo", 2, 10, VARIED, out) as progress:
        progress.resume(["completed"], pd.DataFrame([row]))
        progress.trial_started("aaaa", settings())
        progress.epoch_done("aaaa", result(1, 0.5))
        progress.trial_ended("aaaa", "stopped")
    assert "best 0.800" in out.file.getvalue()


def test_diverged_and_failed_trials_are_never_the_best(clock):
    out = console(False)
    with Progress("demo", 5, 10, [], out) as progress:
        progress.resume(["completed", "failed"], NOTHING)
        progress.trial_started("aaaa", settings())
        clock.now += 5
        progress.trial_ended("aaaa", "failed")
        progress.trial_started("bbbb", settings())
        progress.epoch_done("bbbb", result(1, float("nan"), diverged=True))
        progress.trial_ended("bbbb", "diverged")
        progress.trial_started("cccc", settings())
        progress.epoch_done("cccc", result(1, 0.0))
        progress.trial_ended("cccc", "stopped")
    shown = [line.split("  the one configuration  ") for line in out.file.getvalue().splitlines()]
    assert shown == [
        ["   3/5  aaaa", "failed at epoch 0, validation accuracy nan; none yet; 5 s"],
        ["   4/5  bbbb", "diverged at epoch 1, validation accuracy nan; none yet; 5 s, about 2 s left"],
        ["   5/5  cccc", "stopped at epoch 1, validation accuracy 0.000; best 0.000; 5 s"],
    ]


def test_a_trial_that_starts_again_is_counted_once(clock):
    out = console(False)
    with Progress("demo", 1, 10, VARIED, console=out) as progress:
        progress.trial_started("aaaa", settings())
        progress.epoch_done("aaaa", result(1, 0.5))
        progress.trial_started("aaaa", settings())
        progress.epoch_done("aaaa", result(2, 0.7))
        progress.trial_ended("aaaa", "completed")
    (line,) = out.file.getvalue().splitlines()
    assert line.startswith("   1/1  aaaa  optimizer=sgd  lr=0.1  completed at epoch 2, ")
    assert "best 0.700" in line


def test_the_live_view_shows_counts_the_best_and_what_runs(clock):
    out = console(True)
    with Progress("demo: 9 trials", 9, 10, VARIED, out) as progress:
        progress.resume(["completed", "completed"], NOTHING)
        for name, status, accuracy in (("aaaa", "stopped", 0.25), ("bbbb", "diverged", 0.125), ("cccc", "failed", 0.5)):
            progress.trial_started(name, settings(lr=0.01))
            progress.epoch_done(name, result(1, accuracy))
            progress.trial_ended(name, status)
        progress.trial_started("dddd", settings(optimizer="adam"))
        for epoch in (1, 2, 3):
            progress.epoch_done("dddd", result(epoch, 0.75 if epoch == 2 else 0.625))
        progress.trial_started("eeee", settings())
        clock.now += 60
    shown = frame(out.file.getvalue())
    lines = [" ".join(line.strip("│ ").split()) for line in shown.splitlines()]
    assert "demo: 9 trials" in lines[0]
    assert "2 running 2 completed 1 stopped 1 diverged 1 failed 2 waiting" in lines
    # Six epochs so far, 10 s each; those that ended had one, so two trials to come and eeee have one left each.
    assert any(line.endswith("6 epochs of about 9 1 min 00 s, about 30 s left") for line in lines)
    assert "best so far 0.750 optimizer=adam lr=0.1 (epoch 2, trial dddd)" in lines
    table = (re.sub(r"[━╸╺]+ ?", "", line) for line in lines if re.match(r"[a-e]{4} ", line))
    rows = {line[:4]: line for line in table}
    assert rows == {
        "dddd": "dddd optimizer=adam lr=0.1 3/10 0.625 1,234 running",
        "eeee": "eeee optimizer=sgd lr=0.1 0/10 running",
        "cccc": "cccc optimizer=sgd lr=0.01 1/10 0.500 failed",
        "bbbb": "bbbb optimizer=sgd lr=0.01 1/10 0.125 diverged",
        "aaaa": "aaaa optimizer=sgd lr=0.01 1/10 0.250 stopped",
    }


def test_the_live_view_of_a_study_that_just_began(clock):
    out = console(True)
    with Progress("demo", 3, 10, VARIED, console=out):
        pass
    shown = frame(out.file.getvalue())
    assert "0 running   3 waiting" in shown
    assert "no result yet" in shown
    assert "0 epochs of about 30" in shown
    assert " left" not in shown


def test_the_live_view_keeps_to_the_terminal(clock):
    out = console(True, 100)
    with Progress("demo", 40, 10, VARIED, console=out) as progress:
        for i in range(20):
            progress.trial_started(f"done{i}", settings())
            progress.epoch_done(f"done{i}", result(1, 0.5))
            progress.trial_ended(f"done{i}", "stopped")
        for i in range(15):
            progress.trial_started(f"run{i}", settings())
    shown = frame(out.file.getvalue())
    assert [int(i) for i in re.findall(r"\brun(\d+)", shown)] == list(range(12))
    assert "and 3 more" in shown
    assert [int(i) for i in re.findall(r"\bdone(\d+)", shown.split("images/s")[1])] == [19, 18, 17, 16, 15]
    assert {len(line) for line in shown.rstrip("\n").split("\n")} == {100}


def test_names_are_shown_as_they_are(clock):
    out = console(True)
    with Progress("demo [red]: 1 trial", 1, 10, ["note"], console=out) as progress:
        progress.trial_started("aaaa", {"note": "[bold]"})
        progress.epoch_done("aaaa", result(1, 0.5))
    shown = frame(out.file.getvalue())
    assert "demo [red]: 1 trial" in shown
    assert shown.count("note=[bold]") == 2
