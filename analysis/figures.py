"""Figures of a report, drawn from tables only."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from analysis.compare import recipe_columns, recipe_name
from analysis.effects import accuracy_over
from analysis.explanations import Explanation
from explain.render import heatmap, overlay
from trainables.data import ImageData

# Okabe & Ito's palette (2008), which the colour-blind can tell apart; without its yellow, which is faint on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
DPI = 150
_TILE = 96  # pixels of one picture in the panel


def _style(index: int) -> dict[str, Any]:
    return {
        "color": PALETTE[index % len(PALETTE)],
        "marker": MARKERS[(index + index // 28) % len(MARKERS)],
        "linestyle": LINES[index // len(PALETTE) % len(LINES)],
    }


def _shorten(text: str, length: int = 34) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _tidy(axis: Axes) -> None:
    axis.grid(True, color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def accuracy_figure(recipes: pd.DataFrame) -> Figure:
    """Draw validation and, where measured, test accuracy of each recipe with 95 % intervals.

    Args:
        recipes: as :func:`analysis.compare.compare_recipes` gives them, with ``test_accuracy``, ``test_low`` and
            ``test_high`` (NaN where not measured).
    """
    figure = Figure(figsize=(8, 1.4 + 0.42 * len(recipes)), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    rows = np.arange(len(recipes))
    for kind, offset, index in (("val", -0.12, 0), ("test", 0.12, 1)):
        value = recipes[f"{kind}_accuracy"].to_numpy(dtype=float)
        if np.isnan(value).all():
            continue
        low = value - recipes[f"{kind}_low"].to_numpy(dtype=float)
        high = recipes[f"{kind}_high"].to_numpy(dtype=float) - value
        label = "validation" if kind == "val" else "test"
        errors = np.nan_to_num(np.clip(np.stack([low, high]), 0, None))
        style = _style(index) | {"linestyle": "none"}
        axis.errorbar(value, rows + offset, xerr=errors, label=label, capsize=3, markersize=6, **style)
    names = [_shorten(r["recipe"]) + (" (not all completed)" if r["censored"] else "") for _, r in recipes.iterrows()]
    axis.set_yticks(rows, names, parse_math=False)
    axis.invert_yaxis()
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_xlabel("accuracy of the recipe's best configuration, with 95 % interval")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _tidy(axis)
    return figure


def curves_figure(trials: pd.DataFrame, epochs: pd.DataFrame) -> Figure:
    """Draw validation accuracy over epochs, one line a trial; a cross marks where ASHA stopped it."""
    columns = recipe_columns(trials)
    names = trials.apply(lambda row: recipe_name(row, columns), axis=1)
    figure = Figure(figsize=(8, max(4.2, 0.8 + 0.18 * names.nunique())), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    styles = {name: _style(i) for i, name in enumerate(names.unique())}
    curves = dict(list(epochs.groupby("trial_id")))
    seen: set[str] = set()
    for (_, trial), name in zip(trials.iterrows(), names, strict=True):
        if trial["trial_id"] not in curves:
            continue
        curve = curves[trial["trial_id"]]
        label = _shorten(name) if name not in seen else None
        seen.add(name)
        axis.plot(curve["epoch"], curve["val_accuracy"], label=label, markersize=3.5, linewidth=1.3, **styles[name])
        if trial["status"] in ("stopped", "diverged"):
            last = curve.iloc[-1]
            height = 0.0 if pd.isna(last["val_accuracy"]) else last["val_accuracy"]
            axis.plot(last["epoch"], height, "x", color=styles[name]["color"], markersize=9, markeredgewidth=2)
    if trials["status"].isin(["stopped", "diverged"]).any():
        axis.plot([], [], "x", color="#555555", markersize=9, markeredgewidth=2, label="stopped early")
    axis.set_xlabel("epoch")
    axis.set_ylabel("validation accuracy")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _tidy(axis)
    return figure


def lr_figure(trials: pd.DataFrame) -> Figure:
    """Draw validation accuracy over the learning rate, one panel an optimizer, one line for what else varies.

    Hollow marks are trials that were stopped early: their accuracy is that of an unfinished training.
    """
    points = accuracy_over(trials, "lr")
    panels = sorted(points["optimizer"].unique()) if "optimizer" in points else [None]
    others = [c for c in recipe_columns(trials) if c not in ("lr", "optimizer")]
    names = points.apply(lambda row: recipe_name(row, others), axis=1)
    styles = {name: _style(i) for i, name in enumerate(sorted(names.unique()))}
    figure = Figure(figsize=(8, max(3.6, 1.0 + 0.18 * len(styles))), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        inside = points["optimizer"] == panel if panel is not None else pd.Series(True, index=points.index)
        for name, style in styles.items():
            line = points[inside & (names == name)].sort_values("lr")
            axis.plot(
                line["lr"], line["val_accuracy"], linewidth=1.3, color=style["color"], linestyle=style["linestyle"]
            )
            for censored, face in ((False, style["color"]), (True, "white")):
                part = line[line["censored"] == censored]
                axis.plot(part["lr"], part["val_accuracy"], style["marker"], color=style["color"], markerfacecolor=face)
        axis.set_xscale("log")
        rates = sorted(points["lr"].unique())
        if len(rates) <= 6:
            axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
            axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("learning rate")
        axis.margins(x=0.15)
        axis.set_title(str(panel) if panel is not None else "", fontsize=10)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _tidy(axis)
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("validation accuracy")
    for name, style in styles.items():
        axes[-1].plot([], [], label=_shorten(name), **style)
    axes[-1].plot([], [], "o", color="#555555", markerfacecolor="white", label="not completed")
    axes[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def savings_figure(savings: pd.DataFrame) -> Figure:
    """Draw how many trials were trained for how many epochs, against all of them to the end."""
    figure = Figure(figsize=(8, 2.8), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    marks, trained = savings["epoch"].to_numpy(), savings["trials_trained"].to_numpy()
    edges = np.concatenate([[0], marks])
    axis.stairs([trained[0]] * len(trained), edges, fill=True, color="#e3e3e3", label="epochs saved")
    axis.stairs(trained, edges, fill=True, color=PALETTE[0], label="epochs run")
    axis.set_xlabel("epoch")
    axis.set_ylabel("trials in training")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlim(0, marks[-1])
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _tidy(axis)
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
    width = tile + networks * (between + 2 * tile + gap) + 0.3
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
        title = f"{k + 1}. {_shorten(name, 26)}"
        figure.text(lefts[k] / width, 1 - 0.2 / height, title, fontsize=8.5, weight="bold", parse_math=False)
        figure.text(lefts[k] / width, 1 - 0.34 / height, note, fontsize=6, color="#555555", parse_math=False)
    for row, position in enumerate(positions):
        index = int(explanations[0].indices[position])
        picture, label = data.images[index], int(data.labels[index])
        place(row, 0.15, picture)
        write(row, 0.15, _shorten(data.class_names[label], 19))
        for k, explanation in enumerate(explanations):
            predicted = int(explanation.logits[index].argmax())
            right = predicted == label
            place(row, lefts[k], heatmap(explanation.saliency[position], _TILE))
            place(row, lefts[k] + tile + gap, overlay(picture, explanation.cam[position], _TILE))
            text = ("✓ " if right else "✗ ") + _shorten(data.class_names[predicted], 36)
            write(row, lefts[k], text, color="#00694b" if right else "#a33c00")
    for k in range(networks):
        write(len(positions), lefts[k] + tile / 2, "saliency", ha="center", color="#555555")
        write(len(positions), lefts[k] + tile + gap + tile / 2, "Grad-CAM", ha="center", color="#555555")
    return figure
