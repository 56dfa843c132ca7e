"""Tables of a run that a study of the preset demo left (tests/runs/demo), against its log read line by line."""

import json
from pathlib import Path

import pandas as pd
import pytest

from analysis import (
    asha_savings,
    isolation,
    load_decisions,
    load_epochs,
    load_timeline,
    load_trials,
    pareto_front,
    replay_decisions,
    write_report,
)

RUN = Path(__file__).parent / "runs/demo"
EVENTS = [json.loads(line) for line in (RUN / "events.jsonl").read_text().splitlines()]
EPOCHS = [event for event in EVENTS if event["event"] == "epoch"]


def accuracy(trial_id: str, epoch: int) -> float:
    return next(e["val_accuracy"] for e in EPOCHS if (e["trial_id"], e["epoch"]) == (trial_id, epoch))


def test_trials_are_those_of_the_manifest_with_their_best_epochs() -> None:
    trials = load_trials(RUN)
    asked = json.loads((RUN / "manifest.json").read_text())["trials"]
    assert trials["trial_id"].to_list() == [entry["trial_id"] for entry in asked]
    for row, entry in zip(trials.itertuples(), asked, strict=True):
        own = [event for event in EPOCHS if event["trial_id"] == row.trial_id]
        assert row.epochs == len(own)
        assert row.val_accuracy == max(event["val_accuracy"] for event in own)
        assert row.train_seconds == pytest.approx(sum(event["epoch_seconds"] for event in own))
        assert row.status == ("stopped" if any(event.get("stop") for event in own) else "completed")
        assert (row.optimizer, row.lr) == (entry["settings"]["optimizer"], entry["settings"]["lr"])
    assert trials["checkpoint"].isna().all()  # they are not stored
    assert len(load_epochs(RUN)) == len(EPOCHS) == 28


def test_asha_decided_as_it_must_have() -> None:
    decisions = load_decisions(RUN)
    pd.testing.assert_frame_equal(replay_decisions(decisions, 4), decisions)
    savings = asha_savings(load_trials(RUN))
    assert savings["trials_trained"].to_list() == [8, 4]
    assert savings[["epochs_run", "epochs_without_stopping"]].drop_duplicates().to_numpy().tolist() == [[28, 40]]


def test_effects_are_those_at_the_rung_that_all_reached() -> None:
    trials = load_trials(RUN)
    found = isolation(trials, load_epochs(RUN)).set_index(["hyperparameter", "value"])
    assert set(found["epoch"]) == {2}
    by_optimizer = {
        name: [accuracy(trial_id, 2) for trial_id in trials[trials["optimizer"] == name]["trial_id"]]
        for name in ("adam", "muon")
    }
    half = (sum(by_optimizer["muon"]) - sum(by_optimizer["adam"])) / 4 / 2
    assert found.loc[("optimizer", "muon"), "effect"] == pytest.approx(half)
    assert found.loc[("optimizer", "adam"), "effect"] == pytest.approx(-half)


def test_two_slots_were_never_held_by_three() -> None:
    timeline = load_timeline(RUN)
    assert set(timeline["slot"]) == {0, 1}
    assert timeline["outcome"].to_list() == ["ended"] * 8
    for _, slot in timeline.groupby("slot"):
        ordered = slot.sort_values("start_seconds")
        assert (ordered["start_seconds"].iloc[1:].to_numpy() >= ordered["end_seconds"].iloc[:-1].to_numpy()).all()


def test_the_front_is_of_what_nothing_beats() -> None:
    points = pareto_front(load_trials(RUN))
    for point in points.itertuples():
        better = points[
            (points["train_seconds"] < point.train_seconds) & (points["val_accuracy"] >= point.val_accuracy)
            | (points["train_seconds"] <= point.train_seconds) & (points["val_accuracy"] > point.val_accuracy)
        ]  # fmt: skip
        assert point.on_front == better.empty


def test_its_report_needs_no_checkpoints(tmp_path: Path) -> None:
    html = write_report([RUN], tmp_path).read_text()
    assert '<p class="won">muon · no augmentation with lr 0.005</p>' in html
    assert "validation accuracy 69.7 % (64.2 to 74.6)" in html
    assert {file.stem for file in (tmp_path / "figures").iterdir()} == {
        "accuracy", "learning_rate", "isolation", "importance", "parallel", "curves", "pareto", "savings", "timeline",
    }  # fmt: skip
