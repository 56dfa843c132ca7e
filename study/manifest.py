"""The list of trials asked for, written before anything starts."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from trainables.errors import UserError
from trainables.settings import TrialSettings


class ManifestError(UserError):
    """The trials of a run are not those that this version would train."""


def write_atomically(file: Path, text: str) -> None:
    """Write a file so that it is there whole or, after a crash, as it was before."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, file)


def write_manifest(run: Path, trials: Sequence[TrialSettings]) -> None:
    """Write ``RUN/trials.json``: id and settings of each trial, in the order of starting."""
    entries = [{"trial_id": trial.key(), "settings": trial.model_dump()} for trial in trials]
    write_atomically(run / "trials.json", json.dumps(entries, indent=1))


def read_manifest(run: Path) -> list[TrialSettings]:
    """Return the trials of ``RUN/trials.json``; none for a search that chooses as it goes.

    Raises:
        ManifestError: if they were written by a version of this project that trained other things under these settings.
    """
    trials = []
    for entry in json.loads((run / "trials.json").read_text()):
        try:
            trial = TrialSettings(**entry["settings"])
            if trial.key() != entry["trial_id"]:
                raise ValueError(f"{trial.key()} is not {entry['trial_id']}")
        except ValueError as error:  # pydantic's among them
            raise ManifestError(f"{run}: was begun by another version of this project, go on with that one") from error
        trials.append(trial)
    return trials
