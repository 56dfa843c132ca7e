"""Run directory -> DataFrames -> comparisons -> report."""

from analysis.compare import accuracy_over, asha_savings, compare_recipes, top_trials
from analysis.report import write_report
from analysis.rungs import replay_decisions
from analysis.trials import RunError, load_decisions, load_epochs, load_trials, read_study, varied

__all__ = [
    "RunError",
    "accuracy_over",
    "asha_savings",
    "compare_recipes",
    "load_decisions",
    "load_epochs",
    "load_trials",
    "read_study",
    "replay_decisions",
    "top_trials",
    "varied",
    "write_report",
]
