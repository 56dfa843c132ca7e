import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from analysis import (
    RunError,
    calibration,
    class_accuracy,
    confused_pairs,
    confusion,
    load_predictions,
)
from analysis.explanations import Explanation, UnreadableExplanation, _read
from analysis.intervals import bootstrap_interval, wilson_interval
from analysis.predictions import predictions_of
from analysis.trials import EXPLANATION_FORMAT
from trainables import ImageData, TrialSettings

CLASSES = ["car", "cat", "dog", "ship"]
KINDS = {"car": "vehicle", "cat": "animal", "dog": "animal", "ship": "vehicle"}


def said(
    labels: str, predicted: str, confidence: Sequence[float] | None = None, trial_id: str = "a", supers: bool = True
) -> pd.DataFrame:
    """Predictions of one network of images 0, 1, ... as load_predictions gives them, classes as words."""
    pairs = list(zip(labels.split(), predicted.split(), strict=True))
    frame = pd.DataFrame(pairs, columns=["label", "predicted"]).astype(pd.CategoricalDtype(CLASSES))
    frame.insert(0, "trial_id", trial_id)
    frame.insert(1, "image", range(len(pairs)))
    frame["confidence"] = [0.5] * len(pairs) if confidence is None else confidence
    frame["correct"] = [label == prediction for label, prediction in pairs]
    if supers:
        kind = pd.CategoricalDtype(["animal", "vehicle"])
        frame["superclass"] = pd.Categorical([KINDS[label] for label, _ in pairs], dtype=kind)
        frame["predicted_superclass"] = pd.Categorical([KINDS[name] for _, name in pairs], dtype=kind)
    return frame


ONE = said("cat cat cat cat dog dog car", "cat cat cat dog cat ship car")
TWO = pd.concat([ONE, said("cat cat cat cat dog dog car", "cat cat dog dog cat dog cat", trial_id="b")])


# --- class_accuracy ---


def test_accuracy_of_one_network_class_by_class_the_least_first():
    found = class_accuracy(ONE)
    assert list(found.columns) == ["label", "accuracy", "low", "high", "num_images", "num_networks"]
    assert found["label"].to_list() == ["dog", "cat", "car"]
    assert found["label"].dtype == ONE["label"].dtype
    assert found["accuracy"].to_list() == [0, 0.75, 1]
    limits = [wilson_interval(0, 2), wilson_interval(0.75, 4), wilson_interval(1, 1)]
    assert [tuple(row) for row in found[["low", "high"]].to_numpy()] == limits
    assert found["num_images"].to_list() == [2, 4, 1]
    assert found["num_networks"].to_list() == [1, 1, 1]


def test_only_of_several_networks_images_are_drawn_again(monkeypatch):
    def refuse(values: np.ndarray) -> None:
        raise AssertionError

    monkeypatch.setattr("analysis.predictions.bootstrap_interval", refuse)
    assert class_accuracy(ONE)["accuracy"].notna().all()
    with pytest.raises(AssertionError):
        class_accuracy(TWO)


def test_of_several_networks_each_image_counts_with_its_mean():
    found = class_accuracy(TWO).set_index("label")
    # Of dog 0 and 0.5, of cat 1, 1, 0.5 and 0, of car 0.5.
    assert found.index.to_list() == ["dog", "car", "cat"]
    assert found["accuracy"].to_list() == [0.25, 0.5, 0.625]
    assert tuple(found.loc["cat", ["low", "high"]]) == bootstrap_interval(np.array([1, 1, 0.5, 0]))[1:]
    assert found.loc["car", ["low", "high"]].isna().all()
    assert found["num_images"].to_list() == [2, 1, 4]
    assert found["num_networks"].to_list() == [2, 2, 2]


def test_trials_of_one_name_in_several_runs_are_several_networks():
    both = pd.concat([ONE.assign(run="x"), ONE.assign(run="y")], ignore_index=True)
    found = class_accuracy(both)
    assert found["num_networks"].to_list() == [2, 2, 2]
    assert found["num_images"].to_list() == [2, 4, 1]
    assert confused_pairs(both)["num_images"].to_list() == confused_pairs(ONE)["num_images"].to_list()


def test_of_superclasses_it_is_also_told_how_often_they_are_right_themselves():
    found = class_accuracy(ONE, by="superclass")
    assert list(found.columns) == ["superclass", "accuracy", "low", "high", "within", "num_images", "num_networks"]
    assert found["superclass"].to_list() == ["animal", "vehicle"]
    assert found["accuracy"].to_list() == [0.5, 1]
    assert found["within"].to_list() == pytest.approx([5 / 6, 1])
    assert found["num_images"].to_list() == [6, 1]
    assert tuple(found.loc[0, ["low", "high"]]) == wilson_interval(0.5, 6)
    assert class_accuracy(TWO, by="superclass")["within"].to_list() == pytest.approx([11 / 12, 0.5])


def test_classes_of_equal_accuracy_stand_in_their_order():
    assert class_accuracy(said("ship dog cat car", "ship dog cat car"))["label"].to_list() == CLASSES


# --- calibration ---


def test_calibration_by_hand():
    predictions = said("cat " * 5, "cat dog cat cat dog", [0.3, 0.45, 0.5, 1.0, 0.75])
    found = calibration(predictions, num_bins=4)
    assert found[["low", "high"]].to_numpy().tolist() == [[0.25, 0.5], [0.5, 0.75], [0.75, 1.0]]
    assert found["confidence"].to_list() == pytest.approx([0.375, 0.5, 0.875])
    assert found["accuracy"].to_list() == [0.5, 1, 0.5]
    assert found["num_predictions"].to_list() == [2, 1, 2]
    # (2 * 0.125 + 1 * 0.5 + 2 * 0.375) / 5
    assert found["expected_calibration_error"].to_list() == pytest.approx([0.3] * 3)


def test_full_confidence_is_in_the_last_of_fifteen_bins():
    found = calibration(said("cat cat", "cat cat", [1.0, 0.94]))
    assert found[["low", "high"]].to_numpy().tolist() == [[14 / 15, 1.0]]
    assert found["num_predictions"].to_list() == [2]


def test_who_is_as_often_right_as_confident_has_no_calibration_error():
    found = calibration(said("cat " * 5, "cat dog cat cat dog", [0.6] * 5))
    assert found["expected_calibration_error"].to_list() == pytest.approx([0])


def test_networks_are_taken_together_in_calibration():
    sure, unsure = (said("cat cat", "cat dog", [value] * 2, name) for value, name in ((0.9, "a"), (0.6, "b")))
    found = calibration(pd.concat([sure, unsure]), num_bins=2)
    assert found[["confidence", "accuracy", "num_predictions"]].to_numpy().tolist() == [[pytest.approx(0.75), 0.5, 4]]
    assert found["expected_calibration_error"].to_list() == pytest.approx([0.25])


# --- confusion ---


def test_rows_of_a_confusion_are_shares_of_the_truth():
    found = confusion(ONE)
    assert found.index.to_list() == found.columns.to_list() == CLASSES
    assert (found.index.name, found.columns.name) == ("label", "predicted")
    assert found.to_numpy().tolist() == [
        [1, 0, 0, 0],
        [0, 0.75, 0.25, 0],
        [0, 0.5, 0, 0.5],
        [0, 0, 0, 0],  # no image shows it
    ]


def test_a_confusion_of_several_networks_is_their_mean():
    found = confusion(TWO)
    assert found.loc["dog"].to_list() == [0, 0.5, 0.25, 0.25]
    assert found.loc[["car", "cat", "dog"]].sum(axis=1).to_list() == [1, 1, 1]


def test_superclasses_are_confused_too():
    found = confusion(ONE, by="superclass")
    assert found.index.to_list() == found.columns.to_list() == ["animal", "vehicle"]
    assert found.to_numpy().ravel().tolist() == pytest.approx([5 / 6, 1 / 6, 0, 1])


# --- confused_pairs ---


def test_confused_pairs_by_hand():
    predictions = said("cat cat cat cat dog dog car car", "cat cat cat dog cat cat cat ship")
    found = confused_pairs(predictions)
    columns = ["label", "predicted", "share", "back", "num_images", "num_networks", "same_superclass"]
    assert list(found.columns) == columns
    assert found.to_numpy().tolist() == [
        ["dog", "cat", 1.0, 0.25, 2, 1, True],
        ["car", "cat", 0.5, 0.0, 2, 1, False],
        ["car", "ship", 0.5, 0.0, 2, 1, True],  # of which there is no image
        ["cat", "dog", 0.25, 1.0, 4, 1, True],
    ]


def test_confused_pairs_of_several_networks_are_their_mean():
    found = confused_pairs(TWO).set_index(["label", "predicted"])
    assert found["share"].to_dict() == {
        ("car", "cat"): 0.5,
        ("dog", "cat"): 0.5,
        ("cat", "dog"): 0.375,
        ("dog", "ship"): 0.25,
    }
    assert found["share"].is_monotonic_decreasing
    assert found.loc[("cat", "dog"), "back"] == 0.5
    assert found["num_images"].to_list() == [1, 2, 4, 2]
    assert (found["num_networks"] == 2).all()


def test_without_superclasses_and_without_errors_confusions_are_told_alike():
    plain = ["label", "predicted", "share", "back", "num_images", "num_networks"]
    found = confused_pairs(said("cat dog", "dog dog", supers=False))
    assert list(found.columns) == plain
    assert found["share"].to_list() == [1.0]
    right = confused_pairs(said("cat dog", "cat dog"))
    assert right.empty
    assert list(right.columns) == [*plain, "same_superclass"]


# --- predictions_of ---


def images(superclasses: tuple[int, ...] = (1, 0, 0)) -> ImageData:
    names = ("animal", "vehicle") if superclasses else ()
    pixels = np.zeros((4, 32, 32, 3), np.uint8)
    return ImageData(pixels, np.array([0, 1, 2, 2]), ("car", "cat", "dog"), names, superclasses)


def explanation(trial_id: str, logits: Any) -> Explanation:
    nothing = np.zeros((0, 32, 32), np.float32)
    labels, indices = np.array([0, 1, 2, 2]), np.zeros(0, np.int64)
    return Explanation(trial_id, np.asarray(logits, np.float32), labels, indices, nothing, nothing, pd.DataFrame())


LOGITS = [
    np.log([0.7, 0.2, 0.1]),  # right
    np.log([0.1, 0.3, 0.6]) - 7,  # wrong, of the same superclass; softmax does not care for what is added
    [1000, 1000, -1000],  # half of one, half of the other: the first counts
    [-1e30, -1e30, 1e30],
]


def test_predictions_by_hand():
    found = predictions_of([explanation("a", LOGITS)], images())
    assert list(found.columns) == [
        *("trial_id", "image", "label", "predicted", "confidence", "correct"),
        *("superclass", "predicted_superclass"),
    ]
    assert found["image"].to_list() == [0, 1, 2, 3]
    assert found["label"].to_list() == ["car", "cat", "dog", "dog"]
    assert found["predicted"].to_list() == ["car", "dog", "car", "dog"]
    assert found["confidence"].to_list() == pytest.approx([0.7, 0.6, 0.5, 1.0])
    assert found["correct"].to_list() == [True, False, False, True]
    assert found["superclass"].to_list() == ["vehicle", "animal", "animal", "animal"]
    assert found["predicted_superclass"].to_list() == ["vehicle", "animal", "vehicle", "animal"]
    assert found["predicted"].cat.categories.to_list() == ["car", "cat", "dog"]


def test_predictions_of_several_networks_stand_under_each_other():
    found = predictions_of([explanation("a", LOGITS), explanation("b", np.eye(4, 3))], images(()))
    assert found["trial_id"].to_list() == ["a"] * 4 + ["b"] * 4
    assert found["image"].to_list() == [0, 1, 2, 3] * 2
    assert found["predicted"].to_list()[4:] == ["car", "cat", "dog", "car"]
    assert found["confidence"].to_list()[4:] == pytest.approx([math.e / (math.e + 2)] * 3 + [1 / 3])
    assert list(found.index) == list(range(8))
    assert "superclass" not in found


# --- load_predictions ---

TABLE = {
    "trial_id": "str",
    "image": "int64",
    "label": pd.CategoricalDtype(["car", "cat", "dog"]),
    "predicted": pd.CategoricalDtype(["car", "cat", "dog"]),
    "confidence": "float64",
    "correct": "bool",
}
OF_SUPERCLASSES = dict.fromkeys(["superclass", "predicted_superclass"], pd.CategoricalDtype(["animal", "vehicle"]))


def make_run(run: Path, *explained: str, superclasses: bool = True) -> Path:
    """Write a run of the trials a, b and c, some of them explained."""
    run.mkdir()
    data: dict[str, Any] = {"class_names": ["car", "cat", "dog"]}
    if superclasses:
        data |= {"superclass_names": ["animal", "vehicle"], "superclasses": [1, 0, 0]}
    (run / "study.yaml").write_text(yaml.safe_dump({"settings": {}, "data": data}))
    settings = TrialSettings(max_epochs=1).model_dump()
    trials = [{"trial_id": name, "settings": settings} for name in "abc"]
    (run / "manifest.json").write_text(json.dumps({"trials": trials}))
    metrics = ("lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "epoch_seconds", "images_per_second")
    with (run / "events.jsonl").open("w") as events:
        for name in "abc":
            folder = f"tune/attempt-1/{name}/checkpoint_000000"
            (run / folder).mkdir(parents=True)
            epoch = {"event": "epoch", "trial_id": name, "epoch": 1, "checkpoint": folder}
            events.write(json.dumps(epoch | dict.fromkeys(metrics, 0.5)) + "\n")
    for name in explained:
        of = {"checkpoint": f"tune/attempt-1/{name}/checkpoint_000000", "test_accuracy": 0.5, "num_test_images": 4}
        (run / "explanations" / name).mkdir(parents=True)
        (run / "explanations" / name / "summary.json").write_text(json.dumps({"format": EXPLANATION_FORMAT} | of))
        write_arrays(run, name)
    return run


def write_arrays(run: Path, name: str, **arrays: Any) -> Path:
    file = run / "explanations" / name / "arrays.npz"
    np.savez(file, **{"logits": np.asarray(LOGITS, np.float32), "labels": np.array([0, 1, 2, 2])} | arrays)
    return file


def test_predictions_of_a_run_are_those_of_its_explained_networks(tmp_path):
    run = make_run(tmp_path / "run", "a", "c")
    write_arrays(run, "c", logits=np.eye(4, 3))
    found = load_predictions(run)
    expected = predictions_of([explanation("a", LOGITS), explanation("c", np.eye(4, 3))], images())
    pd.testing.assert_frame_equal(found, expected)
    assert found.dtypes.to_dict() == TABLE | OF_SUPERCLASSES


@pytest.mark.parametrize(("superclasses", "expected"), [(True, TABLE | OF_SUPERCLASSES), (False, TABLE)])
def test_where_nothing_was_explained_the_table_has_its_form(tmp_path, superclasses, expected):
    found = load_predictions(make_run(tmp_path / "run", superclasses=superclasses))
    assert found.empty
    assert found.dtypes.to_dict() == expected


def test_predictions_of_another_checkpoint_or_format_do_not_count(tmp_path):
    run = make_run(tmp_path / "run", "a", "b", "c")
    for name, change in (("a", {"checkpoint": "tune/attempt-1/a/checkpoint_000007"}), ("b", {"format": 1})):
        file = run / "explanations" / name / "summary.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert load_predictions(run)["trial_id"].unique().tolist() == ["c"]


def test_predictions_of_several_runs_are_told_apart(tmp_path):
    one, two = make_run(tmp_path / "one", "a"), make_run(tmp_path / "two", "a", "b")
    found = load_predictions([one, str(two)])
    assert found.columns[0] == "run"
    assert found[["run", "trial_id"]].drop_duplicates().to_numpy().tolist() == [
        [str(one), "a"],
        [str(two), "a"],
        [str(two), "b"],
    ]
    assert found["label"].dtype == TABLE["label"]
    assert class_accuracy(found)["num_networks"].to_list() == [3, 3, 3]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-60])


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"half a file"),
        lambda file: np.savez(file, logits=np.eye(4, 3)),
        lambda file: np.savez(file, logits=np.array([{}], dtype=object), labels=np.arange(1)),
    ],
)
def test_predictions_that_cannot_be_read_are_left_out_and_told_of(tmp_path, damage):
    run = make_run(tmp_path / "run", "a", "b")
    damage(run / "explanations/b/arrays.npz")
    text = r"run/explanations/b/arrays\.npz: cannot be read \(.+\); its trial is left out until it is explained again$"
    with pytest.warns(UnreadableExplanation, match=text):
        found = load_predictions(run)
    assert set(found["trial_id"]) == {"a"}


def test_trials_whose_predictions_were_not_kept_are_told_of_in_one_line(tmp_path):
    run = make_run(tmp_path / "run", "a", "b", "c")
    for trial_id in "ac":
        (run / f"explanations/{trial_id}/arrays.npz").unlink()
    with pytest.warns(UnreadableExplanation) as told:
        found = load_predictions(run)
    assert [str(warning.message) for warning in told] == [
        f"{run}: 2 explained trials have no arrays.npz here and are left out"
    ]
    assert set(found["trial_id"]) == {"b"}


@pytest.mark.parametrize(
    "arrays",
    [
        {"logits": np.eye(4)},
        {"logits": np.eye(5, 3)},
        {"logits": np.zeros(12)},
        {"labels": np.array([0, 1, 2, 3])},
        {"labels": np.array([0, 1, 2, -1])},
    ],
)
def test_predictions_of_other_classes_are_left_out(tmp_path, arrays):
    run = make_run(tmp_path / "run", "a", "b")
    write_arrays(run, "b", **arrays)
    with pytest.warns(UnreadableExplanation, match=r"arrays\.npz: cannot be read \(is not of 3 classes\); its trial"):
        found = load_predictions(run)
    assert set(found["trial_id"]) == {"a"}


def test_predictions_of_what_is_no_run_are_none(tmp_path):
    with pytest.raises(RunError, match="no such run"):
        load_predictions(tmp_path / "nowhere")


# --- explanations that are broken ---


@pytest.mark.parametrize(
    "arrays",
    [
        {"labels": np.array([0.0, 1, 2, 2])},  # as numbers of superclasses an IndexError
        {"logits": np.full((4, 3), np.nan)},
        {"logits": np.where(np.eye(4, 3) > 0, np.inf, 0)},
    ],
)
@pytest.mark.parametrize("superclasses", [True, False])
def test_predictions_of_what_is_no_number_are_left_out(tmp_path, arrays, superclasses):
    run = make_run(tmp_path / "run", "a", "b", superclasses=superclasses)
    write_arrays(run, "b", **arrays)
    with pytest.warns(UnreadableExplanation, match=r"b/arrays\.npz: cannot be read"):
        found = load_predictions(run)
    assert set(found["trial_id"]) == {"a"}


def stored(**changed: Any) -> dict[str, Any]:
    """What is kept of an explained network, of the 4 test images."""
    whole = {
        "logits": np.asarray(LOGITS, np.float32),
        "labels": np.array([0, 1, 2, 2]),
        "indices": np.arange(4),
        "saliency": np.ones((4, 32, 32), np.float32),
        "cam": np.ones((4, 4, 4), np.float32),
    }
    return whole | changed


@pytest.mark.parametrize(
    ("arrays", "is_read"),
    [
        (stored(), True),
        (stored(saliency=np.ones((4, 16, 16), np.float32), cam=np.ones((4, 2, 2), np.float32)), True),
        *((stored(logits=logits.astype(np.float32)), False) for logits in (np.eye(4), np.eye(3), np.zeros(12))),
        (stored(logits=np.full((4, 3), np.nan, np.float32)), False),
        (stored(logits=np.full((4, 3), "x")), False),
        (stored(labels=np.array([0, 1, 2, 0])), False),
        (stored(indices=np.array([0, 1, 2, 4])), False),
        (stored(indices=np.array([0, 1, 2])), False),
        (stored(indices=np.array([0, 0, 1, 2])), False),
        *((stored(**{name: np.ones((3, 4, 4), np.float32)}), False) for name in ("saliency", "cam")),
        *((stored(**{name: np.ones((4, 16), np.float32)}), False) for name in ("saliency", "cam")),
        *((stored(**{name: np.ones((4, 0, 4), np.float32)}), False) for name in ("saliency", "cam")),
        *((stored(**{name: np.full((4, 4, 4), np.inf, np.float32)}), False) for name in ("saliency", "cam")),
    ],
)
def test_stored_arrays_of_other_shapes_count_as_absent(tmp_path, arrays, is_read):
    measures = pd.DataFrame({"map": ["saliency"], "measure": ["gini"], "image": [0], "value": [0.5]})
    measures.to_parquet(tmp_path / "measures.parquet")
    (tmp_path / "about.json").write_text(json.dumps({"format": 5}))
    np.savez(tmp_path / "arrays.npz", **arrays)
    assert (_read(tmp_path, {"format": 5}, images()) is not None) == is_read
