import io
import itertools
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from analysis.explanations import Explanation
from analysis.figures import (
    LINES,
    PALETTE,
    accuracy_figure,
    choose_images,
    curves_figure,
    lr_figure,
    panel_figure,
    savings_figure,
)
from explain import heatmap, overlay
from trainables import ImageData

NAN = float("nan")


def draw(figure: Figure) -> np.ndarray:
    """Save a figure as a report does; a warning or an empty picture fails."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(buffer, format="png")
    picture = np.asarray(Image.open(buffer).convert("L"))
    assert picture.std() > 5
    return picture


def recipes(*rows: dict[str, Any]) -> pd.DataFrame:
    defaults = {"censored": False, "val_low": NAN, "val_high": NAN}
    defaults |= {"test_accuracy": NAN, "test_low": NAN, "test_high": NAN}
    return pd.DataFrame([defaults | row for row in rows])


def trials(*rows: dict[str, Any]) -> pd.DataFrame:
    defaults = {
        "status": "completed",
        "phase": "search",
        "seed": 0,
        "optimizer": "sgd",
        "lr": 0.1,
        "augmentation": "none",
    }
    return pd.DataFrame([{"trial_id": f"t{i}"} | defaults | row for i, row in enumerate(rows)])


def epochs(**curves: list[float]) -> pd.DataFrame:
    rows = [(trial_id, i + 1, value) for trial_id, curve in curves.items() for i, value in enumerate(curve)]
    return pd.DataFrame(rows, columns=["trial_id", "epoch", "val_accuracy"])


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for axis in figure.axes if axis.get_legend() for text in axis.get_legend().get_texts()]


def assert_legend_is_inside(figure: Figure) -> None:
    box = figure.axes[-1].get_legend().get_window_extent()
    assert box.x1 <= figure.bbox.x1
    assert 0 <= box.y0 < box.y1 <= figure.bbox.y1


def points(line: Any) -> list[tuple[float, float]]:
    return list(zip(*(np.asarray(data).tolist() for data in line.get_data()), strict=True))


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


# --- curves_figure ---


def test_curves_figure_draws_a_line_a_trial_and_a_cross_where_one_was_stopped():
    table = trials(
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "status": "stopped"},
        {"optimizer": "adam", "status": "diverged"},
        {"optimizer": "adam", "status": "pending"},
    )
    figure = curves_figure(table, epochs(t0=[0.1, 0.2, 0.3], t1=[0.15], t2=[0.2, NAN]))
    draw(figure)
    first, second, cross, third, lost, _ = figure.axes[0].lines
    assert points(first) == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert points(second) == points(cross) == [(1, 0.15)]
    assert third.get_xdata().tolist() == [1, 2]
    assert points(lost) == [(2, 0.0)]  # a loss that is no number stands at the bottom
    assert [line.get_marker() for line in (cross, lost)] == ["x", "x"]
    assert first.get_color() == second.get_color() == cross.get_color() != third.get_color()
    assert legend(figure) == ["sgd", "adam", "stopped early"]
    assert figure.axes[0].get_ylim()[0] == 0


def test_curves_figure_of_one_recipe():
    figure = curves_figure(trials({}), epochs(t0=[0.5]))
    draw(figure)
    (line,) = figure.axes[0].lines
    assert points(line) == [(1, 0.5)]
    assert legend(figure) == ["the one recipe"]


def thirty_curves() -> Figure:
    rows = [{"lr": 10 ** (-i / 10)} for i in range(30)]
    return curves_figure(trials(*rows), epochs(**{f"t{i}": [i / 60, i / 30] for i in range(30)}))


def test_curves_figure_of_30_recipes():
    figure = thirty_curves()
    draw(figure)
    assert [points(line) for line in figure.axes[0].lines] == [[(1, i / 60), (2, i / 30)] for i in range(30)]
    assert legend(figure)[0] == "lr 1.0"
    assert_legend_is_inside(figure)
    assert figure.axes[0].get_window_extent().height > 300


def test_curves_of_30_recipes_can_be_told_apart():
    lines = thirty_curves().axes[0].lines
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == 30


# --- lr_figure ---


def test_lr_figure_has_a_panel_an_optimizer_and_a_line_for_what_else_varies():
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
    assert legend(figure) == ["flip", "no augmentation", "not completed"]
    # For each of the two: the line, its completed points, its stopped ones.
    flip, full, hollow, plain, *_ = sgd.lines
    assert points(flip) == [(0.01, 0.4), (0.1, 0.5)]
    assert points(full) == [(0.1, 0.5)]
    assert points(hollow) == [(0.01, 0.4)]
    assert (full.get_markerfacecolor(), hollow.get_markerfacecolor()) == (full.get_color(), "white")
    assert points(plain) == [(0.1, 0.3)]
    assert points(adam.lines[0]) == [(0.01, 0.6)]
    assert [axis.get_xscale() for axis in figure.axes] == ["log", "log"]
    assert [label.get_text() for label in sgd.get_xticklabels()] == ["0.01", "0.1"]
    assert adam.get_ylim()[0] == 0


def test_lr_figure_of_one_recipe_has_one_panel_and_one_line():
    rates = [0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4]
    figure = lr_figure(trials(*({"lr": lr, "val_accuracy": i / 10} for i, lr in enumerate(rates))))
    draw(figure)
    (axis,) = figure.axes
    assert axis.get_title() == ""
    assert points(axis.lines[0]) == [(lr, pytest.approx(i / 10)) for i, lr in reversed(list(enumerate(rates)))]
    assert legend(figure) == ["the one recipe", "not completed"]
    lines = [line for line in axis.lines if len(line.get_xdata()) > 1 and line.get_linestyle() in LINES]
    assert len(lines) == 1


def test_lr_figure_of_30_recipes():
    rows = [{"augmentation": f"a{i}", "lr": lr, "val_accuracy": i / 40} for i in range(30) for lr in (0.1, 0.01)]
    figure = lr_figure(trials(*rows))
    draw(figure)
    lines = [line for line in figure.axes[0].lines if line.get_linestyle() in LINES and line.get_xdata().size]
    assert sorted(line.get_ydata()[0] for line in lines) == pytest.approx([i / 40 for i in range(30)])
    assert legend(figure)[0] == "a0"
    assert_legend_is_inside(figure)
    assert figure.axes[0].get_window_extent().height > 300


# --- savings_figure ---


def test_savings_figure_shows_what_was_run_and_what_was_saved():
    savings = pd.DataFrame({"epoch": [1, 3, 9], "trials_trained": [9, 3, 1], "trials_stopped": [6, 2, 0]})
    figure = savings_figure(savings)
    draw(figure)
    saved, run = figure.axes[0].patches
    assert run.get_data().values.tolist() == [9, 3, 1]
    assert run.get_data().edges.tolist() == saved.get_data().edges.tolist() == [0, 1, 3, 9]
    assert list(saved.get_data().values) == [9, 9, 9]
    assert legend(figure) == ["epochs saved", "epochs run"]
    assert figure.axes[0].get_xlim() == (0, 9)
    assert run.get_facecolor()[:3] == pytest.approx([int(PALETTE[0][i : i + 2], 16) / 255 for i in (1, 3, 5)])


def test_savings_figure_of_one_trial():
    figure = savings_figure(pd.DataFrame({"epoch": [1], "trials_trained": [1], "trials_stopped": [0]}))
    draw(figure)
    assert figure.axes[0].patches[1].get_data().values.tolist() == [1]


# --- choose_images and panel_figure ---

CLASSES = ("$x^2$", "<script>", "a_b%\\", "long " * 20)


def explanation(correct: list[bool], indices: list[int] | None = None) -> Explanation:
    """Of images of classes 0, 1, 2, 3, 0, ...; a wrong prediction is the next class."""
    rng = np.random.default_rng(0)
    labels = np.arange(len(correct)) % 4
    logits = np.eye(4, dtype=np.float32)[np.where(correct, labels, (labels + 1) % 4)]
    indices = list(range(len(correct))) if indices is None else indices
    maps = rng.random((len(indices), 32, 32), dtype=np.float32)
    return Explanation("t0", logits, labels, np.array(indices), maps, maps[:, ::8, ::8] - 0.3, pd.DataFrame())


def test_chosen_images_are_right_ones_and_then_wrong_ones():
    correct = [i % 3 > 0 for i in range(60)]
    indices = list(range(5, 60, 2))
    best = explanation(correct, indices)
    chosen = choose_images(best, 5, 3)
    assert [correct[indices[position]] for position in chosen] == [True] * 5 + [False] * 3
    assert len(set(chosen)) == 8
    assert choose_images(best, 5, 3) == chosen
    assert choose_images(best, 5, 3, seed=1) != chosen


@pytest.mark.parametrize(("correct", "number"), [([True] * 6, 4), ([False] * 6, 2), ([True, False], 2)])
def test_there_are_fewer_images_where_there_are_too_few_of_a_kind(correct, number):
    assert len(choose_images(explanation(correct), 4, 2)) == number


def test_panel_shows_images_maps_and_class_names():
    rng = np.random.default_rng(1)
    data = ImageData(rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8), np.arange(8) % 4, CLASSES)
    first = explanation([True] * 4 + [False] * 4, [2, 3, 4, 5])
    second = explanation([False] * 8, [2, 3, 4, 5])
    figure = panel_figure([first, second], ["sgd · $lr$", "name " * 20], ["note 1", "$note$ 2"], data, [0, 3])
    draw(figure)
    pictures = [axis.images[0].get_array() for axis in figure.axes]
    assert len(pictures) == 2 * (1 + 2 * 2)
    assert np.array_equal(pictures[0], data.images[2])
    assert np.array_equal(pictures[1], heatmap(first.saliency[0], 96))
    assert np.array_equal(pictures[2], overlay(data.images[2], first.cam[0], 96))
    assert np.array_equal(pictures[5], data.images[5])
    assert np.array_equal(pictures[8], heatmap(second.saliency[3], 96))
    assert not any(text.get_parse_math() for text in figure.texts)
    assert [text.get_text() for text in figure.texts] == [
        "1. sgd · $lr$",
        "note 1",
        "2. " + ("name " * 20)[:25] + "…",
        "$note$ 2",
        "a_b%\\",
        "✓ a_b%\\",
        "✗ " + ("long " * 20)[:35] + "…",
        "<script>",
        "✗ a_b%\\",
        "✗ a_b%\\",
        *["saliency", "Grad-CAM"] * 2,
    ]
    boxes = [axis.get_position() for axis in figure.axes]
    assert all(box.x0 >= 0 and box.x1 <= 1 and box.y0 >= 0 and box.y1 <= 1 for box in boxes)


def test_titles_and_notes_of_a_panel_keep_to_their_network():
    data = ImageData(np.full((4, 32, 32, 3), 90, dtype=np.uint8), np.arange(4), CLASSES)
    names = ["adam · no augmentation · normalize False"] * 3
    notes = ["epoch 10, stopped early, test accuracy 99.9 %"] * 3
    figure = panel_figure([explanation([True] * 4)] * 3, names, notes, data, [0])
    draw(figure)
    boxes = [text.get_window_extent() for text in figure.texts]
    for titles in (boxes[0:6:2], boxes[1:6:2]):
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(titles))
        assert titles[-1].x1 <= figure.bbox.x1


def test_panel_of_one_network_and_one_image():
    data = ImageData(np.full((4, 32, 32, 3), 90, dtype=np.uint8), np.arange(4), CLASSES)
    figure = panel_figure([explanation([True] * 4, [1])], ["adam"], [""], data, [0])
    draw(figure)
    assert len(figure.axes) == 3
    assert [text.get_text() for text in figure.texts[2:4]] == ["<script>", "✓ <script>"]
