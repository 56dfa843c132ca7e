"""Reports and explanations over a small finished study."""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from analysis import RunError, compare_recipes, load_trials, read_study, top_trials, write_report
from analysis.__main__ import main
from analysis.explanations import Explanation, explain_trials, load_measures, load_test_data
from analysis.report import _headline
from analysis.tables import interval, percent
from analysis.trials import command_of
from explain import explain
from study import load_settings, run_study
from study.space import list_trials
from trainables import (
    CheckpointError,
    DataError,
    ImageData,
    TrialSettings,
    evaluate,
    load_data,
    load_model,
    save_checkpoint,
    split_validation,
    to_input,
    to_tensors,
    train,
)

EVIL = "<script>alert(1)</script>"


def explain_trial(run: Path, trial: pd.Series, data: ImageData, device: str) -> Explanation:
    return explain_trials(run, trial.to_frame().T, data, device)[0]


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    return copy


def test_explanation_is_what_the_network_says(run: Path) -> None:
    data = load_test_data(run)
    row = top_trials(load_trials(run), 1).iloc[0]
    found = explain_trial(run, row, data, "cpu")
    model, about = load_model(row["checkpoint"], "cpu")
    images, labels = to_tensors(data, torch.device("cpu"))
    assert found.accuracy == evaluate(model, images, labels, about["settings"].precision)[1]
    assert found.indices.tolist() == list(range(len(data)))  # fewer images than NUM_MAPS: all of them
    maps = explain(model, to_input(images), dtype=torch.float32)
    np.testing.assert_allclose(found.saliency, maps.saliency.numpy(), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(found.cam, maps.cam.numpy(), rtol=1e-5, atol=1e-7)


def test_explanation_is_computed_once_and_again_when_something_changed(run: Path) -> None:
    data = load_test_data(run)
    row = top_trials(load_trials(run), 1).iloc[0]
    first = explain_trial(run, row, data, "cpu")
    file = run / "explanations" / row["trial_id"] / "arrays.npz"
    written = file.stat().st_mtime_ns
    second = explain_trial(run, row, data, "cpu")
    assert file.stat().st_mtime_ns == written
    np.testing.assert_array_equal(first.saliency, second.saliency)
    about = json.loads(file.with_name("about.json").read_text())
    file.with_name("about.json").write_text(json.dumps({**about, "epoch": 99}))
    explain_trial(run, row, data, "cpu")
    assert file.stat().st_mtime_ns > written
    file.write_bytes(b"half a file")
    np.testing.assert_array_equal(explain_trial(run, row, data, "cpu").saliency, first.saliency)


def test_measures_of_a_run_are_columns_of_its_trials(run: Path) -> None:
    before = load_trials(run)
    assert "test_accuracy" not in before
    assert load_measures(run).empty
    row = top_trials(before, 1).iloc[0]
    found = explain_trial(run, row, load_test_data(run), "cpu")
    trials = load_trials(run)
    assert trials[list(before)].equals(before)
    explained = trials.set_index("trial_id").loc[row["trial_id"]]
    others = trials[trials["trial_id"] != row["trial_id"]]
    assert explained["test_accuracy"] == found.accuracy
    assert others[["test_accuracy", "saliency_gini", "gradcam_total_variation_high"]].isna().all(axis=None)
    table = load_measures(run)
    assert set(table["trial_id"]) == {row["trial_id"]}
    for name in ("saliency", "gradcam"):
        values = table[(table["map"] == name) & (table["measure"] == "gini")]["value"].to_numpy(dtype=np.float64)
        assert explained[f"{name}_gini"] == pytest.approx(np.nanmean(values))
        assert explained[f"{name}_gini_low"] < explained[f"{name}_gini"] < explained[f"{name}_gini_high"]
        assert 0 <= explained[f"{name}_grid_pointing"] <= 1
    # Of another checkpoint than the best epoch's, they are not the trial's any more.
    file = run / "explanations" / row["trial_id"] / "summary.json"
    summary = json.loads(file.read_text())
    file.write_text(json.dumps({**summary, "checkpoint": "tune/attempt-1/other/checkpoint_000001"}))
    assert "test_accuracy" not in load_trials(run)
    assert load_measures(run).empty
    # Nor what an older version of the measures left.
    file.write_text(json.dumps({**summary, "format": summary["format"] - 1}))
    assert "test_accuracy" not in load_trials(run)
    assert load_measures(run).empty
    file.write_text(json.dumps(summary))
    assert "test_accuracy" in load_trials(run)


@pytest.mark.usefixtures("ray_session")
def test_a_cluster_explains_as_this_process_does(run: Path, finished_run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(finished_run, elsewhere)
    data, told = load_test_data(run), []
    here = explain_trials(run, top_trials(load_trials(run), 2), data, "cpu")
    there = explain_trials(
        elsewhere, top_trials(load_trials(elsewhere), 2), data, "cpu", address="auto", tell=told.append
    )
    assert [text.split(", ")[1] for text in told] == ["1 of 2", "2 of 2"]  # in whichever order they are ready
    assert {text.split(",")[0] for text in told} == {f"explained {e.trial_id}" for e in here}
    for a, b in zip(here, there, strict=True):
        assert a.trial_id == b.trial_id
        np.testing.assert_allclose(a.logits, b.logits, rtol=0, atol=1e-5)
        np.testing.assert_allclose(a.saliency, b.saliency, rtol=0, atol=1e-5)
        assert a.measures[["map", "measure", "image"]].equals(b.measures[["map", "measure", "image"]])
    assert [p.name for p in sorted((elsewhere / "explanations").iterdir())] == sorted(e.trial_id for e in here)
    broken = Path(load_trials(elsewhere).set_index("trial_id").loc[here[0].trial_id, "checkpoint"])
    (broken / "weights.pt").write_bytes(b"half")
    shutil.rmtree(elsewhere / "explanations")
    with pytest.raises(CheckpointError, match=r"weights\.pt"):
        explain_trials(elsewhere, top_trials(load_trials(elsewhere), 2), data, "cpu", address="auto")


def test_a_strangers_summary_names_measures_only(run: Path) -> None:
    row = top_trials(load_trials(run), 1).iloc[0]
    explain_trial(run, row, load_test_data(run), "cpu")
    file = run / "explanations" / row["trial_id"] / "summary.json"
    kept = json.loads(file.read_text())
    file.write_text(
        json.dumps({**kept, "val_accuracy": {"mean": 0.99}, "saliency_gini": "high", "gradcam_x": {"mean": [1]}})
    )
    trials = load_trials(run).set_index("trial_id")
    assert trials.loc[row["trial_id"], "val_accuracy"] == row["val_accuracy"]
    assert not {"saliency_gini", "gradcam_x"} & set(trials)
    assert trials.loc[row["trial_id"], "gradcam_gini"] == kept["gradcam_gini"]["mean"]
    file.write_text("[1, 2]")
    assert "test_accuracy" not in load_trials(run)


def test_first_screen_answers(run: Path) -> None:
    html = write_report([run], top=2, device="cpu").read_text()
    best = top_trials(load_trials(run), 1).iloc[0]
    recipe = "no augmentation" if best["augmentation"] == "none" else best["augmentation"]
    assert f'<p class="won">{recipe} with lr 0.05</p>' in html
    # ASHA's reason stands in percent, as the columns beside it.
    assert re.search(r"epoch 1: [\d.]+ % &lt; [\d.]+ %", html)
    screen = html.split("</header>")[0]
    for text in ("test accuracy", "validation accuracy", "One seed.", "2 completed", "96 training and 32 validation"):
        assert text in screen
    assert percent(best["val_accuracy"]) in screen


def test_the_report_tells_how_to_train_the_winner_again(run: Path) -> None:
    markdown = write_report([run], top=0).with_suffix(".md").read_text()
    trials = load_trials(run)
    best = trials[trials["status"] == "completed"].sort_values("val_accuracy").iloc[-1]
    assert f"    {command_of(best, read_study(run), 'winner')}" in markdown.splitlines()


@pytest.mark.parametrize("preset", ["demo", "setups"])
def test_every_trial_has_a_command_that_trains_it_again(run: Path, preset: str) -> None:
    study = read_study(run)
    for _, row in load_trials(run).iterrows():
        words = shlex.split(command_of(row, study, "again"))
        assert words[: words.index("--name") + 2] == ["python", "-m", "study", "run", "--name", "again"]
        again = load_settings(preset, [word for word in words if "=" in word])
        assert [trial.key() for trial in list_trials(again)] == [row["trial_id"]]
        for name in ("dataset", "train_size", "val_fraction", "seed", "max_epochs", "device", "cpus_per_trial"):
            assert getattr(again, name) == study["settings"][name], name
        assert again.early_stopping == "none"
        assert words[words.index("--data-dir") + 1] == study["settings"]["data_dir"]


def test_test_images_are_left_alone_at_top_0(run: Path) -> None:
    study = yaml.safe_load((run / "study.yaml").read_text())
    study["settings"]["data_dir"] = "/nonexistent"
    (run / "study.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(DataError, match="/nonexistent: no such directory; give the data set's folder with --data-dir"):
        write_report([run])
    html = write_report([run], top=0).read_text()
    assert "What the networks look at" not in html
    assert not (run / "explanations").exists()


def name_with_markup(run: Path, pictures: Path, hostile: Path) -> None:
    """Let a copied run's name, and one of its classes, hold markup; its pictures are copied to ``hostile``."""
    shutil.copytree(pictures, hostile)
    (hostile / "red").rename(hostile / "<img src=x onerror=alert(1)>")
    study = yaml.safe_load((run / "study.yaml").read_text())
    study["name"] = EVIL
    study["settings"]["data_dir"] = str(hostile)
    study["data"]["fingerprint"] = load_data("folder", "train", hostile, seed=1).fingerprint()
    study["data"]["class_names"] = sorted(folder.name for folder in hostile.iterdir())
    (run / "study.yaml").write_text(yaml.safe_dump(study))


def test_names_from_outside_are_text(run: Path, pictures: Path, tmp_path: Path) -> None:
    """Class names, run names and errors with markup in them show as they are."""
    name_with_markup(run, pictures, tmp_path / "pictures")
    (failed, epochs), *_ = load_trials(run).query("status == 'completed'")[["trial_id", "epochs"]].to_numpy()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    events = [e for e in events if (e.get("trial_id"), e.get("epoch")) != (failed, epochs)]  # it never came so far
    events.append({"event": "trial_failed", "trial_id": failed, "error": f"| {EVIL}"})
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    html_file = write_report([run], device="cpu")
    html = html_file.read_text()
    assert html.count("<script") == 1  # the report's own
    assert "onerror" not in html.replace("&lt;img src=x onerror=alert(1)&gt;", "")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    markdown = html_file.with_suffix(".md").read_text()
    assert "<script" not in markdown
    assert "\\| &lt;script&gt;" in markdown


def test_two_runs_are_compared(run: Path, finished_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"  # what is explained would stay in the run that other tests share
    shutil.copytree(finished_run, other)
    html = write_report([run, other], tmp_path / "both", top=1, device="cpu").read_text()
    assert "8 trials" in html
    assert f"{run.name}/" in html
    assert f"{other.name}/" in html


def test_runs_over_other_images_are_refused(run: Path, finished_run: Path) -> None:
    study = yaml.safe_load((run / "study.yaml").read_text())
    study["data"]["fingerprint"] = "0" * 16
    (run / "study.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(RunError, match="were trained on different images"):
        write_report([run, finished_run])


def test_the_same_run_twice_is_refused(run: Path) -> None:
    with pytest.raises(RunError, match="given twice"):
        write_report([run, run])


def test_pictures_that_changed_are_not_tested(run: Path, pictures: Path, tmp_path: Path) -> None:
    """One picture less, and an undivided folder's seeded split would put training images into the test."""
    shutil.copytree(pictures, tmp_path / "pictures")
    next((tmp_path / "pictures" / "red").iterdir()).unlink()
    with pytest.raises(RunError, match="the pictures have changed since the study"):
        write_report([run], data_dir=tmp_path / "pictures")


def test_a_run_without_results_says_so(run: Path) -> None:
    (run / "events.jsonl").write_text("")
    with pytest.raises(RunError, match="no trial has a finished epoch to report on"):
        write_report([run])


def test_runs_of_different_length_get_no_verdict_and_the_winner_its_own_settings(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", ["a", "b"], 20)
    short = trained_without_ray(tmp_path / "short", data)
    longer = trained_without_ray(tmp_path / "longer", data, epochs=3, lr=0.01)
    for run, accuracy in ((short, 0.25), (longer, 0.75)):
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        changed = [event | {"val_accuracy": accuracy} if event["event"] == "epoch" else event for event in events]
        (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in changed))
    html = write_report([short, longer], tmp_path / "both", top=0).read_text()
    assert "no verdict, for they were trained for 3 and 1 epochs" in html
    command = next(line for line in html.splitlines() if "--name winner" in line)
    assert "max_epochs=3" in command
    assert "fixed.lr=0.01" in command
    assert f"study confirm {longer}" in html
    assert "short: Every trial was to be trained for 1 epochs" in html
    assert "longer: Every trial was to be trained for 3 epochs" in html


def made_up(rows: list[tuple[str, int, float, str]]) -> pd.DataFrame:
    """Trials by optimizer, seed, validation accuracy and phase; what is at most 0.5 was stopped."""
    return pd.DataFrame(
        {"run": "r", "trial_id": f"{name}{seed}", "optimizer": name, "seed": seed, "val_accuracy": accuracy,
         "status": "completed" if accuracy > 0.5 else "stopped", "phase": phase, "setup": "plain", "epochs": 3,
         "max_epochs": 3, "train_accuracy": 0.9, "generalization_gap": 0.1, "train_seconds": 1.0, "checkpoint": "c"}
        for name, seed, accuracy, phase in rows
    )  # fmt: skip


def test_the_winner_is_explained_first_whoever_has_the_best_trials() -> None:
    """Of adam one seed was stopped, so sgd, all of whose seeds were trained to the end, is the best recipe."""
    accuracies = {"adam": (0.9, 0.9, 0.1), "sgd": (0.8, 0.8, 0.8)}
    trials = made_up(
        [(name, seed, v, "search") for name, values in accuracies.items() for seed, v in enumerate(values)]
    )
    assert compare_recipes(trials, 100)["recipe"].to_list() == ["sgd", "adam"]
    assert top_trials(trials, 2)["optimizer"].to_list() == ["sgd", "sgd", "sgd", "adam", "adam"]
    assert set(top_trials(trials, 1)["optimizer"]) == {"sgd"}
    assert top_trials(trials, 0).empty


@pytest.mark.parametrize(
    ("rows", "by", "sure"),
    [
        (
            [("adam", 0, 0.75, "search"), ("sgd", 0, 0.875, "search"), ("adam", 5, 0.625, "confirm"),
             ("adam", 6, 0.625, "confirm")],
            "The next recipe, sgd, shows 25.0 points more, but was not confirmed; no verdict, for one of them has a "
            "single seed.",
            "Mean of 2 fresh seeds; the 95 % interval is over seeds.",
        ),
        (
            [("adam", 0, 0.875, "search"), ("adam", 1, 0.25, "search"), ("sgd", 0, 0.625, "search")],
            "The next recipe, adam, shows 25.0 points more over 1 of its 2 seeds, but was not trained to the end with "
            "all its seeds; no verdict, for not all of their trials were trained to the end.",
            "One seed. ",
        ),
        (
            [("adam", 0, 0.625, "search"), ("sgd", 0, 0.5625, "search"), ("muon", 0, 0.875, "search"),
             ("muon", 1, 0.25, "search")],
            "6.2 points of validation accuracy ahead of the next recipe, sgd. Further behind, muon shows 25.0 points "
            "more over 1 of its 2 seeds, but was not trained to the end with all its seeds.",
            "One seed. ",
        ),
        (
            [("adam", 0, 0.75, "search"), ("adam", 1, 0.875, "search"), ("adam", 2, 0.25, "search")],
            "There is no other recipe to compare with.",
            "Mean of 2 of 3 seeds; the 95 % interval is over seeds. No recipe was trained to the end with all its "
            "seeds: these figures are of those that were, which may flatter it.",
        ),
        (
            [("adam", 0, 0.5, "search"), ("adam", 1, 0.25, "search")],
            "There is no other recipe to compare with.",
            "Mean of 2 seeds; the 95 % interval is over seeds. No recipe was trained to the end with all its seeds: "
            "these figures are of unfinished trainings.",
        ),
    ],
)  # fmt: skip
def test_the_headline_says_what_the_lead_rests_on(rows: list[tuple[str, int, float, str]], by: str, sure: str) -> None:
    trials = made_up(rows)
    headline = _headline(compare_recipes(trials, 100), [], trials, 100, "r")
    assert headline["by"] == by
    assert headline["sure"].startswith(sure)


def test_a_report_says_how_many_trials_were_tested_whoever_did_it(run: Path) -> None:
    explain_trials(run, top_trials(load_trials(run), 2), load_test_data(run), "cpu")
    html = write_report([run], top=0).read_text()
    assert "was measured for 2 of 4 trials" in html
    assert "were read for 2 of 4 trials, by the report or by python -m analysis explain" in html
    assert "are not kept here" not in html


def test_a_report_says_which_networks_are_gone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a run that was published without its weights."""
    explain_trials(run, top_trials(load_trials(run), 2), load_test_data(run), "cpu")
    assert main(["report", str(run), "--top", "0"]) == 0
    assert f"python -m explain {run} --images" in capsys.readouterr().out
    shutil.rmtree(run / "tune")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next: open {run / 'report/report.html'}"
    html = (run / "report/report.html").read_text()
    assert "The networks of 2 of these trials are not kept here: of them no maps are shown." in html


def test_a_report_stays_inside_its_directory(run: Path, tmp_path: Path) -> None:
    """Whoever made the run may have put links there."""
    (tmp_path / "victim.html").write_text("mine")
    (run / "report").mkdir(exist_ok=True)
    (run / "report/report.html").unlink(missing_ok=True)
    (run / "report/report.html").symlink_to(tmp_path / "victim.html")
    assert "<h1>" in write_report([run], top=0).read_text()
    assert (tmp_path / "victim.html").read_text() == "mine"
    shutil.rmtree(run / "report/figures")
    (tmp_path / "victims").mkdir()
    (run / "report/figures").symlink_to(tmp_path / "victims")
    with pytest.raises(RunError, match=r"report/figures: leads out of"):
        write_report([run], top=0)
    shutil.rmtree(run / "report")
    (run / "report").symlink_to(tmp_path / "victims")
    with pytest.raises(RunError, match=r"report/figures: leads out of"):
        write_report([run], top=0)
    assert not (run / "explanations").exists()
    (run / "explanations").symlink_to(tmp_path / "victims")
    with pytest.raises(RunError, match=r"explanations/\w+: leads out of"):
        write_report([run], tmp_path / "elsewhere", top=1)
    assert not list((tmp_path / "victims").iterdir())


def test_links_in_markdown_are_text(run: Path) -> None:
    study = yaml.safe_load((run / "study.yaml").read_text())
    study["name"] = "~~x~~ https://evil.example @user www.evil.example"
    (run / "study.yaml").write_text(yaml.safe_dump(study))
    markdown = write_report([run], top=0).with_suffix(".md").read_text()
    assert markdown.startswith("# \\~\\~x\\~\\~ https&#58;//evil.example &#64;user www&#46;evil.example: which")


def test_a_run_in_progress_is_reported_as_it_stands(run: Path) -> None:
    trials = load_trials(run)
    last = trials[trials["status"] == "stopped"]["trial_id"].iloc[-1]
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(line for line in lines if last not in line))
    html = write_report([run], device="cpu").read_text()
    assert "1 pending" in html.split("</header>")[0]
    assert re.search(rf"{last}.*?pending", html, flags=re.DOTALL)


@pytest.mark.usefixtures("ray_session")
def test_seeds_are_averaged(tiny: tuple[str, ...], tmp_path: Path) -> None:
    overrides = [*tiny, "space.seed=[0,1,2]", "space.lr=[0.05]", "space.augmentation=[none]", "early_stopping=none"]
    run = tmp_path / "seeds"
    assert run_study(load_settings("demo", [*overrides, "max_epochs=2"]), run, show=False)
    html = write_report([run], top=3, device="cpu").read_text()
    assert "Mean of 3 seeds; the 95 % interval is over seeds." in html
    mean = load_trials(run)["val_accuracy"].mean()
    assert percent(mean) in html


def test_figures_are_of_good_size(run: Path) -> None:
    report = write_report([run], device="cpu").parent
    files = list((report / "figures").glob("*.png"))
    assert {"accuracy", "curves", "panel"} <= {file.stem for file in files}
    for file in files:
        with Image.open(file) as figure:
            assert figure.width >= 400
            assert figure.height >= 200
            assert np.asarray(figure.convert("L")).std() > 5  # not blank


def trained_without_ray(run: Path, data_dir: Path, epochs: int = 1, lr: float = 0.1) -> Path:
    """A run of one trial, written by hand: for data sets that a study would take long over."""
    train_data, val_data = split_validation(load_data("folder", "train", data_dir), 0.34, seed=0)
    words = ("dataset=folder", f"data_dir={data_dir}", "train_size=null", f"max_epochs={epochs}")
    settings = load_settings("demo", (*words, "grace_period=1", "early_stopping=none"))
    data = {"dataset": "folder", "fingerprint": load_data("folder", "train", data_dir).fingerprint()}
    data |= {"num_train_images": len(train_data), "num_val_images": len(val_data)}
    data |= {
        "class_names": list(train_data.class_names),
        "superclass_names": [],
        "superclasses": [],
        "has_masks": False,
    }
    machine = {"processor": "none", "cores": 2, "gpus": [], "system": "none"}
    study = {"name": run.name, "created": "now", "command": "by hand", "versions": {}, "machine": machine, "data": data}
    run.mkdir()
    (run / "study.yaml").write_text(yaml.safe_dump({**study, "settings": settings.model_dump(mode="json")}))
    trial = TrialSettings(width=4, max_epochs=epochs, batch_size=64, lr=lr)
    values = trial.model_dump(mode="json")
    events: list[dict[str, Any]] = [{"time": 0.0, "event": "attempt_started", "attempt": 1}]
    events.append({"time": 1.0, "event": "trial_started", "attempt": 1, "trial_id": "t0", "settings": values})
    for metrics, state in train(trial, train_data, val_data):
        folder = f"tune/attempt-1/t0/checkpoint_{metrics.epoch - 1:06}"
        save_checkpoint(run / folder, state)
        epoch = {**dataclasses.asdict(metrics), "objective": metrics.val_accuracy, "checkpoint": folder}
        events.append({"time": 2.0, "event": "epoch", "trial_id": "t0", "device": "cpu", "host": "h", **epoch})
    (run / "manifest.json").write_text(json.dumps({"trials": [{"trial_id": "t0", "settings": values}]}))
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


def folder_of(directory: Path, names: list[str], each: int) -> Path:
    rng = np.random.default_rng(0)
    for name in names:
        (directory / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(directory / name / f"{i}.png")
    return directory


def test_a_run_of_one_trial_has_a_report(tmp_path: Path) -> None:
    run = trained_without_ray(tmp_path / "one", folder_of(tmp_path / "data", ["a", "b"], 10))
    report = write_report([run], device="cpu")
    html = report.read_text()
    assert '<p class="won">the one recipe</p>' in html
    assert "There is no other recipe to compare with." in html
    assert "<dd>1 trial (" in html
    assert {file.stem for file in (report.parent / "figures").iterdir()} == {
        "accuracy", "curves", "timeline", "panel", "confusion", "calibration",
    }  # fmt: skip


def test_a_report_on_a_thousand_classes_stays_readable(tmp_path: Path) -> None:
    run = trained_without_ray(tmp_path / "many", folder_of(tmp_path / "data", [f"{i:04}" for i in range(1000)], 4))
    report = write_report([run], device="cpu")
    html = report.read_text()
    assert "1000 classes" in html
    assert "What the winner gets right and wrong" in html
    assert "Confusion of" not in html  # of a thousand classes nobody can read a matrix
    assert report.stat().st_size < 2e6


def test_a_run_whose_trials_all_failed_says_so(run: Path) -> None:
    trials = load_trials(run)["trial_id"]
    failed = [{"event": "trial_failed", "trial_id": trial_id, "error": "it broke"} for trial_id in trials]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in failed))
    with pytest.raises(RunError, match=r"no trial has a finished epoch to report on \(4 failed\)"):
        write_report([run])


def test_numbers_as_people_read_them() -> None:
    assert percent(0.12345) == "12.3 %"
    assert percent(float("nan")) == "–"
    assert interval(0.5, 0.4, 0.6) == "50.0 % (40.0 to 60.0)"
    assert interval(0.5, float("nan"), float("nan")) == "50.0 %"
    assert percent(pd.NA) == "–"  # type: ignore[arg-type]
