"""Figures of what networks say of the test images: their maps, their confidence, and what they confuse."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from analysis.explanations import Explanation
from analysis.figures import COLORMAP, DPI, PALETTE, in_percent, shorten, tidy
from explain.render import heatmap, overlay
from trainables.data import ImageData

_TILE = 96  # pixels of one picture in the panel


def confusion_figure(shares: pd.DataFrame) -> Figure:
    """Draw which share of each class's images (rows) is predicted as which (columns).

    Args:
        shares: as :func:`analysis.confusion` gives them.
    """
    size = len(shares)
    figure = Figure(figsize=(min(9.0, 4.2 + 0.24 * size), min(8.2, 3.4 + 0.22 * size)), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    # The root, so that one image in a hundred is seen beside ninety.
    image = axis.imshow(shares.to_numpy(), cmap=COLORMAP, norm=PowerNorm(0.5, 0, 1))
    names = [shorten(str(name), 24) for name in shares.index]
    axis.set_xticks(range(size), names, rotation=90, fontsize=7, parse_math=False)
    axis.set_yticks(range(size), names, fontsize=7, parse_math=False)
    axis.set_xlabel("predicted")
    axis.set_ylabel("truth")
    figure.colorbar(image, ax=axis, format=in_percent(), label="share of the row's images", shrink=0.7)
    return figure


def calibration_figure(bins: pd.DataFrame) -> Figure:
    """Draw accuracy over confidence, and how many predictions are how confident.

    Args:
        bins: as :func:`analysis.calibration` gives them.
    """
    figure = Figure(figsize=(5.2, 4.6), dpi=DPI, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color="#777777", linestyle="--", linewidth=1, label="as right as confident")
    upper.plot(bins["confidence"], bins["accuracy"], "o-", color=PALETTE[0], label="predictions")
    upper.set_ylabel("accuracy")
    upper.set_ylim(0, 1)
    upper.yaxis.set_major_formatter(in_percent())
    upper.legend(frameon=False, fontsize=8)
    lower.bar(
        bins["low"], bins["num_predictions"], width=bins["high"] - bins["low"], align="edge", color=PALETTE[0],
        edgecolor="white",
    )  # fmt: skip
    lower.set_ylabel("predictions", fontsize=8)
    lower.set_xlabel("confidence (softmax of the predicted class)")
    lower.set_xlim(0, 1)
    lower.xaxis.set_major_formatter(in_percent())
    for axis in (upper, lower):
        tidy(axis)
    return figure


def choose_images(best: Explanation, num_right: int, num_wrong: int, seed: int = 0) -> list[int]:
    """Return positions among the explained images: a seeded choice of right and wrong predictions of one trial.

    Right ones come first. Where there are too few of one kind, there are fewer.
    """
    correct = best.correct[best.indices]
    rng = np.random.default_rng([seed, 4])
    right = rng.permutation(np.flatnonzero(correct))[:num_right]
    wrong = rng.permutation(np.flatnonzero(~correct))[:num_wrong]
    return [int(i) for i in (*right, *wrong)]


def panel_figure(
    explanations: Sequence[Explanation],
    names: Sequence[str],
    notes: Sequence[str],
    data: ImageData,
    positions: Sequence[int],
) -> Figure:
    """Draw test images with saliency and Grad-CAM of several networks side by side.

    Args:
        explanations: one a network, all of the same images.
        names: one a network, its title.
        notes: one a network, below its title.
        data: the test images.
        positions: which of the explained images.
    """
    # Laid out by hand: a layout engine would make room for every title.
    tile, gap, between, line = 1.0, 0.06, 0.22, 0.24  # inches
    networks = len(explanations)
    width = tile + networks * (between + 2 * tile + gap) + 0.4
    height = len(positions) * (tile + line + 0.04) + 3 * line
    figure = Figure(figsize=(width, height), dpi=DPI)

    def place(row: int, left: float, picture: np.ndarray) -> None:
        bottom = height - 1.8 * line - (row + 1) * (tile + line + 0.04) + 0.04
        axis = figure.add_axes((left / width, bottom / height, tile / width, tile / height))
        axis.imshow(picture, interpolation="nearest")
        axis.set_axis_off()

    def write(row: int, left: float, text: str, **style: Any) -> None:
        bottom = height - 1.8 * line - row * (tile + line + 0.04) - 0.17
        figure.text(left / width, bottom / height, text, fontsize=style.pop("fontsize", 7), parse_math=False, **style)

    lefts = [0.15 + tile + between + k * (between + 2 * tile + gap) for k in range(networks)]
    for k, (name, note) in enumerate(zip(names, notes, strict=True)):
        title = f"{k + 1}. {shorten(name, 22)}"
        figure.text(lefts[k] / width, 1 - 0.2 / height, title, fontsize=8.5, weight="bold", parse_math=False)
        figure.text(lefts[k] / width, 1 - 0.34 / height, note, fontsize=6, color="#555555", parse_math=False)
    for row, position in enumerate(positions):
        index = int(explanations[0].indices[position])
        picture, label = data.images[index], int(data.labels[index])
        place(row, 0.15, picture)
        write(row, 0.15, shorten(data.class_names[label], 19))
        for k, explanation in enumerate(explanations):
            predicted = int(explanation.logits[index].argmax())
            right = predicted == label
            place(row, lefts[k], heatmap(explanation.saliency[position], _TILE))
            place(row, lefts[k] + tile + gap, overlay(picture, explanation.cam[position], _TILE))
            text = ("✓ " if right else "✗ ") + shorten(data.class_names[predicted], 36)
            write(row, lefts[k], text, color="#00694b" if right else "#a33c00")
    for k in range(networks):
        write(len(positions), lefts[k] + tile / 2, "saliency", ha="center", color="#555555")
        write(len(positions), lefts[k] + tile + gap + tile / 2, "Grad-CAM", ha="center", color="#555555")
    return figure
