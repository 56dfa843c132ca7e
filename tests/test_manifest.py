"""The manifest: what a study was begun with is read back, and what resumes is held against it."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import study
import trainables
from study.manifest import (
    Manifest,
    ManifestError,
    check_resumable,
    make_manifest,
    read_manifest,
    write_atomically,
    write_manifest,
)
from study.settings import Range, StudySettings, load_settings, preset_names
from study.space import list_trials

SETTINGS = StudySettings(
    space={"lr": [0.1, 1e-5], "optimizer": ["sgd", "muon"]}, fixed={"width": 8, "resolution": "16,32"}, max_epochs=4
)
OPTUNA = StudySettings(search="optuna", num_trials=5, space={"lr": Range(min=1e-4, max=0.1, log=True)})
RUN = Path("runs/mine")


def manifest_of(settings: StudySettings) -> Manifest:
    return make_manifest(settings, [] if settings.search == "optuna" else list_trials(settings))


def changed(settings: StudySettings, **values: Any) -> StudySettings:
    return StudySettings(**{**{name: getattr(settings, name) for name in StudySettings.model_fields}, **values})


@pytest.fixture
def begun() -> Manifest:
    return manifest_of(SETTINGS)


# ---- Written and read back


@pytest.mark.parametrize("name", [*preset_names(), "here", "optuna"])
def test_what_is_written_is_read_back(name, tmp_path):
    settings = {"here": SETTINGS, "optuna": OPTUNA}.get(name) or load_settings(name)
    before = manifest_of(settings)
    write_manifest(tmp_path, before)
    after = read_manifest(tmp_path)
    assert after == before
    assert check_resumable(after, manifest_of(settings), tmp_path, force=False) == []
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_trials_stand_there_in_their_order_under_their_ids(begun, tmp_path):
    write_manifest(tmp_path, begun)
    content = json.loads((tmp_path / "manifest.json").read_text())
    trials = list_trials(SETTINGS)
    assert [entry["trial_id"] for entry in content["trials"]] == [trial.key() for trial in trials]
    assert [entry["settings"] for entry in content["trials"]] == [trial.model_dump() for trial in trials]
    assert len({entry["trial_id"] for entry in content["trials"]}) == 4
    assert read_manifest(tmp_path).trials == tuple(trials)


def test_versions_are_those_that_run():
    versions = manifest_of(SETTINGS).versions
    assert versions == {name: version(name) for name in ("torch", "torchvision", "ray", "optuna", "numpy")}


# ---- Damage


def refused(run: Path) -> str:
    with pytest.raises(ManifestError) as error:
        read_manifest(run)
    message = str(error.value)
    assert message.startswith(f"{run}")
    assert message.isprintable()  # one line
    return message


Damage = Callable[[dict[str, Any]], Any]
MISSING = "what the study was begun with is not known"
OTHER = "was begun by another version of this project, go on with that one"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no code": (lambda m: m.pop("code"), MISSING),
    "no versions": (lambda m: m.pop("versions"), MISSING),
    "no settings": (lambda m: m.pop("settings"), MISSING),
    "no trials": (lambda m: m.pop("trials"), MISSING),
    "key that does not fit": (lambda m: m["trials"][1].update(trial_id="01234567"), OTHER),
    "settings that do not fit their key": (lambda m: m["trials"][0]["settings"].update(lr=0.3), OTHER),
    "setting that is unknown now": (lambda m: m["trials"][0]["settings"].update(shuffle=True), OTHER),
    "value that is not allowed now": (lambda m: m["trials"][0]["settings"].update(optimizer="lamb"), OTHER),
    "setting that is new": (lambda m: m["trials"][0]["settings"].pop("lr"), OTHER),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_manifest_is_refused_and_named(name, begun, tmp_path):
    damage, part = DAMAGES[name]
    write_manifest(tmp_path, begun)
    file = tmp_path / "manifest.json"
    content = json.loads(file.read_text())
    damage(content)
    file.write_text(json.dumps(content))
    message = refused(tmp_path)
    assert part in message
    if part == MISSING:
        assert message.startswith(f"{file}: damaged")
        assert name.removeprefix("no ") in message


UNSEEN: dict[str, Damage] = {
    "trials are null": lambda m: m.update(trials=None),
    "trial is null": lambda m: m["trials"].__setitem__(0, None),
    "trial without an id": lambda m: m["trials"][0].pop("trial_id"),
    "trial without settings": lambda m: m["trials"][0].pop("settings"),
    "settings of a trial are null": lambda m: m["trials"][0].update(settings=None),
    "code is a list": lambda m: m.update(code=[]),
    "versions are null": lambda m: m.update(versions=None),
    "settings are a list": lambda m: m.update(settings=[]),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_other_damage_is_refused_too(name, begun, tmp_path):
    write_manifest(tmp_path, begun)
    file = tmp_path / "manifest.json"
    content = json.loads(file.read_text())
    UNSEEN[name](content)
    file.write_text(json.dumps(content))
    refused(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", '{"code": {}, "versions": {}, "settings": {}, "trials": [', "[]", "3", "null"]
)
def test_manifest_that_is_cut_short_or_another_thing_is_refused(text, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    assert MISSING in refused(tmp_path)


def test_manifest_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_bytes(b'{"code": "\xff"}')
    assert MISSING in refused(tmp_path)


def test_missing_manifest_is_refused(tmp_path):
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path / 'manifest.json'}: damaged or missing (No such file or directory)")
    assert MISSING in message


# ---- What may go on


def forbidden(begun: Manifest, now: Manifest, force: bool) -> str:
    with pytest.raises(ManifestError) as error:
        check_resumable(begun, now, RUN, force)
    message = str(error.value)
    assert message.startswith(f"{RUN}: ")
    assert message.isprintable()
    return message


def test_nothing_changed_is_nothing_to_tell(begun):
    for force in (False, True):
        assert check_resumable(begun, manifest_of(SETTINGS), RUN, force) == []


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("data_dir", "/elsewhere", "study.yaml, data_dir None -> /elsewhere"),
        ("max_failures", 7, "study.yaml, max_failures 2 -> 7"),
        ("keep_checkpoints", 3, "study.yaml, keep_checkpoints 20 -> 3"),
        ("keep_checkpoints", None, "study.yaml, keep_checkpoints 20 -> None"),
    ],
)
def test_what_changes_no_result_may_change_and_is_told(name, value, told, begun):
    now = manifest_of(changed(SETTINGS, **{name: value}))
    for force in (False, True):
        assert check_resumable(begun, now, RUN, force) == [told]


def other_hash(manifest: Manifest, file: str) -> Manifest:
    return replace(manifest, code={**manifest.code, file: "0" * 12})


# What changes, and how it is told.
SERIOUS: dict[str, tuple[Callable[[], Manifest], str]] = {
    "device": (lambda: manifest_of(changed(SETTINGS, device="cpu")), "study.yaml, device auto -> cpu"),
    "cpus": (lambda: manifest_of(changed(SETTINGS, cpus_per_trial=2)), "study.yaml, cpus_per_trial None -> 2"),
    "gpus": (lambda: manifest_of(changed(SETTINGS, gpus_per_trial=0.5)), "study.yaml, gpus_per_trial None -> 0.5"),
    "code": (lambda: other_hash(manifest_of(SETTINGS), "trainables/train.py"), "trainables/train.py"),
    "space": (lambda: other_hash(manifest_of(SETTINGS), "study/space.py"), "study/space.py"),
    "new file": (lambda: other_hash(manifest_of(SETTINGS), "trainables/lamb.py"), "trainables/lamb.py"),
    "package": (
        lambda: replace(manifest_of(SETTINGS), versions={**manifest_of(SETTINGS).versions, "torch": "9.9.9"}),
        f"torch {version('torch')} -> 9.9.9",
    ),
}


@pytest.mark.parametrize("name", SERIOUS)
def test_what_may_change_results_is_refused_unless_forced(name, begun):
    change, told = SERIOUS[name]
    message = forbidden(begun, change(), force=False)
    assert f"this has changed: {told};" in message
    assert "go on all the same with --force" in message
    assert check_resumable(begun, change(), RUN, force=True) == [told]


def test_a_file_that_is_gone_is_a_change_too(begun):
    code = {name: value for name, value in begun.code.items() if name != "trainables/optim.py"}
    now = replace(begun, code=code)
    assert "this has changed: trainables/optim.py;" in forbidden(begun, now, force=False)
    assert check_resumable(begun, now, RUN, force=True) == ["trainables/optim.py"]


def test_harmless_changes_are_told_with_serious_ones_but_not_blamed(begun):
    now = manifest_of(changed(SETTINGS, device="cpu", max_failures=0))
    assert "max_failures" not in forbidden(begun, now, force=False)
    assert sorted(check_resumable(begun, now, RUN, force=True)) == [
        "study.yaml, device auto -> cpu",
        "study.yaml, max_failures 2 -> 0",
    ]


def test_many_changes_are_counted(begun):
    now = replace(begun, code=dict.fromkeys(begun.code, "0"))
    message = forbidden(begun, now, force=False)
    assert f" and {len(begun.code) - 5} more" in message
    assert message.count(".py") == 5
    assert check_resumable(begun, now, RUN, force=True) == list(begun.code)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("max_epochs", 5, "max_epochs 4 -> 5"),
        ("seed", 1, "seed 0 -> 1"),
        ("dataset", "cifar10", "dataset cifar100 -> cifar10"),
        ("train_size", 1000, "train_size None -> 1000"),
        ("val_fraction", 0.2, "val_fraction 0.1 -> 0.2"),
        ("early_stopping", "none", "early_stopping asha -> none"),
        ("grace_period", 2, "grace_period 1 -> 2"),
        ("reduction_factor", 2.0, "reduction_factor 3.0 -> 2.0"),
        ("search", "random", "search grid -> random"),
        ("num_trials", 3, "num_trials None -> 3"),
        ("space", {"lr": [0.1]}, "space {'lr': [0.1, 1e-05], 'optimizer': ['sgd', 'muon']} -> {'lr': [0.1]}"),
        ("fixed", {"width": 16}, "fixed {'width': 8, 'resolution': '16,32'} -> {'width': 16}"),
    ],
)
def test_what_makes_it_another_study_is_refused_also_if_forced(name, value, told, begun):
    extra = {"num_trials": 4} if name == "search" else {}
    now = manifest_of(changed(SETTINGS, **{name: value}, **extra))
    for force in (False, True):
        message = forbidden(begun, now, force)
        assert f"was begun as another study (study.yaml, {told}" in message
        assert "python -m study run" in message
        assert "--force" not in message


def test_other_trials_are_another_study(begun):
    for trials in (begun.trials[:-1], begun.trials[::-1], ()):
        message = forbidden(begun, replace(begun, trials=trials), force=True)
        assert "study.yaml lists other trials, or in another order" in message


def test_another_study_is_said_before_what_could_be_forced(begun):
    now = manifest_of(changed(SETTINGS, device="cpu", seed=1))
    message = forbidden(begun, now, force=False)
    assert "seed 0 -> 1" in message
    assert "device" not in message


@pytest.mark.parametrize("num_trials", [3, 8])
def test_a_search_that_chooses_as_it_goes_may_have_more_or_fewer_trials(num_trials):
    begun, now = manifest_of(OPTUNA), manifest_of(changed(OPTUNA, num_trials=num_trials))
    assert check_resumable(begun, now, RUN, force=False) == [f"study.yaml, num_trials 5 -> {num_trials}"]


def test_a_random_search_may_not_have_more_trials():
    random = changed(OPTUNA, search="random")
    now = manifest_of(changed(random, num_trials=6))
    assert "num_trials 5 -> 6" in forbidden(manifest_of(random), now, force=True)


# ---- The code that decides results


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources, which the manifest takes for the ones that run."""
    for package in (trainables, study):
        copied = tmp_path / package.__name__
        shutil.copytree(package.__path__[0], copied, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(package, "__path__", [str(copied)])
    return tmp_path


def test_code_is_all_that_trains_and_what_chooses_and_stops(begun):
    names = {f"trainables/{file.name}" for file in Path(trainables.__path__[0]).glob("*.py")}
    assert {"trainables/train.py", "trainables/tune_trial.py", "trainables/settings.py"} <= names
    assert set(begun.code) == names | {"study/space.py", "study/asha.py", "explain/maps.py"}
    assert all(len(value) == 12 for value in begun.code.values())


def test_code_is_known_by_what_it_says_not_by_where_it_lies(begun, sources):
    assert manifest_of(SETTINGS).code == begun.code


@pytest.mark.parametrize("name", ["trainables/augment.py", "study/space.py", "study/asha.py"])
def test_code_that_decides_results_is_seen_to_change(name, begun, sources):
    with (sources / name).open("a") as out:
        out.write("# another line\n")
    assert begun.changes(manifest_of(SETTINGS)) == {name: name}


def test_code_that_decides_nothing_may_change(begun, sources):
    for name in ("study/progress.py", "study/run.py", "study/presets/demo.yaml"):
        with (sources / name).open("a") as out:
            out.write("# another line\n")
    assert begun.changes(manifest_of(SETTINGS)) == {}


def test_files_that_come_and_go_are_seen(begun, sources):
    (sources / "trainables/lamb.py").touch()
    (sources / "trainables/shapes.py").unlink()
    assert set(begun.changes(manifest_of(SETTINGS))) == {"trainables/lamb.py", "trainables/shapes.py"}


# ---- Atomic writing


def test_a_file_is_written_and_written_again(tmp_path):
    file = tmp_path / "a.txt"
    for text in ("one", "zwei, ä", ""):
        write_atomically(file, text)
        assert file.read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_the_old_file_stays_if_writing_fails(step, tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    write_atomically(file, "old")
    monkeypatch.setattr(f"study.manifest.os.{step}", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new")
    assert file.read_text() == "old"


def test_a_file_that_was_not_there_is_not_there_if_writing_fails(tmp_path):
    file = tmp_path / "a.txt"
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "begins well, ends with \ud800")
    assert not file.exists()


def test_what_is_written_is_on_disk_before_it_takes_the_place(tmp_path, monkeypatch):
    steps = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(f"study.manifest.os.{name}", lambda *a, n=name, f=real: (steps.append(n), f(*a)))
    write_atomically(tmp_path / "a.txt", "new")
    assert steps == ["fsync", "replace"]
