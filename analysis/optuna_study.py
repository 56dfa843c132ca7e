"""A run as an Optuna study: for its importance evaluators, and for optuna-dashboard."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.study_file import RunError
from analysis.trials import varied

# Optuna is imported where it is used: nobody else who imports this package should wait for it.
if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

# A number with more values than this was drawn from a range, or may as well have been.
MAX_CHOICES = 12
STATES = {  # names of Optuna's
    "pending": "WAITING",
    "running": "RUNNING",
    "completed": "COMPLETE",
    "stopped": "PRUNED",
    "diverged": "FAIL",
    "failed": "FAIL",
}
ATTRIBUTES = ("trial_id", "status", "phase", "stop_reason", "error", "train_seconds", "test_accuracy")


def to_optuna(
    trials: pd.DataFrame,
    epochs: pd.DataFrame | None = None,
    storage: "optuna.storages.BaseStorage | None" = None,
    name: str | None = None,
) -> "optuna.Study":
    """Return the trials as a study of Optuna's that maximizes validation accuracy.

    Args:
        trials: as :func:`analysis.load_trials` gives them.
        epochs: as :func:`analysis.load_epochs` does; they become intermediate values.
        storage: where Optuna keeps the study; in memory by default.
        name: of the study.
    """
    import optuna
    from optuna.trial import TrialState

    names = list(varied(trials))
    spaces = {name: _distribution(trials[name].dropna()) for name in names}
    curves: dict[Any, dict[int, float]] = {}
    if epochs is not None:
        seen = epochs[epochs["val_accuracy"].notna()]
        keys = [column for column in ("run", "trial_id") if column in epochs and column in trials]
        for key, curve in seen.groupby(keys):
            curves[key] = dict(zip(curve["epoch"].tolist(), curve["val_accuracy"].tolist(), strict=True))
    else:
        keys = ["trial_id"]
    frozen = []
    for row in trials.to_dict("records"):
        state, value = TrialState[STATES[str(row["status"])]], row["val_accuracy"]
        if state == TrialState.COMPLETE and pd.isna(value):  # its log lost the epochs
            state = TrialState.FAIL
        known = {name: row[name] for name in names if not pd.isna(row[name])}
        frozen.append(
            optuna.trial.create_trial(
                state=state,
                value=None if pd.isna(value) or state not in (TrialState.COMPLETE, TrialState.PRUNED) else value,
                params=known,
                distributions={name: spaces[name] for name in known},
                user_attrs={name: row[name] for name in ATTRIBUTES if name in row and not pd.isna(row[name])},
                intermediate_values=curves.get(tuple(row[key] for key in keys), {}),
            )
        )
    with _quiet():
        study = optuna.create_study(direction="maximize", storage=storage, study_name=name)
        study.add_trials(frozen)
    return study


def _distribution(values: pd.Series) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    numeric = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    if not numeric or values.nunique() <= MAX_CHOICES:
        return CategoricalDistribution(sorted(values.unique().tolist()))
    least, most = values.min(), values.max()
    log = bool(least > 0 and most / least >= 100)
    if pd.api.types.is_integer_dtype(values):
        return IntDistribution(int(least), int(most), log=log)
    return FloatDistribution(float(least), float(most), log=log)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna tells of every study that it creates."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def export_optuna(trials: pd.DataFrame, epochs: pd.DataFrame, file: Path, name: str) -> None:
    """Write the trials as a journal that ``optuna-dashboard FILE`` opens.

    Raises:
        RunError: if the file exists (a journal is appended to) or cannot be written.
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    try:
        file.touch(exist_ok=False)
        try:
            to_optuna(trials, epochs, JournalStorage(JournalFileBackend(str(file))), name)
        except BaseException:
            file.unlink()  # half a journal would be taken for one that exists already
            raise
    except FileExistsError as error:
        raise RunError(
            f"{file}: exists already, and a journal is only added to; give another name or remove it"
        ) from error
    except OSError as error:
        raise RunError(f"{file}: cannot be written ({error.strerror or error})") from error
