"""Tables and figures -> report.html (one file, opens offline), report.md and figures/."""

import base64
import dataclasses
import hashlib
import html
import os
import re
import secrets
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import yaml
from jinja2 import Undefined
from markupsafe import Markup

from analysis.claims import CLAIMS, MapComparison, decide
from analysis.compare import (
    amount_columns,
    by_budget,
    compare_recipes,
    top_trials,
)
from analysis.explanations import Explanation, explain_trials, load_measures, load_test_data
from analysis.health import search_space_health
from analysis.in_words import MAP_TITLES, claim_rows, class_rows, looks_at, measure_table, undecidable
from analysis.intervals import paired_difference, paired_over_seeds
from analysis.measures import OWN
from analysis.pictures import Picture, make_image_pictures, make_pictures
from analysis.predictions import predictions_of
from analysis.remote import RunPath, is_uri, local_run, source
from analysis.study_file import RunError, check_inside, read_study
from analysis.tables import interval, percent, signed
from analysis.trials import (
    HYPERPARAMETERS,
    check_comparable,
    command_of,
    load_epochs,
    load_timeline,
    load_trials,
    varied,
)
from trainables.data import ImageData

MAX_WARNINGS = 6
NUM_CLASSES = 10  # most confused pairs, and classes at both ends, that are told


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

    The test images are read for all seeds of the ``top`` configurations, and the results are kept.

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
    inside = output is None and not is_uri(runs[0])
    output = output or (Path(f"{Path(str(runs[0])).name}-report") if is_uri(runs[0]) else Path(runs[0]) / "report")
    folders = [local_run(run) for run in runs]
    check_inside(output / "figures", folders[0] if inside else output)
    check_comparable(folders)
    studies = [read_study(folder) for folder in folders]
    trials, epochs, timeline = (_load(load, folders) for load in (load_trials, load_epochs, load_timeline))
    if not trials["val_accuracy"].notna().any():
        counts = ", ".join(f"{n} {status}" for status, n in trials["status"].value_counts().items() if n)
        raise RunError(f"{', '.join(map(source, folders))}: no trial has a finished epoch to report on ({counts})")
    num_val = int(studies[0]["data"]["num_val_images"])
    chosen = top_trials(by_budget(trials)[0], top)
    data, explanations = _explain(folders, chosen, data_dir, device, address, tell) if len(chosen) else (None, [])
    if explanations:  # which are columns of the trials now
        trials = _load(load_trials, folders)
    equal_epochs, equal_compute = by_budget(trials)
    recipes = _recipes(trials, num_val)
    if recipes.empty:
        raise RunError(f"{', '.join(map(source, folders))}: no recipe has a finished epoch to report on")
    claims = _decide(load_measures(folders), trials, epochs, studies)

    first = trials.set_index("trial_id").loc[recipes.iloc[0]["trial_ids"][0]]
    won_in = folders.index(Path(first["run"]))
    winners = [explanation for explanation in explanations if explanation.trial_id in recipes.iloc[0]["trial_ids"]]
    predictions = predictions_of(winners, data) if data is not None and winners else None
    pictures = make_pictures(trials, epochs, timeline, recipes)
    if data is not None and explanations:
        pictures |= make_image_pictures(trials, chosen, data, explanations, predictions)
    script = Path(__file__).with_name("report.js").read_text(encoding="utf-8")
    context = {
        "title": ", ".join(str(study["name"]) for study in studies),
        "studies": studies,
        "data": studies[0]["data"],
        "versions": studies[0]["versions"],
        "headline": _headline(recipes, explanations, trials, num_val, source(folders[won_in])),
        "recipes": _recipe_rows(recipes),
        "best": {
            "trial_id": first.name,
            "values": first[[*HYPERPARAMETERS, "seed"]].to_dict(),
            "command": command_of(first, studies[won_in], "winner"),
        },
        "looks_at": looks_at(winners[0], data) if data is not None and winners else "",
        "classes": class_rows(predictions, NUM_CLASSES) if predictions is not None else None,
        "measures": measure_table(winners[0]) if winners else None,
        "claims": claim_rows(claims),
        "undecidable": undecidable(claims),
        "warnings": _warnings(search_space_health(equal_epochs, num_val)["text"].to_list(), folders),
        "equal_compute": _recipe_rows(compare_recipes(equal_compute, num_val)),
        "map_columns": _map_columns(recipes),
        "pictures": pictures,
        "counts": {str(k): int(n) for k, n in trials["status"].value_counts().items() if n},
        "trials": _trial_rows(trials),
        "trial_columns": [*varied(trials)],
        "num_val": num_val,
        "num_test": _num_test(trials),
        "num_tested": _num_tested(trials),
        "machines": list(dict.fromkeys(map(_machine, studies))),
        "report_command": shlex.join(["python", "-m", "analysis", "report", *map(source, folders)]),
        "settings_yaml": [yaml.safe_dump(study["settings"], sort_keys=False, width=100) for study in studies],
        "train_seconds": float(trials["train_seconds"].sum()),
        "method": _method(studies, trials),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    _write(output, context, pictures)
    return output / "report.html"


def _recipes(trials: pd.DataFrame, num_val: int) -> pd.DataFrame:
    recipes = compare_recipes(by_budget(trials)[0], num_val)
    # So far maybe only those of equal compute have an epoch.
    return compare_recipes(trials, num_val) if recipes.empty else recipes


def _warnings(texts: list[str], runs: Sequence[Path]) -> list[str]:
    more = len(texts) - MAX_WARNINGS
    if more <= 0:
        return texts
    command = shlex.join(["python", "-m", "analysis", "health", *map(source, runs)])
    return [*texts[:MAX_WARNINGS], f"And {more} more: {command}."]


def _num_tested(trials: pd.DataFrame) -> int:
    return int(trials["test_accuracy"].notna().sum()) if "test_accuracy" in trials else 0


def _num_test(trials: pd.DataFrame) -> int:
    return int(trials["num_test_images"].max()) if _num_tested(trials) else 0


def _machine(study: dict[str, Any]) -> str:
    machine = study["machine"]
    return ", ".join([f"{machine['processor']} with {machine['cores']} cores", *machine["gpus"]])


def _load(load: Callable[[Sequence[Path]], pd.DataFrame], folders: Sequence[Path]) -> pd.DataFrame:
    """Return the table of all runs. Where they are several, trials get the run's name before their own."""
    table = load(folders)
    if len(folders) > 1:
        # The same settings may have been run twice; their curves must not become one.
        names = [Path(source(folder)).name for folder in folders]
        prefixes = names if len(set(names)) == len(names) else [source(folder) for folder in folders]
        shown = {str(run): f"{prefix}/" for run, prefix in zip(folders, prefixes, strict=True)}
        table["trial_id"] = table["run"].map(shown) + table["trial_id"]
    return table


def _decide(
    measures: pd.DataFrame, trials: pd.DataFrame, epochs: pd.DataFrame, studies: Sequence[dict[str, Any]]
) -> pd.DataFrame:
    """Return the claims that all explained networks decide and, of runs that lasted equally long, their trials."""
    if len({study["settings"].get("max_epochs") for study in studies}) > 1:
        of_maps = [claim for claim in CLAIMS if all(isinstance(c, MapComparison) for c in claim.comparisons)]
        return decide(measures, claims=of_maps)
    return decide(measures, trials, epochs)


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


def _headline(
    recipes: pd.DataFrame,
    explanations: Sequence[Explanation],
    trials: pd.DataFrame,
    num_val: int,
    run: str,
) -> dict[str, str]:
    """Say in plain words what won, by how much and how sure that is."""
    first = recipes.iloc[0]
    with_what = ", ".join(f"{name} {first[name]:g}" for name in amount_columns(trials))
    won = f"{first['recipe']}{' with ' + with_what if with_what else ''}"
    reached = f"validation accuracy {interval(first['val_accuracy'], first['val_low'], first['val_high'])}"
    if first["test_seeds"]:
        reached = f"test accuracy {_test_accuracy(first)}, " + reached
    seeds = int(first["num_seeds"])
    if seeds > 1:
        of = "" if seeds == first["num_seeds_asked"] else f" of {first['num_seeds_asked']}"
        sure = f"Mean of {seeds}{of} {'fresh ' if first['confirmed'] else ''}seeds; the 95 % interval is over seeds."
    else:
        on = (
            f"{_num_test(trials):,} test and {num_val:,} validation images"
            if first["test_seeds"]
            else f"{num_val:,} images"
        )
        sure = (
            f"One seed. The 95 % interval covers which images were drawn ({on}), not the chance in training: "
            "another seed may rank close recipes differently. Confirm it before you rely on it: "
            f"{shlex.join(['python', '-m', 'study', 'confirm', run])}."
        )
    by = "There is no other recipe to compare with."
    if len(recipes) > 1:
        second = recipes.iloc[1]
        gap = 100 * (first["val_accuracy"] - second["val_accuracy"])
        by = f"{gap:.1f} points of validation accuracy ahead of the next recipe, {second['recipe']}"
        if gap < 0:
            by = f"The next recipe, {second['recipe']}, {_shows_more(second, -gap)}"
        by += _difference(first, second, explanations, trials) + "."
        further = recipes.iloc[recipes["val_accuracy"].argmax()]
        if (more := 100 * (further["val_accuracy"] - first["val_accuracy"])) > max(0, -gap):
            by += f" Further behind, {further['recipe']} {_shows_more(further, more)}."
    if first["censored"]:
        ended = trials.set_index("trial_id").loc[list(first["trial_ids"])]["status"] == "completed"
        those = "those that were, which may flatter it" if ended.all() else "unfinished trainings"
        sure += f" No recipe was trained to the end with all its seeds: these figures are of {those}."
    return {"won": won, "reached": reached + ".", "by": by, "sure": sure}


def _shows_more(behind: pd.Series, points: float) -> str:
    """Say by how much a recipe seems better than the one it stands behind, and what it lacks to stand before it."""
    seeds, asked = behind["num_seeds"], behind["num_seeds_asked"]
    over = f" over {seeds} of its {asked} seeds" if seeds < asked else ""
    lacks = "trained to the end with all its seeds" if behind["censored"] else "confirmed"
    return f"shows {points:.1f} points more{over}, but was not {lacks}"


def _difference(first: pd.Series, second: pd.Series, explanations: Sequence[Explanation], trials: pd.DataFrame) -> str:
    """Say whether the best recipe's lead over the next one is more than chance."""
    if first["censored"] or second["censored"]:
        return "; no verdict, for not all of their trials were trained to the end"
    if first["epochs"] != second["epochs"]:
        return f"; no verdict, for they were trained for {first['epochs']} and {second['epochs']} epochs"
    by_id = {e.trial_id: e for e in explanations}
    if (first["num_seeds"] > 1) != (second["num_seeds"] > 1):
        return "; no verdict, for one of them has a single seed"
    if first["num_seeds"] > 1:
        rows = trials.set_index("trial_id")
        groups = (rows.loc[list(row["trial_ids"])].set_index("seed")["val_accuracy"] for row in (first, second))
        what, chance = "over seeds the difference is", "in training"
        mean, low, high, _ = paired_over_seeds(*groups)
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
    difference, least, greatest = (signed(100 * value) for value in (mean, low, high))
    return f"; {what} {difference} points (95 % interval {least} to {greatest}): {verdict}"


def _map_columns(recipes: pd.DataFrame) -> dict[str, str]:
    """Return the measures of maps that stand beside accuracy, with their titles: on the object, where it is known."""
    for measure, title in (("energy_on_object", "on the object"), ("grid_pointing", "on its image of four")):
        names = {f"{name}_{measure}": f"{MAP_TITLES[name]} {title}" for name in OWN}
        if set(names) <= set(recipes):
            return names
    return {}


def _share(row: pd.Series, name: str) -> str:
    return interval(*(row[f"{name}{end}"] for end in ("", "_low", "_high")))


def _recipe_rows(recipes: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for _, row in recipes.iterrows():
        val = interval(row["val_accuracy"], row["val_low"], row["val_high"])
        gap = row["generalization_gap"]
        rows.append(
            {
                **row,
                "val": val,
                "test": _test_accuracy(row),
                "seeds": row["num_seeds"]
                if row["num_seeds"] == row["num_seeds_asked"]
                else f"{row['num_seeds']} of {row['num_seeds_asked']}",
                "minutes": "–" if pd.isna(row["train_seconds"]) else f"{row['train_seconds'] / 60:.1f}",
                "maps": [_share(row, name) for name in _map_columns(recipes)],
                "gap": "–" if pd.isna(gap) else signed(100 * gap),
            }
        )
    return rows


def _test_accuracy(recipe: pd.Series) -> str:
    """Return a recipe's test accuracy with its interval and, if they are not all of its seeds, of how many it is."""
    of = f", {recipe['test_seeds']:.0f} of the seeds" if 0 < recipe["test_seeds"] < recipe["num_seeds"] else ""
    return interval(recipe["test_accuracy"], recipe["test_low"], recipe["test_high"]) + of


def _trial_rows(trials: pd.DataFrame) -> list[dict[str, Any]]:
    names = varied(trials)
    ordered = trials.sort_values("val_accuracy", ascending=False, na_position="last")
    return [
        {
            "trial_id": row["trial_id"],
            "status": row["status"] + (" (confirmation)" if row["phase"] == "confirm" else ""),
            "epochs": row["epochs"],
            "numbers": {kind: _number(row.get(f"{kind}_accuracy", np.nan)) for kind in ("val", "train", "test")},
            **{kind: percent(row.get(f"{kind}_accuracy", np.nan), 2) for kind in ("val", "train", "test")},
            "note": next((_short(row[name]) for name in ("stop_reason", "error") if pd.notna(row[name])), ""),
            "values": ["" if pd.isna(row[name]) else row[name] for name in names],
        }
        for _, row in ordered.iterrows()
    ]


def _number(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.6g}"


def _method(studies: Sequence[dict[str, Any]], trials: pd.DataFrame) -> list[str]:
    """Say what was done with which images, and how it was judged."""
    settings, data = studies[0]["settings"], studies[0]["data"]
    texts = [
        f"{data['num_train_images']:,} images were trained on and {data['num_val_images']:,} validated: a stratified, "
        f"seeded share of {percent(settings['val_fraction'], 0)} of the training images was held out. Every choice "
        "rests on validation alone."
    ]
    if tested := _num_tested(trials):
        texts.append(
            f"The {_num_test(trials):,} test images were read for {tested} of {len(trials)} trials, by the report or "
            "by python -m analysis explain; no choice in this study rests on them."
        )
        if absent := int((trials["test_accuracy"].notna() & trials["checkpoint"].isna()).sum()):
            texts.append(f"The networks of {absent} of these trials are not kept here: of them no maps are shown.")
    for study in studies:
        settings = study["settings"]
        which = f"{study['name']}: " if len(studies) > 1 else ""
        if settings.get("early_stopping") == "asha":
            texts.append(
                f"{which}ASHA (Li et al., MLSys 2020) stopped the worst trials at rungs from epoch "
                f"{settings['grace_period']} on; one in {settings['reduction_factor']:g} goes on. Stopped trials are "
                "marked. What each hyperparameter did, and how much it matters, is compared at the last epoch that all "
                "of them reached."
            )
        else:
            epochs = settings["max_epochs"]
            fewer = " (setups that cost more a step once more, for fewer)" if settings.get("equal_compute") else ""
            texts.append(f"{which}Every trial was to be trained for {epochs} epochs{fewer}; none was stopped early.")
    texts.append(
        "Intervals are of 95 %: Wilson's over images for one seed, Student's t over seeds where there are several, the "
        "bootstrap over images for the maps of one network."
    )
    return texts


def _short(note: str) -> str:
    """Return ASHA's reason with percentages, as the columns beside it have them."""
    numbers = re.fullmatch(r"ASHA at epoch (\d+): accuracy ([\d.]+) below the cutoff ([\d.]+) of rung .*", note)
    if not numbers:
        return note
    epoch, value, cutoff = numbers.groups()
    return f"epoch {epoch}: {percent(float(value))} < {percent(float(cutoff))}"


def _write(output: Path, context: dict[str, Any], pictures: dict[str, Picture]) -> None:
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
            _replace(output / "figures" / f"{picture.name}.png", picture.png)
        for kind, environment in environments.items():
            text = environment.get_template(f"template.{kind}").render(context)
            _replace(output / f"report.{kind}", text.encode())
    except OSError as error:
        raise RunError(f"{output}: the report cannot be written ({error.strerror or error})") from error


def _replace(file: Path, content: bytes) -> None:
    """Write a file whole or not at all; a link that stands there is replaced, not followed."""
    draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    draft.write_bytes(content)
    os.replace(draft, file)


def _markdown_text(value: object) -> object:
    """Return a value as Markdown text, also in a table's cell, in which nothing is markup."""
    if isinstance(value, Markup | Undefined):
        return value
    text = html.escape(re.sub(r"\s+", " ", str(value)), quote=False)
    for character in "\\`*_{}[]|#~":
        text = text.replace(character, "\\" + character)
    # Which would become links.
    return text.replace("://", "&#58;//").replace("@", "&#64;").replace("www.", "www&#46;")
