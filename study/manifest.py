"""What a study was begun with, written before anything starts: what resumes is checked against it."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import explain
import study
import trainables
from analysis.remote import source
from analysis.study_file import RunError
from study.settings import StudySettings
from trainables.errors import UserError
from trainables.settings import TrialSettings

# What decides which trials there are, what each of them does, and which are stopped.
_CODE = [(trainables, "*.py"), (study, "space.py"), (study, "asha.py"), (explain, "maps.py")]
_PACKAGES = ("torch", "torchvision", "ray", "optuna", "numpy")


class ManifestError(UserError):
    """A study would go on otherwise than it began."""


@dataclass(frozen=True)
class Manifest:
    """How a study began.

    Attributes:
        code: hash of each source file that decides results, by its path in the project.
        versions: of the packages that decide results.
        settings: of the study.
        trials: those asked for, in the order of starting; none for a search that chooses as it goes.
        confirmations: trials that repeat the best of these with fresh seeds; see :func:`study.run.confirm_study`.
    """

    code: dict[str, str]
    versions: dict[str, str]
    settings: dict[str, Any]
    trials: tuple[TrialSettings, ...]
    confirmations: tuple[TrialSettings, ...] = ()

    def changes(self, now: "Manifest") -> dict[str, str]:
        """Return what would not be as it began: a name, and a few words on it."""
        changed = {}
        for mark, then, here in (
            ("", self.code, now.code),
            ("", self.versions, now.versions),
            ("study.yaml, ", self.settings, now.settings),
        ):
            for name in dict.fromkeys([*then, *here]):
                if then.get(name) != here.get(name):
                    shown = "" if then is self.code else f" {then.get(name, 'unset')} -> {here.get(name, 'unset')}"
                    changed[name] = f"{mark}{name}{shown}"
        return changed


def make_manifest(settings: StudySettings, trials: Sequence[TrialSettings]) -> Manifest:
    """Return the manifest of a study that begins now."""
    code = {
        f"{package.__name__}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        for package, pattern in _CODE
        for file in sorted(Path(package.__path__[0]).glob(pattern))
    }
    versions = {name: version(name) for name in _PACKAGES}
    return Manifest(code, versions, settings.model_dump(mode="json"), tuple(trials))


def write_atomically(file: Path, text: str) -> None:
    """Write a file so that it is there whole or, after a crash, as it was before."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def write_manifest(run: Path, manifest: Manifest) -> None:
    """Write ``RUN/manifest.json``."""
    parts = {part: getattr(manifest, part) for part in ("trials", "confirmations")}
    entries = {
        part: [{"trial_id": trial.key(), "settings": trial.model_dump()} for trial in trials]
        for part, trials in parts.items()
    }
    content = asdict(replace(manifest, trials=(), confirmations=())) | entries
    write_atomically(run / "manifest.json", json.dumps(content, indent=1))


def read_manifest(run: Path) -> Manifest:
    """Read ``RUN/manifest.json``.

    Raises:
        ManifestError: if it is missing, damaged, or of a version of this project that trained other things under these
            settings.
    """
    file = run / "manifest.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        kinds = {"code": dict, "versions": dict, "settings": dict, "trials": list, "confirmations": list}
        for part, kind in kinds.items():
            if not isinstance(content[part], kind):
                raise ValueError(f"{part} is of another kind")
    except KeyError as error:
        raise ManifestError(
            f"{file}: damaged, it has no {error}; what the study was begun with is not known"
        ) from error
    except (FileNotFoundError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ManifestError(
            f"{file}: damaged or missing ({reason}); what the study was begun with is not known"
        ) from error
    except OSError as error:
        raise RunError(f"{file}: cannot be read ({error.strerror or error})") from error
    trials = []
    for entry in [*content["trials"], *content["confirmations"]]:
        try:
            trial = TrialSettings(**entry["settings"])
            if trial.key() != entry["trial_id"]:
                raise ValueError(f"its settings have the id {trial.key()} now")
        except (ValueError, KeyError, TypeError) as error:  # pydantic's among them
            name = entry.get("trial_id", "?") if isinstance(entry, dict) else "?"
            raise ManifestError(
                f"{source(run)}: was begun by another version of this project, go on with that one "
                f"(trial {name}: {_reason(error)})"
            ) from error
        trials.append(trial)
    begun, later = tuple(trials[: len(content["trials"])]), tuple(trials[len(content["trials"]) :])
    return Manifest(content["code"], content["versions"], content["settings"], begun, later)


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def check_resumable(begun: Manifest, now: Manifest, run: Path, force: bool) -> list[str]:
    """Return what has changed since a study began, if it may go on all the same.

    Raises:
        ManifestError: if the changes make it another study, or could change results and ``force`` is not given.
    """
    harmless = {"data_dir", "max_failures", "keep_checkpoints"}
    if now.settings["search"] == "optuna":
        harmless.add("num_trials")
    resources = {"device", "cpus_per_trial", "gpus_per_trial"}
    changes = begun.changes(now)
    # A setting that the project did not have when the study began is a change of code.
    other = [what for name, what in changes.items() if name in begun.settings.keys() - harmless - resources]
    if other or begun.trials != now.trials:
        what = "; ".join(other) or "study.yaml lists other trials, or in another order"
        raise ManifestError(
            f"{source(run)}: was begun as another study ({what}); "
            "take that back, or begin a new one by python -m study run"
        )
    serious = [what for name, what in changes.items() if name not in harmless]
    if serious and not force:
        shown = "; ".join(serious[:5]) + (f" and {len(serious) - 5} more" if len(serious) > 5 else "")
        raise ManifestError(
            f"{source(run)}: results could differ from those that are there, for this has changed: {shown}; "
            "take it back, or go on all the same with --force (python -m study resume, or confirm)"
        )
    return list(changes.values())
