"""Search space -> a seeded list of trials, or a space for Optuna."""

import math
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from study.settings import Range, SettingsError, StudySettings
from trainables.settings import TrialSettings
from trainables.setups import epochs_of_equal_compute

_MAX_SHUFFLED = 1_000_000  # combinations; of more, trials are drawn one by one


def fixed_settings(settings: StudySettings) -> dict[str, Any]:
    """Return the hyperparameters that are the same for all trials, among them ``max_epochs`` and the seed."""
    return {"seed": settings.seed, **settings.fixed, "max_epochs": settings.max_epochs}


def list_trials(settings: StudySettings) -> list[TrialSettings]:
    """Return the trials of a grid or random search, without repetition, in a seeded order; then, for equal compute,
    those of setups that cost more than plain training again, with fewer epochs.

    The order matters: ASHA compares a trial with those that came before it, so a grid in its own order would favour
    its last values.

    Raises:
        SettingsError: if the space holds fewer trials than were asked for.
    """
    rng = np.random.default_rng([settings.seed, 3])
    fixed = fixed_settings(settings)
    size = settings.space_size()
    if size is not None and (settings.search == "grid" or size <= _MAX_SHUFFLED):
        # A finite space is shuffled whole, also for a random search: drawing without replacement.
        lists = {name: values for name, values in settings.space.items() if isinstance(values, list)}
        shape = tuple(map(len, lists.values()))
        chosen = [
            {name: values[place] for (name, values), place in zip(lists.items(), places, strict=True)}
            for number in rng.permutation(size)[: settings.num_trials]
            for places in [np.unravel_index(number, shape)]
        ]
        return _with_equal_compute(settings, [TrialSettings(**{**fixed, **trial}) for trial in chosen])
    trials: dict[str, TrialSettings] = {}
    for _ in range(100 * (settings.num_trials or 0)):  # ends also where whole numbers allow fewer trials than asked
        if len(trials) == settings.num_trials:
            break
        drawn = {name: _draw(name, values, rng) for name, values in settings.space.items()}
        trial = TrialSettings(**{**fixed, **drawn})
        trials[trial.key()] = trial
    if len(trials) < (settings.num_trials or 0):
        raise SettingsError(f"num_trials is {settings.num_trials}, but the space has {len(trials)} combinations")
    return _with_equal_compute(settings, list(trials.values()))


def _with_equal_compute(settings: StudySettings, trials: list[TrialSettings]) -> list[TrialSettings]:
    if not settings.equal_compute:
        return trials
    shorter = []
    for trial in trials:
        epochs = epochs_of_equal_compute(trial.setup, trial.max_epochs)
        if epochs < max(len(trial.resolutions), trial.warmup_epochs):
            raise SettingsError(
                f"equal_compute leaves {trial.setup} {epochs} epochs, too few for its resolutions ({trial.resolution}) "
                f"and warm-up ({trial.warmup_epochs:g}); raise max_epochs"
            )
        if epochs < trial.max_epochs:
            shorter.append(trial.model_copy(update={"max_epochs": epochs}))
    return trials + shorter


def _draw(name: str, values: list[Any] | Range, rng: np.random.Generator) -> Any:
    if not isinstance(values, Range):
        return values[int(rng.integers(len(values)))]
    if TrialSettings.model_fields[name].annotation is int:
        if values.log:
            return round(math.exp(rng.uniform(math.log(values.min), math.log(values.max))))
        return int(rng.integers(int(values.min), int(values.max) + 1))
    if values.log:
        return float(math.exp(rng.uniform(math.log(values.min), math.log(values.max))))
    return float(rng.uniform(values.min, values.max))


def optuna_space(settings: StudySettings) -> dict[str, BaseDistribution]:
    """Return the distributions of the search space for Optuna, by hyperparameter."""
    space: dict[str, BaseDistribution] = {}
    for name, values in settings.space.items():
        if not isinstance(values, Range):
            space[name] = CategoricalDistribution(values)
        elif TrialSettings.model_fields[name].annotation is int:
            space[name] = IntDistribution(int(values.min), int(values.max), log=values.log)
        else:
            space[name] = FloatDistribution(values.min, values.max, log=values.log)
    return space
