import io
import itertools
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from analysis.figures import (
    MAX_PANELS,
    PALETTE,
    accuracy_figure,
    curves_figure,
    heat_map_figure,
    in_percent,
    lr_figure,
    savings_figure,
    shorten,
    style,
)
from analysis.search_figures import parallel_figure

NAN = float("nan")


def draw(figure: Figure) -> np.ndarray:
    """Save a figure as a report does; a warning, an empty picture or text outside of it fails."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(buffer, format="png")
    picture = np.asarray(Image.open(buffer).convert("L"))
    assert picture.std() > 5
    assert cut_off(figure) == []
    return picture


def texts(figure: Figure) -> list[Any]:
    """All that can be read in a figure: labels, ticks, titles and legends."""
    found = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    found += [label for label in (figure._supxlabel, figure._supylabel) if label]  # type: ignore[attr-defined]
    for axis in figure.axes:
        if not axis.get_visible() or not axis.axison:
            continue
        found += [axis.title, axis._left_title, axis.xaxis.label, axis.yaxis.label, *axis.texts]  # type: ignore[attr-defined]
        found += [*ticks(axis, "x"), *ticks(axis, "y")]
        found += axis.get_legend().get_texts() if axis.get_legend() else []
    return [text for text in found if text.get_text() and text.get_visible()]


def ticks(axis: Axes, which: str) -> list[Any]:
    """The labels at an axis that are shown."""
    one = axis.xaxis if which == "x" else axis.yaxis
    low, high = sorted(one.get_view_interval())
    shown = [
        tick.label1 for tick in one.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1.get_visible()
    ]
    return [label for label in shown if label.get_text()]


def cut_off(figure: Figure) -> list[str]:
    """Texts that leave the figure."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    return [
        text
        for text, box in boxes
        if box.x0 < -1 or box.y0 < -1 or box.x1 > figure.bbox.x1 + 1 or box.y1 > figure.bbox.y1 + 1
    ]


def overlapping(labels: list[Any]) -> list[tuple[str, str]]:
    """Pairs of texts that lie on each other: of slanted ones those whose lines are nearer than they are high."""
    found = []
    for one, other in itertools.combinations(labels, 2):
        if one.get_rotation() % 90:
            (x, _), (x_other, _) = (label.get_transform().transform(label.get_position()) for label in (one, other))
            high = label_height(one)
            on_each_other = abs(x - x_other) * np.sin(np.deg2rad(one.get_rotation())) < high
        else:
            on_each_other = one.get_window_extent().overlaps(other.get_window_extent())
        if on_each_other:
            found.append((one.get_text(), other.get_text()))
    return found


def label_height(label: Any) -> float:
    """Pixels from the top of a line of text to its bottom, without what hangs below it."""
    return float(label.get_fontsize() * label.figure.dpi / 72)


def recipes(*rows: dict[str, Any]) -> pd.DataFrame:
    defaults = {"censored": False, "val_low": NAN, "val_high": NAN}
    defaults |= {"test_accuracy": NAN, "test_low": NAN, "test_high": NAN}
    return pd.DataFrame([defaults | row for row in rows])


def trials(*rows: dict[str, Any]) -> pd.DataFrame:
    defaults = {
        "status": "completed",
        "phase": "search",
        "seed": 0,
        "epochs": 3,
        "val_accuracy": 0.5,
        "optimizer": "sgd",
        "lr": 0.1,
        "augmentation": "none",
    }
    return pd.DataFrame([{"trial_id": f"t{i}"} | defaults | row for i, row in enumerate(rows)])


def epochs(**curves: list[float]) -> pd.DataFrame:
    rows = [(trial_id, i + 1, value) for trial_id, curve in curves.items() for i, value in enumerate(curve)]
    return pd.DataFrame(rows, columns=["trial_id", "epoch", "val_accuracy"])


def legend(figure: Figure) -> list[str]:
    """What the legends of a figure and of its axes say."""
    boxes = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
    return [text.get_text() for box in boxes for text in box.get_texts()]


def assert_legend_is_inside(figure: Figure) -> None:
    box = figure.axes[-1].get_legend().get_window_extent()
    assert box.x1 <= figure.bbox.x1
    assert 0 <= box.y0 < box.y1 <= figure.bbox.y1


def points(line: Any) -> list[tuple[float, float]]:
    return list(zip(*(np.asarray(data).tolist() for data in line.get_data()), strict=True))


# --- style and ticks ---


def test_any_two_of_28_things_differ_without_colour():
    looks = [style(i) for i in range(28)]
    assert len({(look["marker"], look["linestyle"]) for look in looks}) == 28
    assert len({look["marker"] for look in looks[:11]}) == 11  # where there is no line, as many can be told apart


def test_any_two_of_7_things_differ_in_colour():
    assert len({style(i)["color"] for i in range(7)}) == 7


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.5, "50 %"), (0.905, "90.5 %"), (0.07, "7 %"), (-1e-18, "0 %"), (1.0, "100 %"), (0.00125, "0.125 %")],
)
def test_a_tick_has_as_many_digits_as_its_share(share, text):
    assert in_percent()(share) == text


def test_a_long_text_is_shortened():
    assert shorten("abcde", 5) == "abcde"
    assert shorten("abcdef", 5) == "abcd…"


# --- accuracy_figure ---


def test_accuracy_figure_shows_values_and_intervals():
    table = recipes(
        {"recipe": "adam", "val_accuracy": 0.6, "val_low": 0.5, "val_high": 0.65, "test_accuracy": 0.55}
        | {"test_low": 0.5, "test_high": 0.6},
        {"recipe": "sgd · flip", "val_accuracy": 0.4, "val_low": 0.3, "val_high": 0.5, "censored": True},
    )
    figure = accuracy_figure(table)
    draw(figure)
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["adam", "sgd · flip (not all completed)"]
    assert legend(figure) == ["validation", "test"]
    validation, test = axis.containers
    assert [x for x, _ in points(validation.lines[0])] == [0.6, 0.4]
    assert test.lines[0].get_xdata()[0] == 0.55
    assert np.isnan(test.lines[0].get_xdata()[1])
    ends = np.array(validation.lines[2][0].get_segments())[:, :, 0]
    np.testing.assert_allclose(ends, [[0.5, 0.65], [0.3, 0.5]])
    np.testing.assert_allclose(np.array(test.lines[2][0].get_segments()[0])[:, 0], [0.5, 0.6])
    first, second = (y for _, y in points(validation.lines[0]))
    assert axis.transData.transform((0, first))[1] > axis.transData.transform((0, second))[1]  # the best at the top


def test_accuracy_figure_without_test_accuracy_shows_none():
    figure = accuracy_figure(recipes({"recipe": "the one recipe", "val_accuracy": 0.5}))
    draw(figure)
    assert legend(figure) == ["validation"]
    (container,) = figure.axes[0].containers
    assert points(container.lines[0]) == [(0.5, -0.12)]
    assert np.ptp(container.lines[2][0].get_segments()[0][:, 0]) == 0  # no interval is known


def test_accuracy_figure_has_a_row_for_each_of_30_recipes():
    names = [f"recipe {i} " + "with a long name " * (i % 4) for i in range(30)]
    table = recipes(*({"recipe": name, "val_accuracy": 0.9 - i / 50} for i, name in enumerate(names)))
    figure = accuracy_figure(table)
    picture = draw(figure)
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [text.split(" with")[0] for text in shown] == [f"recipe {i}" + " " * (i % 4 == 0) for i in range(30)]
    assert max(map(len, shown)) == 34
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(above.y0 > below.y1 for above, below in itertools.pairwise(boxes))  # none over another
    assert min(box.x0 for box in boxes) >= 0
    assert picture.shape[1] == 1200


def test_accuracy_figure_of_100_recipes_shows_the_best_30_and_says_so():
    figure = accuracy_figure(recipes(*({"recipe": f"lr {i}", "val_accuracy": 0.9 - i / 200} for i in range(100))))
    draw(figure)
    assert [label.get_text() for label in ticks(figure.axes[0], "y")] == [f"lr {i}" for i in range(30)]
    assert figure.axes[0].get_xlabel().endswith("interval (best 30 of 100 recipes)")
    assert figure.get_figheight() < 15


def test_accuracies_close_to_each_other_have_ticks_that_differ():
    figure = accuracy_figure(recipes(*({"recipe": f"r{i}", "val_accuracy": 0.9 + i / 1000} for i in range(4))))
    draw(figure)
    labels = [label.get_text() for label in ticks(figure.axes[0], "x")]
    assert len(labels) == len(set(labels)) > 2


def test_accuracy_figure_of_one_recipe_keeps_its_marks_off_the_edges():
    figure = accuracy_figure(recipes({"recipe": "sgd", "val_accuracy": 0.5, "test_accuracy": 0.4}))
    draw(figure)
    (axis,) = figure.axes
    assert axis.get_ylim() == (0.5, -0.5)
    assert axis.get_xlabel() == "accuracy of the recipe's best configuration, with 95 % interval"


# --- curves_figure ---


def panels(figure: Figure) -> list[Axes]:
    return [axis for axis in figure.axes if axis.get_visible()]


def curves_in(axis: Axes) -> list[Any]:
    """The curves of a panel, without crosses and rungs."""
    return [line for line in axis.lines if line.get_marker() not in ("x", "None")]


def test_curves_figure_draws_a_panel_a_recipe_and_a_cross_where_a_trial_was_stopped():
    table = trials(
        {"optimizer": "sgd", "lr": 0.1, "val_accuracy": 0.3},
        {"optimizer": "sgd", "lr": 0.01, "val_accuracy": 0.15, "status": "stopped", "epochs": 1},
        {"optimizer": "adam", "lr": 0.1, "val_accuracy": 0.2, "status": "diverged", "epochs": 2},
        {"optimizer": "adam", "lr": 0.01, "val_accuracy": NAN, "status": "pending", "epochs": 0},
    )
    figure = curves_figure(table, epochs(t0=[0.1, 0.2, 0.3], t1=[0.15], t2=[0.2, NAN]))
    draw(figure)
    sgd, adam = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["sgd", "adam"]  # the best first
    first, second, cross, rung = sgd.lines
    assert points(first) == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert points(second) == points(cross) == [(1, 0.15)]
    assert rung.get_xdata() == [1, 1]
    third, lost, _ = adam.lines
    assert third.get_xdata().tolist() == [1, 2]
    assert points(lost) == [(2, 0.0)]  # a loss that is no number stands at the bottom
    assert [line.get_marker() for line in (cross, lost)] == ["x", "x"]
    assert first.get_color() == third.get_color() != second.get_color() == cross.get_color()
    assert first.get_linestyle() == third.get_linestyle() != second.get_linestyle()  # also without colour
    assert legend(figure) == ["lr 0.01", "lr 0.1", "stopped early or diverged"]
    assert sgd.get_ylim()[0] == 0
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("epoch", "validation accuracy")
    assert all(label.get_text().endswith(" %") for label in ticks(sgd, "y"))


def test_curves_figure_of_one_trial_has_no_legend_and_ticks_at_whole_epochs():
    figure = curves_figure(trials({}), epochs(t0=[0.5]))
    draw(figure)
    (axis,) = figure.axes
    (line,) = axis.lines
    assert points(line) == [(1, 0.5)]
    assert line.get_marker() == "o"  # a line of one point would not be seen
    assert axis.get_title() == "the one recipe"
    assert legend(figure) == []
    assert [label.get_text() for label in ticks(axis, "x")] == ["1"]


def test_curves_figure_of_40_recipes_shows_the_best_twelve():
    accuracies = [((7 * i) % 40) / 50 for i in range(40)]
    rows = [{"optimizer": f"an optimizer with a long name {i}", "val_accuracy": v} for i, v in enumerate(accuracies)]
    figure = curves_figure(trials(*rows), epochs(**{f"t{i}": [v / 2, v] for i, v in enumerate(accuracies)}))
    draw(figure)
    assert len(figure.axes) == MAX_PANELS == 12
    assert [curves_in(axis)[0].get_ydata()[-1] for axis in figure.axes] == sorted(accuracies, reverse=True)[:12]
    assert overlapping([axis.title for axis in figure.axes]) == []
    assert all(len(axis.get_title()) == 26 for axis in figure.axes)


def test_every_column_of_panels_has_its_epochs_below():
    rows = [{"optimizer": f"o{i}", "val_accuracy": 0.5 - i / 20} for i in range(5)]
    figure = curves_figure(trials(*rows), epochs(**{f"t{i}": [0.1, 0.2] for i in range(5)}))
    draw(figure)
    assert [axis.get_title() for axis in panels(figure)] == ["o0", "o1", "o2", "o3", "o4"]
    assert [bool(ticks(axis, "x")) for axis in panels(figure)] == [False, True, True, True, True]


def test_curves_of_up_to_12_amounts_can_be_told_apart_and_of_more_look_alike():
    def looks(number: int) -> tuple[set[Any], Figure]:
        rows = [{"lr": 10 ** (-i / 10), "optimizer": ["sgd", "adam"][i % 2]} for i in range(number)]
        figure = curves_figure(trials(*rows), epochs(**{f"t{i}": [i / 60, i / 30] for i in range(number)}))
        draw(figure)
        lines = [line for axis in figure.axes for line in curves_in(axis)]
        assert len(lines) == number
        return {(line.get_marker(), line.get_linestyle()) for line in lines}, figure

    told, figure = looks(12)
    assert len(told) == 12
    assert len(legend(figure)) == 12
    alike, figure = looks(30)
    assert len(alike) == 1
    assert legend(figure) == []


def test_trials_of_the_same_id_in_two_runs_have_a_curve_each():
    table = trials({"trial_id": "t0"}, {"trial_id": "t0"}).assign(run=["a", "b"])
    curves = pd.concat([epochs(t0=[0.1, 0.2]).assign(run="a"), epochs(t0=[0.3]).assign(run="b")])
    figure = curves_figure(table, curves)
    draw(figure)
    assert [points(line) for line in figure.axes[0].lines] == [[(1, 0.1), (2, 0.2)], [(1, 0.3)]]


def test_curves_figure_of_trials_that_all_diverged():
    table = trials({"status": "diverged", "val_accuracy": 0.1}, {"lr": 1.0, "status": "diverged", "val_accuracy": NAN})
    figure = curves_figure(table, epochs(t0=[0.1, NAN], t1=[NAN]))
    draw(figure)
    crosses = [line for axis in figure.axes for line in axis.lines if line.get_marker() == "x"]
    assert [points(cross) for cross in crosses] == [[(2, 0.0)], [(1, 0.0)]]
    assert legend(figure) == ["diverged"]


# --- lr_figure ---


def test_lr_figure_has_a_panel_an_optimizer_and_a_mark_for_what_else_varies():
    rows = [
        {"optimizer": optimizer, "augmentation": augmentation, "lr": lr, "val_accuracy": accuracy}
        for optimizer, augmentation, lr, accuracy in [
            ("sgd", "flip", 0.1, 0.5),
            ("sgd", "flip", 0.01, 0.4),
            ("sgd", "none", 0.1, 0.3),
            ("adam", "flip", 0.01, 0.6),
        ]
    ]
    rows[1]["status"] = "stopped"
    figure = lr_figure(trials(*rows))
    draw(figure)
    adam, sgd = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["adam", "sgd"]
    assert [axis.get_xlabel() for axis in figure.axes] == ["learning rate"] * 2
    assert adam.get_ylabel() == "validation accuracy"
    assert legend(figure) == ["flip", "no augmentation", "not completed"]
    # For each of the two: its completed points, its stopped ones.
    full, hollow, plain, *_ = sgd.lines
    assert points(full) == [(0.1, 0.5)]
    assert points(hollow) == [(0.01, 0.4)]
    assert (full.get_markerfacecolor(), hollow.get_markerfacecolor()) == (full.get_color(), "white")
    assert points(plain) == [(0.1, 0.3)]
    assert full.get_marker() == hollow.get_marker() != plain.get_marker()
    assert points(adam.lines[0]) == [(0.01, 0.6)]
    assert [axis.get_xscale() for axis in figure.axes] == ["log", "log"]
    assert [label.get_text() for label in sgd.get_xticklabels()] == ["0.01", "0.1"]
    assert adam.get_ylim()[0] == 0


def test_lr_figure_of_one_recipe_has_one_panel_and_marks_that_no_line_joins():
    rates = [0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4]
    figure = lr_figure(trials(*({"lr": lr, "val_accuracy": i / 10} for i, lr in enumerate(rates))))
    draw(figure)
    (axis,) = figure.axes
    assert axis.get_title() == ""
    assert points(axis.lines[0]) == [(lr, pytest.approx(i / 10)) for i, lr in reversed(list(enumerate(rates)))]
    assert legend(figure) == ["the one recipe"]
    assert {line.get_linestyle() for line in axis.lines} == {"None"}


def test_lr_figure_names_the_best_twelve_of_30_recipes():
    rows = [{"augmentation": f"a{i}", "lr": lr, "val_accuracy": i / 40} for i in range(30) for lr in (0.1, 0.01)]
    figure = lr_figure(trials(*rows))
    draw(figure)
    lines = [line for line in figure.axes[0].lines if line.get_xdata().size]
    assert [line.get_ydata()[0] for line in lines] == pytest.approx([i / 40 for i in reversed(range(30))])
    assert len({(line.get_marker(), line.get_color()) for line in lines}) == 13
    assert legend(figure) == [*(f"a{i}" for i in range(29, 17, -1)), "18 more recipes"]
    assert_legend_is_inside(figure)
    assert figure.axes[0].get_window_extent().height > 300


def test_lr_figure_of_four_optimizers_has_room_for_its_rates():
    names = ("sgd", "adam", "adamw", "muon")
    rows = [{"optimizer": name, "lr": lr} for name in names for lr in (0.1, 0.03, 0.01, 0.003, 0.001, 3e-4)]
    figure = lr_figure(trials(*rows))
    draw(figure)
    assert [overlapping(ticks(axis, "x")) for axis in figure.axes] == [[]] * 4


# --- heat_map_figure ---


def heat_map_of(accuracies: dict[tuple[str, float], float], stopped: tuple[str, float] | None = None) -> Figure:
    rows = [
        {"optimizer": name, "lr": lr, "val_accuracy": value, "status": "completed"}
        | ({"status": "stopped"} if (name, lr) == stopped else {})
        for (name, lr), value in accuracies.items()
    ]
    return heat_map_figure(trials(*rows))


def test_heat_map_shows_each_accuracy_as_number_and_what_is_missing_as_a_dash():
    found = {("sgd", 0.1): 0.3, ("sgd", 0.01): 0.456, ("adam", 0.1): 0.9}
    figure = heat_map_of(found, stopped=("sgd", 0.01))
    draw(figure)
    axis, bar = figure.axes
    values = np.asarray(axis.images[0].get_array())
    np.testing.assert_array_equal(values, [[NAN, 0.9], [0.456, 0.3]])  # the best recipe on top
    assert [label.get_text() for label in axis.get_yticklabels()] == ["adam", "sgd"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.01", "0.1"]
    assert [(text.get_position(), text.get_text()) for text in axis.texts] == [
        ((0, 0), "–"),
        ((1, 0), "90.0"),
        ((0, 1), "45.6"),
        ((1, 1), "30.0"),
    ]
    assert [text.get_color() for text in axis.texts[1:]] == ["white", "black", "black"]  # each against its ground
    (box,) = axis.patches  # hatched: the one that was stopped
    assert (box.get_xy(), box.get_hatch()) == ((-0.5, 0.5), "//")
    assert axis.get_xlabel() == "learning rate"
    assert bar.get_ylabel() == "validation accuracy"
    assert all(label.get_text().endswith(" %") for label in ticks(bar, "y"))


def test_heat_map_averages_over_seeds():
    rows = [{"lr": 0.1, "seed": 0, "val_accuracy": 0.4}, {"lr": 0.1, "seed": 1, "val_accuracy": 0.5}, {"lr": 0.01}]
    figure = heat_map_figure(trials(*rows))
    draw(figure)
    assert [text.get_text() for text in figure.axes[0].texts] == ["50.0", "45.0"]


def test_heat_map_of_equal_accuracies_can_be_read():
    figure = heat_map_of({("sgd", 0.1): 0.1, ("sgd", 0.01): 0.1})
    draw(figure)
    assert [text.get_color() for text in figure.axes[0].texts] == ["black"] * 2


@pytest.mark.slow
def test_heat_map_of_30_long_names_and_12_rates_does_not_overlap():
    rates = [10 ** (-i / 3) for i in range(12)]
    names = [f"an optimizer with quite a long name {i}" for i in range(30)]
    figure = heat_map_of({(name, lr): (i + 1) / 31 for i, name in enumerate(names) for lr in rates})
    draw(figure)
    axis = figure.axes[0]
    assert len(axis.texts) == 360
    assert overlapping(list(axis.texts)) == []
    assert overlapping(ticks(axis, "x")) == overlapping(ticks(axis, "y")) == []
    assert axis.get_yticklabels()[0].get_text() == "an optimizer with quite a long na…"


def test_heat_map_of_40_recipes_shows_the_best_30_and_says_so():
    figure = heat_map_of({(f"o{i}", lr): i / 50 for i in range(40) for lr in (0.1, 0.01)})
    draw(figure)
    (axis, _) = figure.axes
    assert [label.get_text() for label in ticks(axis, "y")] == [f"o{i}" for i in range(39, 9, -1)]
    assert axis.get_xlabel() == "learning rate (best 30 of 40 recipes)"


# --- trials without settings yet ---

UNKNOWN = dict.fromkeys(("seed", "val_accuracy", "optimizer", "lr", "augmentation")) | {
    "status": "pending",
    "epochs": 0,
}


def test_trials_without_settings_yet_are_in_no_figure():
    """A search that chooses as it goes has asked for them, but not said what they are."""
    known = [{"lr": 0.1}, {"lr": 0.01}, {"optimizer": "adam"}]
    kinds = {"seed": "Int64", "lr": "float64", "val_accuracy": "float64", "optimizer": "str", "augmentation": "str"}
    table = trials(*known, UNKNOWN, UNKNOWN).astype(kinds)
    figure = curves_figure(table, epochs(t0=[0.1], t1=[0.2], t2=[0.3]))
    draw(figure)
    assert [axis.get_title() for axis in panels(figure)] == ["adam", "sgd"]
    assert legend(figure) == ["lr 0.01", "lr 0.1"]
    for drawn in (lr_figure(table), heat_map_figure(table), parallel_figure(table)):
        draw(drawn)
        assert not [text.get_text() for text in texts(drawn) if "nan" in text.get_text().lower()]


# --- savings_figure ---


def test_savings_figure_shows_what_was_run_and_what_was_saved():
    savings = pd.DataFrame({"epoch": [1, 3, 9], "trials_trained": [9, 3, 1], "trials_without_stopping": [9, 8, 8]})
    figure = savings_figure(savings)
    draw(figure)
    saved, run = figure.axes[0].patches
    assert run.get_data().values.tolist() == [9, 3, 1]
    assert run.get_data().edges.tolist() == saved.get_data().edges.tolist() == [0, 1, 3, 9]
    assert list(saved.get_data().values) == [9, 8, 8]
    assert legend(figure) == ["epochs saved", "epochs run"]
    assert figure.axes[0].get_xlim() == (0, 9)
    assert run.get_facecolor()[:3] == pytest.approx([int(PALETTE[0][i : i + 2], 16) / 255 for i in (1, 3, 5)])


def test_savings_figure_of_one_trial():
    figure = savings_figure(pd.DataFrame({"epoch": [1], "trials_trained": [1], "trials_without_stopping": [1]}))
    draw(figure)
    assert figure.axes[0].patches[1].get_data().values.tolist() == [1]


def test_a_picture_of_savings_says_what_its_axes_are():
    savings = pd.DataFrame({"epoch": [1, 3], "trials_trained": [4, 2], "trials_without_stopping": [4, 4]})
    (axis,) = savings_figure(savings).axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("epoch", "trials in training")
