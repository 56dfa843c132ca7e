"""The parts of the benchmarks that compute: tables by hand. What they measure, they measure themselves."""

import json
import re
import shlex
import shutil
from importlib.metadata import version
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from analysis import load_trials
from benchmarks import calibration, recipes, reference, tables, training
from benchmarks import explain as explaining
from study import load_settings
from study.space import list_trials
from trainables import ImageData, ResNet18, TrialSettings, load_data
from trainables.data import DataError
from trainables.errors import UserError
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


def test_recipes_of_another_machine_are_run_anew(monkeypatch, tmp_path):
    file, ran = tmp_path / "training.cpu.json", []

    def run_recipe(name, seed, *ignored):
        ran.append(seed)
        return {"recipe": name, "seed": seed, "settings": training._settings(name, seed).model_dump()}

    monkeypatch.setattr(training, "run_recipe", run_recipe)
    monkeypatch.setattr(training.multiprocessing, "get_context", lambda kind: SimpleNamespace(Pool=ThreadPool))
    for seeds in (1, 2):
        assert len(training.accuracy(tmp_path, "cpu", seeds, ["0.71"], file)) == seeds
    assert ran == [0, 1]
    monkeypatch.setattr(tables, "describe_machine", lambda: {"processor": "another"})
    assert [row["seed"] for row in training.accuracy(tmp_path, "cpu", 1, ["0.71"], file)] == [0]
    assert ran == [0, 1, 0]
    assert json.loads(file.read_text())["accuracy"]["machine"] == {"processor": "another"}


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


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (UserError("nowhere: no images there"), 2, "error: nowhere: no images there\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (None, 0, ""),
    ],
)
def test_a_benchmark_tells_what_can_be_mended_in_a_sentence(raised, code, told, capsys):
    def main():
        if raised:
            raise raised

    with pytest.raises(SystemExit) as ended:
        tables.run_main(main)
    assert (ended.value.code or 0, capsys.readouterr().err) == (code, told)


def test_recipes_of_two_machines_are_not_mixed(monkeypatch, tmp_path):
    monkeypatch.setattr(recipes, "describe_machine", lambda: {"processor": "another"})
    monkeypatch.setattr("sys.argv", ["recipes", "--data-dir", str(tmp_path)])
    with pytest.raises(UserError, match=r"recipes\.json: was measured on another machine or torch"):
        recipes.main()


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


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folders of this test for the parts of the reference study, and for what is published of them."""
    monkeypatch.setattr(reference, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(reference, "PUBLISHED", tmp_path / "published")
    return tmp_path / "runs", tmp_path / "published"


def unfinished(run):
    """Copy the demo's run as it was before its last epoch."""
    shutil.copytree(DEMO, run)
    lines = (run / "events.jsonl").read_text().splitlines()
    epochs = [i for i, line in enumerate(lines) if json.loads(line)["event"] == "epoch"]
    (run / "events.jsonl").write_text("\n".join(lines[: epochs[-1]]) + "\n")


@pytest.mark.parametrize(
    ("part", "trials", "expected"),
    [
        ("search", 18, {"width": 64, "resolution": "16", "max_epochs": 9, "batch_size": 256, "label_smoothing": 0.0}),
        ("tune", 4, {"width": 32, "resolution": "16", "max_epochs": 9, "batch_size": 256, "label_smoothing": 0.1}),
        ("final", 3, {"width": 64, "resolution": "16,20,24,28", "max_epochs": 14, "weight_decay": 0.07}),
        ("grid", 18, {"width": 16, "resolution": "16", "max_epochs": 9, "batch_size": 256, "label_smoothing": 0.0}),
        ("setups", 18, {"width": 16, "resolution": "16", "max_epochs": 12, "batch_size": 128}),
        ("gpu-search", 18, {"width": 64, "resolution": "32", "max_epochs": 9, "batch_size": 256, "cutout": 0}),
        ("gpu-final", 3, {"width": 64, "resolution": "32", "max_epochs": 48, "weight_decay": 0.07, "cutout": 8}),
        ("gpu-setups", 18, {"width": 64, "resolution": "16,24,32", "max_epochs": 8, "batch_size": 256}),
    ],
)
def test_a_part_of_the_reference_study_trains_what_it_should(part, trials, expected, places):
    shutil.copytree(DEMO, places[0] / "search")
    shutil.copytree(DEMO, places[0] / "tune")
    manifest = places[0] / "tune/manifest.json"
    manifest.write_text(re.sub(r'"weight_decay": [^,}]+', '"weight_decay": 0.07', manifest.read_text()))
    words = reference.words_of(part)
    settings = load_settings(words[words.index("--preset") + 1], [word for word in words if "=" in word])
    asked = list_trials(settings)
    assert len(asked) == trials
    for trial in asked:
        assert trial.model_dump().items() >= expected.items()
    assert settings.early_stopping == ("asha" if part.endswith("search") else "none")
    if part.startswith("gpu-"):
        assert (settings.device, settings.cpus_per_trial) == ("cuda", None)
    else:
        assert (settings.device, settings.cpus_per_trial) == ("auto", 1 if trial.width < 64 else 2)
    if part in ("tune", "final", "gpu-final"):
        winner = load_trials(DEMO).query("status == 'completed'").sort_values("val_accuracy").iloc[-1]
        chosen = {(trial.optimizer, trial.lr, trial.augmentation) for trial in asked}
        assert chosen == {(winner["optimizer"], winner["lr"], winner["augmentation"])}
    if part.endswith("final"):
        assert {trial.seed for trial in asked} == {1, 2, 3}  # that of the others is 0


def test_on_a_gpu_the_reference_study_has_parts_of_its_own(monkeypatch):
    parts = {device: reference.parts_of(device) for device in ("cpu", "mps", "cuda")}
    assert parts["cpu"] == parts["mps"] == ["search", "tune", "final", "grid", "setups"]
    assert set(parts["cpu"] + parts["cuda"]) == set(reference.PARTS)
    ran = []
    monkeypatch.setattr(reference, "resolve_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(reference, "run_part", lambda part, data_dir: ran.append(part) or True)
    monkeypatch.setattr(reference, "publish", lambda data_dir: ran.append("publish"))
    monkeypatch.setattr("sys.argv", ["reference"])
    assert reference.main() == 0
    assert ran == ["gpu-search", "gpu-final", "gpu-setups", "publish"]


def test_published_panels_are_smaller(tmp_path):
    panel, colours = tmp_path / "panel.png", np.random.default_rng(0).integers(0, 256, (50, 100, 3), np.uint8)
    Image.fromarray(colours).save(panel)
    before = panel.stat().st_size
    reference.shrink_panel(panel)
    with Image.open(panel) as picture:
        assert (picture.size, picture.mode) == ((60, 30), "P")
    assert panel.stat().st_size < before


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("missing", ["search", "tune"])
def test_nothing_is_built_on_a_part_that_has_not_ended(missing, published, places, monkeypatch):
    """Nor, then, on what was published of another run of it."""
    if published:
        shutil.copytree(DEMO, places[1] / missing)
    for part in ("search", "tune"):
        (unfinished if part == missing else lambda run: shutil.copytree(DEMO, run))(places[0] / part)
    monkeypatch.setattr("sys.argv", ["reference", "--only", "final"])
    with pytest.raises(UserError, match=f"^{missing} has not ended, which says what to train"):
        reference.main()


def test_of_parts_that_have_not_ended_nothing_is_published(places, monkeypatch):
    unfinished(places[0] / "search")
    monkeypatch.setattr("sys.argv", ["reference", "--only", "publish"])
    with pytest.raises(UserError, match="no part of the reference study has ended yet"):
        reference.main()
    assert not places[1].exists()


def test_the_reference_study_goes_on_where_it_was_interrupted(places, monkeypatch, tmp_path):
    done, interruptions = [], iter([False, True])

    def run_study(settings, run, command):
        assert f"data_dir={tmp_path}/my data" in shlex.split(command)
        assert settings.data_dir == f"{tmp_path}/my data"
        done.append(f"run {run.name}")
        (unfinished if run.name == "grid" else lambda run: shutil.copytree(DEMO, run))(run)
        return run.name != "grid"

    def resume_study(run):
        done.append(f"resume {run.name}")
        if ended := next(interruptions):
            shutil.copy(DEMO / "events.jsonl", run / "events.jsonl")
        return ended

    def confirm_study(run, top, trials, seeds):
        winner = load_trials(DEMO).query("status == 'completed'").sort_values("val_accuracy")["trial_id"].iloc[-1]
        assert (top, trials, seeds) == (2, [winner], 5)
        done.append("confirm")
        confirm(run, {winner: [0.5, 0.5]})
        return True

    for function in (run_study, resume_study, confirm_study):
        monkeypatch.setattr(reference, function.__name__, function)
    monkeypatch.setattr(reference, "publish", lambda data_dir: done.append("publish"))
    monkeypatch.setattr(reference, "resolve_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("sys.argv", ["reference", "--data-dir", str(tmp_path / "my data")])
    assert [reference.main() for _ in range(3)] == [130, 130, 0]
    begun = ["run search", "run tune", "run final", "run grid"]
    assert done == [*begun, "resume grid", "resume grid", "confirm", "run setups", "publish"]
    done.clear()
    assert reference.main() == 0
    assert done == ["publish"]


def test_what_was_lost_is_tried_again(places, monkeypatch):
    """A trial that was given up for its worker or GPU has ended, but not as it should."""
    run, resumed = places[0] / "search", []
    unfinished(run)
    (name,) = load_trials(run).query("status == 'pending'")["trial_id"]
    with (run / "events.jsonl").open("a") as out:
        for event, lost in (("trial_lost", {}), ("trial_failed", {"lost": True})):
            line = {"event": event, "trial_id": name, "error": "CUDA error: unspecified launch failure", **lost}
            out.write(json.dumps(line) + "\n")
    assert reference.place_of("search") == run
    monkeypatch.setattr(reference, "resume_study", lambda run: resumed.append(run) or True)
    assert reference.run_part("search", None)
    assert resumed == [run]


def test_while_a_part_is_run_again_what_was_published_of_it_stands(places):
    runs, published = places
    shutil.copytree(DEMO, published / "search")
    unfinished(runs / "search")
    shutil.copytree(DEMO, runs / "grid")
    completed = load_trials(DEMO).query("status == 'completed'")["trial_id"]
    confirm(runs / "grid", {trial_id: [0.5] for trial_id in completed})
    reference.publish(None)
    assert pd.read_csv(published / "parts.csv")["part"].to_list() == ["search", "grid"]
    assert (published / "early_stopping.csv").exists()


def test_a_part_that_cannot_be_published_anew_stays_as_it_was(places, monkeypatch):
    runs, published = places
    shutil.copytree(DEMO, published / "search")
    shutil.copytree(DEMO, runs / "search")
    before = sorted(published.rglob("*"))

    def moved(*ignored, **options):
        raise DataError("no such directory")

    monkeypatch.setattr(reference, "write_report", moved)
    with pytest.raises(DataError):
        reference.publish(None)
    assert sorted(published.rglob("*")) == before


def confirm(run, accuracies):
    """Give trials of a copy of the demo's run fresh seeds, from 1, by the last epoch's validation accuracy of each."""
    manifest = json.loads((run / "manifest.json").read_text())
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    for entry in [entry for entry in manifest["trials"] if entry["trial_id"] in accuracies]:
        for seed, accuracy in enumerate(accuracies[entry["trial_id"]], 1):
            fresh = {"trial_id": f"{entry['trial_id'][:8]}-{seed}", "settings": entry["settings"] | {"seed": seed}}
            manifest["confirmations"].append(fresh)
            for line in [line for line in lines if line.get("trial_id") == entry["trial_id"]]:
                last = {"val_accuracy": accuracy} if line.get("epoch") == entry["settings"]["max_epochs"] else {}
                lines.append(line | {"trial_id": fresh["trial_id"]} | last)
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_winner_of_the_search_is_compared_with_the_best_of_the_grid(tmp_path):
    """By fresh seeds, where the search had it that another trial is the best."""
    grid = tmp_path / "grid"
    shutil.copytree(DEMO, grid)
    completed = load_trials(DEMO).query("status == 'completed'").sort_values("val_accuracy").set_index("trial_id")
    assert list(reference.early_stopping(grid, completed.iloc[0])["n"]) == [1000, 1]  # nothing is confirmed
    confirm(grid, {completed.index[0]: [0.5, 0.375], completed.index[-1]: [0.25, 0.375]})
    other = reference.early_stopping(grid, completed.iloc[0]).iloc[-1]
    # Of -0.25 and 0: mean -0.125, Student's t with one degree of freedom 12.706 * 0.1768 / sqrt(2) = 1.588.
    assert other[["loss", "low", "high", "n"]].to_list() == pytest.approx([-0.125, -1.7133, 1.4633, 2], abs=2e-4)
    assert other["found"] == 0
    same = reference.early_stopping(grid, completed.iloc[-1]).iloc[-1]
    assert (same["loss"], same["found"]) == (0, 1)  # one configuration, so there is nothing to compare
    assert same[["low", "high", "n"]].isna().all()


def test_what_is_published_comes_from_what_was_published(places, finished_run):
    """Once with the runs and once without: the same files. What is not at its end is left out."""
    runs, published = places
    shutil.copytree(DEMO, runs / "search")
    shutil.copytree(finished_run, runs / "final")
    unfinished(runs / "grid")
    (published / "final/explanations/old").mkdir(parents=True)
    reference.publish(None)
    files = {file: file.read_bytes() for file in published.rglob("*") if file.is_file()}
    assert {file.parent.relative_to(published).as_posix() for file in files if file.name == "report.md"} == {
        "search", "final",
    }  # fmt: skip
    assert not {file.suffix for file in files} & {".html", ".pt", ".npz", ".pkl"}
    assert not (published / "final/explanations/old").exists()
    explained = list(runs.glob("final/explanations/*/measures.parquet"))
    assert len(explained) == 4
    for measures in explained:
        rounded = pd.read_parquet(published / measures.relative_to(runs))
        pd.testing.assert_frame_equal(rounded, pd.read_parquet(measures), rtol=2**-11, atol=2**-25)
    trials = pd.read_csv(published / "trials.csv")
    assert trials["part"].to_list() == ["search"] * 8 + ["final"] * 4
    assert trials["val_accuracy"].to_list()[:8] == load_trials(DEMO)["val_accuracy"].to_list()
    assert trials["test_accuracy"].notna().to_list() == [False] * 8 + [True] * 4  # all that have a checkpoint
    parts = pd.read_csv(published / "parts.csv").set_index("part")
    times = [json.loads(line)["time"] for line in (DEMO / "events.jsonl").read_text().splitlines() if "trial_" in line]
    assert parts.loc["search", "hours"] == pytest.approx((max(times) - min(times)) / 3600, abs=0.01)
    assert parts.loc["final", "commands"].endswith(
        "analysis explain runs/final --all; python -m analysis report runs/final"
    )
    shutil.rmtree(runs)
    reference.publish(None)
    assert {file: file.read_bytes() for file in published.rglob("*") if file.is_file()} == files
