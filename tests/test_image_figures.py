import itertools

import numpy as np
import pandas as pd
import pytest
from test_figures import draw, overlapping, points, ticks

from analysis.explanations import Explanation
from analysis.image_figures import calibration_figure, choose_images, confusion_figure, panel_figure
from explain import heatmap, overlay
from trainables import ImageData

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
        "2. " + ("name " * 20)[:21] + "…",
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


# --- confusion_figure ---


def shares(matrix: list[list[float]] | np.ndarray, names: list[str]) -> pd.DataFrame:
    return pd.DataFrame(np.asarray(matrix), index=names, columns=names)


def test_confusion_figure_has_the_truth_in_rows_and_what_is_predicted_in_columns():
    matrix = [[0.9, 0.1, 0.0], [0.0, 0.5, 0.5], [0.25, 0.0, 0.75]]
    figure = confusion_figure(shares(matrix, ["cat", "dog", "<b>$x$"]))
    draw(figure)
    axis, bar = figure.axes
    np.testing.assert_array_equal(axis.images[0].get_array(), matrix)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["cat", "dog", "<b>$x$"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["cat", "dog", "<b>$x$"]
    assert not any(label.get_parse_math() for label in (*axis.get_xticklabels(), *axis.get_yticklabels()))
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted", "truth")
    assert bar.get_ylabel() == "share of the row's images"
    assert all(label.get_text().endswith(" %") for label in ticks(bar, "y"))
    assert overlapping(ticks(bar, "y")) == []


def test_a_share_of_a_hundredth_is_seen_and_darker_is_more():
    figure = confusion_figure(shares([[0.99, 0.01], [0.0, 1.0]], ["a", "b"]))
    draw(figure)
    image = figure.axes[0].images[0]
    lightness = [image.cmap(image.norm(share))[:3] @ np.array([0.299, 0.587, 0.114]) for share in (0, 0.01, 0.5, 1)]
    assert lightness == sorted(lightness, reverse=True)
    assert lightness[0] - lightness[1] > 0.04  # of a scale that is not bent it would be 0.007


@pytest.mark.parametrize("size", [2, 10, 30])
def test_names_of_classes_do_not_overlap(size):
    names = [f"class {i} with a long name" for i in range(size)]
    figure = confusion_figure(shares(np.eye(size), names))
    draw(figure)
    axis = figure.axes[0]
    assert len(ticks(axis, "x")) == len(ticks(axis, "y")) == size
    assert overlapping(ticks(axis, "x")) == overlapping(ticks(axis, "y")) == []
    assert all(len(label.get_text()) <= 24 for label in ticks(axis, "x"))
    box = axis.get_window_extent()
    assert box.width / size > 20  # pixels a class


# --- calibration_figure ---


def test_calibration_figure_shows_accuracy_over_confidence_and_how_many():
    bins = pd.DataFrame(
        {
            "low": [0.0, 0.8],
            "high": [0.2, 1.0],
            "confidence": [0.1, 0.9],
            "accuracy": [0.05, 0.7],
            "num_predictions": [4, 16],
        }
    )
    figure = calibration_figure(bins)
    draw(figure)
    upper, lower = figure.axes
    ideal, network = upper.lines
    assert points(ideal) == [(0, 0), (1, 1)]
    assert points(network) == [(0.1, 0.05), (0.9, 0.7)]
    assert ideal.get_linestyle() != network.get_linestyle()
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["as right as confident", "predictions"]
    assert [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in lower.patches] == [
        (0.0, pytest.approx(0.2), 4),
        (0.8, pytest.approx(0.2), 16),
    ]
    assert (upper.get_ylabel(), lower.get_ylabel()) == ("accuracy", "predictions")
    assert lower.get_xlabel() == "confidence (softmax of the predicted class)"
    assert (upper.get_xlim(), upper.get_ylim()) == ((0, 1), (0, 1))


def test_calibration_figure_of_one_bin_shows_a_mark():
    bins = {"low": [0.8], "high": [1.0], "confidence": [0.9], "accuracy": [1.0], "num_predictions": [3]}
    figure = calibration_figure(pd.DataFrame(bins))
    draw(figure)
    assert figure.axes[0].lines[1].get_marker() == "o"
    assert [label.get_text() for label in ticks(figure.axes[0], "y")][-1] == "100 %"
