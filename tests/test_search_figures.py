from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from test_figures import NAN, assert_legend_is_inside, draw, legend, overlapping, points, ticks, trials

from analysis.search_figures import (
    MAX_AXES,
    importance_figure,
    isolation_figure,
    parallel_figure,
    pareto_figure,
    timeline_figure,
)

# --- isolation_figure ---


def effects(**values: dict[str, tuple[float, float, float]]) -> pd.DataFrame:
    """Of each hyperparameter's values effect, low and high."""
    rows = [
        {"hyperparameter": name, "value": value, "effect": effect, "low": low, "high": high, "num_blocks": 4}
        for name, of_values in values.items()
        for value, (effect, low, high) in of_values.items()
    ]
    return pd.DataFrame(rows)


def test_isolation_figure_shows_effects_in_points_with_their_intervals():
    table = effects(
        lr={"0.1": (0.05, 0.02, 0.08), "0.01": (-0.05, -0.08, -0.02)},
        optimizer={"sgd": (0.01, NAN, NAN), "adam": (0.0, -0.02, 0.02), "muon": (-0.01, -0.03, 0.01)},
    )
    figure = isolation_figure(table)
    draw(figure)
    lr, optimizer = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["lr (n = 4)", "optimizer (n = 4)"]
    assert figure.get_supylabel() == "effect on validation accuracy, points"
    assert [label.get_text() for label in optimizer.get_xticklabels()] == ["sgd", "adam", "muon"]
    (container,) = lr.containers
    assert points(container.lines[0]) == [(0, 5.0), (1, -5.0)]
    ends = np.array(container.lines[2][0].get_segments())[:, :, 1]
    np.testing.assert_allclose(ends, [[2, 8], [-8, -2]])
    no_interval = optimizer.containers[0].lines[2][0].get_segments()[0]
    assert np.ptp(no_interval[:, 1]) == 0
    assert all(any(set(line.get_ydata()) == {0} for line in axis.lines) for axis in figure.axes)  # no effect


def test_isolation_figure_of_more_hyperparameters_than_fit_shows_the_first_eight():
    table = effects(**{f"a_long_hyperparameter_{i}": {"a": (0.1, 0.0, 0.2), "b": (-0.1, -0.2, 0)} for i in range(10)})
    figure = isolation_figure(table)
    draw(figure)
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in shown] == [f"a_long_hyperparameter_{i} (n = 4)" for i in range(MAX_AXES)]
    assert overlapping([axis.title for axis in shown]) == []


@pytest.mark.parametrize("others", [0, 2])
def test_names_of_many_values_do_not_overlap(others):
    names = ("none", "flip", "flip+crop", "a_value_with_a_long_name", "$x$ and more", "5")
    table = effects(
        augmentation=dict.fromkeys(names, (0.1, 0.0, 0.2)),
        **{f"other{i}": {"64": (0.1, 0, 0.2), "128": (0.1, 0, 0.2)} for i in range(others)},
    )
    figure = isolation_figure(table)
    draw(figure)
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()][3:5] == ["a_value_wit…", "$x$ and more"]
    assert overlapping(ticks(axis, "x")) == []
    if others:
        assert all(label.get_rotation() == 0 for label in figure.axes[1].get_xticklabels())  # here is room


# --- importance_figure ---


def test_importance_figure_has_a_bar_with_its_share_for_each_hyperparameter():
    shares = pd.DataFrame({"hyperparameter": ["lr", "optimizer", "x"], "importance": [0.7, 0.295, 0.005]})
    figure = importance_figure(shares.assign(num_trials=32))
    draw(figure)
    (axis,) = figure.axes
    assert [bar.get_width() for bar in axis.patches] == [0.7, 0.295, 0.005]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["lr", "optimizer", "x"]
    assert [text.get_text() for text in axis.texts] == ["70 %", "30 %", "0 %"]
    assert axis.get_xlabel() == "importance (PED-ANOVA, n = 32 trials)"
    first, *_, last = (bar.get_window_extent().y0 for bar in axis.patches)
    assert first > last  # the most important at the top


def test_importance_figure_where_nothing_matters():
    shares = pd.DataFrame({"hyperparameter": ["a", "b"], "importance": [0.0, 0.0], "num_trials": 8})
    figure = importance_figure(shares)
    draw(figure)
    assert [text.get_text() for text in figure.axes[0].texts] == ["0 %", "0 %"]


def test_importance_figure_of_12_hyperparameters_with_long_names():
    names = [f"a_hyperparameter_with_a_long_name_{i}" for i in range(12)]
    figure = importance_figure(pd.DataFrame({"hyperparameter": names, "importance": 1 / 12, "num_trials": 8}))
    draw(figure)
    assert overlapping(ticks(figure.axes[0], "y")) == []
    assert len(ticks(figure.axes[0], "y")) == 12


# --- parallel_figure ---


def parallel_lines(table: pd.DataFrame) -> tuple[Any, list[Any]]:
    """The axes, and the lines of the trials: they alone go from one axis to another."""
    figure = parallel_figure(table)
    draw(figure)
    (axis,) = figure.axes
    return axis, [line for line in axis.lines if len(set(line.get_xdata())) > 1]


def test_parallel_figure_draws_a_line_a_trial_through_its_values():
    table = trials(
        {"optimizer": "sgd", "lr": 0.1, "val_accuracy": 0.9},
        {"optimizer": "adam", "lr": 0.01, "val_accuracy": 0.1},
        {"optimizer": "muon", "lr": 0.001, "val_accuracy": 0.3},
        {"optimizer": "muon", "lr": 0.001, "val_accuracy": NAN},
    )
    axis, lines = parallel_lines(table)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["optimizer", "lr", "validation\naccuracy"]
    assert axis.get_title(loc="left") == "n = 3 trials"
    # From the worst to the best; adam, muon and sgd from the bottom to the top, as 0.001, 0.01 and 0.1.
    assert [line.get_ydata().tolist() for line in lines] == [
        [0, 0.5, 0],
        [0.5, 0, pytest.approx(0.25)],
        [1, 1, 1],
    ]
    lightness = [np.dot(to_rgb(line.get_color()), (0.299, 0.587, 0.114)) for line in lines]
    assert lightness == sorted(lightness, reverse=True)  # the darker, the better
    assert lightness[0] < 0.85  # and the worst is seen on white
    assert [text.get_text() for text in axis.texts] == [
        *("adam", "muon", "sgd"),
        *("0.001", "0.01", "0.1"),
        *("10.0 %", "90.0 %"),
    ]


def test_few_numbers_stand_apart_whatever_their_distance():
    rows = [{"lr": 0.1, "weight_decay": value} for value in (0.0, 1e-5, 1e-4, 1e-2)] + [
        {"lr": 0.2, "weight_decay": 0.0}
    ]
    axis, _ = parallel_lines(trials(*rows))
    places = {text.get_text(): text.get_position()[1] for text in axis.texts if text.get_position()[0] > 1}
    assert places == pytest.approx({"0": 0, "1e-05": 1 / 3, "0.0001": 2 / 3, "0.01": 1, "50.0 %": 0})
    assert overlapping(axis.texts) == []


def test_many_numbers_stand_on_a_logarithm_where_they_span_ten_times_and_show_their_ends():
    rows = [{"lr": 10.0**-i, "dropout": i / 10, "val_accuracy": i / 10} for i in range(7)]
    axis, lines = parallel_lines(trials(*rows))
    assert [line.get_ydata()[0] for line in lines] == pytest.approx([1 - i / 6 for i in range(7)])
    assert [line.get_ydata()[1] for line in lines] == pytest.approx([i / 6 for i in range(7)])
    assert [text.get_text() for text in axis.texts] == ["1e-06", "1", "0", "0.6", "0.0 %", "60.0 %"]


def test_parallel_figure_of_many_trials_shows_seven_hyperparameters_with_names_that_do_not_overlap():
    names = (
        "optimizer",
        "lr",
        "weight_decay",
        "batch_size",
        "schedule",
        "augmentation",
        "normalize",
        "dropout",
        "width",
    )
    rng = np.random.default_rng(0)
    values = {
        "lr": rng.random(300),
        "weight_decay": rng.random(300),
        "batch_size": pd.array(rng.choice([64, 128, 256], 300), dtype="Int64"),
        "normalize": pd.array(rng.random(300) > 0.5, dtype="boolean"),
        "dropout": rng.random(300),
        "width": pd.array(rng.choice([32, 64], 300), dtype="Int64"),
        **{name: [f"{name}-{i % 3}" for i in range(300)] for name in ("optimizer", "schedule", "augmentation")},
    }
    table = trials(*[{}] * 300).assign(**values, val_accuracy=rng.random(300))
    axis, lines = parallel_lines(table)
    assert len(lines) == 300
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert len(labels) == MAX_AXES
    assert set(labels[:-1]) < set(names)
    assert overlapping(ticks(axis, "x")) == []
    assert {"False", "True", "64", "128", "256"} <= {text.get_text() for text in axis.texts}


def test_parallel_figure_of_trials_that_are_equally_good():
    _, lines = parallel_lines(trials({"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3, "optimizer": "adam"}))
    assert [line.get_ydata()[-1] for line in lines] == [0, 0, 0]


# --- pareto_figure ---


def front(*rows: tuple[str, float, float, bool, bool]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["recipe", "train_seconds", "val_accuracy", "censored", "on_front"])


def test_pareto_figure_shows_accuracy_over_minutes_and_the_front():
    figure = pareto_figure(
        front(("sgd", 30, 0.3, True, True), ("adam", 60, 0.2, False, False), ("sgd", 120, 0.6, False, True))
    )
    draw(figure)
    (axis,) = figure.axes
    assert points(axis.lines[0]) == [(0.5, 0.3), (2.0, 0.6)]
    assert axis.lines[0].get_drawstyle() == "steps-post"
    marks = [line for line in axis.lines[1:] if line.get_xdata().size]
    assert [points(line) for line in marks] == [[(2.0, 0.6)], [(0.5, 0.3)], [(1.0, 0.2)]]
    assert [line.get_markerfacecolor() == "white" for line in marks] == [False, True, False]  # hollow: not completed
    assert marks[0].get_marker() == marks[1].get_marker() != marks[2].get_marker()
    assert legend(figure) == ["front", "sgd", "adam", "not completed"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("training time, minutes a trial", "validation accuracy")
    assert (axis.get_xlim()[0], axis.get_ylim()[0]) == (0, 0)


def test_the_outermost_points_are_not_cut_at_the_edge():
    figure = pareto_figure(front(("a", 1000, 0.7, False, True), ("b", 1020, 0.71, False, True)))
    draw(figure)
    (axis,) = figure.axes
    x, y = axis.transAxes.inverted().transform(axis.transData.transform((17, 0.71)))
    assert 0.9 < x < 0.97
    assert 0.9 < y < 0.97


def test_pareto_figure_names_the_best_twelve_of_40_recipes():
    rows = [
        (f"recipe {i} with a rather long name of it", 60.0 + i, (i % 40) / 50, i % 2 == 0, i == 0) for i in range(40)
    ]
    figure = pareto_figure(front(*rows))
    draw(figure)
    names = legend(figure)
    assert [name.split(" with")[0] for name in names] == [
        "front",
        *(f"recipe {i}" for i in range(39, 27, -1)),
        "28 more recipes",
        "not completed",
    ]
    assert_legend_is_inside(figure)
    named = [line for line in figure.axes[0].lines if line.get_label().startswith("recipe")]
    assert len({(line.get_marker(), line.get_color()) for line in named}) == 12
    grey = [line for line in figure.axes[0].lines if line.get_color() == "#999999" and line.get_xdata().size]
    assert len(grey) == 28


def test_pareto_figure_of_networks_that_learned_nothing():
    figure = pareto_figure(front(("a", 0.0, 0.0, False, True), ("b", 0.0, 0.0, False, False)))
    draw(figure)
    assert figure.axes[0].get_ylim()[1] > 0


# --- timeline_figure ---


def stretch(trial: str, slot: int, start: float, end: float, **more: Any) -> dict[str, Any]:
    times = {"slot": slot, "start_seconds": start, "end_seconds": end}
    return {"trial_id": trial, "attempt": 1, "host": "h", "outcome": "ended", **times, **more}


def bars(figure: Any) -> dict[str, list[tuple[float, float, float]]]:
    """By kind: start, end (minutes) and row of each bar."""
    return {
        container.get_label(): [
            (bar.get_x(), bar.get_x() + bar.get_width(), bar.get_y() + bar.get_height() / 2) for bar in container
        ]
        for container in figure.axes[0].containers
    }


def test_timeline_shows_who_held_which_slot_when_and_what_became_of_it():
    table = trials({"status": "completed"}, {"status": "stopped"}, {"status": "running"})
    timeline = pd.DataFrame(
        [
            stretch("t0", 0, 0, 120),
            stretch("t1", 1, 0, 30, outcome="lost"),
            stretch("t1", 1, 60, 90),
            stretch("t2", 1, 90, 180, outcome=None),
        ]
    )
    figure = timeline_figure(timeline, table)
    draw(figure)
    (axis,) = figure.axes
    assert bars(figure) == {
        "completed": [(0, 2, 0)],
        "stopped": [(1, 1.5, 1)],
        "begun again": [(0, 0.5, 1)],
        "running": [(1.5, 3, 1)],
    }
    assert legend(figure) == list(bars(figure))
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("minutes since the first trial began", "slot")
    assert [label.get_text() for label in ticks(axis, "y")] == ["0", "1"]


def test_what_became_of_trials_can_be_told_without_colour():
    kinds = ["completed", "stopped", "diverged", "failed", "running"]
    timeline = pd.DataFrame(
        [stretch(f"t{i}", i, 0, 60) for i in range(5)] + [stretch("t0", 5, 0, 9, outcome="retried")]
    )
    figure = timeline_figure(timeline, trials(*({"status": kind} for kind in kinds)))
    draw(figure)
    assert set(bars(figure)) == {*kinds, "begun again"}
    assert len({container[0].get_hatch() for container in figure.axes[0].containers}) == 6


def test_timeline_of_one_trial_has_one_slot():
    figure = timeline_figure(pd.DataFrame([stretch("t0", 0, 0, 60, host=None)]), trials({}))
    draw(figure)
    (axis,) = figure.axes
    assert [label.get_text() for label in ticks(axis, "y")] == ["0"]
    assert bars(figure) == {"completed": [(0, 1, 0)]}


def test_slots_of_each_host_and_attempt_are_rows_of_their_own():
    timeline = pd.DataFrame(
        [stretch("t0", 0, 0, 60, host="b"), stretch("t1", 0, 0, 60, host="a"), stretch("t2", 0, 60, 90, attempt=2)]
    )
    figure = timeline_figure(timeline, trials({}, {}, {}))
    draw(figure)
    assert [row for _, _, row in bars(figure)["completed"]] == [1, 0, 2]


def test_trials_of_the_same_id_in_two_runs_are_told_apart():
    timeline = pd.DataFrame([stretch("t0", 0, 0, 60, run="a"), stretch("t0", 0, 0, 120, run="b")])
    table = trials({"trial_id": "t0"}, {"trial_id": "t0", "status": "failed"}).assign(run=["a", "b"])
    figure = timeline_figure(timeline, table)
    draw(figure)
    assert bars(figure) == {"completed": [(0, 1, 0)], "failed": [(0, 2, 1)]}


def test_timeline_of_40_slots_has_readable_rows():
    timeline = pd.DataFrame([stretch(f"t{i}", i % 40, 60 * (i // 40), 60 * (i // 40) + 50) for i in range(120)])
    figure = timeline_figure(timeline, trials(*[{}] * 120))
    picture = draw(figure)
    (axis,) = figure.axes
    assert len(bars(figure)["completed"]) == 120
    assert [label.get_text() for label in ticks(axis, "y")] == [str(i) for i in range(0, 40, 2)]
    assert overlapping(ticks(axis, "y")) == []
    assert min(bar.get_window_extent().height for bar in axis.patches) > 10
    assert picture.shape[0] <= 9 * 150
