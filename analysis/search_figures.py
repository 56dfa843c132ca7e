"""Figures of a search: what each hyperparameter did, what accuracy cost, and who ran when."""

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from analysis.compare import varied_hyperparameters
from analysis.figures import (
    COLORMAP,
    DPI,
    PALETTE,
    in_percent,
    label_ticks,
    looks_of,
    name_marks,
    of_trial,
    shorten,
    tidy,
)

MAX_AXES = 8


def isolation_figure(effects: pd.DataFrame) -> Figure:
    """Draw the effect of each value of the first eight hyperparameters, the others being equal.

    Args:
        effects: as :func:`analysis.isolation` gives them, of hyperparameters whose trials could be paired.
    """
    names = effects["hyperparameter"].unique()[:MAX_AXES]
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
        values = [shorten(value, 12) for value in part["value"]]
        label_ticks(axis, places.tolist(), values, 7.4 / across)
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
    axis.xaxis.set_major_formatter(in_percent())
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
    norm = Normalize(least - 0.4 * (most - least), most)  # the worst must not vanish on white
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
    is_share = values.name == "val_accuracy"
    is_number = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    # Few numbers stand as far apart as kinds do: 0, 1e-5 and 1e-4 would lie on each other.
    if not is_share and (not is_number or values.nunique() <= 6):
        kinds = sorted(values.unique())
        place_of = {kind: i / max(1, len(kinds) - 1) for i, kind in enumerate(kinds)}
        texts = [f"{kind:.3g}" if is_number else str(kind) for kind in kinds]
        return values.map(place_of).to_numpy(dtype=float), list(zip(place_of.values(), texts, strict=True))
    numbers = values.to_numpy(dtype=float)
    log = not is_share and numbers.min() > 0 and numbers.max() / numbers.min() >= 10
    scaled = np.log(numbers) if log else numbers
    least, span = scaled.min(), np.ptp(scaled) or 1.0
    ends = sorted({numbers.min(), numbers.max()})
    texts = [f"{100 * end:.1f} %" if is_share else f"{end:.3g}" for end in ends]
    return (scaled - least) / span, list(zip((0.0, 1.0), texts, strict=False))


def pareto_figure(points: pd.DataFrame) -> Figure:
    """Draw what each configuration reached over the minutes it took; hollow if not completed.

    The best twelve recipes have names, any others are grey.

    Args:
        points: as :func:`analysis.pareto_front` gives them.
    """
    figure = Figure(figsize=(8, 3.8), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    front = points[points["on_front"]]
    axis.step(
        front["train_seconds"] / 60, front["val_accuracy"], where="post", color="#000000", linewidth=1, label="front"
    )
    looks = looks_of(points.set_index("recipe")["val_accuracy"])
    for name, look in looks.items():
        for censored, face in ((False, look["color"]), (True, "white")):
            part = points[(points["recipe"] == name) & (points["censored"] == censored)]
            axis.plot(part["train_seconds"] / 60, part["val_accuracy"], markerfacecolor=face, markersize=6, **look)
    axis.set_xlabel("training time, minutes a trial")
    axis.set_ylabel("validation accuracy")
    axis.set_ylim(0, 1.06 * max(1e-3, points["val_accuracy"].max()))
    axis.set_xlim(0, 1.06 * max(1e-3, points["train_seconds"].max() / 60))
    axis.yaxis.set_major_formatter(in_percent())
    name_marks(axis, looks, bool(points["censored"].any()))
    tidy(axis)
    return figure


def timeline_figure(timeline: pd.DataFrame, trials: pd.DataFrame) -> Figure:
    """Draw which trial held which slot when, by what became of it.

    Args:
        timeline: as :func:`analysis.load_timeline` gives it.
        trials: as :func:`analysis.load_trials` does, of the same runs.
    """
    places = [name for name in ("run", "attempt", "host", "slot") if name in timeline]
    rows = timeline.assign(host=timeline["host"].fillna("")).groupby(places, sort=True).ngroup()
    keys = of_trial(timeline)
    status = timeline[keys].merge(trials[[*keys, "status"]], on=keys, how="left")["status"].astype("str")
    status.index = timeline.index
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
    axis.yaxis.set_major_locator(MultipleLocator(-(-slots // 20)))
    axis.set_ylim(slots - 0.5, -0.5)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    tidy(axis)
    return figure
