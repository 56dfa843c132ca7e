"""The parts of the benchmarks that compute: tables by hand. What they measure, they measure themselves."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from analysis import load_trials
from benchmarks import calibration, recipes, reference, tables, training
from benchmarks import explain as explaining
from study import load_settings
from study.space import list_trials
from trainables import ImageData, ResNet18, TrialSettings, load_data
from trainables.setups import FORWARDS


def row(variant: str, seed: int, accuracy: float) -> dict[str, object]:
    return {"budget": "short", "variant": variant, "seed": seed, "val_accuracy": accuracy, "seconds": 1.0}


def test_variants_are_compared_with_the_baseline_of_the_same_seed():
    rows = [row("baseline", 0, 0.2), row("baseline", 1, 0.4), row("muon", 1, 0.45), row("muon", 0, 0.21)]
    table = recipes.table(rows).set_index("variant")
    assert table.loc["muon", "accuracy"] == pytest.approx(33.0)
    assert table.loc["muon", "difference"] == pytest.approx(3.0)  # of 5 and 1
    # Student's t with one degree of freedom: 12.706 * (4 / sqrt(2)) / sqrt(2) = 25.4.
    assert table.loc["muon", ["low", "high"]].tolist() == pytest.approx([-22.4, 28.4])
    assert table.loc["muon", "n"] == 2


def test_a_variant_without_its_baseline_has_no_difference():
    table = recipes.table([row("muon", 0, 0.3)])
    assert np.isnan(table["difference"]).all()


def test_results_are_kept_beside_those_of_other_figures(tmp_path, capsys):
    file = tmp_path / "results.json"
    tables.save(file, "one", [{"a": 1}])
    tables.save(file, "other", [{"b": 2}])
    tables.save(file, "one", [{"a": 3}])
    tables.save(file, "nothing", [])
    content = tables.json.loads(file.read_text())
    assert [content[name]["rows"] for name in ("one", "other")] == [[{"a": 3}], [{"b": 2}]]
    assert set(content) == {"one", "other"}
    assert content["one"]["versions"]["torch"] == version("torch")


def test_every_variant_and_recipe_is_one_that_can_be_trained():
    for changes in recipes.VARIANTS.values():
        values = {**recipes.BASELINE, **changes, "max_epochs": 6}
        TrialSettings(**{**values, "warmup_epochs": 6 * values.get("warmup_epochs", 0.0)})
    assert all(isinstance(recipe, TrialSettings) for recipe in training.RECIPES.values())


def test_a_recipe_is_run_again_only_if_it_changed():
    row = {"recipe": "0.71", "seed": 0, "settings": training._settings("0.71", 0).model_dump()}
    assert training._is_of(row, "0.71", 0)
    assert not training._is_of(row, "0.71", 1)
    assert not training._is_of(row, "0.75", 0)
    older = {**row, "settings": {k: v for k, v in row["settings"].items() if k != "cutout"} | {"mixing": "none"}}
    assert training._is_of(older, "0.71", 0)
    assert not training._is_of({**row, "settings": row["settings"] | {"lr": 0.02}}, "0.71", 0)


def test_speeds_on_record_are_of_the_recipes_as_they_are():
    content = tables.json.loads((Path(training.__file__).with_suffix(".cpu.json")).read_text())
    ways = {row["way"] for row in content["throughput"]["rows"]}
    for name, recipe in training.RECIPES.items():
        assert f"recipe {name}, whole run: {recipe.resolution} px" in ways


def test_our_epochs_and_the_overhead_are_measured(monkeypatch):
    labels = np.arange(200) % 2
    images = np.random.default_rng(0).integers(0, 255, (200, 32, 32, 3)).astype(np.uint8)
    data = ImageData(images, labels, ("dark", "light"))
    small = TrialSettings(width=4, batch_size=16)
    epochs = training.our_epochs(data, "cpu", small, "16")
    assert next(epochs) > 0
    assert next(epochs) > 0
    monkeypatch.setattr(training, "TrialSettings", lambda **changes: small.model_copy(update=changes))
    measured = training._overhead_at("16", data, data.subset(np.arange(20)), torch.device("cpu"), 2)
    assert 0 < measured["share_outside"] < 1
    assert measured["evaluation_of_two_tenths"] > 0
    steps = training.setups(data, "cpu", 1)
    assert [row["setup"] for row in steps] == list(FORWARDS)
    assert (steps[0]["ratio"], steps[0]["expected"], steps[2]["expected"]) == (1.0, 1.0, 2.67)
    assert measured["n"] == 2


def test_all_ways_to_explain_are_timed(monkeypatch):
    monkeypatch.setattr(explaining, "network", lambda device: ResNet18(100, width=4).to(device).eval())
    pixels = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = {row["way"]: row for row in explaining.speed(pixels, torch.device("cpu"), 2)}
    assert rows["plain forward, fp32"]["forwards"] == "1.00 (1.00-1.00)"
    assert rows["captum + captum, fp32"]["captum + captum takes"] == "1.00 (1.00-1.00)"
    assert all(row["images_per_second"] > 0 and row["n"] == 2 for row in rows.values())
    streamed = explaining._stream(pixels.repeat(200, 1, 1, 1), "cpu", 800)
    assert streamed["images"] == 800
    assert streamed["images_per_second"] > 0
    assert 0 <= streamed["growth_mb"] < streamed["peak_mb"]


def test_calibration_is_of_networks_in_eval_mode(monkeypatch):
    monkeypatch.setattr(calibration, "SETTINGS", TrialSettings(width=2, max_epochs=1, batch_size=256))
    monkeypatch.setattr(calibration, "TEST_SIZE", 200)
    monkeypatch.setattr(calibration, "load_data", lambda name, split, size=200: load_data(name, split, size=size))
    seen = []

    def compute(model, about, data, device):
        seen.append((model.training, about["epoch"], len(data)))
        parts = {"map": "saliency", "measure": "energy_on_object", "image": [0, 1], "value": [0.25, 0.75]}
        return {}, pd.DataFrame(parts)

    monkeypatch.setattr(calibration, "compute_explanation", compute)
    found, measures = calibration.calibrate("biased", 0, 400, "cpu")
    assert seen == [(False, 1, 200)]
    assert found["saliency"] == 0.5
    assert 0 <= found["accuracy"] <= 1
    assert 0 < found["kept_under_swap"] < 1
    monkeypatch.setattr(calibration, "MAPS", ("saliency",))
    (only,) = calibration.table([found, found], measures, "biased")
    assert only["energy_on_object"] == 0.5
    assert (only["low_of_networks"], only["high_of_networks"]) == (0.5, 0.5)
    assert (only["images"], only["networks"]) == (2, 2)


def test_calibration_decides_by_the_ends_of_intervals():
    def rows(saliency: tuple[float, float], kept: float = 0.995) -> list[dict[str, object]]:
        intervals = {"saliency": saliency, "gradcam": (0.5, 0.6)}
        return [
            {"map": name, "low": low, "high": high, "low_of_networks": low - 0.1, "high_of_networks": high + 0.1}
            | {"object_area": 0.11, "kept_under_swap": [0.999, kept]}
            for name in ("saliency", "gradcam", "pooled_saliency", "random", "sobel", "gaussian")
            for low, high in [intervals.get(name, (0.18, 0.2))]
        ]

    def failing(**tables: list[dict[str, object]]) -> list[str]:
        return [row["condition"] for row in calibration.verdicts(tables) if not row["holds"]]

    assert failing(clean=rows((0.3, 0.4))) == []
    assert failing(clean=rows((0.3, 0.4), kept=0.985)) == ["clean: predictions survive a swap"]
    assert failing(clean=rows((0.19, 0.4))) == [
        f"clean: saliency beats {name}" for name in ("pooled_saliency", "random", "sobel", "gaussian")
    ]
    both = failing(clean=rows((0.3, 0.4)), biased=rows((0.1, 0.25)))
    assert [text for text in both if "saliency" in text] == [
        "biased: saliency lies on it less than on clean of networks"
    ]
    assert failing(scene=rows((0.05, 0.1))) == ["scene: gradcam lies off the object"]


DEMO = Path(__file__).parent / "runs/demo"


@pytest.mark.parametrize(("part", "trials"), [("search", 18), ("final", 3), ("grid", 18), ("setups", 18)])
def test_a_part_of_the_reference_study_trains_what_it_should(part, trials, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "RUNS", tmp_path)
    shutil.copytree(DEMO, tmp_path / "search")
    words = reference.words_of(part)
    settings = load_settings(words[words.index("--preset") + 1], [word for word in words if "=" in word])
    asked = list_trials(settings)
    assert len(asked) == trials
    assert {trial.batch_size for trial in asked} == {128 if part == "setups" else 256}
    if part == "final":
        winner = load_trials(DEMO).query("status == 'completed'").sort_values("val_accuracy").iloc[-1]
        chosen = {(trial.optimizer, trial.lr, trial.augmentation) for trial in asked}
        assert chosen == {(winner["optimizer"], winner["lr"], winner["augmentation"])}
        assert [trial.seed for trial in list_trials(settings)].count(0) == 0  # the seed of the search


def test_the_winner_of_the_search_is_compared_with_the_best_of_the_grid(tmp_path):
    """In the grid another trial is the best, by what the log says."""
    shutil.copytree(DEMO, tmp_path / "grid")
    completed = load_trials(DEMO).query("status == 'completed'").sort_values("val_accuracy")
    winner, other = completed["trial_id"].iloc[[-1, 0]]
    lines = [json.loads(line) for line in (DEMO / "events.jsonl").read_text().splitlines()]
    for line in lines:
        if line["event"] == "epoch" and line["trial_id"] in (winner, other):
            line["val_accuracy"] = 0.25 if line["trial_id"] == winner else 0.75
    (tmp_path / "grid/events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = reference.early_stopping(DEMO, tmp_path / "grid").iloc[-1]
    assert own["method"] == "the search's winner here, mean of 1 seeds"
    assert (own["loss"], own["found"]) == (0.5, False)
    same = reference.early_stopping(DEMO, DEMO).iloc[-1]
    assert (same["loss"], same["found"]) == (0, True)


def test_what_is_published_comes_from_what_was_published(tmp_path, monkeypatch):
    """Once with the runs and once without: the same tables."""
    monkeypatch.setattr(reference, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(reference, "PUBLISHED", tmp_path / "published")
    for part in ("search", "grid"):
        shutil.copytree(DEMO, tmp_path / "runs" / part)
    reference.publish(None)
    names = [f"{name}.csv" for name in ("parts", "trials", "epochs", "comparison", "claims", "early_stopping")]
    tables = [(tmp_path / "published" / name).read_text() for name in names]
    assert (tmp_path / "published/report.md").exists()
    assert not (tmp_path / "published/report.html").exists()
    trials = pd.read_csv(tmp_path / "published/trials.csv")
    assert trials["part"].to_list() == ["search"] * 8 + ["grid"] * 8
    assert trials["val_accuracy"].to_list() == 2 * load_trials(DEMO)["val_accuracy"].to_list()
    parts = pd.read_csv(tmp_path / "published/parts.csv")
    times = [json.loads(line)["time"] for line in (DEMO / "events.jsonl").read_text().splitlines() if "trial_" in line]
    assert parts["hours"].to_list() == pytest.approx([(max(times) - min(times)) / 3600] * 2, abs=0.01)
    shutil.rmtree(tmp_path / "runs")
    reference.publish(None)
    assert [(tmp_path / "published" / name).read_text() for name in names] == tables
