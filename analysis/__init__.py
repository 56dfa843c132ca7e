"""Run directory -> DataFrames -> comparisons -> report."""

from analysis.claims import Claim, MapComparison, TrialComparison, decide
from analysis.compare import by_budget, compare_recipes, top_trials
from analysis.effects import accuracy_over, asha_savings, importance, isolation, pareto_front, replay_decisions
from analysis.explanations import explain_trials, load_measures, load_test_data
from analysis.health import search_space_health
from analysis.optuna_study import export_optuna, to_optuna
from analysis.predictions import calibration, class_accuracy, confused_pairs, confusion, load_predictions
from analysis.report import write_report
from analysis.study_file import RunError, read_study
from analysis.trials import load_decisions, load_epochs, load_timeline, load_trials, varied

__all__ = [
    "Claim",
    "MapComparison",
    "RunError",
    "TrialComparison",
    "accuracy_over",
    "asha_savings",
    "by_budget",
    "calibration",
    "class_accuracy",
    "compare_recipes",
    "confused_pairs",
    "confusion",
    "decide",
    "explain_trials",
    "export_optuna",
    "importance",
    "isolation",
    "load_decisions",
    "load_epochs",
    "load_measures",
    "load_predictions",
    "load_test_data",
    "load_timeline",
    "load_trials",
    "pareto_front",
    "read_study",
    "replay_decisions",
    "search_space_health",
    "to_optuna",
    "top_trials",
    "varied",
    "write_report",
]
