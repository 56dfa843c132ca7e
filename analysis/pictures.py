"""The figures of a report, each with what stands below it and what it shows for those who cannot see it."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from analysis import figures, image_figures, search_figures
from analysis.compare import amount_columns, by_budget, drawn, recipe_columns, recipe_name, varied_hyperparameters
from analysis.effects import accuracy_over, asha_savings, importance, isolation, pareto_front
from analysis.explanations import Explanation
from analysis.predictions import calibration, confusion
from analysis.tables import percent
from analysis.trials import varied
from explain.render import any_script
from trainables.data import ImageData

PANEL_RIGHT, PANEL_WRONG = 5, 3
PANEL_NETWORKS = 4  # side by side; more would not be legible
MAX_CONFUSED = 30  # classes whose names can be read at the axes


@dataclass(frozen=True)
class Picture:
    """A figure of the report: its file's name, title, what stands below it, and what it shows in words."""

    name: str
    title: str
    caption: str
    alt: str
    png: bytes

    @property
    def data_uri(self) -> str:
        """The picture itself, for a page that needs no other file."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


class _Album(dict[str, Picture]):
    def put(self, name: str, title: str, caption: str, alt: str, figure: Figure) -> None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        self[name] = Picture(name, title, caption, alt, buffer.getvalue())


def _after(table: pd.DataFrame) -> str:
    """Say after which epoch trials were compared, unless each was at its best."""
    return "" if table["epoch"].isna().all() else f" after epoch {table['epoch'].max()}"


def make_pictures(
    trials: pd.DataFrame, epochs: pd.DataFrame, timeline: pd.DataFrame, recipes: pd.DataFrame
) -> dict[str, Picture]:
    """Return the figures of trials, by name.

    Args:
        trials: as :func:`analysis.load_trials` gives them.
        epochs: as :func:`analysis.load_epochs` does.
        timeline: as :func:`analysis.load_timeline` does.
        recipes: as :func:`analysis.compare_recipes` does.
    """
    album = _Album()
    searched = by_budget(trials)[0].query("phase == 'search'")
    seen = searched[searched["val_accuracy"].notna()]
    with any_script():
        best = recipes.iloc[0]
        album.put(
            "accuracy",
            "Accuracy of each recipe",
            "Best configuration of each recipe. Bars are 95 % intervals: over seeds where there are several, else over "
            "images.",
            f"Accuracies of {len(recipes)} recipes; the best is {best['recipe']} with {percent(best['val_accuracy'])}.",
            figures.accuracy_figure(recipes),
        )
        ended = searched[searched["val_accuracy"].notna() | (searched["status"] == "diverged")]
        if "lr" in varied(ended):
            points = accuracy_over(ended, "lr")
            top = points.sort_values("val_accuracy").iloc[-1]
            album.put(
                "learning_rate",
                "Accuracy over the learning rate",
                "Best validation accuracy at each learning rate, mean over seeds. Hatched or hollow: none was "
                "completed, and the accuracy is that of an unfinished training. Diverged trials count as 0.",
                "Validation accuracy of each recipe at each learning rate; the highest is "
                f"{percent(top['val_accuracy'])} at {top['lr']:g}.",
                (figures.lr_figure if drawn(ended["lr"]) else figures.heat_map_figure)(ended),
            )
        effects = isolation(trials, epochs)
        paired = effects[effects["num_blocks"] > 0]
        if len(paired):
            most = paired.iloc[int(paired["effect"].abs().to_numpy().argmax())]
            album.put(
                "isolation",
                "What each hyperparameter did",
                f"Effect of each value on validation accuracy{_after(paired)}, all other hyperparameters and the "
                "seed being equal: distance from the mean of the n blocks of trials that differ in nothing else. The "
                "95 % interval takes blocks for independent, though seeds come back in several; a trial that diverged "
                "counts as 0.",
                f"Effects of {', '.join(paired['hyperparameter'].unique())} on validation accuracy; the greatest is "
                f"that of {most['hyperparameter']} {most['value']}, {100 * most['effect']:+.1f} points.",
                search_figures.isolation_figure(paired),
            )
        shares = importance(trials, epochs)
        if len(shares) > 1:
            album.put(
                "importance",
                "Which hyperparameters matter",
                f"How much each decides whether a trial is among the best{_after(shares)} (PED-ANOVA).",
                f"Importance of {len(shares)} hyperparameters; most important is {shares['hyperparameter'].iloc[0]} "
                f"with {percent(shares['importance'].iloc[0], 0)}.",
                search_figures.importance_figure(shares),
            )
        if len(varied_hyperparameters(seen)) > 1 and len(seen) > 3:
            album.put(
                "parallel",
                "All trials at a glance",
                "One line a trial, through the values of its hyperparameters to its validation accuracy; the darker, "
                "the better.",
                f"Parallel coordinates of {len(seen)} trials, with accuracies from "
                f"{percent(seen['val_accuracy'].min())} to {percent(seen['val_accuracy'].max())}.",
                search_figures.parallel_figure(seen),
            )
        number = trials.loc[trials["seed"].notna(), recipe_columns(trials)].drop_duplicates().shape[0]
        album.put(
            "curves",
            "Learning curves",
            "Validation accuracy after each epoch, one line a trial; a cross marks a trial that was stopped early or "
            "diverged, a dotted line where trials were stopped. Colour and mark tell apart what varies within a recipe."
            + (f" Of {number} recipes the best {figures.MAX_PANELS}." if number > figures.MAX_PANELS else ""),
            f"Validation accuracy over epochs of {trials['epochs'].gt(0).sum()} trials.",
            figures.curves_figure(trials, epochs),
        )
        costs = pareto_front(trials)
        if len(costs) > 1:
            album.put(
                "pareto",
                "Accuracy and what it cost",
                "Each configuration, mean over seeds, by the minutes that a trial took. On the line is what no other "
                "beats in both.",
                f"Accuracy over training time of {len(costs)} configurations, "
                f"{costs['on_front'].sum()} of them on the line.",
                search_figures.pareto_figure(costs),
            )
        if (searched["status"] == "stopped").any():
            savings = asha_savings(searched)
            run, full = int(savings["epochs_run"].iloc[0]), int(savings["epochs_without_stopping"].iloc[0])
            album.put(
                "savings",
                "What early stopping saved",
                f"{run} epochs were run of {full} without early stopping: {percent(1 - run / full, 0)} less.",
                f"Trials in training at each epoch: {run} epochs run of {full}.",
                figures.savings_figure(savings),
            )
        if len(timeline):
            album.put(
                "timeline",
                "Who ran when",
                "Each trial on the slot of the machine or cluster that it held, coloured by what became of it.",
                f"{len(timeline)} stretches of training over {timeline['end_seconds'].max() / 60:.1f} minutes.",
                search_figures.timeline_figure(timeline, trials),
            )
    return album


def make_image_pictures(
    trials: pd.DataFrame,
    chosen: pd.DataFrame,
    data: ImageData,
    explanations: Sequence[Explanation],
    predictions: pd.DataFrame | None,
) -> dict[str, Picture]:
    """Return the figures of test images, by name.

    Args:
        trials: as :func:`analysis.load_trials` gives them.
        chosen: those of them that were explained, best first.
        data: the test images.
        explanations: one for each of ``chosen``.
        predictions: of the winner's networks, as :func:`analysis.load_predictions` gives them.
    """
    album = _Album()
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
    positions = image_figures.choose_images(shown[0], PANEL_RIGHT, PANEL_WRONG)
    with any_script():
        album.put(
            "panel",
            "What the networks look at",
            f"Test images, a seeded choice of up to {PANEL_RIGHT} that the best network gets right and {PANEL_WRONG} "
            "that it gets wrong. For each network saliency (absolute gradient of the predicted class's logit) and "
            "Grad-CAM (last stage) laid over the image; each map is scaled by itself, so brightness "
            "cannot be compared between maps.",
            f"{len(positions)} test images with saliency and Grad-CAM maps of {len(shown)} "
            f"network{'s' * (len(shown) > 1)}: {', '.join(names)}.",
            image_figures.panel_figure(shown, names, notes, data, positions),
        )
        if predictions is None:
            return album
        by = "superclass" if len(data.superclass_names) and len(data.class_names) > MAX_CONFUSED else "label"
        if len(data.superclass_names if by == "superclass" else data.class_names) <= MAX_CONFUSED:
            kinds = "superclass" if by == "superclass" else "class"
            confused = confusion(predictions, by)
            right = percent(confused.to_numpy().trace() / len(confused))
            album.put(
                "confusion",
                "What is taken for what",
                f"Share of each {kinds}'s test images that the winner predicts as which {kinds}; scaled by the root, "
                "so that small shares are seen.",
                f"Confusion of {kinds} by {kinds}; on average {right} of a {kinds}'s images are predicted right.",
                image_figures.confusion_figure(confused),
            )
        bins = calibration(predictions)
        error = percent(bins["expected_calibration_error"].iloc[0])
        album.put(
            "calibration",
            "Is it as right as it is confident?",
            f"Accuracy of the winner's predictions over their confidence, n = {len(predictions):,}. Expected "
            f"calibration error: {error}.",
            f"Accuracy over confidence; expected calibration error {error}.",
            image_figures.calibration_figure(bins),
        )
    return album


def _panel_note(trial: pd.Series, columns: Sequence[str], explanation: Explanation) -> str:
    rate = "" if "lr" in columns else f"lr {trial['lr']:.3g}, "
    stopped = "" if trial["status"] == "completed" else ", not completed"
    return f"{rate}epoch {trial['best_epoch']}{stopped}, test {percent(explanation.accuracy)}"
