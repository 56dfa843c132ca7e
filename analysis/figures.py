"""Figures of trials, drawn from tables only."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from analysis.compare import amount_columns, recipe_columns, recipe_name
from analysis.effects import accuracy_over

# Okabe & Ito's palette (2008), which the colour-blind can tell apart; without its yellow, which is faint on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "d")
LINES = ("-", "--", "-.", ":")
DPI = 150
# Its lightness rises evenly, so it reads in grey; dark is high, as white is the page.
COLORMAP = "Blues"
MAX_PANELS = 12
MAX_ROWS = 30  # recipes, one a row: more would not fit on a page
CROSSED = {"stopped": "stopped early", "diverged": "diverged"}  # curves that end in a cross


def style(index: int) -> dict[str, Any]:
    """Return colour, marker and line of one thing of several, so that any two of 44 differ without colour too.

    There are 7, 11 and 4: no two have a common divisor, so no pair of them comes again before their product.
    """
    return {
        "color": PALETTE[index % len(PALETTE)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
    }


def looks_of(best: pd.Series) -> dict[str, dict[str, Any]]:
    """Return the mark of each recipe, best first: twelve can be told apart, all others are grey.

    Args:
        best: what counts of each recipe, indexed by its name; there may be several of one.
    """
    names = best.groupby(level=0).max().sort_values(ascending=False, kind="stable").index
    grey = {"color": "#999999", "marker": ".", "linestyle": "none"}
    return {name: style(i) | {"linestyle": "none"} if i < MAX_PANELS else grey for i, name in enumerate(names)}


def name_marks(axis: Axes, looks: dict[str, dict[str, Any]], censored: bool) -> None:
    """Write a legend of recipes' marks beside an axis; where some are hollow, of that too."""
    for name, look in list(looks.items())[:MAX_PANELS]:
        axis.plot([], [], label=shorten(name), **look)
    if len(looks) > MAX_PANELS:
        axis.plot([], [], label=f"{len(looks) - MAX_PANELS} more recipes", **list(looks.values())[-1])
    if censored:
        axis.plot([], [], "o", color="#555555", markerfacecolor="white", label="not completed")
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def in_percent() -> FuncFormatter:
    """Return what writes the shares at an axis as percent, with the digits that they have."""
    return FuncFormatter(lambda share, _: f"{round(100 * share, 6) + 0.0:g} %")


def whole(most: int = 10) -> MaxNLocator:
    """Return what puts ticks at whole numbers only, even where there is but one."""
    return MaxNLocator(nbins=most, integer=True, min_n_ticks=1)


def of_trial(table: pd.DataFrame) -> list[str]:
    """Return the columns that say which trial a row is of: several runs may have trials of the same id."""
    return [name for name in ("run", "trial_id") if name in table]


def shorten(text: str, length: int = 34) -> str:
    """Return a text of at most so many characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def label_ticks(axis: Axes, places: Sequence[float], labels: Sequence[str], inches: float) -> None:
    """Write labels below an axis of about so many inches, slanted where they would lie on each other."""
    crowded = 0.085 * len(labels) * max(map(len, labels)) > inches
    slant: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axis.set_xticks(places, labels, fontsize=8, parse_math=False, **slant)


def tidy(axis: Axes) -> None:
    """Give an axis a faint grid and no frame."""
    axis.grid(True, color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def accuracy_figure(recipes: pd.DataFrame) -> Figure:
    """Draw validation and, where measured, test accuracy of each recipe (the best 30) with 95 % intervals.

    Args:
        recipes: as :func:`analysis.compare.compare_recipes` gives them, best first, with ``test_accuracy``,
            ``test_low`` and ``test_high`` (NaN where not measured).
    """
    number = len(recipes)
    recipes = recipes.head(MAX_ROWS)
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
        look = style(index) | {"linestyle": "none"}
        axis.errorbar(value, rows + offset, xerr=errors, label=label, capsize=3, markersize=6, **look)
    names = [shorten(r["recipe"]) + (" (not all completed)" if r["censored"] else "") for _, r in recipes.iterrows()]
    axis.set_yticks(rows, names, parse_math=False)
    axis.set_ylim(len(recipes) - 0.5, -0.5)
    axis.xaxis.set_major_formatter(in_percent())
    axis.set_xlabel("accuracy of the recipe's best configuration, with 95 % interval" + _best_of(len(recipes), number))
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    tidy(axis)
    return figure


def _best_of(shown: int, number: int) -> str:
    return f" (best {shown} of {number} recipes)" if shown < number else ""


def curves_figure(trials: pd.DataFrame, epochs: pd.DataFrame) -> Figure:
    """Draw validation accuracy over epochs, a panel a recipe (the best twelve) and a line a trial.

    Colour, mark and line tell the amounts apart that vary within a recipe, such as learning rates, of up to twelve. A
    cross marks where a trial was stopped early, or diverged; a dotted line an epoch at which trials were stopped.
    """
    trials = trials[trials["seed"].notna()]  # a search that chooses as it goes has trials without settings yet
    columns, amounts = recipe_columns(trials), amount_columns(trials)
    named = trials.assign(
        _recipe=[recipe_name(row, columns) for _, row in trials.iterrows()],
        _amounts=[", ".join(f"{name} {row[name]:g}" for name in amounts) for _, row in trials.iterrows()],
    )
    best = named.groupby("_recipe")["val_accuracy"].max().sort_values(ascending=False)
    panels = best.index[:MAX_PANELS].to_list()
    amounts_seen = sorted(named["_amounts"].unique())
    # Of more than can be told apart, all look the same.
    told = len(amounts_seen) <= MAX_PANELS
    plain = {"color": PALETTE[0], "alpha": 0.5, "marker": "."}
    styles = {name: style(i) if told else plain for i, name in enumerate(amounts_seen)}
    curves = dict(list(epochs.groupby(of_trial(epochs))))
    across = min(len(panels), 4)
    down = -(-len(panels) // across)
    figure = Figure(figsize=(8, max(3.2, 0.6 + 1.9 * down)), dpi=DPI, layout="constrained")
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for place, (axis, panel) in enumerate(zip(axes.flat, panels, strict=False)):
        for _, trial in named[named["_recipe"] == panel].iterrows():
            key = tuple(trial[name] for name in of_trial(epochs))
            if key not in curves:
                continue
            curve, look = curves[key], styles[trial["_amounts"]]
            axis.plot(curve["epoch"], curve["val_accuracy"], markersize=3, linewidth=1.1, **look)
            if trial["status"] in CROSSED:
                last = curve.iloc[-1]
                height = 0.0 if pd.isna(last["val_accuracy"]) else last["val_accuracy"]
                axis.plot(last["epoch"], height, "x", color=look["color"], markersize=7, markeredgewidth=1.8)
        for rung in sorted(trials[trials["status"] == "stopped"]["epochs"].unique()):
            axis.axvline(rung, color="#999999", linewidth=0.8, linestyle=":", zorder=0)
        axis.set_title(shorten(panel, 26), fontsize=8, parse_math=False)
        axis.yaxis.set_major_formatter(in_percent())
        axis.xaxis.set_major_locator(whole(5))
        axis.tick_params(labelbottom=place + across >= len(panels))  # no panel below it
        tidy(axis)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    axes[0, 0].set_ylim(bottom=0)
    figure.supxlabel("epoch", fontsize=10)
    figure.supylabel("validation accuracy", fontsize=10)
    shown = [Line2D([], [], label=shorten(name), **look) for name, look in styles.items() if name and told]
    crosses = [text for status, text in CROSSED.items() if (trials["status"] == status).any()]
    if crosses:
        shown.append(Line2D([], [], linestyle="none", marker="x", color="#555555", label=" or ".join(crosses)))
    if shown:
        figure.legend(handles=shown, frameon=False, fontsize=8, loc="outside upper center", ncols=min(4, len(shown)))
    return figure


def lr_figure(trials: pd.DataFrame) -> Figure:
    """Draw validation accuracy over learning rates that were drawn from a range, one panel an optimizer.

    What else varies has marks of its own: the best twelve have names, any others are grey. Hollow marks are of trials
    that were not completed: their accuracy is that of an unfinished training. No line joins the marks, for between two
    rates that were drawn other things may differ, too.
    """
    points = accuracy_over(trials, "lr")
    panels = sorted(points["optimizer"].unique()) if "optimizer" in points else [None]
    others = [c for c in recipe_columns(trials) if c not in ("lr", "optimizer")]
    names = points.apply(lambda row: recipe_name(row, others), axis=1)
    looks = looks_of(points.set_index(names)["val_accuracy"])
    figure = Figure(figsize=(8, 3.6), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    rates = sorted(points["lr"].unique())
    for axis, panel in zip(axes, panels, strict=True):
        inside = points["optimizer"] == panel if panel is not None else pd.Series(True, index=points.index)
        for name, look in looks.items():
            for censored, face in ((False, look["color"]), (True, "white")):
                part = points[inside & (names == name) & (points["censored"] == censored)]
                # What diverged lies on the axis: it is not cut off there.
                free = {"clip_on": False, "in_layout": False}
                axis.plot(part["lr"], part["val_accuracy"], markerfacecolor=face, **free, **look)
        axis.set_xscale("log")
        if len(rates) <= 6:
            label_ticks(axis, rates, [f"{rate:.3g}" for rate in rates], 5.2 / len(panels))
            axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("learning rate")
        axis.margins(x=0.15)
        axis.set_title(str(panel) if panel is not None else "", fontsize=10)
        axis.yaxis.set_major_formatter(in_percent())
        tidy(axis)
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("validation accuracy")
    name_marks(axes[-1], looks, bool(points["censored"].any()))
    return figure


def savings_figure(savings: pd.DataFrame) -> Figure:
    """Draw how many trials were trained for how many epochs, against how many would have been without ASHA.

    Args:
        savings: as :func:`analysis.asha_savings` gives them, with a row at least.
    """
    figure = Figure(figsize=(8, 2.8), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    marks, trained = savings["epoch"].to_numpy(), savings["trials_trained"].to_numpy()
    edges = np.concatenate([[0], marks])
    axis.stairs(savings["trials_without_stopping"], edges, fill=True, color="#e3e3e3", label="epochs saved")
    axis.stairs(trained, edges, fill=True, color=PALETTE[0], label="epochs run")
    axis.set_xlabel("epoch")
    axis.set_ylabel("trials in training")
    axis.xaxis.set_major_locator(whole())
    axis.yaxis.set_major_locator(whole())
    axis.set_xlim(0, marks[-1])
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    tidy(axis)
    return figure


def heat_map_figure(trials: pd.DataFrame) -> Figure:
    """Draw validation accuracy of each recipe (rows, the best 30) at each learning rate (columns).

    Hatched where no trial was completed.
    """
    points = accuracy_over(trials, "lr")
    rates = sorted(points["lr"].unique())
    table = points.pivot_table(index="recipe", columns="lr", values="val_accuracy")
    number = len(table)
    table = table.loc[table.max(axis=1).sort_values(ascending=False).index, rates].head(MAX_ROWS)
    censored = points.set_index(["recipe", "lr"])["censored"]
    width, height = min(8, 3.6 + 0.9 * len(rates)), max(2.6, 1.3 + 0.36 * len(table))
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    values = table.to_numpy(dtype=np.float64)
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    image = axis.imshow(values, cmap=COLORMAP, aspect="auto")
    for row, recipe in enumerate(table.index):
        for column, rate in enumerate(rates):
            value = values[row, column]
            if np.isnan(value):
                axis.text(column, row, "–", ha="center", va="center", fontsize=8)
                continue
            dark = value > middle
            axis.text(
                column, row, f"{100 * value:.1f}", ha="center", va="center", fontsize=8,
                color="white" if dark else "black",
            )  # fmt: skip
            if censored[recipe, rate]:
                edge = "white" if dark else "black"
                box = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="//", edgecolor=edge, alpha=0.35)
                axis.add_patch(box)
    label_ticks(axis, range(len(rates)), [f"{rate:.3g}" for rate in rates], width - 3.6)
    axis.set_yticks(range(len(table)), [shorten(name) for name in table.index], fontsize=8, parse_math=False)
    axis.set_xlabel("learning rate" + _best_of(len(table), number))
    figure.colorbar(image, ax=axis, format=in_percent(), label="validation accuracy")
    return figure
