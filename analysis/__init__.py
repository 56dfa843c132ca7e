"""Run directory -> DataFrames -> comparisons -> report."""

from analysis.trials import RunError, load_epochs, load_trials, read_study, varied

__all__ = ["RunError", "load_epochs", "load_trials", "read_study", "varied"]
