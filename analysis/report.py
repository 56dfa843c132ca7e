"""Tables and figures -> report.html (one file, opens offline), report.md and figures/."""

import base64
import dataclasses
import html
import io
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import yaml
from jinja2 import Undefined
from markupsafe import Markup
from matplotlib.figure import Figure

from analysis import figures
from analysis.compare import (
    amount_columns,
    asha_savings,
    compare_recipes,
    difference_of_means,
    mean_interval,
    paired_difference,
    recipe_columns,
    recipe_name,
    top_trials,
    wilson_interval,
)
from analysis.explanations import Explanation, explain_trials, load_test_data
from analysis.maps_in_words import claim_rows, looks_at, measure_table
from analysis.remote import RunPath, is_uri, local_run, source
from analysis.tables import interval, percent
from analysis.trials import HYPERPARAMETERS, RunError, load_epochs, load_trials, read_study, varied
from trainables.data import ImageData

PANEL_RIGHT, PANEL_WRONG = 5, 3
PANEL_NETWORKS = 4  # side by side; more would not be legible


@dataclass(frozen=True)
class _Picture:
    """A figure of the report: its file's name, what stands below it, and what it shows for those who cannot see it."""

    name: str
    title: str
    caption: str
    alt: str
    png: bytes

    @property
    def data_uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def write_report(
    runs: Sequence[RunPath],
    output: Path | None = None,
    *,
    top: int = 4,
    data_dir: Path | None = None,
    device: str = "auto",
    address: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write the report of one run or of several over the same data.

    The test images are read here and nowhere else, for all seeds of the ``top`` configurations, and the results are
    kept.

    Args:
        runs: run directories, or their URIs.
        output: where to write; by default ``report`` in the first run, and ``NAME-report`` here if that is at a URI.
        top: how many configurations to evaluate on the test images and to explain; 0 leaves the test images alone.
        data_dir: where the data lies, if not where the study found it.
        device: where to compute predictions and maps.
        address: a Ray cluster on which to compute them; see :func:`analysis.explain_trials`.
        tell: is told of each trial that was explained.

    Returns:
        The path of ``report.html``.

    Raises:
        RunError: if a run cannot be read, has no finished epoch, or the runs are over different data.
        DataError, CheckpointError: if the test images or a checkpoint cannot be read.
    """
    output = output or (Path(f"{Path(str(runs[0])).name}-report") if is_uri(runs[0]) else Path(runs[0]) / "report")
    folders = [local_run(run) for run in runs]
    studies = [read_study(folder) for folder in folders]
    check_comparable(folders, studies)
    trials = load_trials(folders)
    epochs = load_epochs(folders)
    if not trials["val_accuracy"].notna().any():
        counts = ", ".join(f"{n} {status}" for status, n in trials["status"].value_counts().items() if n)
        raise RunError(f"{', '.join(map(source, folders))}: no trial has a finished epoch to report on ({counts})")
    if len(folders) > 1:
        # The same settings may have been run twice; their curves must not become one.
        for frame in (trials, epochs):
            names = [Path(source(folder)).name for folder in folders]
            prefixes = names if len(set(names)) == len(names) else [source(folder) for folder in folders]
            shown = {str(run): f"{prefix}/" for run, prefix in zip(folders, prefixes, strict=True)}
            frame["trial_id"] = frame["run"].map(shown) + frame["trial_id"]
    num_val = int(studies[0]["data"]["num_val_images"])
    recipes = compare_recipes(trials, num_val)
    chosen = top_trials(trials, top)
    data, explanations = _explain(folders, chosen, data_dir, device, address, tell) if len(chosen) else (None, [])
    recipes = _with_test(recipes, explanations)
    trials["test_accuracy"] = trials["trial_id"].map({e.trial_id: e.accuracy for e in explanations}).astype("float64")

    pictures = _pictures(trials, epochs, recipes, chosen, data, explanations)
    context = {
        "title": ", ".join(str(study["name"]) for study in studies),
        "studies": studies,
        "data": studies[0]["data"],
        "versions": studies[0]["versions"],
        "headline": _headline(recipes, explanations, trials, num_val, len(data) if data else 0),
        "recipes": _recipe_rows(recipes),
        "best": _best(trials, recipes, studies[0]),
        "looks_at": looks_at(explanations[0], data) if data and explanations else "",
        "measures": measure_table(explanations[0]) if explanations else None,
        "claims": claim_rows(explanations) if explanations else [],
        "pictures": pictures,
        "counts": {str(k): int(n) for k, n in trials["status"].value_counts().items() if n},
        "trials": _trial_rows(trials),
        "trial_columns": [*varied(trials)],
        "num_val": num_val,
        "num_test": len(data) if data else 0,
        "runs": [source(folder) for folder in folders],
        "top": len(chosen),
        "settings_yaml": yaml.safe_dump(studies[0]["settings"], sort_keys=False, width=100),
        "train_seconds": float(trials["train_seconds"].sum()),
    }
    _write(output, context, pictures)
    return output / "report.html"


def check_comparable(runs: Sequence[Path], studies: Sequence[dict[str, Any]]) -> None:
    """See that runs are over the same images.

    Raises:
        RunError: if they are not, or a run is given twice.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise RunError(f"{', '.join(map(source, runs))}: the same run is given twice")
    for run, study in zip(runs, studies, strict=True):
        if study["data"]["fingerprint"] != studies[0]["data"]["fingerprint"]:
            raise RunError(
                f"{source(run)} and {source(runs[0])} were trained on different images: accuracies cannot be compared"
            )
        for name in ("val_fraction", "seed"):
            if study["settings"].get(name) != studies[0]["settings"].get(name):
                raise RunError(
                    f"{source(run)} and {source(runs[0])} differ in {name}, so they were validated on different images"
                )


def _explain(
    runs: Sequence[Path],
    chosen: pd.DataFrame,
    data_dir: Path | None,
    device: str,
    address: str | None,
    tell: Callable[[str], None],
) -> tuple[ImageData, list[Explanation]]:
    data = load_test_data(runs[0], data_dir)
    found: dict[str, Explanation] = {}
    for run, trials in chosen.groupby("run", sort=False):
        own = trials.assign(trial_id=trials["trial_id"].str.split("/").str[-1])
        explanations = explain_trials(Path(str(run)), own, data, device, address, tell)
        for trial_id, explanation in zip(trials["trial_id"], explanations, strict=True):
            found[trial_id] = dataclasses.replace(explanation, trial_id=trial_id)
    return data, [found[trial_id] for trial_id in chosen["trial_id"]]


def _with_test(recipes: pd.DataFrame, explanations: Sequence[Explanation]) -> pd.DataFrame:
    by_id = {e.trial_id: e for e in explanations}
    values = []
    for ids in recipes["trial_ids"]:
        measured = [by_id[i] for i in ids if i in by_id]
        mean, low, high = mean_interval([e.accuracy for e in measured])
        if len(measured) == 1:
            low, high = wilson_interval(mean, len(measured[0].labels))
        low, high = np.clip([low, high], 0, 1)  # NaN stays
        values.append((mean, low, high, len(measured)))
    return recipes.assign(
        **{
            name: [value[i] for value in values]
            for i, name in enumerate(("test_accuracy", "test_low", "test_high", "test_seeds"))
        }
    )


def _headline(
    recipes: pd.DataFrame,
    explanations: Sequence[Explanation],
    trials: pd.DataFrame,
    num_val: int,
    num_test: int,
) -> dict[str, str]:
    """Say in plain words what won, by how much and how sure that is."""
    first = recipes.iloc[0]
    with_what = ", ".join(f"{name} {first[name]:g}" for name in amount_columns(trials))
    won = f"{first['recipe']}{' with ' + with_what if with_what else ''}"
    reached = f"validation accuracy {interval(first['val_accuracy'], first['val_low'], first['val_high'])}"
    if first["test_seeds"]:
        reached = f"test accuracy {interval(first['test_accuracy'], first['test_low'], first['test_high'])}, " + reached
    seeds = int(first["num_seeds"])
    if seeds > 1:
        of = "" if seeds == first["num_seeds_asked"] else f" of {first['num_seeds_asked']}"
        sure = f"Mean of {seeds}{of} seeds; the 95 % interval is over seeds."
    else:
        on = f"{num_test:,} test and {num_val:,} validation images" if first["test_seeds"] else f"{num_val:,} images"
        sure = (
            f"One seed. The 95 % interval covers which images were drawn ({on}), not the chance in training: "
            "another seed may rank close recipes differently. Repeat with space.seed=[0,1,2] early_stopping=none "
            "before you rely on it."
        )
    by = "There is no other recipe to compare with."
    if len(recipes) > 1:
        second = recipes.iloc[1]
        gap = 100 * (first["val_accuracy"] - second["val_accuracy"])
        by = f"{gap:.1f} points of validation accuracy ahead of the next recipe, {second['recipe']}"
        by += _difference(first, second, explanations, trials) + "."
    if first["censored"]:
        sure += " No recipe was trained to the end with all its seeds: these figures are of unfinished trainings."
    return {"won": won, "reached": reached + ".", "by": by, "sure": sure}


def _difference(first: pd.Series, second: pd.Series, explanations: Sequence[Explanation], trials: pd.DataFrame) -> str:
    """Say whether the best recipe's lead over the next one is more than chance."""
    if first["censored"] or second["censored"]:
        return "; no verdict, for not all of their trials were trained to the end"
    by_id = {e.trial_id: e for e in explanations}
    accuracy = trials.set_index("trial_id")["val_accuracy"]
    if first["num_seeds"] > 1 and second["num_seeds"] > 1:
        groups = [accuracy[list(row["trial_ids"])].tolist() for row in (first, second)]
        what, chance = "over seeds the difference is", "in training"
        mean, low, high = difference_of_means(*groups)
    elif (a := by_id.get(first["trial_ids"][0])) and (b := by_id.get(second["trial_ids"][0])):
        what, chance = f"on the same {len(a.labels):,} test images the two networks differ by", "in the images"
        mean, low, high = paired_difference(a.correct, b.correct)
    else:
        return ""
    if low > 0:
        verdict = f"beyond chance {chance}"
    elif high < 0:
        verdict = f"here the next recipe is better, beyond chance {chance}"
    else:
        verdict = "too close to call"
    numbers = f"{100 * mean:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f})".replace("-", "−")
    return f"; {what} {numbers}: {verdict}"


def _recipe_rows(recipes: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for _, row in recipes.iterrows():
        val = interval(row["val_accuracy"], row["val_low"], row["val_high"])
        test = interval(row["test_accuracy"], row["test_low"], row["test_high"])
        gap = row["generalization_gap"]
        rows.append(
            {
                **row,
                "val": val,
                "test": test,
                "seeds": row["num_seeds"]
                if row["num_seeds"] == row["num_seeds_asked"]
                else f"{row['num_seeds']} of {row['num_seeds_asked']}",
                "gap": "–" if pd.isna(gap) else f"{100 * gap:+.1f}".replace("-", "−"),
                "trial": ", ".join(row["trial_ids"]),
            }
        )
    return rows


def _best(trials: pd.DataFrame, recipes: pd.DataFrame, study: dict[str, Any]) -> dict[str, Any]:
    """Return the winner's whole configuration and the command that trains it alone."""
    row = trials.set_index("trial_id").loc[recipes.iloc[0]["trial_ids"][0]]
    names = [*HYPERPARAMETERS, "seed"]
    values = {name: row[name].item() if isinstance(row[name], np.generic) else row[name] for name in names}
    settings = study["settings"]
    # Everything that decides the result, whatever the preset that it is laid over.
    same = ("dataset", "train_size", "val_fraction", "max_epochs", "seed")
    words = [f"{name}={'null' if settings[name] is None else settings[name]}" for name in same]
    words += [f"fixed.{name}={value}" for name, value in values.items()]
    command = "python -m study run --name winner search=grid early_stopping=none 'space={}' num_trials=1 "
    command += " ".join(shlex.quote(word) for word in words)
    if settings["data_dir"]:
        command += f" --data-dir {shlex.quote(settings['data_dir'])}"
    return {"values": values, "trial_id": row.name, "command": command}


def _trial_rows(trials: pd.DataFrame) -> list[dict[str, Any]]:
    names = varied(trials)
    ordered = trials.sort_values("val_accuracy", ascending=False, na_position="last")
    return [
        {
            "trial_id": row["trial_id"],
            "status": row["status"],
            "epochs": row["epochs"],
            "val": percent(row["val_accuracy"], 2),
            "train": percent(row["train_accuracy"], 2),
            "test": percent(row["test_accuracy"], 2),
            "note": next((_short(row[name]) for name in ("stop_reason", "error") if pd.notna(row[name])), ""),
            "values": ["" if pd.isna(row[name]) else row[name] for name in names],
        }
        for _, row in ordered.iterrows()
    ]


def _panel_note(trial: pd.Series, columns: Sequence[str], explanation: Explanation) -> str:
    rate = "" if "lr" in columns else f"lr {trial['lr']:g}, "
    stopped = "" if trial["status"] == "completed" else ", stopped early"
    return f"{rate}epoch {trial['best_epoch']}{stopped}, test accuracy {percent(explanation.accuracy)}"


def _short(note: str) -> str:
    """Return ASHA's reason with percentages, as the columns beside it have them."""
    numbers = re.fullmatch(r"ASHA at epoch (\d+): accuracy ([\d.]+) below the cutoff ([\d.]+) of rung .*", note)
    if not numbers:
        return note
    epoch, value, cutoff = numbers.groups()
    return f"epoch {epoch}: {percent(float(value))} < {percent(float(cutoff))}"


def _pictures(
    trials: pd.DataFrame,
    epochs: pd.DataFrame,
    recipes: pd.DataFrame,
    chosen: pd.DataFrame,
    data: ImageData | None,
    explanations: Sequence[Explanation],
) -> dict[str, _Picture]:
    pictures: dict[str, _Picture] = {}

    def add(name: str, title: str, caption: str, alt: str, figure: Figure) -> None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        pictures[name] = _Picture(name, title, caption, alt, buffer.getvalue())

    best = recipes.iloc[0]
    add(
        "accuracy",
        "Accuracy of each recipe",
        "Best configuration of each recipe. Bars are 95 % intervals: over seeds where there are several, else over "
        "images.",
        f"Accuracies of {len(recipes)} recipes; the best is {best['recipe']} with {percent(best['val_accuracy'])}.",
        figures.accuracy_figure(recipes),
    )
    add(
        "curves",
        "Learning curves",
        "Validation accuracy after each epoch, one line a trial; a cross marks a trial that was stopped early.",
        f"Validation accuracy over epochs of {trials['epochs'].gt(0).sum()} trials.",
        figures.curves_figure(trials, epochs),
    )
    if "lr" in varied(trials):
        add(
            "learning_rate",
            "Accuracy over the learning rate",
            "Best validation accuracy at each learning rate. Hollow marks are trials that were stopped early: their "
            "accuracy is that of an unfinished training.",
            "Validation accuracy over the learning rate for each optimizer and augmentation.",
            figures.lr_figure(trials),
        )
    savings = asha_savings(trials)
    if (trials["status"] == "stopped").any():
        run, full = int(savings["epochs_run"].iloc[0]), int(savings["epochs_without_stopping"].iloc[0])
        add(
            "savings",
            "What early stopping saved",
            f"{run} epochs were run of {full} without early stopping: {percent(1 - run / full, 0)} less.",
            f"Trials in training at each epoch: {run} epochs run of {full}.",
            figures.savings_figure(savings),
        )
    if data is not None and explanations:
        columns = recipe_columns(trials)
        # One network a configuration: its first seed, whatever that seed reached.
        alike = [*columns, *amount_columns(trials)]
        single = ~chosen.duplicated(alike) if alike else pd.Series(range(len(chosen)), index=chosen.index) == 0
        picked = [
            pair for pair, take in zip(zip(explanations, chosen.iterrows(), strict=True), single, strict=True) if take
        ]
        shown = [explanation for explanation, _ in picked][:PANEL_NETWORKS]
        networks = [trial for _, (_, trial) in picked][:PANEL_NETWORKS]
        names = [recipe_name(trial, columns) for trial in networks]
        notes = [_panel_note(trial, columns, explanation) for trial, explanation in zip(networks, shown, strict=True)]
        positions = figures.choose_images(shown[0], PANEL_RIGHT, PANEL_WRONG)
        add(
            "panel",
            "What the networks look at",
            f"Test images, a seeded choice of up to {PANEL_RIGHT} that the best network gets right and {PANEL_WRONG} "
            "that it gets wrong. For each network saliency (absolute gradient of the predicted class's logit) and "
            "Grad-CAM (last stage) laid over the image; each map is scaled by itself, so brightness "
            "cannot be compared between maps.",
            f"{len(positions)} test images with saliency and Grad-CAM maps of {len(shown)} networks.",
            figures.panel_figure(shown, names, notes, data, positions),
        )
    return pictures


def _write(output: Path, context: dict[str, Any], pictures: dict[str, _Picture]) -> None:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    options: dict[str, Any] = {"loader": loader, "undefined": jinja2.StrictUndefined, "trim_blocks": True}
    # Whatever comes from a run is text: markup in class names, run names or errors shows as it is.
    environments = {
        "html": jinja2.Environment(autoescape=True, lstrip_blocks=True, **options),
        "md": jinja2.Environment(finalize=_markdown_text, lstrip_blocks=True, **options),
    }
    environments["md"].filters["code"] = lambda value: Markup(" ".join(str(value).split()))
    try:
        (output / "figures").mkdir(parents=True, exist_ok=True)
        for picture in pictures.values():
            (output / "figures" / f"{picture.name}.png").write_bytes(picture.png)
        for kind, environment in environments.items():
            text = environment.get_template(f"template.{kind}").render(context)
            (output / f"report.{kind}").write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{output}: the report cannot be written ({error.strerror or error})") from error


def _markdown_text(value: object) -> object:
    """Return a value as Markdown text, also in a table's cell, in which nothing is markup."""
    if isinstance(value, Markup | Undefined):
        return value
    text = html.escape(re.sub(r"\s+", " ", str(value)), quote=False)
    for character in "\\`*_{}[]|#":
        text = text.replace(character, "\\" + character)
    return text
