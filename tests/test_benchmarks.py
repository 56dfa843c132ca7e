"""The parts of the benchmarks that compute: tables by hand. What they measure, they measure themselves."""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import recipes, tables, training
from trainables import ImageData, TrialSettings


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
    assert measured["validation_of_a_tenth_per_epoch"] > 0
    assert measured["n"] == 2
