"""Run directory -> DataFrames -> comparisons -> report."""

from analysis.claims import Claim, Comparison, decide
from analysis.compare import accuracy_over, asha_savings, compare_recipes, top_trials
from analysis.explanations import explain_trials, load_measures, load_test_data
from analysis.report import write_report
from analysis.rungs import replay_decisions
from analysis.trials import RunError, load_decisions, load_epochs, load_trials, read_study, varied

__all__ = [
    "Claim",
    "Comparison",
    "RunError",
    "accuracy_over",
    "asha_savings",
    "compare_recipes",
    "decide",
    "explain_trials",
    "load_decisions",
    "load_epochs",
    "load_measures",
    "load_test_data",
    "load_trials",
    "read_study",
    "replay_decisions",
    "top_trials",
    "varied",
    "write_report",
]
