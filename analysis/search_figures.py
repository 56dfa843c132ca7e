"""Figures of a search: what each hyperparameter did, what accuracy cost, and who ran when."""

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from analysis.compare import varied_hyperparameters
from analysis.figures import COLORMAP, DPI, MAX_PANELS, PALETTE, shorten, style, tidy

MAX_AXES = 8


def isolation_figure(effects: pd.DataFrame) -> Figure | None:
    """Draw the effect of each hyperparameter's values, the others being equal; None if no two trials could be paired.

    Args:
        effects: as :func:`analysis.isolation` gives them.
    """
    names = effects[effects["num_blocks"] > 0]["hyperparameter"].unique()[:MAX_AXES]
    if not len(names):
        return None
    across = min(len(names), 3)
    down = -(-len(names) // across)
    figure = Figure(figsize=(8, 0.5 + 2.3 * down), dpi=DPI, layout="constrained")
    axes = figure.subplots(down, across, sharey=True, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        part = effects[effects["hyperparameter"] == name]
        middle = 100 * part["effect"].to_numpy()
        spread = np.stack([part["effect"] - part["low"], part["high"] - part["effect"]])
        places = np.arange(len(part))
        axis.axhline(0, color="#777777", linewidth=0.8)
        axis.errorbar(places, middle, yerr=100 * np.nan_to_num(spread), fmt="o", capsize=3, color=PALETTE[0])
        axis.set_xticks(places, [shorten(value, 12) for value in part["value"]], fontsize=8, parse_math=False)
        axis.set_title(f"{name} (n = {part['num_blocks'].iloc[0]})", fontsize=9, parse_math=False)
        axis.margins(x=0.25)
        tidy(axis)
    for axis in list(axes.flat)[len(names) :]:
        axis.set_visible(False)
    figure.supylabel("effect on validation accuracy, points", fontsize=9)
    return figure


def importance_figure(shares: pd.DataFrame) -> Figure:
    """Draw how much each hyperparameter decides whether a trial is among the best.

    Args:
        shares: as :func:`analysis.importance` gives them.
    """
    figure = Figure(figsize=(8, 0.9 + 0.34 * len(shares)), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(shares["hyperparameter"], shares["importance"], color=PALETTE[0])
    axis.bar_label(bars, [f"{100 * share:.0f} %" for share in shares["importance"]], padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.08 * max(1e-9, shares["importance"].max()))
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_xlabel(f"importance (PED-ANOVA, n = {shares['num_trials'].iloc[0]} trials)")
    tidy(axis)
    return figure


def parallel_figure(trials: pd.DataFrame) -> Figure:
    """Draw each trial as a line through its hyperparameters' values to its validation accuracy; the darker, the better.

    Args:
        trials: with an accuracy; the first eight hyperparameters that vary are drawn.
    """
    names = varied_hyperparameters(trials)[: MAX_AXES - 1]
    seen = trials[trials["val_accuracy"].notna()].sort_values("val_accuracy")
    figure = Figure(figsize=(8, 3.6), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    heights = []
    for place, name in enumerate([*names, "val_accuracy"]):
        height, ticks = _axis_of(seen[name])
        heights.append(height)
        axis.plot([place, place], [0, 1], color="#555555", linewidth=0.8)
        for at, text in ticks:
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
            axis.text(
                place + 0.02, at, shorten(text, 16), fontsize=7, va="center", parse_math=False, bbox=box, zorder=5
            )
    lines = np.stack(heights, axis=1)
    least, most = seen["val_accuracy"].min(), seen["val_accuracy"].max()
    norm = Normalize(least - 0.25 * (most - least), most)  # the worst must not vanish on white
    alpha = float(np.clip(100 / len(seen), 0.15, 0.8))
    for line, value in zip(lines, seen["val_accuracy"], strict=True):
        axis.plot(range(len(names) + 1), line, color=colormaps[COLORMAP](norm(value)), linewidth=1.1, alpha=alpha)
    axis.set_xticks(range(len(names) + 1), [*names, "validation\naccuracy"], fontsize=8)
    axis.set_xlim(-0.1, len(names) + 0.35)
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.set_title(f"n = {len(seen)} trials", fontsize=9, loc="left")
    return figure


def _axis_of(values: pd.Series) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Return where values lie on an axis from 0 to 1, and its ticks."""
    if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        kinds = sorted(values.astype("str").unique())
        place_of = {kind: i / max(1, len(kinds) - 1) for i, kind in enumerate(kinds)}
        return values.astype("str").map(place_of).to_numpy(dtype=float), [(at, kind) for kind, at in place_of.items()]
    numbers = values.to_numpy(dtype=float)
    is_share = values.name == "val_accuracy"
    log = not is_share and numbers.min() > 0 and numbers.max() / numbers.min() >= 10
    scaled = np.log(numbers) if log else numbers
    least, span = scaled.min(), np.ptp(scaled) or 1.0
    marks = sorted(set(numbers))
    if is_share or len(marks) > 6:
        marks = [marks[0], marks[-1]]
    places = ((np.array(marks) if not log else np.log(marks)) - least) / span
    texts = [f"{100 * mark:.1f} %" if is_share else f"{mark:.3g}" for mark in marks]
    return (scaled - least) / span, list(zip(places.tolist(), texts, strict=True))


def pareto_figure(points: pd.DataFrame) -> Figure:
    """Draw what each configuration reached over the minutes it took; hollow if stopped early.

    Args:
        points: as :func:`analysis.pareto_front` gives them.
    """
    figure = Figure(figsize=(8, 3.8), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    front = points[points["on_front"]]
    axis.step(
        front["train_seconds"] / 60, front["val_accuracy"], where="post", color="#000000", linewidth=1, label="front"
    )
    names = points["recipe"].unique()
    for i, name in enumerate(names):
        look = style(i)
        for censored, face in ((False, look["color"]), (True, "white")):
            part = points[(points["recipe"] == name) & (points["censored"] == censored)]
            axis.plot(
                part["train_seconds"] / 60, part["val_accuracy"], look["marker"], color=look["color"],
                markerfacecolor=face, markersize=6,
            )  # fmt: skip
        if i < MAX_PANELS:
            axis.plot([], [], look["marker"], color=look["color"], label=shorten(name))
    if points["censored"].any():
        axis.plot([], [], "o", color="#555555", markerfacecolor="white", label="stopped early")
    axis.set_xlabel("training time, minutes a trial")
    axis.set_ylabel("validation accuracy")
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    tidy(axis)
    return figure


def timeline_figure(timeline: pd.DataFrame, trials: pd.DataFrame) -> Figure:
    """Draw which trial held which slot when, by what became of it.

    Args:
        timeline: as :func:`analysis.load_timeline` gives it.
        trials: as :func:`analysis.load_trials` does, of the same runs.
    """
    keys = [name for name in ("run", "attempt", "host", "slot") if name in timeline]
    rows = timeline.assign(host=timeline["host"].fillna("")).groupby(keys, sort=True).ngroup()
    status = timeline["trial_id"].map(trials.set_index("trial_id")["status"].astype("str"))
    kinds = status.where(~timeline["outcome"].isin(["lost", "retried"]), "begun again")
    looks = {
        "completed": (PALETTE[0], ""),
        "stopped": (PALETTE[4], "///"),
        "diverged": (PALETTE[5], "xxx"),
        "failed": (PALETTE[1], "+++"),
        "begun again": (PALETTE[3], "..."),
        "running": (PALETTE[2], "\\\\"),
        "pending": ("#bbbbbb", ""),
    }
    slots = int(rows.max()) + 1
    figure = Figure(figsize=(8, min(9.0, 1.3 + 0.28 * slots)), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    for kind, (color, hatch) in looks.items():
        part = timeline[kinds == kind]
        if part.empty:
            continue
        start = part["start_seconds"] / 60
        length = (part["end_seconds"] - part["start_seconds"]) / 60
        axis.barh(
            rows[part.index], length, left=start, height=0.8, color=color, hatch=hatch, edgecolor="white",
            linewidth=0.5, label=kind,
        )  # fmt: skip
    axis.set_xlabel("minutes since the first trial began")
    axis.set_ylabel("slot")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylim(slots - 0.5, -0.5)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    tidy(axis)
    return figure
