from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.claims import CLAIM_COLUMNS, CLAIMS, Claim, Comparison, decide
from analysis.compare import bootstrap_interval

NAN = float("nan")
HIGHER = Comparison("ours", "merit", "theirs")
LOWER = Comparison("ours", "merit", "theirs", higher=False)


def table(trial_id: str = "t0", first: int = 0, **values: dict[str, list[float]]) -> pd.DataFrame:
    """Measures as load_measures gives them: of each measure, each map's values of the images first, first + 1, ..."""
    rows = [
        {"trial_id": trial_id, "map": name, "measure": measure, "image": image, "value": value}
        for measure, maps in values.items()
        for name, of_images in maps.items()
        for image, value in enumerate(of_images, first)
    ]
    types = {"trial_id": "str", "map": "category", "measure": "category", "image": "int64", "value": "float32"}
    return pd.DataFrame(rows, columns=list(types)).astype(types)


def decided(measures: pd.DataFrame, *comparisons: Comparison) -> list[dict[str, Any]]:
    return decide(measures, [Claim("It is so.", comparisons)]).to_dict("records")


def test_a_row_says_what_was_compared_with_what_and_by_how_much():
    # On both images the map is 0.25 higher: so it is in every resample.
    rows = decided(table(merit={"ours": [0.5, 1.0], "theirs": [0.25, 0.75], "other": [9.0, 9.0]}), HIGHER)
    assert rows == [
        {
            "claim": "It is so.",
            "verdict": "supported",
            "map": "ours",
            "measure": "merit",
            "than": "theirs",
            "difference": 0.25,
            "low": 0.25,
            "high": 0.25,
            "holds": "yes",
            "num_images": 2,
            "num_networks": 1,
        }
    ]


@pytest.mark.parametrize(
    ("differences", "higher", "lower"),
    [
        ([1.0, 2.0, 3.0], "yes", "no"),
        ([-1.0, -2.0, -3.0], "no", "yes"),
        ([1.0, -1.0, 1.0, -1.0], "open", "open"),
        ([3.0, 3.0, 3.0, -1.0], "open", "open"),  # 13 of 256 resamples hold the last at least three times
        ([0.0, 0.0, 0.0], "open", "open"),
        ([5.0], "open", "open"),  # one image has no interval
    ],
)
def test_a_comparison_holds_if_the_whole_interval_lies_on_its_side(differences, higher, lower):
    measures = table(merit={"ours": differences, "theirs": [0.0] * len(differences)})
    verdicts = {"yes": "supported", "no": "not supported", "open": "undecided"}
    for comparison, expected in ((HIGHER, higher), (LOWER, lower)):
        (row,) = decided(measures, comparison)
        assert (row["holds"], row["verdict"]) == (expected, verdicts[expected])
        assert row["difference"] == pytest.approx(np.mean(differences))


@pytest.mark.parametrize(
    ("controls", "verdict"),
    [
        (["below", "below"], "supported"),
        (["below", "above"], "not supported"),
        (["above", "below", "below", "below"], "not supported"),
        (["below", "alike"], "undecided"),
        (["alike", "above"], "not supported"),
        (["alike", "alike"], "undecided"),
    ],
)
def test_a_claim_needs_all_its_comparisons_and_one_failing_control_is_enough(controls, verdict):
    measures = table(merit={"ours": [2.0] * 4, "below": [1.0] * 4, "above": [3.0] * 4, "alike": [1.0, 3.0, 1.0, 3.0]})
    rows = decided(measures, *(Comparison("ours", "merit", control) for control in controls))
    assert [row["verdict"] for row in rows] == [verdict] * len(controls)
    assert [row["than"] for row in rows] == controls
    holds = {"below": "yes", "above": "no", "alike": "open"}
    assert [row["holds"] for row in rows] == [holds[control] for control in controls]


def test_a_map_is_compared_with_what_it_would_have_by_chance():
    measures = table(lift={"ours": [0.25, 0.75], "theirs": [1.5, 2.0]})
    below, above = decided(
        measures, Comparison("ours", "lift", 1.0, higher=False), Comparison("theirs", "lift", 1.0, higher=False)
    )
    assert (below["than"], below["difference"], below["holds"]) == ("1.0", -0.5, "yes")
    assert (above["than"], above["difference"], above["holds"]) == ("1.0", 0.75, "no")
    assert (below["low"], below["high"]) == (-0.75, -0.25)  # each image alone makes up a quarter of the resamples


def test_comparisons_without_data_are_left_out_and_claims_without_any_too():
    measures = table(merit={"ours": [2.0, 3.0], "theirs": [1.0, 1.0]})
    absent = Comparison("ours", "on_object", "theirs")
    claims = [Claim("None.", (absent,)), Claim("Some.", (absent, HIGHER)), Claim("All.", (LOWER,)), Claim("No.", ())]
    found = decide(measures, claims)
    assert found[["claim", "verdict", "measure"]].to_numpy().tolist() == [
        ["Some.", "supported", "merit"],
        ["All.", "not supported", "merit"],
    ]
    assert list(found.index) == [0, 1]


@pytest.mark.parametrize("comparison", [Comparison("ours", "merit", "absent"), Comparison("absent", "merit", "ours")])
def test_comparisons_of_a_map_that_was_not_measured_are_left_out(comparison):
    measures = table(merit={"ours": [2.0, 3.0], "theirs": [1.0, 1.0]})
    assert [row["than"] for row in decided(measures, comparison, HIGHER)] == ["theirs"]
    assert decided(measures, comparison) == []


def test_comparisons_without_an_image_in_common_are_left_out():
    measures = pd.concat([table(merit={"ours": [2.0, 3.0]}), table(first=2, merit={"theirs": [1.0, NAN]})])
    assert decided(measures, HIGHER) == []


def test_a_measure_of_some_maps_is_compared_for_these():
    measures = table(merit={"ours": [1.0, 1.0], "theirs": [3.0, 3.0]}, other={"ours": [7.0, 8.0]})
    (row,) = decided(measures, HIGHER)
    assert row["difference"] == -2.0


def test_images_without_a_value_of_both_are_left_out():
    # Of image 0 and of image 3 one value is missing, image 4 has one map only: 5 - 1 and 2 - 4 are left.
    measures = table(merit={"ours": [NAN, 5.0, 2.0, 9.0, 9.0], "theirs": [0.0, 1.0, 4.0, NAN]})
    (row,) = decided(measures, HIGHER)
    assert (row["num_images"], row["difference"], row["low"], row["high"]) == (2, 1.0, -2.0, 4.0)


def test_an_image_counts_once_with_its_mean_over_networks():
    # Differences: image 0: 1 and 0, image 1: 0.5 and 0, image 2, of one network: 0. The mean of the five would be 0.3.
    measures = pd.concat(
        [
            table("t0", merit={"ours": [1.0, 0.5], "theirs": [0.0, 0.0]}),
            table("t1", merit={"ours": [4.0, 4.0, 4.0], "theirs": [4.0, 4.0, 4.0]}),
        ]
    )
    (row,) = decided(measures, HIGHER)
    assert (row["difference"], row["num_images"], row["num_networks"]) == (0.25, 3, 2)
    assert (row["low"], row["high"]) == bootstrap_interval(np.array([0.5, 0.25, 0.0]))[1:]


def test_more_networks_of_the_same_images_do_not_narrow_the_interval():
    values = {"ours": [1.0, 2.0, 4.0, 8.0], "theirs": [0.0, 0.0, 0.0, 0.0]}
    one = decided(table(merit=values), HIGHER)
    many = decided(pd.concat([table(f"t{i}", merit=values) for i in range(5)]), HIGHER)
    assert many == [one[0] | {"num_networks": 5}]


def test_networks_are_those_that_have_the_measure():
    both = {"ours": [2.0, 2.0], "theirs": [1.0, 1.0]}
    measures = pd.concat([table("t0", merit=both, other=both), table("t1", other=both)])
    merit, other = decided(measures, HIGHER, Comparison("ours", "other", "theirs"))
    assert (merit["num_networks"], other["num_networks"]) == (1, 2)


def test_what_images_have_in_common_for_both_maps_cancels():
    image = np.arange(100.0)  # the maps' values differ by 0.125, those of images by up to 99
    rows = decided(table(merit={"ours": (image + 0.125).tolist(), "theirs": image.tolist()}), HIGHER)
    assert [(row["difference"], row["low"], row["high"], row["holds"]) for row in rows] == [
        (0.125, 0.125, 0.125, "yes")
    ]
    apart = [bootstrap_interval(values) for values in (image + 0.125, image)]
    assert apart[0][1] < apart[1][2]
    # Of other images' values nothing can be said.
    (row,) = decided(table(merit={"ours": (image + 0.125).tolist(), "theirs": image[::-1].tolist()}), HIGHER)
    assert (row["difference"], row["holds"]) == (0.125, "open")


def test_the_interval_is_that_of_the_differences():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.5, 1, (2, 50)).astype(np.float32)
    (row,) = decided(table(merit={"ours": ours.tolist(), "theirs": theirs.tolist()}), HIGHER)
    expected = bootstrap_interval(ours - theirs)
    assert (row["difference"], row["low"], row["high"]) == pytest.approx(expected, abs=1e-6)


def test_columns_and_types_are_those_documented():
    measures = table(merit={"ours": [2.0, 3.0], "theirs": [1.0, 1.0]})
    found = decide(measures, [Claim("It is so.", (HIGHER, Comparison("ours", "merit", 1.0)))])
    assert tuple(found.columns) == CLAIM_COLUMNS
    for name in ("difference", "low", "high"):
        assert found[name].dtype == np.float64
    for name in ("num_images", "num_networks"):
        assert found[name].dtype == np.int64
    for name in ("claim", "verdict", "map", "measure", "than", "holds"):
        assert found[name].map(type).unique().tolist() == [str]


@pytest.mark.parametrize("kind", ["no rows", "no such measure", "as load_measures gives it"])
def test_without_data_there_are_columns_and_no_rows(kind):
    measures = table(other={"ours": [1.0]}) if kind == "no such measure" else table()
    if kind == "as load_measures gives it":
        measures = measures.astype({"image": object, "value": object})
    found = decide(measures)
    assert tuple(found.columns) == CLAIM_COLUMNS
    assert found.empty


def test_the_shipped_claims_follow_from_a_table_made_for_them():
    """Saliency and Grad-CAM as the claims say, and every control worse than Grad-CAM but for one measure."""
    every = ("saliency", "gradcam", "pooled_saliency", "random", "sobel", "gaussian")
    worse = {name: [2.0 if name == "gradcam" else 1.0] * 3 for name in every}
    measures = table(
        high_frequency_share={**worse, "saliency": [3.0] * 3},
        energy_lift={**worse, "saliency": [0.5] * 3, "gradcam": [1.5] * 3},
        total_variation={**worse, "gradcam": [0.5] * 3},
        energy_on_object=worse,
        grid_pointing={**worse, "gaussian": [2.5] * 3},
        patch_fidelity=worse,
    )
    found = decide(measures)
    verdicts = ["supported", "not supported", "supported", "supported", "not supported", "supported"]
    assert found.drop_duplicates("claim")["verdict"].to_list() == verdicts
    assert found["claim"].unique().tolist() == [claim.sentence for claim in CLAIMS]
    assert found[found["holds"] == "no"][["map", "than"]].to_numpy().tolist() == [
        ["gradcam", "1.0"],
        ["gradcam", "gaussian"],
    ]
