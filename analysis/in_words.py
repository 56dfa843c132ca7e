"""What the report says of maps and claims, for people to read."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.explanations import Explanation
from analysis.intervals import bootstrap_interval
from analysis.measures import OWN
from analysis.predictions import class_accuracy, confused_pairs
from analysis.tables import interval, percent, signed
from trainables.data import ImageData

MAP_TITLES = {
    "saliency": "Saliency",
    "gradcam": "Grad-CAM",
    "pooled_saliency": "Pooled saliency",
    "random": "Random map",
    "sobel": "Edges (Sobel)",
    "gaussian": "Middle of the image",
}
MEASURE_TITLES = {
    "energy_on_object": "On object",
    "rank_accuracy": "Rank accuracy",
    "energy_lift": "Lift over its area",
    "grid_pointing": "Grid pointing",
    "patch_fidelity": "Patch fidelity",
    "deletion": "Deletion",
    "insertion": "Insertion",
    "total_variation": "Total variation",
    "high_frequency_share": "High frequencies",
    "gini": "Gini",
    "max_sensitivity": "Max-sensitivity",
    "likeness_untrained": "Likeness, untrained",
}


# What trials are compared in that is a share.
SHARES = {
    "val_accuracy": "validation accuracy",
    "test_accuracy": "test accuracy",
    "train_accuracy": "training accuracy",
    "generalization_gap": "train − validation accuracy",
}


def looks_at(best: Explanation, data: ImageData) -> str:
    """Say where the maps of one network lie, with 95 % intervals over images."""

    def share(name: str, measure: str) -> str:
        table = best.measures
        values = table[(table["map"] == name) & (table["measure"] == measure)]["value"].to_numpy()
        return interval(*bootstrap_interval(values)) if len(values) else ""

    of = f"network {best.trial_id}; intervals over images"
    if data.masks is not None:
        cam, saliency = (share(name, "energy_on_object") for name in OWN[::-1])
        area = percent(float(data.masks[best.indices].mean()))
        return (
            f"{cam} of its Grad-CAM and {saliency} of its saliency lie on the object, which covers {area} of the image "
            f"({of})."
        )
    cam, saliency = (share(name, "grid_pointing") for name in OWN[::-1])
    if not cam:
        return ""
    return (
        f"of four images in one, {cam} of its Grad-CAM and {saliency} of its saliency lie on the one whose class is "
        f"explained; by chance that is 25 % ({of})."
    )


def measure_table(best: Explanation) -> dict[str, Any]:
    """Return the measures of one network's maps and of the controls, for people to read: one row a measure."""
    cells: dict[str, dict[str, str]] = {}
    for (measure, name), group in best.measures.groupby(["measure", "map"], observed=True):
        mean, low, high = bootstrap_interval(group["value"].to_numpy())
        if math.isfinite(mean):
            text = f"{mean:.2f}" if math.isnan(low) else f"{mean:.2f} ± {(high - low) / 2:.2f}"
            cells.setdefault(str(measure), {})[str(name)] = text.replace("-", "−")
    counts = best.measures.dropna(subset="value").groupby("measure", observed=True)["image"].nunique()
    shown = [measure for measure in MEASURE_TITLES if measure in cells]
    return {
        "of": best.trial_id,
        "columns": list(MAP_TITLES.values()),
        "rows": [
            (f"{MEASURE_TITLES[m]} (n = {counts[m]:,})", [cells[m].get(name, "–") for name in MAP_TITLES])
            for m in shown
        ],
    }


def class_rows(predictions: pd.DataFrame, count: int) -> dict[str, list[dict[str, Any]]]:
    """Return the classes that are recognized least and best, and the most confused pairs, for people to read.

    Args:
        predictions: as :func:`analysis.load_predictions` gives them.
        count: how many classes and how many pairs, at most.
    """
    accuracy = class_accuracy(predictions)
    half = count // 2
    ends = pd.concat([accuracy.head(half), accuracy.iloc[max(half, len(accuracy) - half) :]])
    pairs = confused_pairs(predictions).head(count)
    return {
        "classes": [
            {"name": row["label"], "accuracy": interval(*row[["accuracy", "low", "high"]]), "n": row["num_images"]}
            for _, row in ends.iterrows()
        ],
        "pairs": [
            {"label": row["label"], "predicted": row["predicted"], "share": percent(row["share"], 0),
             "back": percent(row["back"], 0), "n": row["num_images"]}
            for _, row in pairs.iterrows()
        ],
    }  # fmt: skip


def claims_as_text(claims: pd.DataFrame, width: int = 110) -> str:
    """Return the claims for the terminal: each with its verdict and what it rests on.

    Args:
        claims: as :func:`analysis.decide` gives them.
        width: characters a line.
    """
    lines = []
    for row in claim_rows(claims):
        lines += [row["claim"], f"  {row['verdict']} (n = {row['n']})"]
        lines += textwrap.wrap(row["evidence"], width, initial_indent="  ", subsequent_indent="  ")
    for text in undecidable(claims):
        claim, _, reason = text.partition(": ")
        lines += [f"{claim}.", f"  no data: {reason}"]
    return "\n".join(lines)


def claim_rows(claims: pd.DataFrame) -> list[dict[str, str]]:
    """Return the claims that could be decided, each with its verdict and what it rests on.

    Args:
        claims: as :func:`analysis.decide` gives them.
    """
    rows = []
    for (claim, verdict), group in claims[claims["verdict"] != "no data"].groupby(["claim", "verdict"], sort=False):
        made = group[group["n"].notna()]
        rivals, controls = made[~made["control"]], made[made["control"]]
        evidence = "; ".join(_in_words(row) for _, row in rivals.iterrows())
        if len(controls):
            lost = [_in_words(row) for _, row in controls[controls["holds"] != "yes"].iterrows()]
            of = "the comparison with a control" if len(controls) == 1 else f"{len(controls)} comparisons with controls"
            evidence += f". Of {of} {len(controls) - len(lost)} hold" + (f", not {'; '.join(lost)}" if lost else "")
        if missing := group[group["n"].isna()]["reason"].unique().tolist():
            evidence += f". Not compared: {'; '.join(missing)}"
        counts = [_counted(part["n"], str(unit)) for unit, part in made.groupby("unit", sort=False)]
        rows.append({"claim": str(claim), "verdict": str(verdict), "evidence": f"{evidence}.", "n": ", ".join(counts)})
    return rows


def undecidable(claims: pd.DataFrame) -> list[str]:
    """Return the claims for which there are no data, each with the reason."""
    missing = claims[(claims["verdict"] == "no data") & ~claims["control"]].drop_duplicates("claim")
    return [f"{row['claim'].rstrip('.')}: {row['reason']}" for _, row in missing.iterrows()]


def _counted(counts: pd.Series, unit: str) -> str:
    least, most = int(counts.min()), int(counts.max())
    number = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return f"{number} {unit.removesuffix('s') if most == 1 else unit}"


def _in_words(row: pd.Series) -> str:
    numbers = (row["difference"], row["low"], row["high"])
    if row["unit"] == "seeds":
        at = f" at epoch {row['epoch']}" if pd.notna(row["epoch"]) else ""
        against = f"{row['of']} against {row['than']}"
        if row["measure"] not in SHARES:
            return f"{row['measure']}{at}, {against}: {_difference_in_words(numbers, 2)}"
        least = f" (more than {signed(100 * row['by'], 0)} is asked)" if row["by"] else ""
        points = _difference_in_words([100 * value for value in numbers], 1)
        return f"{SHARES[row['measure']]}{at}, {against}: {points} points{least}"

    def title(titles: dict[str, str], name: str) -> str:
        words = titles.get(name, name)
        return words if words == "Grad-CAM" else words[0].lower() + words[1:]

    measure = title(MEASURE_TITLES, row["measure"])
    if pd.notna(row["below"]):
        measure = f"share of images with {measure} below {row['below']:g}"
    against = f"{title(MAP_TITLES, row['of'])} against {title(MAP_TITLES, row['than'])}"
    return f"{measure}, {against}: {_difference_in_words(numbers, 2)}"


def _difference_in_words(numbers: Sequence[float], digits: int) -> str:
    difference, low, high = (signed(number, digits) for number in numbers)
    return f"{difference} ({low} to {high})" if math.isfinite(numbers[1]) else f"{difference} (one seed)"
