import logging
import subprocess
import sys
from typing import Any

import optuna
import pandas as pd
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState

from analysis import RunError, export_optuna, to_optuna
from analysis.trials import PHASES, STATUSES

NAN = float("nan")
DEFAULTS = {
    "status": "completed",
    "stop_reason": None,
    "phase": "search",
    "seed": 0,
    "val_accuracy": 0.5,
    "train_seconds": 60.0,
    "error": None,
    "optimizer": "sgd",
    "lr": 0.1,
    "normalize": True,
    "width": 64,
}


def table(*rows: dict[str, Any]) -> pd.DataFrame:
    """Trials t0, t1, ... as load_trials gives them, each said by what is not as in DEFAULTS."""
    frame = pd.DataFrame([{"trial_id": f"t{i}"} | DEFAULTS | row for i, row in enumerate(rows)])
    texts = dict.fromkeys(["stop_reason", "error", "optimizer"], "str")
    kinds = {"status": pd.CategoricalDtype(STATUSES), "phase": pd.CategoricalDtype(PHASES), "val_accuracy": "float64"}
    numbers = {"seed": "Int64", "width": "Int64", "lr": "float64", "normalize": "boolean", "train_seconds": "float64"}
    return frame.astype(texts | kinds | numbers)


def curves(**accuracies: list[float]) -> pd.DataFrame:
    rows = [(name, i, value) for name, curve in accuracies.items() for i, value in enumerate(curve, 1)]
    return pd.DataFrame(rows, columns=["trial_id", "epoch", "val_accuracy"]).astype({"trial_id": "str"})


PENDING = {"status": "pending", "seed": None, "val_accuracy": NAN, "train_seconds": NAN} | dict.fromkeys(
    ["optimizer", "lr", "normalize", "width"]
)


def test_states_and_values_are_those_of_the_trials():
    rows = [
        ("completed", 0.7),
        ("stopped", 0.4),
        ("diverged", 0.3),
        ("failed", 0.2),
        ("running", 0.1),
        ("pending", NAN),
    ]
    study = to_optuna(table(*({"status": status, "val_accuracy": value} for status, value in rows)))
    assert study.direction == StudyDirection.MAXIMIZE
    assert [(trial.state, trial.value) for trial in study.trials] == [
        (TrialState.COMPLETE, 0.7),
        (TrialState.PRUNED, 0.4),
        (TrialState.FAIL, None),
        (TrialState.FAIL, None),
        (TrialState.RUNNING, None),
        (TrialState.WAITING, None),
    ]
    assert study.best_trial.user_attrs["trial_id"] == "t0"


@pytest.mark.parametrize(("status", "state"), [("completed", TrialState.FAIL), ("stopped", TrialState.PRUNED)])
def test_a_trial_that_ended_without_a_known_accuracy_has_no_value(status, state):
    (trial,) = to_optuna(table({"status": status, "val_accuracy": NAN})).trials
    assert (trial.state, trial.value) == (state, None)
    assert trial.user_attrs["status"] == status


def test_parameters_are_what_varies():
    rows = [{"optimizer": "adam", "lr": 0.01, "seed": 1}, {"normalize": False}, PENDING]
    study = to_optuna(table(*rows))
    assert [trial.params for trial in study.trials] == [
        {"optimizer": "adam", "lr": 0.01, "normalize": True, "seed": 1},
        {"optimizer": "sgd", "lr": 0.1, "normalize": False, "seed": 0},
        {},
    ]
    assert study.trials[0].distributions == {
        "optimizer": CategoricalDistribution(["adam", "sgd"]),
        "lr": CategoricalDistribution([0.01, 0.1]),
        "normalize": CategoricalDistribution([False, True]),
        "seed": CategoricalDistribution([0, 1]),
    }
    assert study.trials[2].distributions == {}
    assert study.trials[2].state == TrialState.WAITING


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("lr", [i / 100 for i in range(1, 13)], CategoricalDistribution([i / 100 for i in range(1, 13)])),
        ("lr", [i / 100 for i in range(1, 14)], FloatDistribution(0.01, 0.13)),
        ("lr", [10 ** (-i / 4) for i in range(13)], FloatDistribution(0.001, 1.0, log=True)),
        ("lr", [i / 100 for i in range(14)], FloatDistribution(0.0, 0.13)),  # 0 has no logarithm
        ("width", list(range(8, 21)), IntDistribution(8, 20)),
        ("width", [*range(1, 13), 100], IntDistribution(1, 100, log=True)),
        ("width", [*range(1, 13), 99], IntDistribution(1, 99)),
    ],
)
def test_numbers_with_more_than_twelve_values_are_of_a_range(name, values, expected):
    study = to_optuna(table(*({name: value} for value in values)))
    assert {str(trial.distributions) for trial in study.trials} == {str({name: expected})}
    assert [trial.params[name] for trial in study.trials] == values


def test_epochs_are_intermediate_values():
    epochs = curves(t0=[0.1, 0.2, 0.3], t2=[0.4, NAN])
    study = to_optuna(table({}, {}, {"status": "diverged"}), epochs)
    assert [trial.intermediate_values for trial in study.trials] == [{1: 0.1, 2: 0.2, 3: 0.3}, {}, {1: 0.4}]
    assert [trial.intermediate_values for trial in to_optuna(table({})).trials] == [{}]


def test_epochs_of_several_runs_are_told_apart():
    trials = pd.concat([table({}).assign(run=run) for run in ("x", "y")], ignore_index=True)
    epochs = pd.concat([curves(t0=[0.1]).assign(run="x"), curves(t0=[0.2, 0.3]).assign(run="y")])
    assert [trial.intermediate_values for trial in to_optuna(trials, epochs).trials] == [{1: 0.1}, {1: 0.2, 2: 0.3}]


def test_attributes_say_what_became_of_a_trial():
    stopped = {"status": "stopped", "stop_reason": "ASHA at epoch 1", "phase": "confirm", "train_seconds": 2.5}
    failed = {"status": "failed", "error": "RuntimeError: out of memory", "train_seconds": NAN}
    trials = table(stopped, failed).assign(test_accuracy=[0.75, NAN])
    assert [trial.user_attrs for trial in to_optuna(trials).trials] == [
        {"trial_id": "t0", "test_accuracy": 0.75, **stopped},
        {"trial_id": "t1", "phase": "search", "status": "failed", "error": "RuntimeError: out of memory"},
    ]


def test_optuna_says_nothing_and_is_as_talkative_afterwards_as_before():
    told: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("optuna")
    handler.emit = lambda record: told.append(record.getMessage())
    before = optuna.logging.get_verbosity()
    logger.addHandler(handler)
    try:
        optuna.logging.set_verbosity(optuna.logging.INFO)
        to_optuna(table({}, {"lr": 0.2}))
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
        assert told == []
        optuna.create_study()
        assert len(told) == 1  # it would have been heard
    finally:
        optuna.logging.set_verbosity(before)
        logger.removeHandler(handler)


# --- export_optuna ---


def test_a_journal_is_read_back_by_optuna(tmp_path):
    rows = [
        {"lr": 0.01},
        {"val_accuracy": 0.25, "status": "stopped"},
        {"status": "failed", "normalize": False},
        PENDING,
    ]
    trials, epochs = table(*rows), curves(t0=[0.25, 0.5], t1=[0.25])
    export_optuna(trials, epochs, tmp_path / "study.journal", "mine")
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "study.journal")))
    study = optuna.load_study(study_name="mine", storage=storage)
    assert study.direction == StudyDirection.MAXIMIZE
    assert [trial.user_attrs["trial_id"] for trial in study.trials] == ["t0", "t1", "t2", "t3"]
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "FAIL", "WAITING"]
    assert [trial.value for trial in study.trials] == [0.5, 0.25, None, None]
    assert [trial.params for trial in study.trials] == [
        {"lr": 0.01, "normalize": True},
        {"lr": 0.1, "normalize": True},
        {"lr": 0.1, "normalize": False},
        {},
    ]
    assert [trial.intermediate_values for trial in study.trials] == [{1: 0.25, 2: 0.5}, {1: 0.25}, {}, {}]
    assert study.trials[0].distributions == to_optuna(trials).trials[0].distributions


def test_a_file_that_is_there_is_not_added_to(tmp_path):
    file = tmp_path / "study.journal"
    file.write_text("precious")
    with pytest.raises(RunError, match=r"study\.journal: exists already, and a journal is only added to; .+$"):
        export_optuna(table({}), curves(), file, "mine")
    assert file.read_text() == "precious"


def test_a_journal_that_could_not_be_written_to_its_end_is_removed(tmp_path):
    broken = table({}).assign(status="a status that nobody knows")
    with pytest.raises(KeyError):
        export_optuna(broken, curves(), tmp_path / "study.journal", "mine")
    assert list(tmp_path.iterdir()) == []
    export_optuna(table({}), curves(), tmp_path / "study.journal", "mine")


def test_who_imports_the_package_does_not_wait_for_optuna():
    code = "import sys, analysis; sys.exit('optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("place", "reason"), [("nowhere/a.journal", "No such file or directory"), ("file/a.journal", "Not a directory")]
)
def test_a_place_that_cannot_be_written_to_is_told_in_a_sentence(tmp_path, place, reason):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=rf"{place}: cannot be written \({reason}\)$") as error:
        export_optuna(table({}), curves(), tmp_path / place, "mine")
    assert "\n" not in str(error.value)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["file"]
