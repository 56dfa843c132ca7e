"""Disk space: how large checkpoints are, what a study needs, and which checkpoints are let go."""

import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from analysis import load_trials
from study.disk import Checkpoints, checkpoint_bytes, free_bytes, needed_bytes, reserve_bytes, size_text
from trainables import ImageData, TrialSettings, save_checkpoint, train

# ---- Sizes


def ten_classes(n: int) -> ImageData:
    images = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3))
    return ImageData(images.astype(np.uint8), np.arange(n) % 10, tuple("abcdefghij"))


def saved_bytes(settings: TrialSettings, folder: Path) -> int:
    """How much a checkpoint takes after one epoch, byte for byte."""
    data = ten_classes(20)
    _, state = next(train(settings, data, data, device="cpu"))
    save_checkpoint(folder, state)
    return sum(file.stat().st_size for file in folder.iterdir())


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "muon"])
@pytest.mark.parametrize("width", [8, 16])
def test_size_of_a_checkpoint_is_known_before_there_is_one(width, optimizer, ema_decay, tmp_path):
    settings = TrialSettings(
        width=width, optimizer=optimizer, ema_decay=ema_decay, batch_size=10, lr=0.001, resolution="12", max_epochs=1
    )
    assert checkpoint_bytes(settings, 10) == pytest.approx(saved_bytes(settings, tmp_path), rel=0.03)


def test_size_of_a_checkpoint_grows_with_what_is_kept():
    sizes = [
        checkpoint_bytes(TrialSettings(width=width, optimizer=optimizer, ema_decay=ema_decay), 100)
        for width, optimizer, ema_decay in [(32, "sgd", 0.0), (64, "sgd", 0.0), (64, "adam", 0.0), (64, "adam", 0.99)]
    ]
    assert sizes == sorted(set(sizes))
    # 11,220,132 parameters of four bytes, and as many numbers of momentum; batch statistics are small.
    assert sizes[1] == pytest.approx(2 * 4 * 11_220_132, rel=0.01)
    assert checkpoint_bytes(TrialSettings(), 1000) > checkpoint_bytes(TrialSettings(), 10)


@pytest.mark.parametrize(
    ("num_trials", "concurrent", "keep", "checkpoints"),
    [
        (10, 4, 3, 3 + 20),
        (10, 4, 20, 10 + 20),
        (10, 4, None, 10 + 20),
        (2, 8, 20, 2 + 10),  # no more run at once than there are
        (1, 1, 1, 1 + 5),
    ],
)
def test_what_a_study_needs_is_what_is_kept_and_what_runs(num_trials, concurrent, keep, checkpoints):
    assert needed_bytes(1_000_000, num_trials, concurrent, keep) == 52_428_800 + checkpoints * 1_000_000


def test_reserve_has_room_for_two_copies_of_a_checkpoint_of_every_running_trial():
    assert reserve_bytes(1_000_000, 4) == 26_214_400 + 8_000_000
    assert reserve_bytes(1_000_000, 4) < needed_bytes(1_000_000, 4, 4, 1)  # else what fits would not begin


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 MB"),
        (499_999, "0 MB"),
        (850e6, "850 MB"),
        (999.4e6, "999 MB"),
        (1e9, "1.0 GB"),
        (1.44e9, "1.4 GB"),
        (2**40, "1099.5 GB"),
    ],
)
def test_sizes_are_as_people_say_them(size, text):
    assert size_text(size) == text


def test_free_space_is_that_of_the_nearest_folder_that_exists(tmp_path, monkeypatch):
    asked = []

    def disk_usage(path: Path) -> SimpleNamespace:
        asked.append(path.resolve())
        return SimpleNamespace(total=9, used=2, free=7)

    monkeypatch.setattr("study.disk.shutil.disk_usage", disk_usage)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    for run in (tmp_path / "there", tmp_path / "there/not/yet", Path("there/not/yet"), Path("runs"), tmp_path / "a/b"):
        assert free_bytes(run) == 7
    assert asked == [tmp_path / "there"] * 3 + [tmp_path] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_free_space_is_the_systems(tmp_path):
    assert 0 < free_bytes(tmp_path / "run") < 2**60


# ---- Which checkpoints are let go


def of(**values: Any) -> dict[str, Any]:
    return TrialSettings(**{"max_epochs": 3, **values}).model_dump()


Epochs = list[tuple[int, float]]
COMPLETED, STOPPED, FAILED, UNFINISHED = "completed", "stopped", "failed", "pending"


class Run:
    """A run directory of trials of three epochs, each epoch with its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        (path / "study.yaml").write_text(yaml.safe_dump({"settings": {"search": "grid"}, "data": {}}))
        self._entries: list[dict[str, Any]] = []
        self._add()

    def _add(self, *events: dict[str, Any]) -> None:
        (self.path / "manifest.json").write_text(json.dumps({"trials": self._entries}))
        with (self.path / "events.jsonl").open("a") as out:
            out.writelines(json.dumps({"time": 1.0, **event}) + "\n" for event in events)

    def within(self, trial_id: str, epoch: int, attempt: int = 1) -> str:
        return f"tune/attempt-{attempt}/{trial_id}/checkpoint_{epoch - 1:06}"

    def folder(self, trial_id: str, epoch: int, attempt: int = 1) -> Path:
        return self.path / self.within(trial_id, epoch, attempt)

    def checkpoint(self, trial_id: str, *epochs: int, attempt: int = 1) -> None:
        for epoch in epochs:
            folder = self.folder(trial_id, epoch, attempt)
            folder.mkdir(parents=True)
            (folder / "checkpoint.json").write_text("{}")

    def trial(self, trial_id: str, status: str, epochs: Epochs, attempt: int = 1, **values: Any) -> None:
        settings = of(**{"lr": 0.1 / (1 + len(self._entries)), **values})
        self._entries.append({"trial_id": trial_id, "settings": settings})
        self._add({"event": "trial_started", "trial_id": trial_id, "attempt": attempt, "settings": settings})
        for epoch, accuracy in epochs:
            self.checkpoint(trial_id, epoch, attempt=attempt)
            loss = math.nan if math.isnan(accuracy) else 1.0
            row: dict[str, Any] = {"lr": 0.1, "train_loss": loss, "train_accuracy": 0.5, "val_loss": loss}
            row |= {"val_accuracy": accuracy, "epoch_seconds": 1.0, "images_per_second": 9.0, "device": "cpu"}
            row |= {"objective": 0.0 if math.isnan(accuracy) else accuracy, "diverged": math.isnan(accuracy)}
            if status == STOPPED and epoch == epochs[-1][0]:
                row |= {"rung": 1.0, "cutoff": 0.99, "stop": True}
            folder = self.within(trial_id, epoch, attempt)
            self._add({"event": "epoch", "trial_id": trial_id, "epoch": epoch, "checkpoint": folder, **row})
        if status in (COMPLETED, STOPPED, "diverged"):
            self._add({"event": "trial_ended", "trial_id": trial_id})
        if status == FAILED:
            self._add({"event": "trial_failed", "trial_id": trial_id, "error": "RuntimeError: no"})
        trials = load_trials(self.path).set_index("trial_id")
        assert trials.loc[trial_id, "status"] == status

    def left(self, where: Path | None = None) -> dict[str, list[int]]:
        """The epochs whose checkpoints are there, by trial."""
        found: dict[str, list[int]] = {}
        for folder in sorted((where or self.path).glob("tune/attempt-*/*/checkpoint_*")):
            found.setdefault(folder.parent.name, []).append(int(folder.name.removeprefix("checkpoint_")) + 1)
        return found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


@pytest.fixture
def ended(run: Run) -> Run:
    """Three trials that ran to their end, and others that did not."""
    run.trial("good", COMPLETED, [(1, 0.2), (2, 0.6), (3, 0.5)])
    run.trial("poor", COMPLETED, [(1, 0.1), (2, 0.2), (3, 0.3)])
    run.trial("best", COMPLETED, [(1, 0.7), (2, 0.1), (3, 0.2)])
    run.trial("early", STOPPED, [(1, 0.9)])
    run.trial("later", STOPPED, [(1, 0.1), (2, 0.4)])
    run.trial("nan", "diverged", [(1, 0.3), (2, math.nan)])
    run.trial("error", FAILED, [(1, 0.8), (2, 0.1)])
    return run


BESTS = {"best": [1], "good": [2], "poor": [3], "early": [1], "error": [1], "later": [2], "nan": [1]}


@pytest.mark.parametrize("keep", range(1, 9))
def test_only_the_best_are_kept_and_completed_ones_before_others(keep, ended):
    Checkpoints(ended.path, ended.path, keep)
    assert ended.left() == dict(itertools.islice(BESTS.items(), keep))


def test_all_the_best_ones_may_be_kept(ended):
    Checkpoints(ended.path, ended.path, None)
    assert ended.left() == BESTS


def test_what_was_let_go_is_not_missed(ended):
    Checkpoints(ended.path, ended.path, 3)
    Checkpoints(ended.path, ended.path, 2)
    assert ended.left() == {"best": [1], "good": [2]}
    Checkpoints(ended.path, ended.path, 5)  # nothing comes back, and nothing more goes
    assert ended.left() == {"best": [1], "good": [2]}
    assert load_trials(ended.path).set_index("trial_id")["checkpoint"].dropna().to_dict() == {
        "best": str(ended.folder("best", 1)),
        "good": str(ended.folder("good", 2)),
    }


def test_unfinished_trials_keep_their_best_and_their_last_two(ended):
    ended.trial("cut", UNFINISHED, [(1, 0.05), (2, 0.02), (3, 0.01), (4, 0.03)], max_epochs=9)
    ended.trial("rising", UNFINISHED, [(1, 0.01), (2, 0.02), (3, 0.03)], max_epochs=9)
    ended.trial("begun", UNFINISHED, [(1, 0.02)])
    ended.trial("waiting", UNFINISHED, [])
    Checkpoints(ended.path, ended.path, 2)
    assert ended.left() == {"best": [1], "good": [2], "cut": [1, 3, 4], "rising": [2, 3], "begun": [1]}


def test_what_is_needed_is_kept_wherever_an_earlier_attempt_left_it(run):
    run.trial("a", COMPLETED, [(1, 0.3), (2, 0.2), (3, 0.1)], attempt=2)
    run.trial("b", UNFINISHED, [(1, 0.3), (2, 0.2)], attempt=12)
    Checkpoints(run.path, run.path, 1)
    assert run.folder("a", 1, attempt=2).is_dir()
    assert run.left() == {"a": [1], "b": [1, 2]}


def test_what_no_epoch_names_is_removed_at_the_start(ended):
    ended.trial("cut", UNFINISHED, [(1, 0.5)])
    ended.checkpoint("cut", 2, attempt=1)  # killed before the epoch was written down
    ended.checkpoint("cut", 3, attempt=2)
    ended.folder("cut", 7).mkdir(parents=True)  # killed while it was copied
    ended.checkpoint("unknown", 1)
    ended.checkpoint("best", 5)
    others = [ended.path / "tune/attempt-1/cut/events.out.tfevents", ended.path / "tune/attempt-1/tuner.pkl"]
    for other in others:
        other.touch()
    others.append(ended.path / "tune/attempt-1/cut/artifacts")
    others[-1].mkdir()
    Checkpoints(ended.path, ended.path, 1)
    assert ended.left() == {"best": [1], "cut": [1]}
    assert all(other.exists() for other in others)


@pytest.mark.parametrize("keep", [1, None])
def test_a_run_without_checkpoints_has_nothing_to_lose(keep, run):
    Checkpoints(run.path, run.path, keep)
    run.trial("a", FAILED, [])
    Checkpoints(run.path, run.path, keep).trial_ended("a", of(lr=0.1), FAILED, -1.0, None)
    assert run.left() == {}


def test_beaten_ones_are_removed_as_trials_end(run):
    budget = Checkpoints(run.path, run.path, 2)
    for trial_id in ("a", "b", "c", "d", "e"):
        run.checkpoint(trial_id, 1, 2, 3)
    budget.trial_ended("a", of(lr=0.1), STOPPED, 0.9, run.within("a", 2))
    assert run.left() == {"a": [2], "b": [1, 2, 3], "c": [1, 2, 3], "d": [1, 2, 3], "e": [1, 2, 3]}
    budget.trial_ended("b", of(lr=0.2), COMPLETED, 0.3, run.within("b", 3))
    assert run.left() == {"a": [2], "b": [3], "c": [1, 2, 3], "d": [1, 2, 3], "e": [1, 2, 3]}
    budget.trial_ended(
        "c", of(lr=0.3), COMPLETED, 0.2, run.within("c", 1)
    )  # beats a, which was more accurate, but stopped
    assert run.left() == {"b": [3], "c": [1], "d": [1, 2, 3], "e": [1, 2, 3]}
    budget.trial_ended("d", of(lr=0.4), STOPPED, 0.95, run.within("d", 1))
    assert run.left() == {"b": [3], "c": [1], "e": [1, 2, 3]}
    budget.trial_ended("e", of(lr=0.5), COMPLETED, 0.25, run.within("e", 2))
    assert run.left() == {"b": [3], "e": [2]}


def test_trials_that_ended_in_earlier_attempts_are_beaten_too(ended):
    budget = Checkpoints(ended.path, ended.path, 2)
    ended.checkpoint("new", 1, 2, attempt=2)
    budget.trial_ended("new", of(lr=0.6), COMPLETED, 0.65, ended.within("new", 2, attempt=2))
    assert ended.left() == {"best": [1], "new": [2]}
    ended.checkpoint("worse", 1, attempt=2)
    budget.trial_ended("worse", of(lr=0.7), COMPLETED, 0.1, ended.within("worse", 1, attempt=2))
    assert ended.left() == {"best": [1], "new": [2]}


def test_trials_that_run_are_never_touched(run):
    run.trial("going", UNFINISHED, [(1, 0.01), (2, 0.02)])
    budget = Checkpoints(run.path, run.path, 1)
    run.checkpoint("going", 3, attempt=2)
    run.checkpoint("a", 1, 2)
    run.checkpoint("a-2", 1, 2)  # the same settings, tried again
    budget.trial_ended("a", of(lr=0.1), COMPLETED, 0.9, run.within("a", 1))
    assert run.left() == {"a": [1], "a-2": [1, 2], "going": [1, 2, 3]}
    run.checkpoint("b", 1)
    budget.trial_ended("b", of(lr=0.2), COMPLETED, 0.95, run.within("b", 1))
    assert run.left() == {"a-2": [1, 2], "b": [1], "going": [1, 2, 3]}


def test_a_trial_that_ends_loses_what_earlier_attempts_left_of_it(run):
    run.trial("a", UNFINISHED, [(1, 0.4), (2, 0.3)])
    budget = Checkpoints(run.path, run.path, None)
    run.checkpoint("a", 3, attempt=2)
    budget.trial_ended("a", of(lr=0.1), COMPLETED, 0.4, run.within("a", 1))
    assert run.left() == {"a": [1]}
    assert run.folder("a", 1).is_dir()


def test_a_trial_that_failed_without_a_checkpoint_leaves_none(run):
    budget = Checkpoints(run.path, run.path, 2)
    run.checkpoint("a", 1)  # written, but its epoch never reported
    budget.trial_ended("a", of(lr=0.1), FAILED, -1.0, None)
    assert run.left() == {}


def test_the_seeds_of_a_configuration_stand_and_fall_together(run):
    """The luckiest seed of all belongs to the second configuration; with one more, the third is the best."""
    for trial_id, lr, seed, accuracy in (
        ("a0", 0.1, 0, 0.60), ("b0", 0.2, 0, 0.70), ("b1", 0.2, 1, 0.40), ("a1", 0.1, 1, 0.58), ("c0", 0.3, 0, 0.50),
    ):  # fmt: skip
        run.trial(trial_id, COMPLETED, [(1, accuracy)], lr=lr, seed=seed)
    Checkpoints(run.path, run.path, 4)
    assert run.left() == {"a0": [1], "a1": [1], "b0": [1], "b1": [1]}
    budget = Checkpoints(run.path, run.path, 3)
    assert run.left() == {"a0": [1], "a1": [1]}
    # What was let go stays so: its one lucky seed would be all that is left of it.
    run.checkpoint("c1", 1)
    budget.trial_ended("c1", of(lr=0.3, seed=1), COMPLETED, 0.9, run.within("c1", 1))
    run.trial("c2", UNFINISHED, [(1, 0.9)], lr=0.3, seed=2)
    budget = Checkpoints(run.path, run.path, 3)
    budget.trial_ended("c2", of(lr=0.3, seed=2), COMPLETED, 0.9, run.within("c2", 1))
    assert run.left() == {"a0": [1], "a1": [1]}


def test_of_more_seeds_than_may_be_kept_the_first_stay(run):
    budget = Checkpoints(run.path, run.path, 2)
    for seed, accuracy in enumerate((0.5, 0.6, 0.7, 0.9)):
        run.checkpoint(f"s{seed}", 1)
        budget.trial_ended(f"s{seed}", of(seed=seed), COMPLETED, accuracy, run.within(f"s{seed}", 1))
    assert run.left() == {"s0": [1], "s1": [1]}


def test_of_more_seeds_than_may_be_kept_those_that_stayed_stay_whatever_their_order_is(run):
    """The first of the manifest ended last, as it does when it lost its worker."""
    for seed in range(4):
        run.trial(f"s{seed}", COMPLETED, [(1, 0.5)], seed=seed)
    shutil.rmtree(run.folder("s0", 1))
    shutil.rmtree(run.folder("s1", 1))
    Checkpoints(run.path, run.path, 2)
    assert run.left() == {"s2": [1], "s3": [1]}
    run.checkpoint("s4", 1)
    Checkpoints(run.path, run.path, 2).trial_ended("s4", of(seed=4), COMPLETED, 0.9, run.within("s4", 1))
    assert run.left() == {"s2": [1], "s3": [1]}


def test_a_seed_whose_configuration_was_let_go_displaces_nobody(run):
    """It is still there: the driver was killed before it was removed, or its removal waits for the log."""
    for trial_id, lr, seed, accuracy in (
        ("a0", 0.1, 0, 0.1),
        ("a1", 0.1, 1, 0.9),
        ("b", 0.2, 0, 0.8),
        ("d", 0.3, 0, 0.7),
    ):
        run.trial(trial_id, COMPLETED, [(1, accuracy)], lr=lr, seed=seed)
    shutil.rmtree(run.folder("a0", 1))
    budget = Checkpoints(run.path, run.path, 2)
    run.checkpoint("a2", 1)
    budget.trial_ended("a2", of(lr=0.1, seed=2), COMPLETED, 0.9, run.within("a2", 1))
    assert run.left() == {"a1": [1], "b": [1], "d": [1]}
    Checkpoints(run.path, run.path, 3)
    assert run.left() == {"a1": [1], "b": [1], "d": [1]}


# ---- Storage elsewhere: the run directory is the copy of a run at a URI


def test_of_a_run_at_a_uri_the_checkpoints_there_are_let_go(ended, tmp_path):
    there = tmp_path / "bucket/run"
    shutil.copytree(ended.path, there)
    for file in ended.path.glob("tune/*/*/*/checkpoint.json"):
        file.unlink()  # of checkpoints the copy has only the folders
    budget = Checkpoints(ended.path, there.as_uri(), 3)
    assert ended.left(there) == {"best": [1], "good": [2], "poor": [3]}
    (there / ended.within("new", 1, attempt=2)).mkdir(parents=True)
    (there / ended.within("new", 2, attempt=2)).mkdir(parents=True)
    budget.trial_ended("new", of(lr=0.6), COMPLETED, 0.65, ended.within("new", 2, attempt=2))
    assert ended.left(there) == {"best": [1], "good": [2], "new": [2]}


def test_checkpoints_are_let_go_when_the_log_that_names_their_successors_is_there(ended):
    waiting, before = [], ended.left()
    budget = Checkpoints(ended.path, ended.path, 1, waiting.append)
    ended.checkpoint("new", 1, attempt=2)
    budget.trial_ended("new", of(lr=0.6), COMPLETED, 0.1, ended.within("new", 1, attempt=2))
    assert ended.left() == before | {"new": [1]}
    for act in waiting:
        act()
    assert ended.left() == {"best": [1]}


def test_of_a_run_at_a_uri_what_the_attempt_before_wrote_is_kept(ended, tmp_path):
    ended.trial("cut", UNFINISHED, [(1, 0.5), (2, 0.4)])
    there = tmp_path / "bucket/run"
    shutil.copytree(ended.path, there)
    shutil.rmtree(ended.path / "tune")  # Ray Tune writes to storage, not to the copy
    Checkpoints(ended.path, there.as_uri(), 1)
    assert ended.left(there) == {"best": [1], "cut": [1, 2]}
