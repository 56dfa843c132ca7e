import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from analysis import load_decisions, replay_decisions
from study.asha import RecordingASHA, trial_name
from study.events import EventLog

# max_epochs, grace_period, reduction_factor
SETTINGS = [(9, 1, 3), (9, 1, 1.3), (16, 1, 2), (20, 2, 2.5), (10, 3, 4), (5, 5, 3), (1, 1, 3)]


@dataclass
class FakeTrial:
    """What a scheduler sees of Ray Tune's trials: their folder has its name only once they are started."""

    trial_id: str
    custom_dirname: str
    relative_logdir: str | None = None


def asha(settings: tuple[int, int, float], history: Any = None) -> RecordingASHA:
    max_epochs, grace, factor = settings
    scheduler = RecordingASHA(max_epochs=max_epochs, grace_period=grace, reduction_factor=factor, history=history or {})
    assert scheduler.decision is None
    assert scheduler.set_search_properties("objective", "max")
    return scheduler


def ray_asha(settings: tuple[int, int, float]) -> AsyncHyperBandScheduler:
    max_epochs, grace, factor = settings
    return AsyncHyperBandScheduler(
        "epoch", "objective", "max", max_t=max_epochs, grace_period=grace, reduction_factor=factor
    )


def curves(max_epochs: int, number: int = 24, seed: int = 0) -> dict[str, list[float]]:
    """Random learning curves by trial; some equal each other, as accuracies on few images do."""
    rng = np.random.default_rng(seed)
    epochs = np.arange(1, max_epochs + 1)
    rise = 1 - np.exp(-epochs / rng.uniform(0.5, 5, (number, 1)))
    values = rng.uniform(0, 1, (number, 1)) * rise + rng.normal(0, 0.05, (number, max_epochs))
    return {f"key{i}": row.tolist() for i, row in enumerate(values.clip(0, 1).round(2))}


class Simulation:
    """Trials that report in a random order, each on its own pace; goes on with another scheduler as a resume does."""

    def __init__(self, values: dict[str, list[float]], seed: int = 0) -> None:
        self.values = values
        reports = [name for name, curve in values.items() for _ in curve]
        self.order = [reports[i] for i in np.random.default_rng(seed).permutation(len(reports))]
        self.epochs = dict.fromkeys(values, 0)
        self.ended: set[str] = set()
        self.decisions: list[tuple[str, int, bool]] = []
        self.log: list[dict[str, Any]] = []  # an epoch each, with what the scheduler says of its decision

    def history(self) -> dict[str, dict[float, float]]:
        found: dict[str, dict[float, float]] = {}
        for row in self.judged():
            found.setdefault(row["trial_id"], {})[row["rung"]] = row["objective"]
        return found

    def run(self, scheduler: TrialScheduler, start: int = 0, stop: int | None = None) -> list[tuple[str, int, bool]]:
        trials = {name: FakeTrial(f"ray{start}_{name}", name) for name in self.values if name not in self.ended}
        for trial in trials.values():
            scheduler.on_trial_add(None, trial)
        for name in self.order[start:stop]:
            if name in self.ended:
                continue
            trials[name].relative_logdir = name
            self.epochs[name] += 1
            epoch = self.epochs[name]
            result = {"epoch": epoch, "objective": self.values[name][epoch - 1], "diverged": False}
            stopped = scheduler.on_trial_result(None, trials[name], result) == TrialScheduler.STOP
            self.decisions.append((name, epoch, stopped))
            told = getattr(scheduler, "decision", None) or {}  # Ray Tune's own tells nothing
            self.log.append({"trial_id": name, "epoch": epoch, "objective": result["objective"], **told})
            if stopped:
                self.ended.add(name)
        return self.decisions

    def judged(self) -> list[dict[str, Any]]:
        """Return the epochs of which the scheduler told a decision."""
        return [row for row in self.log if "rung" in row]


def events(folder: Path) -> list[dict[str, Any]]:
    file = folder / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_decisions_are_those_of_ray_tune(settings, seed):
    values = curves(settings[0], seed=seed)
    expected = Simulation(values, seed).run(ray_asha(settings))
    assert Simulation(values, seed).run(asha(settings)) == expected
    early = sum(stop for _, epoch, stop in expected if epoch < settings[0])
    assert early > 5 or settings[1] == settings[0]
    assert any(epoch == settings[0] for _, epoch, _ in expected)


@pytest.mark.parametrize(
    ("settings", "rungs"),
    [((9, 1, 3), {1: 1, 3: 3}), ((20, 2, 2.5), {2: 2, 5: 5, 13: 12.5}), ((10, 3, 4), {3: 3}), ((5, 5, 3), {})],
)
def test_every_decision_is_told(settings, rungs):
    simulation = Simulation(curves(settings[0]))
    decisions = simulation.run(asha(settings))
    log = simulation.judged()
    assert [(row["trial_id"], row["epoch"], row["stop"]) for row in log] == [d for d in decisions if d[1] in rungs]
    assert all(not stop for _, epoch, stop in decisions if epoch not in rungs and epoch < settings[0])
    for row in log:
        assert row["rung"] == rungs[row["epoch"]]
        assert set(row) == {"trial_id", "epoch", "objective", "rung", "cutoff", "stop"}
        assert type(row["stop"]) is bool
        assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("settings", SETTINGS[:5])
def test_what_is_told_reproduces_each_decision(settings):
    simulation = Simulation(curves(settings[0]))
    simulation.run(asha(settings))
    before = defaultdict(list)
    for row in simulation.judged():
        reached = before[row["rung"]]
        if reached:
            assert row["cutoff"] == pytest.approx(np.percentile(reached, 100 * (1 - 1 / settings[2])))
            assert row["stop"] == (row["objective"] < row["cutoff"])
        else:
            assert (row["cutoff"], row["stop"]) == (None, False)
        reached.append(row["objective"])
    assert max(map(len, before.values())) == 24


@pytest.mark.parametrize("settings", SETTINGS[:5])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.8])
def test_an_interrupted_study_goes_on_to_the_same_decisions(settings, share):
    values = curves(settings[0])
    whole, simulation = Simulation(values), Simulation(values)
    expected = whole.run(asha(settings))
    cut = int(share * len(simulation.order))
    simulation.run(asha(settings), stop=cut)
    assert share < 0.4 or 0 < len(simulation.ended) < len(values)
    assert simulation.run(asha(settings, simulation.history()), start=cut) == expected
    assert simulation.log == whole.log
    assert len(simulation.judged()) >= 24


@pytest.mark.parametrize("settings", SETTINGS[:5])
def test_the_event_log_of_an_interrupted_study_gives_its_decisions_again(tmp_path, settings):
    trials = curves(settings[0])
    (tmp_path / "study.yaml").write_text("settings: {search: grid}\ndata: {images: 1}\n")
    log = EventLog(tmp_path)
    for name in trials:
        log.append("trial_started", trial_id=name, attempt=1, settings={})
    simulation = Simulation(trials)
    cut = len(simulation.order) // 3
    simulation.run(asha(settings), stop=cut)
    simulation.run(asha(settings, simulation.history()), start=cut)
    for row in simulation.log:
        same = dict.fromkeys(("lr", "train_loss", "train_accuracy", "val_loss", "epoch_seconds"), 1.0)
        log.append("epoch", **row, **same, val_accuracy=row["objective"], images_per_second=1.0)
    decisions = load_decisions(tmp_path)
    expected = [(row["trial_id"], row["epoch"], row["rung"], row["objective"]) for row in simulation.judged()]
    assert [tuple(row) for row in decisions[["trial_id", "epoch", "rung", "value"]].to_numpy()] == expected
    assert decisions["stop"].sum() > 5
    pd.testing.assert_frame_equal(replay_decisions(decisions, settings[2]), decisions, check_exact=True)


def test_a_trial_that_goes_on_is_not_judged_again_where_it_was():
    history = {"mine": {1: 0.2, 2: 0.3, 3: 0.4}, "other": {1: 0.9, 2: 0.9, 3: 0.9}}
    rows = [("mine", epoch, 0.1, False) for epoch in (3, 4, 5)]  # its checkpoint was of epoch 2
    actions, decisions = report(asha((9, 1, 3), history), rows)
    assert actions == ["CONTINUE"] * 3
    assert decisions == [None] * 3


def test_a_decision_is_told_of_its_own_result_only():
    rows = [("a", 1, 0.5, False), ("b", 1, 0.25, False), ("a", 2, 0.5, False), ("a", 3, 0.75, False)]
    actions, decisions = report(asha((4, 1, 3)), [*rows, ("a", 4, 0.75, False)])
    assert actions == ["CONTINUE", "STOP", "CONTINUE", "CONTINUE", "STOP"]
    assert decisions == [
        {"rung": 1, "cutoff": None, "stop": False},
        {"rung": 1, "cutoff": 0.5, "stop": True},
        None,
        {"rung": 3, "cutoff": None, "stop": False},
        None,  # its last epoch
    ]


def test_a_trial_has_its_name_before_it_is_started():
    trial = Trial("fake", stub=True, trial_dirname_creator=lambda trial: "0a1b2c3d")
    assert trial_name(trial) == "0a1b2c3d"


def report(
    scheduler: RecordingASHA, rows: list[tuple[str, int, float, bool]]
) -> tuple[list[str], list[dict[str, Any] | None]]:
    """Let trials report (name, epoch, value, diverged); return what the scheduler says to each and its decision."""
    trials: dict[str, FakeTrial] = {}
    actions, decisions = [], []
    for name, epoch, value, diverged in rows:
        if name not in trials:
            trials[name] = FakeTrial(f"ray_{name}", name)
            scheduler.on_trial_add(None, trials[name])
            trials[name].relative_logdir = name
        result = {"epoch": epoch, "objective": value, "diverged": diverged}
        actions.append(scheduler.on_trial_result(None, trials[name], result))
        decisions.append(scheduler.decision)
    return actions, decisions


@pytest.mark.parametrize("rebuilt", [False, True])
def test_a_diverged_trial_is_judged_and_counts_as_zero(rebuilt):
    rows = [("good", 1, 0.8, False), ("lost", 1, 0.0, True), ("poor", 1, 0.3, False), ("late", 1, 0.4, False)]
    rows += [("late", 2, 0.5, False), ("good", 2, 0.0, True), ("late", 3, 0.0, True)]
    if rebuilt:
        actions, decisions = report(asha((9, 1, 2)), rows[:2])
        more = report(asha((9, 1, 2), {"good": {1: 0.8}, "lost": {1: 0.0}}), rows[2:])
        actions, decisions = actions + more[0], decisions + more[1]
    else:
        actions, decisions = report(asha((9, 1, 2)), rows)
    # lost: below 0.8. poor: below the median of 0.8 and 0, 0.4. late: above that of 0.8, 0 and 0.3.
    # At epoch 2 late is the first, and good, now lost, below its 0.5. At epoch 3 nothing is judged.
    assert actions == ["CONTINUE", "STOP", "STOP", "CONTINUE", "CONTINUE", "STOP", "CONTINUE"]
    assert decisions == [
        {"rung": 1, "cutoff": None, "stop": False},
        {"rung": 1, "cutoff": 0.8, "stop": True},
        {"rung": 1, "cutoff": 0.4, "stop": True},
        {"rung": 1, "cutoff": 0.3, "stop": False},
        {"rung": 2, "cutoff": None, "stop": False},
        {"rung": 2, "cutoff": 0.5, "stop": True},
        None,
    ]


def test_events_are_appended_one_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1234.56789)
    log = EventLog(tmp_path)
    log.append("attempt_started", attempt=1, pid=7, host="h")
    EventLog(tmp_path).append("trial_failed", trial_id="a", error="first\nsecond \u2028 é")
    assert log.file == tmp_path / "events.jsonl"
    assert len(log.file.read_text().split("\n")) == 3
    assert events(tmp_path) == [
        {"time": 1234.568, "event": "attempt_started", "attempt": 1, "pid": 7, "host": "h"},
        {"time": 1234.568, "event": "trial_failed", "trial_id": "a", "error": "first\nsecond \u2028 é"},
    ]


def test_an_event_after_a_half_written_line_is_not_lost(tmp_path):
    log = EventLog(tmp_path)
    log.append("attempt_started", attempt=1)
    with log.file.open("a") as file:
        file.write('{"time": 1, "event": "trial_sta')  # killed here
    log.append("attempt_started", attempt=2)
    whole = []
    for line in log.file.read_text().splitlines():
        try:
            whole.append(json.loads(line))
        except ValueError:
            continue
    assert [row["attempt"] for row in whole] == [1, 2]
