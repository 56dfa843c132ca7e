"""Which trials to run, and running them to the end."""

from study.run import StudyError, resume_study, run_study
from study.settings import SettingsError, StudySettings, load_settings, preset_names

__all__ = [
    "SettingsError",
    "StudyError",
    "StudySettings",
    "load_settings",
    "preset_names",
    "resume_study",
    "run_study",
]
