"""Settings of trials and studies: what is read, what is refused and in which words, and the list of trials."""

import itertools
import math
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from study.settings import PRESETS, Range, SettingsError, StudySettings, load_settings, preset_names
from study.space import fixed_settings, list_trials, optuna_space
from trainables import TrialSettings

RANDOM = ("search=random", "num_trials=3")


def refused(preset: str | Path, *overrides: str) -> str:
    with pytest.raises(SettingsError) as error:
        load_settings(str(preset), overrides)
    return str(error.value)


def write(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


# ---- One trial


def test_trial_defaults_are_those_of_the_documentation():
    settings = TrialSettings()
    assert (settings.optimizer, settings.lr, settings.weight_decay, settings.batch_size) == ("sgd", 0.1, 5e-4, 128)
    assert (settings.schedule, settings.warmup_epochs, settings.augmentation) == ("wsd", 0.5, "flip+crop")
    assert (settings.width, settings.dropout, settings.normalize, settings.seed) == (64, 0.0, True, 0)


def test_trial_settings_are_frozen():
    settings = TrialSettings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.lr = 1.0


REFUSED = {
    "optimizer": ["adamax", None],
    "lr": [0, 100.1, "0.1", math.nan, math.inf, True],
    "weight_decay": [-1e-9, 1.1],
    "batch_size": [1, 2.0, 65537],
    "max_epochs": [0, 1.5],
    "schedule": ["step"],
    "warmup_epochs": [-0.1, 10.5],  # there are 10 epochs
    "augmentation": ["crop+flip"],
    "normalize": [1, "yes"],
    "dropout": [-0.1, 1],
    "width": [0, 1025],
    "precision": ["fp8"],
    "setup": ["cam", None],
    "seed": [-1, 2**31],
    "learning_rate": [0.1],
}
TAKEN = {
    "lr": [1e-12, 100],
    "weight_decay": [0, 1],
    "batch_size": [2, 65536],
    "max_epochs": [1, 100_000],
    "warmup_epochs": [0, 10],
    "dropout": [0, 0.999],
    "width": [1, 1024],
    "seed": [0, 2**31 - 1],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_trial_refuses(name, value):
    with pytest.raises(ValidationError) as error:
        TrialSettings(**{name: value})
    assert name in str(error.value)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in TAKEN.items() for value in values])
def test_trial_takes_the_ends_of_its_ranges(name, value):
    assert getattr(TrialSettings(**{name: value}), name) == value


def test_key_is_stable_and_the_same_for_the_same_settings():
    assert TrialSettings().key() == TrialSettings(lr=0.1, seed=0).key()
    assert TrialSettings(lr=1).key() == TrialSettings(lr=1.0).key()
    assert TrialSettings(width=8, lr=0.1).key() == TrialSettings(lr=0.1, width=8).key()
    assert re.fullmatch("[0-9a-f]{10}", TrialSettings().key())
    # Runs are found again by their keys: whoever changes this makes every earlier run unresumable.
    assert TrialSettings().key() == "06d40e6a42"


def test_key_differs_with_every_setting():
    other = {"optimizer": "adam", "lr": 0.2, "weight_decay": 0.0, "batch_size": 64, "max_epochs": 11, "dropout": 0.5}
    other |= {"schedule": "cosine", "warmup_epochs": 1.0, "augmentation": "none", "normalize": False, "width": 32}
    other |= {"precision": "fp32", "seed": 1, "resolution": "16,32", "ema_decay": 0.9, "label_smoothing": 0.1}
    other |= {"cutout": 8, "setup": "gradcam"}
    assert set(other) == set(TrialSettings.model_fields)
    keys = {TrialSettings(**{name: value}).key() for name, value in other.items()} | {TrialSettings().key()}
    assert len(keys) == len(other) + 1


@pytest.mark.parametrize("setup", ["plain", "saliency", "saliency_control", "gradcam", "gradcam_control"])
def test_setups_other_than_augmentation_are_without_it_unless_told(setup):
    assert TrialSettings(setup=setup).augmentation == "none"
    assert TrialSettings(setup=setup) == TrialSettings(setup=setup, augmentation="none")
    if setup != "plain":
        assert TrialSettings(setup=setup, augmentation="flip", cutout=4).augmentation == "flip"


def test_setup_augmentation_is_the_default_and_augments():
    assert TrialSettings() == TrialSettings(setup="augmentation") == TrialSettings(augmentation="flip+crop")
    assert TrialSettings(augmentation="none").setup == "augmentation"


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"augmentation": "flip"}, "augmentation flip"),
        ({"augmentation": "flip+crop"}, "augmentation flip[+]crop"),
        ({"cutout": 8}, "cutout 8"),
        ({"augmentation": "crop", "cutout": 8}, "cutout 8"),
    ],
)
def test_plain_with_augmentation_is_refused(given, what):
    message = f"setup plain is without augmentation, but {what} was given: take setup augmentation"
    with pytest.raises(ValidationError, match=message):
        TrialSettings(setup="plain", **given)


def test_settings_with_a_setup_are_read_again_as_they_were_written():
    for setup in ("plain", "gradcam", "augmentation"):
        settings = TrialSettings(setup=setup)
        assert TrialSettings(**settings.model_dump()) == settings


# ---- Spaces


def test_a_random_search_need_not_list_a_space_that_is_large():
    values = {name: list(range(1, 11)) for name in ("width", "cutout")} | {"lr": [2.0**-i for i in range(10)]}
    values |= {name: [i / 20 for i in range(10)] for name in ("dropout", "label_smoothing", "weight_decay")}
    values |= {"warmup_epochs": [i / 10 for i in range(10)], "seed": list(range(1000))}
    settings = StudySettings(dataset="shapes100", space=values, search="random", num_trials=20)
    assert settings.space_size() == 10**10
    trials = list_trials(settings)
    assert len({trial.key() for trial in trials}) == 20
    assert trials == list_trials(settings)


# ---- Presets and overrides


def test_all_presets_load_and_list_their_trials():
    assert preset_names() == ["cifar100", "demo", "setups"]
    for name in preset_names():
        settings = load_settings(name)
        again = 20 if name == "setups" else 0  # for equal compute
        assert len(list_trials(settings)) == settings.space_size() + again > 1
        assert load_settings(str(PRESETS / f"{name}.yaml")) == settings


def test_reference_preset_is_the_study_it_describes():
    settings = load_settings("cifar100")
    assert (settings.dataset, settings.max_epochs, settings.space_size()) == ("cifar100", 30, 24)
    assert settings.fixed == {
        "width": 64,
        "batch_size": 128,
        "weight_decay": 5e-4,
        "schedule": "wsd",
        "ema_decay": 0.98,
    }


def test_file_without_a_setting_takes_its_default(tmp_path):
    settings = load_settings(str(write(tmp_path / "my.yaml", "seed: 4\n")))
    assert settings == StudySettings(seed=4)


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("max_epochs=5", "max_epochs", 5),
        (" max_epochs = 5 ", "max_epochs", 5),
        ("train_size=null", "train_size", None),
        ("data_dir=/a/b=c", "data_dir", "/a/b=c"),
        ("val_fraction=1e-1", "val_fraction", 0.1),
        ("reduction_factor=2", "reduction_factor", 2.0),
        ("early_stopping=none", "early_stopping", "none"),
        ("gpus_per_trial=.5", "gpus_per_trial", 0.5),
        ("space={lr: [0.1]}", "space", {"lr": [0.1]}),
    ],
)
def test_override_sets_a_value(override, name, value):
    settings = load_settings("demo", [override])
    assert getattr(settings, name) == value
    others = {n: v for n, v in settings.model_dump().items() if n != name}
    assert others == {n: v for n, v in load_settings("demo").model_dump().items() if n != name}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1E-3", 1e-3), ("2e1", 20.0), ("1.5e-2", 0.015), (".5e-1", 0.05), ("0.25", 0.25), ("3", 3)],
)
def test_floats_are_those_of_yaml_1_2(text, value, tmp_path):
    assert load_settings("demo", [f"fixed.lr={text}"]).fixed["lr"] == value
    assert load_settings("demo", [f"space.lr=[{text}]"]).space["lr"] == [value]
    assert load_settings(str(write(tmp_path / "my.yaml", f"fixed:\n  lr: {text}\n"))).fixed == {"lr": value}


@pytest.mark.parametrize("text", ["e5", "1e", "1e5x", "5e-3-2"])
def test_words_that_resemble_floats_stay_words(text):
    assert load_settings("demo", [f"data_dir={text}"]).data_dir == text


def test_later_override_wins():
    assert load_settings("demo", ["seed=1", "seed=2"]).seed == 2


def test_what_is_fixed_leaves_the_space_and_the_other_way_round():
    demo = load_settings("demo")
    assert ("lr" in demo.space, "width" in demo.fixed) == (True, True)
    fixed = load_settings("demo", ["fixed.lr=0.05"])
    assert fixed.fixed == {**demo.fixed, "lr": 0.05}
    assert fixed.space == {name: values for name, values in demo.space.items() if name != "lr"}
    varied = load_settings("demo", ["space.width=[8,16]"])
    assert varied.space == {**demo.space, "width": [8, 16]}
    assert varied.fixed == {"batch_size": 32}
    assert load_settings("demo", ["fixed.lr=0.05", "space.lr=[0.1]"]).space["lr"] == [0.1]


def test_range_may_be_given_by_its_ends(tmp_path):
    wanted = Range(min=0.01, max=0.1, log=True)
    assert load_settings("demo", ["space.lr={min: 0.01, max: 1e-1, log: true}", *RANDOM]).space["lr"] == wanted
    file = write(tmp_path / "my.yaml", "search: random\nnum_trials: 2\nfixed: {lr: 0.1, width: 8}\n")
    settings = load_settings(str(file), ["space.lr.min=0.01", "space.lr.max=0.1", "space.lr.log=true"])
    assert settings.space == {"lr": wanted}
    assert settings.fixed == {"width": 8}


def test_space_may_stand_empty_in_the_file(tmp_path):
    file = write(tmp_path / "my.yaml", "space:\nfixed:\n  # width: 8\n")
    assert load_settings(str(file)).space == {}
    settings = load_settings(str(file), ["space.lr=[0.1]", "fixed.width=8"])
    assert (settings.space, settings.fixed) == ({"lr": [0.1]}, {"width": 8})


def test_yaml_merge_keys_work(tmp_path):
    file = write(tmp_path / "my.yaml", "fixed:\n  <<: {lr: 0.1, width: 4}\n  width: 8\n")
    assert load_settings(str(file)).fixed == {"lr": 0.1, "width": 8}


# ---- What is refused, and in which words

# Overrides, and what the message must hold besides "command line".
BAD = [
    (["max_epochs=0"], ["max_epochs", " 0 ", "greater than or equal to 1"]),
    (["max_epochs=1000000"], ["max_epochs", "1000000", "less than or equal to 100000"]),
    (["max_epochs=five"], ["max_epochs", "'five'", "valid integer"]),
    (["max_epochs=2.5"], ["max_epochs", "2.5", "valid integer"]),
    (["max_epochs=true"], ["max_epochs", "True", "valid integer"]),
    (["max_epochs="], ["max_epochs", "None", "valid integer"]),
    (["max_epochs=[1]"], ["max_epochs", "[1]", "valid integer"]),
    (
        ["dataset=cifar"],
        ["dataset", "'cifar'", "'shapes100-scene', 'cifar100', 'cifar10' or 'folder'", "mean cifar10?"],
    ),
    (["search=gird"], ["search", "'gird'", "'grid', 'random' or 'optuna'", "did you mean grid?"]),
    (["early_stopping=asho"], ["early_stopping", "'asho'", "'asha' or 'none'", "did you mean asha?"]),
    (["device=5"], ["device", "5", "'cuda' or 'mps'"]),
    (["val_fraction=1"], ["val_fraction", "1", "less than 1"]),
    (["val_fraction=.nan"], ["val_fraction", "nan", "finite number"]),
    (["train_size=3"], ["train_size", "3", "greater than or equal to 4"]),
    (["seed=-1"], ["seed", "-1", "greater than or equal to 0"]),
    (["seed=2147483648"], ["seed", "less than 2147483648"]),
    (["grace_period=0"], ["grace_period", "0", "greater than or equal to 1"]),
    (["grace_period=7"], ["grace_period (7)", "max_epochs (5)"]),
    (["reduction_factor=1"], ["reduction_factor", "1", "greater than 1"]),
    (["cpus_per_trial=0"], ["cpus_per_trial", "0", "greater than or equal to 1"]),
    (["gpus_per_trial=-1"], ["gpus_per_trial", "-1", "greater than or equal to 0"]),
    (["max_failures=-1"], ["max_failures", "-1", "greater than or equal to 0"]),
    (["num_trials=0"], ["num_trials", "0", "greater than or equal to 1"]),
    (["num_trials=99"], ["num_trials is 99", "8 combinations"]),
    (["search=random"], ["num_trials is needed", "search: random"]),
    (["search=optuna"], ["num_trials is needed", "search: optuna"]),
    (["search=optuna", "num_trials=5", "space={}"], ["suggests values of the space", "space.NAME"]),
    # Names
    (["maxepochs=3"], ["maxepochs", "did you mean max_epochs?"]),
    (["xyzzy=3"], ["xyzzy", "known are dataset, data_dir, train_size"]),
    (["a.b.c=3"], ["a ", "known are dataset"]),
    (["lr=0.1"], ["lr is a hyperparameter", "space.lr=[...]", "fixed.lr=..."]),
    (["space.lrr=[0.1]"], ["space.lrr", "did you mean lr?"]),
    (["fixed.learning_rate=0.1"], ["fixed.learning_rate", "did you mean lr?"]),
    (["space.learning_rate=0.1"], ["space.learning_rate is not a hyperparameter", "did you mean lr?"]),
    (["fixed.zzz=0.1"], ["fixed.zzz", "known are optimizer, lr, weight_decay"]),
    # Values of hyperparameters
    (["fixed.optimizer=adamax"], ["fixed.optimizer", "'adamax'", "'adam', 'adamw' or 'muon'", "did you mean adam?"]),
    (["fixed.lr=-1"], ["fixed.lr", "-1", "greater than 0"]),
    (["fixed.lr=101"], ["fixed.lr", "101", "less than or equal to 100"]),
    (["fixed.lr=high"], ["fixed.lr", "'high'", "valid number"]),
    (["fixed.lr=.inf"], ["fixed.lr", "inf", "finite number"]),
    (["fixed.lr=.nan"], ["fixed.lr", "nan", "finite number"]),
    (["fixed.lr=null"], ["fixed.lr", "None", "a number, a word, true or false"]),
    (["fixed.lr=[0.1]"], ["fixed.lr", "[0.1]", "a number, a word, true or false"]),
    (["fixed.batch_size=1"], ["fixed.batch_size", "1", "greater than or equal to 2"]),
    (["fixed.batch_size=1.5"], ["fixed.batch_size", "1.5", "valid integer"]),
    (["fixed.normalize=1"], ["fixed.normalize", "1", "valid boolean"]),
    (["fixed.precision=fp61"], ["fixed.precision", "'fp61'", "'auto', 'bf16', 'fp16' or 'fp32'"]),
    (["fixed.warmup_epochs=7"], ["warmup_epochs (7)", "max_epochs (5)"]),
    # The space
    (["space.lr=[-1]"], ["space.lr", "-1", "greater than 0"]),
    (["space.augmentation=[none,flop]"], ["space.augmentation", "'flop'", "did you mean flip?"]),
    (["space.lr=[true]"], ["space.lr", "True", "valid number"]),
    (["space.lr=[]"], ["space.lr", "empty"]),
    (["space.lr=[0.1,1e-1]"], ["space.lr", "twice", "[0.1, 0.1]"]),
    (["space.lr=0.1"], ["space.lr", "0.1 ", "list of values", "range {min"]),
    (["space.lr=low"], ["space.lr", "'low'", "list of values", "range {min"]),
    (["space.lr=null"], ["space.lr", "None", "list of values", "range {min"]),
    (["space.lr=[[0.1]]"], ["space.lr", "[0.1]", "list of values"]),
    (["space.lr=[null]"], ["space.lr", "None", "list of values"]),
    # Ranges
    (["space.lr={min: 0.1, max: 1}"], ["space.lr", "grid", "search: random"]),
    (["space.lr={min: 0.1, max: 0.01}", *RANDOM], ["space.lr", "min (0.1) must be below max (0.01)"]),
    (["space.lr={min: 0.1, max: 0.1}", *RANDOM], ["space.lr", "min (0.1) must be below max (0.1)"]),
    (["space.dropout={min: 0, max: 0.5, log: true}", *RANDOM], ["space.dropout", "min (0) must be above 0"]),
    (["space.lr={min: 0.1}", *RANDOM], ["space.lr", "max"]),
    (["space.lr={min: 0.1, max: 1, lag: true}", *RANDOM], ["space.lr", "lag", "{min: ..., max: ..., log: true}"]),
    (["space.lr={min: a, max: 1}", *RANDOM], ["space.lr", "'a'"]),
    (["space.lr={min: 1, max: 1000}", *RANDOM], ["space.lr", "1000", "less than or equal to 100"]),
    (["space.optimizer={min: 1, max: 2}", *RANDOM], ["space.optimizer", "not a number"]),
    (["space.normalize={min: 0, max: 1}", *RANDOM], ["space.normalize", "not a number"]),
    (["space.batch_size={min: 8.5, max: 16}", *RANDOM], ["space.batch_size", "whole numbers"]),
    (["space.batch_size={min: 1, max: 16}", *RANDOM], ["space.batch_size", "1", "greater than or equal to 2"]),
    # Not mappings
    (["space=3"], ["space", "3", "mapping"]),
    (["space=[1,2]"], ["space", "[1, 2]", "mapping"]),
    (["fixed=3"], ["fixed", "3", "mapping"]),
    (["fixed=word"], ["fixed", "'word'", "mapping"]),
]


@pytest.mark.parametrize(("overrides", "parts"), BAD, ids=[" ".join(overrides[:1]) for overrides, _ in BAD])
def test_bad_override_is_refused(overrides, parts):
    message = refused("demo", *overrides)
    assert message.startswith("command line: ")
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("part", ["fixed.max_epochs=3", "space.max_epochs=[3]"])
def test_epochs_are_no_hyperparameter_and_no_other_is_suggested(part):
    message = refused("demo", part)
    assert "max_epochs is not a hyperparameter: the study sets it for all; write max_epochs=..." in message
    assert "did you mean warmup_epochs" not in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("max_epochs", ["key=value", "max_epochs=5"]),
        ("=3", ["key=value"]),
        (" =3", ["key=value"]),
        ("max_epochs=[1", ["not readable as YAML", "line 1"]),
        ("max_epochs=\t3", ["not readable as YAML", "\\t"]),
        ("space={lr: [1], lr: [2]}", ["not readable as YAML", "lr stands there twice"]),
        ("space={[1]: 2}", ["not readable as YAML"]),
        ("data_dir=2024-13-45", ["not readable as YAML", "month"]),
        ("max_epochs=0x_", ["not readable as YAML"]),
        ("data_dir=!!python/name:os.system", ["not readable as YAML"]),
        ("seed.x=3", ["seed is a single value", "no x"]),
    ],
)
def test_malformed_override_is_refused_and_quoted(override, parts):
    message = refused("demo", override)
    assert repr(override) in message
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("max_epochs: 0\n", ["max_epochs", " 0 ", "greater than or equal to 1"]),
        ("maxepochs: 3\n", ["maxepochs", "did you mean max_epochs?"]),
        ("lr: 0.1\n", ["lr is a hyperparameter", "space.lr", "fixed.lr"]),
        ("fixed: {optimizer: adamax}\n", ["fixed.optimizer", "'adamax'", "did you mean adam?"]),
        ("fixed: {learning_rate: 0.1}\n", ["fixed.learning_rate", "did you mean lr?"]),
        ("space: {lr: []}\n", ["space.lr", "empty"]),
        ("space: {lr: [0.1]}\nfixed: {lr: 0.1}\n", ["lr", "both space and fixed"]),
        ("space: [lr]\n", ["space", "['lr']", "mapping"]),
        ("fixed: {1: 2}\n", ["fixed", "1"]),
        ("search: random\n", ["num_trials is needed"]),
        ("- seed\n", ["mapping", "list"]),
        ("seed\n", ["mapping", "str"]),
        ("[]\n", ["mapping", "list"]),
        ("false\n", ["mapping", "bool"]),
        ("", ["mapping"]),
        ("# seed: 1\n", ["mapping"]),
        ("seed: 1\nseed: 2\n", ["line 2", "seed stands there twice"]),
        ("space:\n  lr: [1]\n  lr: [2]\n", ["line 3", "lr stands there twice"]),
        ("space:\n\tlr: [1]\n", ["line 2", "\\t"]),
        ("space: {lr: [1\n", ["line 2"]),
        ("seed: 1\n---\nseed: 2\n", ["another document"]),
        ("seed: !!python/object/apply:os.getcwd []\n", ["line 1", "python/object/apply"]),
        ("1: 2\n", ["words"]),
        ("? [a]\n: 1\n", ["not readable as YAML"]),
        ("data_dir: 2024-13-45\n", ["not readable as YAML", "month"]),
    ],
)
def test_bad_file_is_refused_and_named(text, parts, tmp_path):
    file = write(tmp_path / "my.yaml", text)
    message = refused(file)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "my.yaml").write_bytes(b"device: \xff\n")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("my.yaml", "folder.yaml"):
        assert refused(tmp_path / name).startswith(f"{tmp_path / name}: not readable as YAML")


def test_unknown_preset_is_refused_with_the_nearest_name(tmp_path):
    assert "no preset 'dmo' (did you mean demo?)" in refused("dmo")
    for preset in ("zzz", "", str(tmp_path / "nowhere.yaml")):
        message = refused(preset)
        assert f"no preset {preset!r}" in message
        assert "known are cifar100, demo, setups" in message
        assert ".yaml file" in message


def test_each_error_is_said_once_with_its_own_place(tmp_path):
    file = write(tmp_path / "my.yaml", "seed: -1\ndevice: 3\n")
    lines = refused(file, "max_epochs=0", "val_fraction=2").splitlines()
    assert sorted(line.split(": ")[1] for line in lines) == ["device", "max_epochs", "seed", "val_fraction"]
    for line in lines:
        place = "command line" if "max_epochs" in line or "val_fraction" in line else str(file)
        assert line.startswith(f"{place}: ")


@pytest.mark.parametrize(
    ("text", "override", "part"),
    [
        ("grace_period: 5\nmax_epochs: 9\n", "max_epochs=2", "grace_period (5)"),
        ("fixed: {warmup_epochs: 5}\nmax_epochs: 9\n", "max_epochs=2", "warmup_epochs (5)"),
        ("search: random\nnum_trials: 2\nspace: {lr: {min: 1, max: 2}}\n", "search=grid", "space.lr is a range"),
    ],
)
def test_override_that_contradicts_the_file_is_blamed(text, override, part, tmp_path):
    message = refused(write(tmp_path / "my.yaml", text), override)
    assert message.startswith("command line: ")
    assert part in message


@pytest.mark.parametrize(
    "text", ["device: 3\n", "xyzzy: 3\n", "fixed: {zzz: 3}\n", "fixed: {lr: -1}\n", "grace_period: 5\nmax_epochs: 2\n"]
)
@pytest.mark.parametrize("override", ["seed=1", "fixed.width=8", "space.dropout=[0.1]"])
def test_override_that_is_right_is_not_blamed(text, override, tmp_path):
    file = write(tmp_path / "my.yaml", text)
    assert refused(file, override).startswith(f"{file}: ")


@pytest.mark.parametrize("name", ["max_epochs", "seed", "space"])
def test_study_settings_are_frozen(name):
    settings = load_settings("demo")
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings, name, 3)


@pytest.mark.parametrize(
    ("overrides", "where", "what"),
    [
        (["fixed={setup: plain, augmentation: flip}", "space={lr: [0.1]}"], "fixed", "augmentation flip"),
        (["fixed={setup: plain, cutout: 8}", "space={}"], "fixed", "cutout 8"),
        (["fixed={setup: plain}", "space={augmentation: [none, flip]}"], "space and fixed", "augmentation flip"),
        (["fixed={cutout: 4}", "space={setup: [gradcam, plain]}"], "space and fixed", "cutout 4"),
        (["fixed={}", "space={setup: [gradcam, plain], cutout: [0, 8]}"], "space and fixed", "cutout 8"),
        (["fixed={setup: plain}", "space={cutout: {min: 0, max: 6}}", *RANDOM], "space and fixed", "cutout 6"),
    ],
)
def test_plain_and_augmentation_contradict_each_other_across_space_and_fixed(overrides, where, what):
    wanted = f"setup plain is without augmentation, but {what} was given: take setup augmentation"
    assert refused("demo", *overrides) == f"command line: {where}: {wanted}"


def test_setups_may_vary_beside_what_does_not_contradict_them():
    demo = ["fixed={augmentation: none}", "space={setup: [plain, augmentation, gradcam]}"]
    assert {trial.augmentation for trial in list_trials(load_settings("demo", demo))} == {"none"}
    trials = list_trials(load_settings("demo", ["fixed={}", "space={setup: [plain, augmentation, saliency]}"]))
    assert {trial.setup: trial.augmentation for trial in trials} == {
        "plain": "none",
        "augmentation": "flip+crop",
        "saliency": "none",
    }


@pytest.mark.parametrize(
    "overrides",
    [["search=optuna", "num_trials=3", "early_stopping=none"], ["early_stopping=asha"]],
    ids=["optuna", "asha"],
)
def test_equal_compute_needs_a_list_of_trials_that_run_to_their_end(overrides):
    message = refused("demo", "equal_compute=true", *overrides)
    assert message == "command line: equal_compute needs search grid or random, and early_stopping: none"


# ---- The list of trials

SPACE = {"optimizer": ["sgd", "adam"], "lr": [0.1, 0.01, 0.001], "width": [4, 8]}


def varied(trials: list[TrialSettings]) -> list[tuple]:
    return [tuple(getattr(trial, name) for name in SPACE) for trial in trials]


def test_grid_lists_every_combination_once():
    settings = StudySettings(space=SPACE, fixed={"dropout": 0.5}, max_epochs=7, seed=3)
    trials = list_trials(settings)
    assert sorted(varied(trials)) == sorted(itertools.product(*SPACE.values()))
    assert {(trial.dropout, trial.max_epochs, trial.seed) for trial in trials} == {(0.5, 7, 3)}
    assert len({trial.key() for trial in trials}) == 12


def test_seed_may_be_fixed_or_varied_by_itself():
    assert fixed_settings(StudySettings(seed=3)) == {"seed": 3, "max_epochs": 30}
    assert fixed_settings(StudySettings(seed=3, fixed={"seed": 5}))["seed"] == 5
    trials = list_trials(StudySettings(seed=3, space={"seed": [0, 1, 2]}))
    assert sorted(trial.seed for trial in trials) == [0, 1, 2]


EQUAL = {"equal_compute": True, "early_stopping": "none", "max_epochs": 16}


@pytest.mark.parametrize("search", [{"search": "grid"}, {"search": "random", "num_trials": 4}])
def test_equal_compute_lists_costly_setups_again_with_the_epochs_worked_out_by_hand(search):
    space = {"setup": ["plain", "augmentation", "saliency", "gradcam"]}
    trials = list_trials(StudySettings(space=space, seed=5, **search, **EQUAL))
    alone = list_trials(StudySettings(space=space, seed=5, **search, early_stopping="none", max_epochs=16))
    assert trials[:4] == alone
    epochs = {"saliency": 6, "gradcam": 8}
    costly = [trial for trial in alone if trial.setup in epochs]
    assert trials[4:] == [TrialSettings(**{**t.model_dump(), "max_epochs": epochs[t.setup]}) for t in costly]
    assert len(trials) == len({trial.key() for trial in trials}) == 6


def test_shorter_trials_must_have_an_epoch_for_each_size_and_for_the_warmup():
    def epochs(**fixed: object) -> list[int]:
        trials = list_trials(StudySettings(fixed={"setup": "saliency", **fixed}, **EQUAL))
        assert [TrialSettings(**trial.model_dump()) for trial in trials] == trials  # still valid
        return [trial.max_epochs for trial in trials]

    assert epochs() == epochs(resolution="12,14,16,18,20,22") == epochs(warmup_epochs=6.0) == [16, 6]
    for fixed in ({"resolution": "12,14,16,18,20,22,24,26"}, {"warmup_epochs": 6.5}):
        with pytest.raises(SettingsError, match="equal_compute leaves saliency 6 epochs, too few for its resolutions"):
            epochs(**fixed)


def test_a_random_search_over_a_large_grid_takes_little_memory():
    space = {name: [i / 100 for i in range(1, 11)] for name in ("lr", "weight_decay", "dropout", "label_smoothing")}
    space["seed"], space["batch_size"] = list(range(10)), list(range(11, 21))
    trials = list_trials(StudySettings(search="random", num_trials=5, space=space))  # of a million
    assert len({trial.key() for trial in trials}) == 5
    values = {name: {getattr(trial, name) for trial in trials} for name in space}
    assert all(found <= set(space[name]) for name, found in values.items())
    assert all(len(found) > 1 for found in values.values())


def test_setups_that_cost_what_plain_costs_are_not_listed_again():
    trials = list_trials(StudySettings(space={"setup": ["plain", "augmentation"]}, **EQUAL))
    assert [trial.max_epochs for trial in trials] == [16, 16]
    one = StudySettings(fixed={"setup": "gradcam"}, **{**EQUAL, "max_epochs": 1})
    assert len(list_trials(one)) == 1  # less than an epoch there is not


def test_preset_of_setups_lists_six_setups_of_five_seeds_and_four_of_them_again():
    trials = list_trials(load_settings("setups"))
    counts = {(t.setup, t.max_epochs): 0 for t in trials}
    for trial in trials:
        counts[trial.setup, trial.max_epochs] += 1
    whole = dict.fromkeys(((setup, 16) for setup in TrialSettings.model_fields["setup"].annotation.__args__), 5)
    shorter = {("saliency", 6): 5, ("saliency_control", 8): 5, ("gradcam", 8): 5, ("gradcam_control", 8): 5}
    assert counts == whole | shorter
    assert len({trial.key() for trial in trials}) == len(trials) == 50
    assert {(trial.setup == "augmentation", trial.augmentation) for trial in trials} == {
        (True, "flip+crop"),
        (False, "none"),
    }


def test_empty_space_is_one_trial():
    assert list_trials(StudySettings(fixed={"lr": 0.2}, max_epochs=4)) == [TrialSettings(lr=0.2, max_epochs=4)]


@pytest.mark.parametrize("search", ["grid", "random"])
def test_order_of_a_finite_space_is_seeded(search):
    orders = [
        varied(list_trials(StudySettings(space=SPACE, seed=seed, search=search, num_trials=12))) for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    assert orders[0] != list(itertools.product(*SPACE.values()))


@pytest.mark.parametrize("search", ["grid", "random"])
@pytest.mark.parametrize("count", [1, 5, 12])
def test_number_of_trials_is_honoured_without_repetition(search, count):
    chosen = varied(list_trials(StudySettings(space=SPACE, search=search, num_trials=count)))
    assert len(set(chosen)) == len(chosen) == count
    assert chosen == varied(list_trials(StudySettings(space=SPACE)))[:count]


def random_study(space: dict, num_trials: int, seed: int = 0) -> StudySettings:
    ranges = {name: Range(**values) if isinstance(values, dict) else values for name, values in space.items()}
    return StudySettings(search="random", num_trials=num_trials, seed=seed, space=ranges)


def test_random_draws_stay_in_their_ranges_and_differ():
    space = {
        "lr": {"min": 1e-4, "max": 1, "log": True},
        "dropout": {"min": 0.2, "max": 0.6},
        "batch_size": {"min": 8, "max": 11},
        "width": {"min": 4, "max": 64, "log": True},
        "optimizer": ["sgd", "adam"],
    }
    trials = list_trials(random_study(space, 400))
    assert len({trial.key() for trial in trials}) == len(trials) == 400
    assert {trial.batch_size for trial in trials} == {8, 9, 10, 11}
    assert {trial.optimizer for trial in trials} == {"sgd", "adam"}
    assert all(1e-4 <= trial.lr <= 1 and 0.2 <= trial.dropout <= 0.6 and 4 <= trial.width <= 64 for trial in trials)
    # A quarter of the logarithms lies in each decade, a quarter of the widths in each octave, half below the middle.
    assert all(70 < sum(10.0**d <= trial.lr < 10.0 ** (d + 1) for trial in trials) < 130 for d in range(-4, 0))
    assert 70 < sum(16 <= trial.width < 32 for trial in trials) < 130
    assert 160 < sum(trial.dropout < 0.4 for trial in trials) < 240


def test_random_draws_are_seeded():
    space = {"lr": {"min": 1e-4, "max": 1, "log": True}}
    lists = [[trial.lr for trial in list_trials(random_study(space, 5, seed))] for seed in (0, 0, 1)]
    assert lists[0] == lists[1]
    assert not set(lists[0]) & set(lists[2])
    assert [trial.lr for trial in list_trials(random_study(space, 3))] == lists[0][:3]


def test_range_of_whole_numbers_gives_no_trial_twice():
    trials = list_trials(random_study({"width": {"min": 4, "max": 6}}, 3))
    assert sorted(trial.width for trial in trials) == [4, 5, 6]
    with pytest.raises(SettingsError, match="num_trials is 10, but the space has 3 combinations"):
        list_trials(random_study({"width": {"min": 4, "max": 6}}, 10))


def test_optuna_gets_the_same_space():
    study = {"lr": {"min": 1e-3, "max": 1, "log": True}, "width": {"min": 4, "max": 8}, "optimizer": ["sgd", "adam"]}
    space = optuna_space(random_study(study, 5))
    assert (space["lr"].low, space["lr"].high, space["lr"].log) == (1e-3, 1.0, True)
    assert (space["width"].low, space["width"].high, space["width"].log, space["width"].step) == (4, 8, False, 1)
    assert space["optimizer"].choices == ("sgd", "adam")
    assert list(space) == ["lr", "width", "optimizer"]


def test_a_whole_part_moves_its_names_too():
    settings = load_settings("demo", ["fixed={lr: 0.1, width: 8}"])
    assert settings.fixed == {"lr": 0.1, "width": 8}
    assert "lr" not in settings.space


def test_a_range_given_by_its_parts_replaces_a_list():
    settings = load_settings("demo", ["search=random", "num_trials=2", "space.lr.min=0.01", "space.lr.max=0.1"])
    assert settings.space["lr"] == Range(min=0.01, max=0.1)


def test_a_resolution_may_be_written_as_a_number():
    settings = load_settings("cifar100", ["fixed.resolution=24"])
    assert settings.fixed["resolution"] == "24"
    settings = load_settings("cifar100", ["space.resolution=[32,16,'16,24,32']"])
    assert settings.space["resolution"] == ["32", "16", "16,24,32"]


def test_several_resolutions_may_be_written_as_a_list():
    assert load_settings("cifar100", ["fixed.resolution=[16,24,32]"]).fixed["resolution"] == "16,24,32"
    settings = load_settings("cifar100", ["space.resolution=[32,[16,24,32]]"])
    assert settings.space["resolution"] == ["32", "16,24,32"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["device=cpu", "gpus_per_trial=0.5"], "gpus_per_trial is 0.5, but device is cpu"),
        (["device=cuda", "gpus_per_trial=0"], "device is cuda, but gpus_per_trial is 0"),
    ],
)
def test_device_and_gpus_do_not_contradict_each_other(overrides, message):
    with pytest.raises(SettingsError, match=message):
        load_settings("cifar100", overrides)


@pytest.mark.parametrize("value", ["40", "11", "'032'", "16,99", "16;24", "'16,'", "''"])
def test_a_wrong_resolution_says_what_is_allowed(value):
    with pytest.raises(SettingsError, match=r"fixed\.resolution: .*whole numbers from 12 to 32"):
        load_settings("cifar100", [f"fixed.resolution={value}"])


def test_more_sizes_than_epochs_are_refused():
    with pytest.raises(SettingsError, match=r"resolution \(16,24,32\) has 3 sizes, max_epochs is only 2"):
        load_settings("cifar100", ["fixed.resolution=16,24,32", "max_epochs=2"])


@pytest.mark.parametrize(
    ("resolution", "max_epochs", "expected"),
    [
        ("32", 3, [32, 32, 32]),
        ("16,32", 4, [16, 16, 32, 32]),
        ("16,32", 5, [16, 16, 16, 32, 32]),
        ("16,16,20,24", 8, [16, 16, 16, 16, 20, 20, 24, 24]),
        ("16,24,32", 4, [16, 16, 24, 32]),
    ],
)
def test_sizes_have_equal_shares_of_the_epochs(resolution, max_epochs, expected):
    settings = TrialSettings(resolution=resolution, max_epochs=max_epochs)
    assert [settings.resolution_at(epoch) for epoch in range(1, max_epochs + 1)] == expected
