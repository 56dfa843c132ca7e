import base64
import io
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_compare import NAN, table

from analysis import image_figures, pictures
from analysis.compare import compare_recipes, confirmed
from analysis.explanations import Explanation
from analysis.pictures import PANEL_NETWORKS, Picture, make_image_pictures, make_pictures
from analysis.predictions import predictions_of
from trainables import ImageData

NO_TIMELINE = pd.DataFrame({name: [] for name in ("trial_id", "attempt", "host", "slot")})


def curves_of(trials: pd.DataFrame) -> pd.DataFrame:
    """Epochs that rise evenly to the trial's accuracy; of one that diverged the last has none."""
    rows = []
    for trial in trials.to_dict("records"):
        for epoch in range(1, trial["epochs"] + 1):
            lost = trial["status"] == "diverged" and epoch == trial["epochs"]
            value = NAN if lost else trial["val_accuracy"] * epoch / trial["epochs"]
            rows.append((trial["trial_id"], epoch, value, value))
    return pd.DataFrame(rows, columns=["trial_id", "epoch", "val_accuracy", "train_accuracy"])


def timeline_of(trials: pd.DataFrame) -> pd.DataFrame:
    rows = [(name, 1, "h", 0, 60.0 * i, 60.0 * i + 45, "ended") for i, name in enumerate(trials["trial_id"])]
    columns = ["trial_id", "attempt", "host", "slot", "start_seconds", "end_seconds", "outcome"]
    return pd.DataFrame(rows, columns=columns)


def shades(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("L"))


def album(trials: pd.DataFrame, timeline: pd.DataFrame = NO_TIMELINE) -> dict[str, Picture]:
    """The pictures of trials, each looked at: none is empty, and none says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = make_pictures(trials, curves_of(trials), timeline, compare_recipes(trials, 1000))
    for name, picture in found.items():
        assert picture.name == name
        assert picture.title
        assert picture.caption.endswith(".")
        assert picture.alt.endswith(".")
        assert shades(picture.png).std() > 5
    return found


def grid(**more: Any) -> pd.DataFrame:
    """Two optimizers by two rates by two seeds; adam at 0.01 is best with 70 %, over seeds 65 %."""
    accuracies = {("sgd", 0.1): 0.6, ("sgd", 0.01): 0.4, ("adam", 0.1): 0.2, ("adam", 0.01): 0.7}
    rows = [
        {"optimizer": name, "lr": lr, "seed": seed, "val_accuracy": value - 0.1 * seed, "train_seconds": 60 * value}
        for (name, lr), value in accuracies.items()
        for seed in (0, 1)
    ]
    return table(*(row | more for row in rows))


def drawn(number: int = 12) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return table(
        *(
            {"optimizer": ["sgd", "adam"][i % 2], "lr": 10 ** -rng.uniform(1, 4), "val_accuracy": rng.uniform(0.3, 0.7)}
            for i in range(number)
        )
    )


@pytest.fixture
def figures_drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """Which figures were drawn, of what."""
    seen: list[tuple[str, tuple[Any, ...]]] = []
    for module in (pictures.figures, pictures.search_figures, pictures.image_figures):
        for name in [name for name in vars(module) if name.endswith("_figure")]:
            draw = getattr(module, name)

            def note(*given: Any, name: str = name, draw: Any = draw) -> Figure:
                seen.append((name, given))
                return draw(*given)

            monkeypatch.setattr(module, name, note)
    return seen


# --- which pictures come for which trials ---


def test_a_grid_has_a_heat_map_and_effects(figures_drawn):
    trials = grid()
    found = album(trials, timeline_of(trials))
    assert list(found) == [
        "accuracy",
        "learning_rate",
        "isolation",
        "importance",
        "parallel",
        "curves",
        "pareto",
        "timeline",
    ]
    assert [name for name, _ in figures_drawn] == [
        "accuracy_figure",
        "heat_map_figure",
        "isolation_figure",
        "importance_figure",
        "parallel_figure",
        "curves_figure",
        "pareto_figure",
        "timeline_figure",
    ]


def test_drawn_rates_have_a_scatter_and_no_effects(figures_drawn):
    found = album(drawn())
    assert "lr_figure" in [name for name, _ in figures_drawn]
    assert "heat_map_figure" not in [name for name, _ in figures_drawn]
    assert "isolation" not in found  # no two trials differ in nothing but the optimizer
    assert {"importance", "parallel"} <= set(found)


def test_without_pairs_there_are_no_effects():
    rows = [{"optimizer": "sgd", "lr": 0.1}, {"optimizer": "adam", "lr": 0.01}, {"optimizer": "sgd", "lr": 0.1}]
    assert "isolation" not in album(table(*rows))
    assert "isolation" in album(table(*rows, {"optimizer": "adam", "lr": 0.1}))


def test_few_trials_have_no_importance_and_no_parallel_coordinates():
    found = album(grid().head(3))
    assert "importance" not in found
    assert "parallel" not in found


def test_one_trial_has_two_pictures():
    trials = table({})
    assert list(album(trials)) == ["accuracy", "curves"]
    assert list(album(trials, timeline_of(trials))) == ["accuracy", "curves", "timeline"]


def test_savings_come_only_where_trials_were_stopped():
    stopped = {"status": "stopped", "epochs": 1, "val_accuracy": 0.1, "lr": 0.01}
    assert "savings" not in album(table({}, stopped | {"status": "completed", "epochs": 9}))
    found = album(table({}, stopped))
    # 9 + 1 of 2 * 9 epochs.
    assert found["savings"].caption == "10 epochs were run of 18 without early stopping: 44 % less."
    assert found["savings"].alt == "Trials in training at each epoch: 10 epochs run of 18."


def test_trials_that_all_diverged_after_an_epoch_have_pictures():
    rows = [{"status": "diverged", "epochs": 2, "lr": lr, "val_accuracy": 0.05} for lr in (0.1, 1.0)]
    found = album(table(*rows))
    assert {"accuracy", "learning_rate", "curves"} <= set(found)
    assert "pareto" not in found
    assert found["accuracy"].alt == "Accuracies of 2 recipes; the best is lr 0.1 with 5.0 %."


def test_rates_that_were_not_yet_validated_have_no_picture():
    waiting = {"status": "pending", "epochs": 0, "val_accuracy": NAN, "train_seconds": NAN}
    found = album(table({"lr": 0.1}, *({"lr": lr} | waiting for lr in (0.01, 0.001, 0.0001))))
    assert list(found) == ["accuracy", "curves"]
    assert found["curves"].alt == "Validation accuracy over epochs of 1 trials."


def test_parallel_coordinates_count_only_trials_with_an_accuracy():
    found = album(pd.concat([grid(), grid(status="pending", epochs=0).assign(val_accuracy=NAN)], ignore_index=True))
    assert found["parallel"].alt == "Parallel coordinates of 8 trials, with accuracies from 10.0 % to 70.0 %."


def test_trials_of_equal_compute_are_in_no_picture_of_the_search(figures_drawn):
    short = {"setup": "gradcam", "max_epochs": 5, "epochs": 5, "val_accuracy": 0.99}
    rows = [
        {"setup": setup, "lr": lr, "seed": seed, "val_accuracy": 0.4 + lr + 0.02 * (setup == "gradcam")}
        for setup in ("augmentation", "gradcam")
        for lr in (0.1, 0.01)
        for seed in (0, 1)
    ]
    trials = table(*rows, *({"lr": lr, "seed": seed} | short for lr in (0.1, 0.01) for seed in (0, 1)))
    found = make_pictures(trials, curves_of(trials), timeline_of(trials), compare_recipes(trials.head(8), 1000))
    given = dict(figures_drawn)
    for name in ("heat_map_figure", "parallel_figure"):
        assert given[name][0]["max_epochs"].tolist() == [9] * 8
    assert given["isolation_figure"][0]["num_trials"].tolist() == [4] * 4
    assert set(given["importance_figure"][0]["num_trials"]) == {8}
    assert found["parallel"].alt.startswith("Parallel coordinates of 8 trials")
    assert len(given["curves_figure"][0]) == 12  # what was trained is seen in full
    assert found["timeline"].alt == "12 stretches of training over 11.8 minutes."


def test_fresh_seeds_are_in_no_picture_of_the_search(figures_drawn):
    trials = pd.concat([grid(), grid(phase="confirm").assign(seed=7)], ignore_index=True)
    trials["trial_id"] = [f"t{i}" for i in range(16)]
    assert len(confirmed(trials)) == 8
    album(trials.astype({"phase": grid()["phase"].dtype}))
    assert len(dict(figures_drawn)["heat_map_figure"][0]) == 8


# --- what stands below them ---


def test_alternative_texts_hold_the_numbers():
    trials = grid()
    alts = {name: picture.alt for name, picture in album(trials, timeline_of(trials)).items()}
    assert alts["accuracy"] == "Accuracies of 2 recipes; the best is adam with 65.0 %."
    assert alts["learning_rate"].endswith("; the highest is 65.0 % at 0.01.")  # mean over seeds
    # Of sgd and adam at 0.1: 60 and 20; at 0.01: 40 and 70. So adam: the mean of -20 and +15; 0.1: of +10 and -25.
    assert alts["isolation"] == (
        "Effects of optimizer, lr on validation accuracy; the greatest is that of lr 0.01, +7.5 points."
    )
    assert alts["importance"].startswith("Importance of 2 hyperparameters; most important is ")
    assert alts["parallel"] == "Parallel coordinates of 8 trials, with accuracies from 10.0 % to 70.0 %."
    assert alts["curves"] == "Validation accuracy over epochs of 8 trials."
    # By 12, 24, 36 and 42 seconds 15, 35, 55 and 65 %.
    assert alts["pareto"] == "Accuracy over training time of 4 configurations, 4 of them on the line."
    assert alts["timeline"] == "8 stretches of training over 7.8 minutes."


def test_after_which_epoch_trials_were_compared_stands_below():
    trials = grid()
    trials.loc[trials["lr"] == 0.1, ["status", "epochs"]] = ["stopped", 2]
    found = album(trials)
    assert "on validation accuracy after epoch 2, all other" in found["isolation"].caption
    assert "among the best after epoch 2 (PED-ANOVA)" in found["importance"].caption
    assert "after epoch" not in album(grid())["isolation"].caption


def test_recipes_that_are_left_out_of_the_curves_are_counted():
    rows = [{"optimizer": f"optimizer {i}", "val_accuracy": 0.5 + i / 100} for i in range(13)]
    assert album(table(*rows))["curves"].caption.endswith(" Of 13 recipes the best 12.")
    assert "recipes the best" not in album(table(*rows[:12]))["curves"].caption


def test_a_picture_can_stand_in_a_page_by_itself():
    picture = album(table({}))["curves"]
    start, data = picture.data_uri.split(",")
    assert start == "data:image/png;base64"
    assert base64.b64decode(data) == picture.png
    assert picture.png.startswith(b"\x89PNG")


# --- pictures of test images ---


def explained(trial_id: str, num_classes: int = 4, right: int = 9, number: int = 12) -> Explanation:
    """The first images are right, the others are taken for the next class."""
    rng = np.random.default_rng(0)
    labels = np.arange(number) % num_classes
    predicted = np.where(np.arange(number) < right, labels, (labels + 1) % num_classes)
    logits = 3 * np.eye(num_classes, dtype=np.float32)[predicted]
    maps = rng.random((number, 32, 32), dtype=np.float32)
    return Explanation(trial_id, logits, labels, np.arange(number), maps, maps[:, ::8, ::8] - 0.3, pd.DataFrame())


def images(names: tuple[str, ...], number: int = 12, **more: Any) -> ImageData:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)
    return ImageData(pixels, np.arange(number) % len(names), names, **more)


def image_album(
    trials: pd.DataFrame, data: ImageData, explanations: list[Explanation], *, predict: bool = True
) -> dict[str, Picture]:
    predictions = predictions_of(explanations[:1], data) if predict else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = make_image_pictures(trials, trials.head(len(explanations)), data, explanations, predictions)
    assert all(shades(picture.png).std() > 5 for picture in found.values())
    return found


TWO = table(
    {"optimizer": "adam", "best_epoch": 7, "lr": 0.01},
    {"optimizer": "sgd", "best_epoch": 3, "lr": 0.1234567, "status": "stopped"},
)
NAMES = ("cat", "dog", "cow", "owl")


def test_pictures_of_test_images_hold_the_numbers():
    found = image_album(TWO, images(NAMES), [explained("t0"), explained("t1")])
    assert list(found) == ["panel", "confusion", "calibration"]
    assert found["panel"].alt == "8 test images with saliency and Grad-CAM maps of 2 networks: adam, sgd."
    # Images 0 to 8 of classes 0 1 2 3 0 1 2 3 0 are right, so of class 0 all three and of the others two.
    assert (
        found["confusion"].alt
        == "Confusion of class by class; on average 75.0 % of a class's images are predicted right."
    )
    # exp(3) / (exp(3) + 3) = 0.870 is the confidence of all, 9 / 12 the accuracy.
    assert found["calibration"].alt == "Accuracy over confidence; expected calibration error 12.0 %."
    assert "n = 12. Expected calibration error: 12.0 %." in found["calibration"].caption


def test_titles_of_the_panel_say_what_the_networks_are_and_fit(figures_drawn):
    image_album(TWO, images(NAMES), [explained("t0"), explained("t1", right=3)])
    _, names, notes, _, positions = dict(figures_drawn)["panel_figure"]
    assert names == ["adam", "sgd"]
    assert notes == ["lr 0.01, epoch 7, test 75.0 %", "lr 0.123, epoch 3, not completed, test 25.0 %"]
    assert sorted(positions[:5]) == sorted(set(positions[:5]) & set(range(9)))  # five right ones
    assert sorted(positions[5:]) == [9, 10, 11]  # and all three wrong ones


def test_the_longest_note_of_a_panel_keeps_to_its_network():
    trial = pd.Series({"lr": 0.000123456, "best_epoch": 100, "status": "stopped"})
    note = pictures._panel_note(trial, ["optimizer"], explained("t0", right=12))
    data = images(NAMES)
    figure = image_figures.panel_figure([explained("t0")] * 2, ["adam", "sgd"], [note] * 2, data, [0])
    _, first, _, second = figure.texts[:4]
    assert first.get_text() == "lr 0.000123, epoch 100, not completed, test 100.0 %"
    assert first.get_window_extent().x1 < second.get_window_extent().x0
    assert second.get_window_extent().x1 < figure.bbox.x1


def test_a_panel_shows_a_configuration_once_and_four_at_most(figures_drawn):
    rows = [{"optimizer": f"o{i}", "seed": seed, "best_epoch": 1} for i in range(6) for seed in (0, 1)]
    found = image_album(table(*rows), images(NAMES), [explained(f"t{i}") for i in range(12)])
    shown, names, *_ = dict(figures_drawn)["panel_figure"]
    assert names == ["o0", "o1", "o2", "o3"]
    assert [explanation.trial_id for explanation in shown] == ["t0", "t2", "t4", "t6"]
    assert len(shown) == PANEL_NETWORKS
    assert "of 4 networks: o0, o1, o2, o3." in found["panel"].alt


def test_one_network_alone_has_a_panel():
    found = image_album(table({"best_epoch": 1}), images(NAMES), [explained("t0")])
    assert found["panel"].alt.endswith(" of 1 network: the one recipe.")


def test_without_predictions_there_is_but_the_panel():
    assert list(image_album(TWO, images(NAMES), [explained("t0")], predict=False)) == ["panel"]


@pytest.mark.parametrize(
    "names",
    [
        ("猫", "犬", "牛の絵", "鳥"),
        ("$x^2$", "$", "a$b$c", "\\frac{$1$"),
        ("قط", "कुत्ता", "고양이", "🦉"),
        ("<script>", "long name " * 9, "a_b%\\", "tab\there"),
    ],
)
def test_class_names_of_any_script_draw_without_a_warning(names):
    assert list(image_album(TWO, images(names), [explained("t0")])) == ["panel", "confusion", "calibration"]


def test_of_more_classes_than_can_be_named_superclasses_are_confused(figures_drawn):
    names = tuple(f"class {i}" for i in range(40))
    many = {"num_classes": 40, "number": 80, "right": 60}
    plain = image_album(TWO, images(names, 80), [explained("t0", **many)])
    assert list(plain) == ["panel", "calibration"]
    data = images(names, 80, superclass_names=("first", "last"), superclasses=tuple(i // 20 for i in range(40)))
    found = image_album(TWO, data, [explained("t0", **many)])
    (shares,) = dict(figures_drawn)["confusion_figure"]
    # Of the last twenty images, classes 20 to 39, one of class 39 is taken for class 0: one of the last forty.
    np.testing.assert_allclose(shares.to_numpy(), [[1, 0], [1 / 40, 39 / 40]])
    assert found["confusion"].alt == (
        "Confusion of superclass by superclass; on average 98.8 % of a superclass's images are predicted right."
    )


def test_30_classes_are_confused_by_name(figures_drawn):
    names = tuple(f"class {i}" for i in range(30))
    image_album(TWO, images(names, 60), [explained("t0", 30, 40, 60)])
    (shares,) = dict(figures_drawn)["confusion_figure"]
    assert shares.shape == (30, 30)
