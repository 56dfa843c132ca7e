"""Studies through Ray Tune, from Python."""

import errno
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import ray
import torch
import yaml

import study.attempt
import study.run
import study.supervise
from analysis import (
    RunError,
    compare_recipes,
    decide,
    load_epochs,
    load_measures,
    load_trials,
    read_study,
    top_trials,
    write_report,
)
from analysis.compare import top_configurations
from analysis.ray_session import ClusterError
from analysis.trials import ENDED, HYPERPARAMETERS, command_of
from study import SettingsError, StudyError, confirm_study, load_settings, resume_study, run_study
from study.space import list_trials
from study.supervise import AttemptError
from trainables import (
    DataError,
    DeviceError,
    UserError,
    load_checkpoint,
    load_data,
    split_validation,
    to_tensors,
    train,
)
from trainables.settings import TrialSettings

pytestmark = pytest.mark.usefixtures("ray_session")


def test_every_trial_asked_for_has_a_row(tiny: tuple[str, ...], finished_run: Path) -> None:
    asked = list_trials(load_settings("demo", tiny))
    trials = load_trials(finished_run)
    assert list(trials["trial_id"]) == [trial.key() for trial in asked]
    assert trials["status"].isin(ENDED).all()
    for row, trial in zip(trials.to_dict("records"), asked, strict=True):
        for name, value in trial.model_dump().items():
            assert row[name] == value, name


def test_query_reads_as_one_would_guess(finished_run: Path) -> None:
    rows = load_trials(finished_run).query("optimizer == 'sgd' and lr <= 0.01")
    assert len(rows) == 2
    assert set(rows["lr"]) == {1e-7}


def test_asha_stops_and_says_why(finished_run: Path) -> None:
    trials = load_trials(finished_run)
    stopped = trials[trials["status"] == "stopped"]
    assert set(stopped["lr"]) == {1e-7}
    assert (stopped["epochs"] == 1).all()
    assert (
        stopped["stop_reason"]
        .str.fullmatch(r"ASHA at epoch 1: accuracy 0\.\d{4} below the cutoff 0\.\d{4} of rung 1")
        .all()
    )
    assert (trials[trials["status"] == "completed"]["epochs"] == 3).all()


def test_a_trial_is_what_the_plain_loop_trains(tiny: tuple[str, ...], finished_run: Path, pictures: Path) -> None:
    settings = load_settings("demo", tiny)
    row = load_trials(finished_run).query("status == 'completed'").iloc[0]
    trial = next(t for t in list_trials(settings) if t.key() == row["trial_id"])
    data = load_data("folder", "train", pictures, seed=settings.seed)
    plain = [
        metrics
        for metrics, _ in train(trial, *split_validation(data, settings.val_fraction, settings.seed), device="cpu")
    ]
    reported = load_epochs(finished_run).query("trial_id == @row.trial_id")
    for name in ("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        np.testing.assert_array_equal(reported[name], [getattr(m, name) for m in plain], err_msg=name)


def test_trials_side_by_side_are_those_trained_alone(
    on_two_cpus: Callable[..., None], tiny: tuple[str, ...], pictures: Path, tmp_path: Path
) -> None:
    """Two at a time, one after the other in reused workers: bit for bit what each is in a process of its own."""
    overrides = [
        *tiny, "early_stopping=none", "cpus_per_trial=1", "space.optimizer=[muon,sgd]", "space.lr=[0.02,0.05]",
        "space.augmentation=[flip+crop]", "fixed.ema_decay=0.9", "fixed.resolution='16,32'", "fixed.cutout=8",
        "fixed.dropout=0.2",
    ]  # fmt: skip
    settings = load_settings("demo", overrides)
    on_two_cpus("-m", "study", "run", "--name", "side-by-side", *overrides)
    run = tmp_path / "runs/side-by-side"
    trials, epochs = load_trials(run).set_index("trial_id"), load_epochs(run)
    data = split_validation(load_data("folder", "train", pictures, seed=1), settings.val_fraction, settings.seed)
    for trial in list_trials(settings):
        own = epochs[epochs["trial_id"] == trial.key()]
        saved = load_checkpoint(trials.loc[trial.key(), "checkpoint"], "cpu")
        for metrics, state in train(trial, *data, device="cpu"):
            row = own[own["epoch"] == metrics.epoch].iloc[0]
            assert (row["train_loss"], row["val_loss"]) == (metrics.train_loss, metrics.val_loss)
            if metrics.epoch == saved.epoch:
                for name, weights in state.network.state_dict().items():
                    assert torch.equal(weights, saved.network.state_dict()[name]), name


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux to look at memory")
def test_a_node_holds_one_copy_of_the_images(
    tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every worker the tensors that are trained on lie in the object store's shared memory."""
    import study.attempt as module

    def look(config: dict[str, Any], *, images: tuple[ray.ObjectRef, ray.ObjectRef], **arguments: Any) -> None:
        ranges = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        found = []
        for data in ray.get(list(images)):
            address = to_tensors(data, torch.device("cpu"))[0].data_ptr()
            for fields in ranges:
                start, stop = (int(part, 16) for part in fields[0].split("-"))
                if start <= address < stop:
                    found.append(" ".join(fields[5:]))
        (tmp_path / f"{os.getpid()}-{config['trial']['lr']}.json").write_text(json.dumps(found))
        original(config, images=images, **arguments)

    original = module.run_trial
    monkeypatch.setattr(module, "run_trial", look)
    assert run_study(load_settings("demo", [*tiny, "max_epochs=1"]), tmp_path / "run", show=False)
    seen = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert seen
    for places in seen:
        assert len(places) == 2
        assert all("/plasma" in place for place in places), places


def test_the_command_of_a_row_trains_its_trial_again_bit_for_bit(
    on_two_cpus: Callable[..., None], tiny: tuple[str, ...], tmp_path: Path
) -> None:
    """In as many threads."""
    overrides = [*tiny, "cpus_per_trial=2", "max_epochs=2", "space.augmentation=[flip+crop]", "space.lr=[0.05]"]
    on_two_cpus("-m", "study", "run", "--name", "once", *overrides)
    once, again = tmp_path / "runs/once", tmp_path / "runs/again"
    python, *words = shlex.split(command_of(load_trials(once).iloc[0], read_study(once), "again"))
    assert python == "python"
    assert "cpus_per_trial=2" in words
    on_two_cpus(*words)
    before, after = (load_epochs(run).set_index("epoch") for run in (once, again))
    assert after.index.to_list() == [1, 2]
    times = ["epoch_seconds", "images_per_second"]
    pd.testing.assert_frame_equal(after.drop(columns=times), before.drop(columns=times), check_exact=True)


def test_checkpoint_of_the_best_epoch_is_kept(finished_run: Path) -> None:
    for row in load_trials(finished_run).to_dict("records"):
        state = load_checkpoint(row["checkpoint"], "cpu")
        assert state.epoch == row["best_epoch"]
        assert state.metrics is not None
        assert state.metrics.val_accuracy == row["val_accuracy"]
        assert state.settings.key() == row["trial_id"]


def test_study_yaml_holds_what_is_needed_to_repeat(finished_run: Path, pictures: Path) -> None:
    study = read_study(finished_run)
    assert study["settings"]["space"]["lr"] == [0.05, 1e-7]
    assert study["data"]["fingerprint"] == load_data("folder", "train", pictures, seed=1).fingerprint()
    assert (study["data"]["num_train_images"], study["data"]["num_val_images"]) == (96, 32)
    assert study["versions"]["ray"]
    assert study["data"]["class_names"] == ["blue", "green", "red", "white"]


def test_nothing_but_json_and_yaml_is_read(finished_run: Path, tmp_path: Path) -> None:
    """Every pickle of a copy of the run is replaced by garbage; the tables stay the same."""
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    pickles = [*copy.rglob("*.pkl"), *copy.rglob("experiment_state*"), *copy.rglob("*.pt")]
    assert pickles
    for file in pickles:
        file.write_bytes(b"garbage")
    original, read = load_trials(finished_run), load_trials(copy)
    pd.testing.assert_frame_equal(original.drop(columns="checkpoint"), read.drop(columns="checkpoint"))


def test_same_directory_twice_is_refused(tiny: tuple[str, ...], finished_run: Path) -> None:
    with pytest.raises(StudyError, match="exists; go on with it by python -m study resume"):
        run_study(load_settings("demo", tiny), finished_run, show=False)


def test_resuming_a_finished_study_changes_nothing(finished_run: Path) -> None:
    before = load_trials(finished_run)
    assert resume_study(finished_run, show=False)
    pd.testing.assert_frame_equal(before, load_trials(finished_run))


def _interrupt(run: Path, keep: int) -> None:
    """Make a finished run look as if its driver had died when `keep` trials had ended, and the others not begun."""
    trials = list(load_trials(run)["trial_id"])
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    kept = [e for e in events if e.get("trial_id") not in trials[keep:] and e["event"] != "attempt_ended"]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in kept))
    for trial_id in trials[keep:]:
        shutil.rmtree(run / "tune" / "attempt-1" / trial_id)


@pytest.mark.parametrize("ended", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_an_interrupted_study_goes_on_to_the_undisturbed_result(
    on_two_cpus: Callable[..., None], tiny: tuple[str, ...], tmp_path: Path, ended: int
) -> None:
    """Also if one trial is left, which could have all the threads now: sums would come out otherwise."""
    overrides = [*tiny, "early_stopping=none"]
    whole, broken = tmp_path / "runs/whole", tmp_path / "runs/broken"
    on_two_cpus("-m", "study", "run", "--name", "whole", *overrides)
    shutil.copytree(whole, broken)
    _interrupt(broken, ended)
    assert list(load_trials(broken)["status"]) == ["completed"] * ended + ["pending"] * (4 - ended)
    on_two_cpus("-m", "study", "resume", "runs/broken")
    drop = ["train_seconds", "images_per_second", "checkpoint"]
    pd.testing.assert_frame_equal(load_trials(whole).drop(columns=drop), load_trials(broken).drop(columns=drop))
    assert not load_epochs(broken).duplicated(["trial_id", "epoch"]).any()


def test_other_images_are_refused_by_the_next_attempt(
    tiny: tuple[str, ...], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials would be validated on what they were trained on before."""
    copy = tmp_path / "pictures"
    shutil.copytree(pictures, copy)

    def fail(*_: object) -> str:
        (copy / "blue/0.png").unlink()
        raise AttemptError("Ray Tune gave up")

    monkeypatch.setattr(study.run, "run_attempt", fail)
    monkeypatch.setattr(study.supervise, "_WAIT_SECONDS", 0.0)
    with pytest.raises(StudyError, match=r"run: began with other images \(fingerprint .*restore them to go on"):
        run_study(load_settings("demo", [*tiny, f"data_dir={copy}"]), tmp_path / "run", show=False)


def test_a_run_goes_on_where_there_is_such_a_device(finished_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    _interrupt(copy, 3)
    content = yaml.safe_load((copy / "study.yaml").read_text())
    content["settings"]["device"] = "mps"
    (copy / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(StudyError, match=r"copy: began on mps, which this machine has not; go on where there is one"):
        resume_study(copy, show=False, force=True)


def test_other_images_are_refused_on_resume(finished_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    _interrupt(copy, 3)
    study = yaml.safe_load((copy / "study.yaml").read_text())
    study["data"]["fingerprint"] = "0" * 16
    (copy / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    with pytest.raises(StudyError, match="began with other images"):
        resume_study(copy, show=False)


@pytest.mark.parametrize("change", [{"trial_id": "0" * 10}, {"settings": {"learning_rate": 0.1}}])
def test_a_run_of_another_version_is_refused_on_resume(
    finished_run: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Its trials would be trained again under other ids."""
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    _interrupt(copy, 3)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["trials"][3] |= change
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="was begun by another version of this project"):
        resume_study(copy, show=False)


def test_optuna_suggests_and_goes_on(tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [
        *tiny, "max_epochs=2", "early_stopping=none", "search=optuna", "num_trials=3",
        "space.lr={min: 0.001, max: 0.2, log: true}", "space.batch_size={min: 10, max: 20}",
    ]  # fmt: skip
    run = tmp_path / "optuna"
    assert run_study(load_settings("demo", overrides), run, show=False)
    trials = load_trials(run)
    assert list(trials["status"]) == ["completed"] * 3
    assert trials["lr"].between(0.001, 0.2).all()
    assert trials["lr"].nunique() == 3
    for row in trials.to_dict("records"):
        values = {name: row[name] for name in TrialSettings.model_fields}
        assert TrialSettings(**values).key() == row["trial_id"]
    # Ask for two more, and forget that one of the three ended: the others are told to the sampler, not run again, by
    # what they ended with.
    content = yaml.safe_load((run / "study.yaml").read_text())
    content["settings"]["num_trials"] = 5
    (run / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    lost = trials["trial_id"].iloc[1]
    shutil.rmtree(run / "tune" / "attempt-1" / lost)
    lines = (run / "events.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines if not (lost in line and "trial_started" not in line)]
    for number, event in enumerate([e for e in kept if e["event"] == "epoch"]):
        event["val_accuracy"] = [0.5, 0.25, 0.75, 0.625][number]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in kept))
    told = []
    original = study.attempt.OptunaSearch.add_evaluated_point
    monkeypatch.setattr(
        study.attempt.OptunaSearch,
        "add_evaluated_point",
        lambda self, point, value, *rest: told.append(value) or original(self, point, value, *rest),
    )
    assert list(load_trials(run)["status"]) == ["completed", "pending", "completed", "pending", "pending"]
    assert resume_study(run, show=False)
    assert told == [0.25, 0.625]
    assert list(load_trials(run)["status"]) == ["completed"] * 5
    assert set(trials["trial_id"]) < set(load_trials(run)["trial_id"])


def test_random_search_runs_what_was_drawn(tiny: tuple[str, ...], tmp_path: Path) -> None:
    overrides = [*tiny, "max_epochs=1", "search=random", "num_trials=2", "space.lr={min: 0.01, max: 0.1}"]
    run = tmp_path / "random"
    settings = load_settings("demo", overrides)
    assert run_study(settings, run, show=False)
    assert set(load_trials(run)["lr"]) == {trial.lr for trial in list_trials(settings)}


def test_a_diverging_and_a_failing_trial_keep_their_rows(tiny: tuple[str, ...], tmp_path: Path) -> None:
    overrides = [
        *tiny, "space.lr=[100,0.05]", "space.augmentation=[none]", "fixed.batch_size=10", "max_failures=0",
        "fixed.warmup_epochs=0", "fixed.weight_decay=1",
    ]  # fmt: skip
    run = tmp_path / "diverging"
    assert run_study(load_settings("demo", overrides), run, show=False)
    trials = load_trials(run).set_index("lr")
    assert trials.loc[100.0, "status"] == "diverged"
    assert trials.loc[100.0, "stop_reason"].startswith("training loss was ")
    assert trials.loc[0.05, "status"] == "completed"


def test_a_failing_trial_has_its_error_and_the_rest_goes_on(
    tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import study.attempt as module

    def explode(config: dict[str, dict[str, float]], **arguments: object) -> None:
        if config["trial"]["lr"] == 0.05:
            raise ValueError("the disk is on fire")
        original(config, **arguments)

    original = module.run_trial
    monkeypatch.setattr(module, "run_trial", explode)
    run = tmp_path / "failing"
    assert run_study(load_settings("demo", [*tiny, "max_epochs=1", "max_failures=0"]), run, show=False)
    trials = load_trials(run)
    failed = trials[trials["lr"] == 0.05]
    assert list(failed["status"]) == ["failed", "failed"]
    assert (failed["error"] == "ValueError: the disk is on fire").all()
    assert (trials[trials["lr"] == 1e-7]["status"] == "completed").all()


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["cpus_per_trial=64"], ClusterError, "a trial needs 64 CPUs and 0 GPUs, but there are 1 and 0"),
        (["device=cuda"], DeviceError, "device 'cuda': this machine has none"),
        (["dataset=folder", "data_dir=/nonexistent"], DataError, "/nonexistent: no such directory"),
        (["train_size=5000"], DataError, "cannot take 5000 images"),
    ],
)
def test_what_cannot_run_says_so(
    tiny: tuple[str, ...], tmp_path: Path, overrides: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_study(load_settings("demo", [*tiny, *overrides]), tmp_path / "run", show=False)


def test_trials_that_no_node_can_run_yet_are_said_to_wait(
    tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study.run, "run_attempt", lambda *arguments: "finished")
    for cpus, waits in ((1, False), (64, True)):
        settings = load_settings("demo", [*tiny, f"cpus_per_trial={cpus}"])
        assert run_study(settings, tmp_path / str(cpus), address="auto")
        output = capsys.readouterr().out
        assert re.search(r"^checkpoints will need up to .* \(trials at once: 1\); .* are free$", output, re.MULTILINE)
        assert ("a trial needs 64 CPUs and 0 GPUs, and no node has that now" in output) == waits


def test_storage_that_workers_do_not_see_ends_the_study_at_once(
    tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nodes join later, the first trials find out."""

    def elsewhere(config: dict[str, Any], *, run: str, **arguments: Any) -> None:
        original(config, run="/nonexistent", **arguments)

    original = study.attempt.run_trial
    monkeypatch.setattr(study.attempt, "run_trial", elsewhere)
    with pytest.raises(ClusterError, match=r"/nonexistent: is not shared by all nodes: .* does not see it"):
        run_study(load_settings("demo", tiny), tmp_path / "run", show=False)
    assert set(load_trials(tmp_path / "run")["status"]) == {"pending"}
    monkeypatch.setattr(study.attempt, "run_trial", original)
    assert resume_study(tmp_path / "run", show=False)


def test_a_directory_that_is_no_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run directory"):
        resume_study(tmp_path)


def test_a_run_directory_appears_whole_or_not_at_all(
    tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def write(file: Path, text: str) -> None:
        seen.append(sorted(path.name for path in file.parent.iterdir()))
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(study.run, "write_atomically", write)
    with pytest.raises(StudyError, match=r"runs/whole: cannot be made \(Input/output error\)"):
        run_study(load_settings("demo", tiny), tmp_path / "runs/whole", show=False)
    assert seen == [["lock", "manifest.json"]]  # all that comes before
    assert list((tmp_path / "runs").iterdir()) == []


def test_two_that_begin_one_run_at_once_do_not_mix(
    tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = study.run._load

    def load(*arguments: Any) -> Any:
        if not (tmp_path / "run").exists():  # meanwhile another process begins it
            (tmp_path / "run").mkdir()
            (tmp_path / "run/study.yaml").write_text("settings: {}\ndata: {}\n")
        return original(*arguments)

    monkeypatch.setattr(study.run, "_load", load)
    with pytest.raises(StudyError, match="run: exists; go on with it by python -m study resume"):
        run_study(load_settings("demo", tiny), tmp_path / "run", show=False)
    assert [file.read_text() for file in (tmp_path / "run").iterdir()] == ["settings: {}\ndata: {}\n"]


def test_a_run_goes_on_with_the_device_and_threads_it_began_with(finished_run: Path) -> None:
    """Found by themselves, they could be others on the machine where it goes on."""
    settings = read_study(finished_run)["settings"]
    assert (settings["device"], settings["cpus_per_trial"], settings["gpus_per_trial"]) == ("cpu", 1, 0)


def test_trials_of_a_killed_driver_are_not_running_while_their_study_begins_again(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, seen = tmp_path / "copy", []
    shutil.copytree(finished_run, copy)
    lines = (copy / "events.jsonl").read_text().splitlines()
    first_epoch = next(i for i, line in enumerate(lines) if '"epoch"' in line)
    (copy / "events.jsonl").write_text("\n".join(lines[: first_epoch + 1]) + "\n")

    def load(*_: Any) -> Any:
        seen.extend(load_trials(copy)["status"])
        raise DataError("as far as this goes")

    monkeypatch.setattr(study.run, "_load", load)
    with pytest.raises(DataError):
        resume_study(copy, show=False)
    assert seen == ["pending"] * 4


def test_settings_are_checked_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        run_study(load_settings("demo", ["max_epoch=3"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- Confirmation


def test_the_best_are_confirmed_with_fresh_seeds(finished_run: Path, tmp_path: Path) -> None:
    """To the last epoch, ASHA or not; the trials of the search stay as they are, and asking again adds what is new."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    before = load_trials(run)
    assert confirm_study(run, top=1, seeds=2, show=False)
    trials = load_trials(run)
    found, fresh = trials[trials["phase"] == "search"], trials[trials["phase"] == "confirm"]
    pd.testing.assert_frame_equal(found.reset_index(drop=True), before)
    best = top_configurations(before, 1).iloc[0]
    assert fresh["seed"].to_list() == [0, 2]  # the study has seed 1
    assert (fresh["status"] == "completed").all()
    assert (fresh["epochs"] == 3).all()
    for name in HYPERPARAMETERS:
        assert (fresh[name] == best[name]).all(), name
    assert fresh["checkpoint"].notna().all()
    recipes = compare_recipes(trials, 32)
    assert recipes["confirmed"].to_list() == [True, False]
    assert recipes.loc[0, "val_accuracy"] == pytest.approx(fresh["val_accuracy"].mean())
    assert set(top_trials(trials, 1)["trial_id"]) == set(fresh["trial_id"])

    log = (run / "events.jsonl").read_text()
    assert confirm_study(run, top=1, seeds=2, show=False)
    assert (run / "events.jsonl").read_text() == log
    assert confirm_study(run, top=1, seeds=3, show=False)
    assert load_trials(run).query("phase == 'confirm'")["seed"].to_list() == [0, 2, 3]
    # Any other configuration can be asked for by its trial; what is asked for twice is trained once.
    stopped = before.query("status == 'stopped'")["trial_id"].iloc[0]
    assert confirm_study(run, top=1, trials=[stopped, best["trial_id"]], seeds=1, show=False)
    fresh = load_trials(run).query("phase == 'confirm'")
    assert fresh["seed"].to_list() == [0, 2, 3, 0]
    asked = before.set_index("trial_id").loc[stopped]
    assert (fresh.iloc[-1][list(HYPERPARAMETERS)] == asked[list(HYPERPARAMETERS)]).all()


def test_an_interrupted_confirmation_is_gone_on_with(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)

    def interrupted(*_: object, **__: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("study.run._run_to_the_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            confirm_study(run, top=2, seeds=1, show=False)
    trials = load_trials(run)
    assert trials.query("phase == 'confirm'")["status"].to_list() == ["pending"] * 2
    assert compare_recipes(trials, 32)["confirmed"].to_list() == [False, False]
    assert resume_study(run, show=False)
    assert load_trials(run).query("phase == 'confirm'")["status"].to_list() == ["completed"] * 2


def test_what_cannot_be_confirmed_is_refused_and_left_as_it_was(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    _interrupt(run, 2)
    manifest = (run / "manifest.json").read_text()
    with pytest.raises(StudyError, match="have not all ended; first: python -m study resume"):
        confirm_study(run, show=False)
    shutil.copytree(finished_run, tmp_path / "other")
    with pytest.raises(StudyError, match=r"its search has no trial abc; python -m study status .*/other lists them"):
        confirm_study(tmp_path / "other", trials=["abc"], show=False)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    failed = [{"event": "trial_failed", "trial_id": name, "error": "why"} for name in load_trials(run)["trial_id"]]
    kept = [event for event in events if event["event"] != "epoch"]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in [*kept, *failed]))
    with pytest.raises(StudyError, match="nothing to confirm"):
        confirm_study(run, show=False)
    assert (run / "manifest.json").read_text() == manifest
    with pytest.raises(RunError, match="no such run"):
        confirm_study(tmp_path / "nowhere", show=False)


# ---- Setups


def test_setups_are_trained_and_reported_at_equal_epochs_and_equal_compute(
    tiny: tuple[str, ...], tmp_path: Path
) -> None:
    setups = ["plain", "saliency", "gradcam_control"]
    overrides = [
        *(word for word in tiny if not word.startswith("space.augmentation")), "early_stopping=none", "max_epochs=4",
        "equal_compute=true", "space.lr=[0.05]", "fixed.augmentation=none", f"space.setup=[{','.join(setups)}]",
        "space.seed=[0,1]", "keep_checkpoints=null",
    ]  # fmt: skip
    run = tmp_path / "setups"
    assert run_study(load_settings("demo", overrides), run, show=False)
    trials = load_trials(run)
    assert trials["status"].to_list() == ["completed"] * 10
    assert (trials["augmentation"] == "none").all()
    epochs = trials.groupby("setup")["max_epochs"].unique().map(sorted).to_dict()
    assert epochs == {"plain": [4], "saliency": [2, 4], "gradcam_control": [2, 4]}

    report = write_report([run], top=3).read_text()
    for text in ("At equal compute", "Saliency training does not improve accuracy.", "What can be claimed"):
        assert text in report
    markdown = (run / "report/report.md").read_text()
    for setup in setups:
        assert markdown.count(f"\n| {setup.replace('_', chr(92) + '_')} ") == 2
    decided = decide(load_measures(run), load_trials(run)).drop_duplicates("claim").set_index("claim")["verdict"]
    assert decided["Saliency training does not improve accuracy."] != "no data"
    assert decided["Augmentation improves generalization."] == "no data"
