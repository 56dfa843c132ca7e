"""Which trials to run, and running them to the end."""

from study.run import confirm_study, resume_study, run_study
from study.settings import SettingsError, StudySettings, load_settings, preset_names
from study.supervise import StudyError

__all__ = [
    "SettingsError",
    "StudyError",
    "StudySettings",
    "confirm_study",
    "load_settings",
    "preset_names",
    "resume_study",
    "run_study",
]
