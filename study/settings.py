"""The settings of a study: presets in YAML, overrides from the command line, and errors that say how to mend them."""

import difflib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from trainables.data import DatasetName
from trainables.errors import UserError
from trainables.settings import TrialSettings

PRESETS = Path(__file__).parent / "presets"
# The study itself decides these for every trial.
_NOT_VARIED = {"max_epochs"}
HYPERPARAMETERS = [name for name in TrialSettings.model_fields if name not in _NOT_VARIED]


class SettingsError(UserError):
    """Settings that name something unknown or give a value that is not allowed."""


class Range(BaseModel):
    """A continuous range of a numeric hyperparameter, for ``search: random`` and ``search: optuna``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    min: float
    max: float
    log: bool = Field(False, description="draw the logarithm uniformly")

    @model_validator(mode="after")
    def _ordered(self) -> "Range":
        if self.min >= self.max:
            raise ValueError(f"min ({self.min:g}) must be below max ({self.max:g})")
        if self.log and self.min <= 0:
            raise ValueError(f"min ({self.min:g}) must be above 0 for a logarithmic range")
        return self


Value = bool | int | float | str


class StudySettings(BaseModel):
    """What a study trains, on what, and how it searches.

    Raises:
        pydantic.ValidationError: on an unknown name, a wrong type or a value out of range. :func:`load_settings` turns
            it into a :class:`SettingsError` that names the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    # Data
    dataset: DatasetName = Field("cifar100", description="what to train on")
    data_dir: str | None = Field(None, description="folder of the data; ./data by default")
    train_size: int | None = Field(None, ge=4, description="use only so many training images, stratified")
    val_fraction: float = Field(0.1, gt=0, lt=1, description="share of the training images held out for validation")

    # Search
    search: Literal["grid", "random", "optuna"] = Field(
        "grid", description="every combination in a seeded order, random draws, or Optuna's TPE"
    )
    num_trials: int | None = Field(None, ge=1, description="trials; by default all of the grid")
    max_epochs: int = Field(30, ge=1, le=100_000, description="epochs of a trial that is not stopped early")
    equal_compute: bool = Field(
        False,
        description="train each setup that costs more than plain a second time, for as many epochs as cost what "
        "max_epochs of plain cost",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="decides the split, the order of trials, and each trial's seed")

    # Early stopping (ASHA: Li et al., MLSys 2020)
    early_stopping: Literal["asha", "none"] = Field("asha", description="stop the worst trials at every rung, or none")
    grace_period: int = Field(1, ge=1, description="epochs of the first rung")
    reduction_factor: float = Field(3, gt=1, description="one in so many goes on at a rung; rungs lie so far apart")

    # Resources
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto takes a GPU where there is one")
    cpus_per_trial: int | None = Field(None, ge=1, description="CPU threads of a trial; by default what is there")
    gpus_per_trial: float | None = Field(None, ge=0, description="0.5 packs two trials onto a GPU; by default 1")
    max_failures: int = Field(2, ge=0, description="how often a trial that fails starts again from its last epoch")
    keep_checkpoints: int | None = Field(
        20, ge=1, description="of the trials that ended, keep the checkpoints of so many, the best; null keeps all"
    )

    # Hyperparameters
    space: dict[str, list[Value] | Range] = Field(default_factory=dict, description="what varies: lists or ranges")
    fixed: dict[str, Value] = Field(default_factory=dict, description="what does not vary")

    @field_validator("space", "fixed", mode="before")
    @classmethod
    def _text_stays_text(cls, values: Any, info: ValidationInfo) -> Any:
        """Take ``resolution: 32`` and ``resolution: [16, 24, 32]``, as YAML reads them, for the text that they are."""
        if not isinstance(values, dict) or "resolution" not in values:
            return values
        value = values["resolution"]
        several = info.field_name == "space" and isinstance(value, list)
        return values | {"resolution": [_as_text(item) for item in value] if several else _as_text(value)}

    @model_validator(mode="after")
    def _consistent(self) -> "StudySettings":
        for part, names in (("space", self.space), ("fixed", self.fixed)):
            for name in names:
                if name not in HYPERPARAMETERS:
                    raise ValueError(_no_hyperparameter(part, name))
        for name, value in self.fixed.items():
            if name in self.space:
                raise ValueError(f"{name} stands in both space and fixed: it either varies or does not")
            _check_value(f"fixed.{name}", name, value, self.max_epochs)
        for name, values in self.space.items():
            self._check_space(name, values)
        if self.gpus_per_trial is not None and self.gpus_per_trial > 1 and not self.gpus_per_trial.is_integer():
            raise ValueError(f"gpus_per_trial: {self.gpus_per_trial} should be at most 1 or a whole number")
        if self.device in ("cpu", "mps") and self.gpus_per_trial:
            raise ValueError(f"gpus_per_trial is {self.gpus_per_trial:g}, but device is {self.device}; leave one out")
        if self.device == "cuda" and self.gpus_per_trial == 0:
            raise ValueError("device is cuda, but gpus_per_trial is 0; give a share above 0 or leave it out")
        if self.early_stopping == "asha" and self.grace_period > self.max_epochs:
            raise ValueError(f"grace_period ({self.grace_period}) must not exceed max_epochs ({self.max_epochs})")
        if self.search != "grid" and self.num_trials is None:
            raise ValueError(f"num_trials is needed for search: {self.search}")
        if self.search == "optuna" and not self.space:
            raise ValueError("search optuna suggests values of the space, which is empty; give space.NAME=...")
        size = self.space_size()
        if self.search != "optuna" and size is not None and self.num_trials is not None and self.num_trials > size:
            raise ValueError(f"num_trials is {self.num_trials}, but the space has {size} combinations")
        if self.equal_compute and (self.search == "optuna" or self.early_stopping != "none"):
            raise ValueError("equal_compute needs search grid or random, and early_stopping: none")
        # Values that are fine alone may contradict each other, or a default.
        entangled = {name: values for name, values in self.space.items() if name in ("setup", "augmentation", "cutout")}
        options = [values if isinstance(values, list) else [int(values.max)] for values in entangled.values()]
        for combination in itertools.product(*options):
            try:
                chosen = dict(zip(entangled, combination, strict=True))
                TrialSettings.model_validate({**self.fixed, **chosen, "max_epochs": self.max_epochs})
            except ValidationError as error:
                where = "space and fixed" if chosen else "fixed"
                raise ValueError(f"{where}: {_reason(error.errors()[0])}") from error
        return self

    def space_size(self) -> int | None:
        """Return the number of combinations, or None if a range makes it infinite."""
        size = 1
        for values in self.space.values():
            if isinstance(values, Range):
                return None
            size *= len(values)
        return size

    def _check_space(self, name: str, values: list[Value] | Range) -> None:
        if isinstance(values, Range):
            if self.search == "grid":
                raise ValueError(f"space.{name} is a range, which a grid cannot list; give a list or search: random")
            whole = TrialSettings.model_fields[name].annotation is int
            if TrialSettings.model_fields[name].annotation not in (int, float):
                raise ValueError(f"space.{name} is a range, but {name} is not a number; give a list of values")
            if whole and not (values.min.is_integer() and values.max.is_integer()):
                raise ValueError(f"space.{name} must have whole numbers as min and max")
            for end in (values.min, values.max):
                _check_value(f"space.{name}", name, int(end) if whole else end, self.max_epochs)
            return
        if not values:
            raise ValueError(f"space.{name} is an empty list; give at least one value or leave it out")
        if len(set(values)) < len(values):
            raise ValueError(f"space.{name} lists a value twice: {values}")
        for value in values:
            _check_value(f"space.{name}", name, value, self.max_epochs)


def _as_text(value: Any) -> Any:
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    return str(value) if type(value) is int else value


def _check_value(where: str, name: str, value: Value, max_epochs: int) -> None:
    try:
        TrialSettings.model_validate({"max_epochs": max_epochs, name: value})
    except ValidationError as error:
        raise ValueError(f"{where}: {_reason(error.errors()[0])}") from error


def _reason(item: Any) -> str:
    """Say what was given and what is allowed, of one of pydantic's errors."""
    message = str(item["msg"])
    if item["type"] == "value_error":
        return message.removeprefix("Value error, ")
    message = f"{item['input']!r} {message.removeprefix('Input ')}"
    if item["type"] == "literal_error" and isinstance(item["input"], str):
        allowed = item["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        near = difflib.get_close_matches(item["input"], allowed, n=1, cutoff=0.5)
        message += f" (did you mean {near[0]}?)" if near else ""
    return message


def suggest(name: str, known: Sequence[str]) -> str:
    """Return what to add to an error about an unknown name: the known one that was meant, or all of them."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    # learning_rate is close to lr for people only.
    near = near or [k for k in known if k == "".join(word[:1] for word in name.split("_"))]
    return f" (did you mean {near[0]}?)" if near else f"; known are {', '.join(known)}"


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1 as PyYAML reads it, but with the floats of YAML 1.2 (1e-5) and without repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key} stands there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# Without this, PyYAML takes 1e-5 for a string: YAML 1.1 wants a dot in every float.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def preset_names() -> list[str]:
    """Return the names of the presets that come with the project."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def load_settings(preset: str, overrides: Sequence[str] = ()) -> StudySettings:
    """Read a preset and apply overrides.

    Args:
        preset: a preset's name, or the path of a YAML file.
        overrides: ``key=value`` with YAML values and dots for nesting: ``max_epochs=5``, ``space.lr=[0.1,0.01]``. What
            is put into ``fixed`` leaves ``space``, and the other way round.

    Raises:
        SettingsError: naming the file or the override, the key, the value, and what is allowed.
    """
    file = Path(preset) if preset.endswith((".yaml", ".yml")) else PRESETS / f"{preset}.yaml"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SettingsError(f"no preset {preset!r}{suggest(preset, preset_names())}, or give a .yaml file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: not readable as YAML ({error})") from error
    raw, changed = (read_yaml(text, str(file)) for _ in range(2))
    for candidate in (raw, changed):
        if not isinstance(candidate, dict):
            raise SettingsError(f"{file}: must be a mapping of settings, not {type(candidate).__name__}")
        for part in ("space", "fixed"):
            if part in candidate and candidate[part] is None:
                candidate[part] = {}
    for override in overrides:
        _apply(changed, override)
    wrong = _check(changed)
    if isinstance(wrong, StudySettings):
        return wrong
    # What is wrong without the overrides too is the file's fault.
    before = _check(raw)
    in_file = set() if isinstance(before, StudySettings) else set(before)
    raise SettingsError("\n".join(f"{file if w in in_file else 'command line'}: {w}" for w in wrong))


def check_settings(raw: dict[str, Any], where: str) -> StudySettings:
    """Return validated settings.

    Raises:
        SettingsError: with a sentence, beginning with ``where``, for everything that is wrong.
    """
    checked = _check(raw)
    if isinstance(checked, StudySettings):
        return checked
    raise SettingsError("\n".join(f"{where}: {sentence}" for sentence in checked))


def read_yaml(text: str, where: str) -> Any:
    """Return what YAML says; safely, with the numbers of YAML 1.2, and without repeated keys.

    Raises:
        SettingsError: beginning with ``where``, if it cannot be read.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise SettingsError(
            f"{where}: not readable as YAML ({f'line {mark.line + 1}: ' if mark else ''}{problem})"
        ) from error
    except (TypeError, ValueError) as error:  # a list as a key, a date that is none
        raise SettingsError(f"{where}: not readable as YAML ({error})") from error


def _check(raw: dict[Any, Any]) -> StudySettings | list[str]:
    """Return the settings, or a sentence for everything that is wrong."""
    strange = [f"{key!r} is not a setting of a study: names are words" for key in raw if not isinstance(key, str)]
    if strange:
        return strange
    try:
        return StudySettings(**raw)
    except ValidationError as error:
        return _sentences(error)


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise SettingsError(f"{override!r}: an override is key=value, for example max_epochs=5")
    value = read_yaml(text, repr(override))
    *parents, last = key.split(".")
    target: Any = raw
    for parent in parents:
        if parents[0] == "space" and isinstance(target.get(parent), list):
            target[parent] = {}  # a range takes the place of a list
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise SettingsError(f"{override!r}: {parent} is a single value, it has no {last}")
    target[last] = value
    part, *names = key.split(".")
    other = raw.get({"space": "fixed", "fixed": "space"}.get(part, ""))
    if isinstance(other, dict):
        for name in names[:1] or (value if isinstance(value, dict) else ()):
            other.pop(name, None)


def _sentences(error: ValidationError) -> list[str]:
    """Turn pydantic's errors into one sentence each: where, what was given, what is allowed."""
    sentences: dict[str, str] = {}
    # A value of the space may be a list or a range; of a mapping only what is wrong with the range matters.
    items = [item for item in error.errors() if not (item["type"] == "list_type" and isinstance(item["input"], dict))]
    for item in items:
        part, *inner = [str(name) for name in item["loc"]] or [""]
        nested = part in ("space", "fixed")
        key = f"{part}.{inner[0]}" if nested and inner else part
        sentences.setdefault(key or _reason(item), _sentence(item, key, inner if nested else []))
    return list(sentences.values())


def _no_hyperparameter(part: str, name: str) -> str:
    if name in _NOT_VARIED:
        return f"{part}.{name} is not a hyperparameter: the study sets it for all; write {name}=..."
    return f"{part}.{name} is not a hyperparameter{suggest(name, HYPERPARAMETERS)}"


def _sentence(item: Any, key: str, inner: list[str]) -> str:
    if not key:  # a check of the whole: its message names the key
        return _reason(item)
    if item["type"] == "extra_forbidden" and inner:
        return f"{key}: {inner[-1]} is not part of a range {{min: ..., max: ..., log: true}}"
    if item["type"] == "extra_forbidden" and key in HYPERPARAMETERS:
        return f"{key} is a hyperparameter: write space.{key}=[...] to vary it or fixed.{key}=... to set it"
    if item["type"] == "extra_forbidden":
        return f"{key} is not a setting of a study{suggest(key, list(StudySettings.model_fields))}"
    if inner and inner[0] not in HYPERPARAMETERS:
        return _no_hyperparameter(key.split(".")[0], inner[0])
    if key in ("space", "fixed"):
        return f"{key}: {item['input']!r} should be a mapping of hyperparameters to values"
    if key.startswith("space.") and item["type"] == "value_error":
        return f"{key}: {_reason(item)}"
    if key.startswith("space."):
        return f"{key}: {item['input']!r} should be a list of values or a range {{min: ..., max: ..., log: true}}"
    if key.startswith("fixed."):
        allowed = "a finite number" if isinstance(item["input"], float) else "a number, a word, true or false"
        return f"{key}: {item['input']!r} should be {allowed}"
    return f"{key}: {_reason(item)}"
