"""Run directory -> DataFrames -> comparisons -> report."""

from analysis.claims import Claim, MapComparison, TrialComparison, decide
from analysis.compare import accuracy_over, asha_savings, by_budget, compare_recipes, top_trials
from analysis.explanations import explain_trials, load_measures, load_test_data
from analysis.health import search_space_health
from analysis.report import write_report
from analysis.rungs import replay_decisions
from analysis.trials import RunError, load_decisions, load_epochs, load_trials, read_study, varied

__all__ = [
    "Claim",
    "MapComparison",
    "RunError",
    "TrialComparison",
    "accuracy_over",
    "asha_savings",
    "by_budget",
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
    "search_space_health",
    "top_trials",
    "varied",
    "write_report",
]
