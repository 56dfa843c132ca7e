"""Tables as files, and what the commands that write them do with options and runs they cannot use."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from test_compare import table
from test_predictions import make_run

from analysis.__main__ import TABLES, main
from analysis.tables import as_text, write_table
from explain.__main__ import main as explain
from trainables import TrialSettings

NAN = float("nan")


def as_json(table: pd.DataFrame, file: Path) -> list[dict[str, Any]]:
    write_table(table, "json", file)
    records: list[dict[str, Any]] = json.loads(file.read_text())
    return records


def test_json_gives_numbers_back_to_their_last_digit(tmp_path: Path) -> None:
    numbers = [1.23456789012345e-8, 0.1 + 0.2, 1 / 3, 1e-300, 1e22, -0.0, 5e-324]
    assert [row["x"] for row in as_json(pd.DataFrame({"x": numbers}), tmp_path / "t.json")] == numbers


def test_json_has_plain_values_and_null_for_what_is_missing(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {
            "text": pd.Series(["a", None], dtype="str"),
            "kind": pd.Categorical(["é", None]),
            "count": pd.array([2, None], dtype="Int64"),
            "switch": pd.array([True, None], dtype="boolean"),
            "share": [0.5, NAN],
            "loss": [np.inf, -np.inf],
            "whole": np.array([1, 2], dtype=np.int32),
            "right": [True, False],
            "mixed": pd.Series([np.float32(0.5), np.bool_(True)], dtype="object"),
            "ids": [("a", "b"), ()],
        }
    )
    assert as_json(table, tmp_path / "t.json") == [
        {"text": "a", "kind": "é", "count": 2, "switch": True, "share": 0.5, "loss": None, "whole": 1, "right": True,
         "mixed": 0.5, "ids": ["a", "b"]},
        {"text": None, "kind": None, "count": None, "switch": None, "share": None, "loss": None, "whole": 2,
         "right": False, "mixed": True, "ids": []},
    ]  # fmt: skip
    assert len((tmp_path / "t.json").read_text().splitlines()) == 4  # a record a line


def test_json_without_rows_is_an_empty_list(tmp_path: Path) -> None:
    assert as_json(pd.DataFrame({"x": []}), tmp_path / "t.json") == []


def test_text_has_seconds_in_whole_ones_and_shares_with_four_digits() -> None:
    values = pd.DataFrame({"x": [14_400.25, 1e12, 123.456, 0.71234, 2e-5]})
    assert as_text(values).split() == ["x", "14400", "1e+12", "123.5", "0.7123", "2e-05"]


# --- commands ---


def unfinished(run: Path, **settings: Any) -> Path:
    """Write a run of one trial that no epoch was run of, and of two more of which nothing is known."""
    run.mkdir()
    asked = {"dataset": "cifar100", "data_dir": None, "train_size": None, "val_fraction": 0.1, "seed": 0}
    asked |= {"search": "optuna", "num_trials": 3, "max_epochs": 1} | settings
    data = {"class_names": ["car", "cat"], "num_val_images": 9, "fingerprint": "f"}
    (run / "study.yaml").write_text(yaml.safe_dump({"name": "x", "settings": asked, "data": data}))
    trial = {"trial_id": "a", "settings": TrialSettings(max_epochs=1).model_dump()}
    (run / "manifest.json").write_text(json.dumps({"trials": [trial]}))
    (run / "events.jsonl").write_text("")
    return run


@pytest.mark.parametrize("name", sorted(set(TABLES) - {"recipes"}))
def test_of_a_run_with_nothing_finished_every_table_can_be_had(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = str(unfinished(tmp_path / "run")), tmp_path / "t.json"
    assert main([name, run]) == 0
    assert capsys.readouterr().out.strip()
    assert main([name, run, "--format", "json", "--output", str(file)]) == 0
    assert len(json.loads(file.read_text())) == {
        "trials": 3,
        "commands": 1,
        "claims": len(TABLES["claims"][0](run)),
    }.get(name, 0)


def test_recipes_of_a_run_with_nothing_finished_are_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = unfinished(tmp_path / "run")
    assert main(["recipes", str(run)]) == 2
    assert capsys.readouterr().err == f"error: {run}: no trial has a finished epoch yet\n"


def test_a_query_that_nothing_meets_tells_the_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trials", str(unfinished(tmp_path / "run")), "--query", "val_accuracy > 2"]) == 0
    assert capsys.readouterr().out.startswith("no rows; columns: trial_id, status, ")


def test_where_no_network_speaks_for_its_configuration_one_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its fresh seeds all diverged, so it was chosen by luck: the network of the search is not taken unasked."""
    fresh = [
        {"seed": s, "phase": "confirm", "status": "diverged", "val_accuracy": NAN, "checkpoint": None} for s in (5, 6)
    ]
    monkeypatch.setattr("explain.__main__.load_trials", lambda run: table({"seed": 0}, *fresh))
    assert explain([str(tmp_path), "--images", "cat.png"]) == 2
    told = f"error: {tmp_path}: no configuration has a network that speaks for it; with --trial one of t0\n"
    assert capsys.readouterr().err == told


def test_a_column_asked_for_twice_is_there_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(unfinished(tmp_path / "run"))
    for fmt in ("table", "csv", "json"):
        assert main(["trials", run, "--columns", "status,trial_id, status", "--format", fmt]) == 0
    assert "status,trial_id\npending,a\n" in capsys.readouterr().out


def test_a_format_asked_for_goes_before_the_ending_of_the_file(tmp_path: Path) -> None:
    run, file = str(unfinished(tmp_path / "run")), tmp_path / "t.json"
    assert main(["trials", run, "--columns", "status", "--format", "csv", "--output", str(file)]) == 0
    assert file.read_text().split() == ["status", "pending", "pending", "pending"]


@pytest.mark.parametrize("name", ["predictions", "measures", "trials"])
def test_where_no_trial_is_explained_it_is_said_how(
    name: str, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, ignore=shutil.ignore_patterns("explanations"))
    asked = [name, str(run), "--columns", "trial_id"]
    assert main(asked) == 0
    assert (f"python -m analysis explain {run}\n" in capsys.readouterr().err) == (name != "trials")
    shutil.rmtree(run / "tune")
    assert main(asked) == 0
    assert ("nor a network to explain is kept here" in capsys.readouterr().err) == (name != "trials")


def test_a_file_is_no_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").touch()
    assert main(["trials", str(tmp_path / "notes.txt")]) == 2
    assert "notes.txt: is no run directory, but a file" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--columns=", "--columns=status,,lr", "--query=", "--sort=", "--sort=-"])
def test_empty_options_are_refused_in_a_sentence(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trials", str(unfinished(tmp_path / "run")), option]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option.split('=')[0]} '': ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["predictions", "classes", "confused", "calibration"])
def test_networks_of_different_data_are_not_taken_together(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = make_run(tmp_path / "one", "a"), make_run(tmp_path / "other", "a")
    assert main([name, str(one), str(other)]) == 0
    study = yaml.safe_load((other / "study.yaml").read_text())
    (other / "study.yaml").write_text(yaml.safe_dump(study | {"data": study["data"] | {"fingerprint": "another"}}))
    capsys.readouterr()
    assert main([name, str(one), str(other)]) == 2
    assert "were trained on different images" in capsys.readouterr().err
