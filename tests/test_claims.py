from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.claims import (
    CLAIM_COLUMNS,
    CLAIMS,
    CONTROLS,
    MIN_IMAGES,
    MIN_IMAGES_OF_SHARE,
    Claim,
    MapComparison,
    decide,
)
from analysis.in_words import _difference_in_words
from analysis.intervals import bootstrap_interval

NAN = float("nan")
OF_MAPS = [claim for claim in CLAIMS if isinstance(claim.comparisons[0], MapComparison)]
HIGHER = MapComparison("ours", "merit", "theirs")
LOWER = MapComparison("theirs", "merit", "ours")


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


def decided(measures: pd.DataFrame, *comparisons: MapComparison) -> list[dict[str, Any]]:
    rows = decide(measures, claims=[Claim("It is so.", comparisons)]).to_dict("records")
    return [{name: None if pd.isna(value) else value for name, value in row.items()} for row in rows]


def test_a_row_says_what_was_compared_with_what_and_by_how_much():
    # On all images the map is 0.25 higher: so it is in every resample.
    merit = {"ours": [0.5, 1.0] * 10, "theirs": [0.25, 0.75] * 10, "other": [9.0, 9.0] * 10}
    rows = decided(table(merit=merit), HIGHER)
    assert rows == [
        {
            "claim": "It is so.",
            "verdict": "supported",
            "of": "ours",
            "measure": "merit",
            "than": "theirs",
            "below": None,
            "by": None,
            "control": False,
            "difference": 0.25,
            "low": 0.25,
            "high": 0.25,
            "holds": "yes",
            "n": 20,
            "unit": "images",
            "num_networks": 1,
            "epoch": None,
            "reason": None,
        }
    ]


@pytest.mark.parametrize(
    ("differences", "higher", "lower"),
    [
        ([1.0, 2.0, 3.0] * 7, "yes", "no"),
        ([-1.0, -2.0, -3.0] * 7, "no", "yes"),
        ([1.0, -1.0] * 10, "open", "open"),
        ([100.0] + [-1.0] * 19, "open", "open"),  # the first is missing in one resample of three
        ([0.0] * 20, "open", "open"),
        ([5.0], "open", "open"),  # one image has no interval
    ],
)
def test_a_comparison_holds_if_the_whole_interval_lies_above_0(differences, higher, lower):
    measures = table(merit={"ours": differences, "theirs": [0.0] * len(differences)})
    verdicts = {"yes": "supported", "no": "not supported", "open": "undecided"}
    for comparison, expected, sign in ((HIGHER, higher, 1), (LOWER, lower, -1)):
        (row,) = decided(measures, comparison)
        assert (row["holds"], row["verdict"]) == (expected, verdicts[expected])
        assert row["difference"] == pytest.approx(sign * np.mean(differences))


@pytest.mark.parametrize("missing", [0, 3])
@pytest.mark.parametrize("networks", [1, 3])
def test_of_too_few_images_every_comparison_is_open(missing, networks):
    assert MIN_IMAGES == 20
    for images, higher, lower in ((19, "open", "open"), (20, "yes", "no")):
        merit = {"ours": [5.0] * images + [NAN] * missing, "theirs": [1.0] * (images + missing)}
        measures = pd.concat([table(f"t{i}", merit=merit) for i in range(networks)])
        above, below = decided(measures, HIGHER, LOWER)
        assert (above["holds"], below["holds"], above["n"]) == (higher, lower, images)
        assert (above["difference"], above["low"], above["high"]) == (4.0, 4.0, 4.0)


@pytest.mark.parametrize(
    ("rivals", "controls", "verdict"),
    [
        (["below"], [], "supported"),
        (["below"], ["below", "below"], "supported"),
        (["below", "below"], ["below"], "supported"),
        # It beats the rival, and not more than that.
        (["below"], ["below", "alike"], "not supported"),
        (["below"], ["alike", "alike"], "not supported"),
        (["below"], ["below", "above"], "not supported"),
        (["below"], ["above", "absent"], "not supported"),
        (["below"], ["alike", "absent"], "not supported"),
        (["below", "below"], ["alike"], "not supported"),
        # Of a control nothing is known.
        (["below"], ["absent"], "undecided"),
        (["below"], ["below", "absent"], "undecided"),
        # A rival is open, or not there.
        (["alike"], [], "undecided"),
        (["alike"], ["below", "below"], "undecided"),
        (["alike"], ["alike"], "undecided"),
        (["alike"], ["absent"], "undecided"),
        (["below", "alike"], ["below"], "undecided"),
        (["below", "alike"], ["alike"], "undecided"),
        (["below", "absent"], ["below"], "undecided"),
        # One that fails is enough.
        (["above"], [], "not supported"),
        (["above"], ["below", "below"], "not supported"),
        (["above"], ["absent"], "not supported"),
        (["above", "alike"], ["below"], "not supported"),
        (["below", "above"], ["below"], "not supported"),
        (["alike"], ["above"], "not supported"),
        (["absent", "above"], [], "not supported"),
        # Of controls alone nothing is said.
        (["absent"], [], "no data"),
        (["absent"], ["below"], "no data"),
        (["absent", "absent"], ["above", "alike"], "no data"),
        ([], ["below"], "no data"),
    ],
)
def test_a_claim_needs_its_rivals_and_its_controls(rivals, controls, verdict):
    values = {"ours": [2.0] * 20, "below": [1.0] * 20, "above": [3.0] * 20, "alike": [1.0, 3.0] * 10}
    comparisons = [MapComparison("ours", "merit", name) for name in rivals]
    comparisons += [MapComparison("ours", "merit", name, control=True) for name in controls]
    holds = {"below": "yes", "above": "no", "alike": "open", "absent": "open"}
    expected = [(c.than, c.control, holds[c.than], verdict) for c in comparisons]
    for order in (1, -1):
        rows = decided(table(merit=values), *comparisons[::order])
        assert [(row["than"], row["control"], row["holds"], row["verdict"]) for row in rows] == expected[::order]


def test_a_map_is_compared_with_a_number():
    measures = table(lift={"ours": [0.25, 0.75], "theirs": [1.5, 2.0]})
    below, above = decided(measures, MapComparison("ours", "lift", 1.0), MapComparison("theirs", "lift", 1.0))
    assert (below["than"], below["difference"]) == ("1.0", -0.5)
    assert (above["than"], above["difference"]) == ("1.0", 0.75)
    assert (below["low"], below["high"]) == (-0.75, -0.25)  # each image alone makes up a quarter of the resamples


def test_the_share_of_images_below_a_value_is_compared():
    # Of 100, 40 are below 1 and four are 1 exactly; of others, none is known.
    lift = [0.5] * 40 + [1.0] * 4 + [1.5] * 56 + [NAN] * 4
    (row,) = decided(table(lift={"ours": lift}), MapComparison("ours", "lift", 0.1, below=1.0))
    assert (row["than"], row["below"], row["n"], row["holds"]) == ("0.1", 1.0, 100, "yes")
    assert row["difference"] == pytest.approx(0.4 - 0.1)
    expected = bootstrap_interval(np.array([1.0] * 40 + [0.0] * 60) - 0.1)
    assert (row["difference"], row["low"], row["high"]) == pytest.approx(expected)
    assert MIN_IMAGES_OF_SHARE == 100
    (row,) = decided(table(lift={"ours": lift[1:]}), MapComparison("ours", "lift", 0.1, below=1.0))
    assert (row["n"], row["holds"]) == (99, "open")


def test_shares_of_two_maps_are_compared_on_the_same_images():
    ours, theirs = [0.5] * 40 + [2.0] * 60, [2.0] * 90 + [0.5] * 10
    (row,) = decided(table(lift={"ours": ours, "theirs": theirs}), MapComparison("ours", "lift", "theirs", below=1.0))
    assert (row["difference"], row["holds"]) == (pytest.approx(0.4 - 0.1), "yes")
    assert (row["low"], row["high"]) == bootstrap_interval(np.array([1.0] * 40 + [0.0] * 50 + [-1.0] * 10))[1:]


def test_what_holds_but_for_a_control_on_too_few_images_is_undecided():
    measures = table(merit={"ours": [2.0] * 40, "theirs": [1.0] * 40, "control": [1.0] * 19})
    rows = decided(measures, HIGHER, MapComparison("ours", "merit", "control", control=True))
    assert [(row["holds"], row["verdict"]) for row in rows] == [("yes", "undecided"), ("open", "undecided")]


def test_maps_that_know_nothing_support_no_claim():
    rng = np.random.default_rng(0)
    maps = ("saliency", "gradcam", *CONTROLS)
    names = {c.measure for claim in OF_MAPS for c in claim.comparisons}
    measures = table(**{name: {m: list(rng.lognormal(0, 0.5, 300)) for m in maps} for name in names})
    assert "supported" not in set(decide(measures, claims=OF_MAPS)["verdict"])


@pytest.mark.parametrize(("share", "holds"), [(0.0, "no"), (0.1, "open"), (0.15, "open"), (0.3, "yes"), (1.0, "yes")])
def test_several_cases_are_more_than_a_share_that_could_be_none(share, holds):
    lift = [0.9] * round(100 * share) + [1.1] * round(100 - 100 * share)
    (row,) = decided(table(lift={"ours": lift}), MapComparison("ours", "lift", 0.1, below=1.0))
    assert (row["difference"], row["holds"]) == (pytest.approx(share - 0.1), holds)


def test_an_image_is_a_case_in_as_far_as_it_is_one_for_each_network():
    # The second image is below 1 for one network of two, although its mean over both is not.
    measures = pd.concat([table("t0", lift={"ours": [0.5, 0.5, 2.0]}), table("t1", lift={"ours": [0.5, 9.0, 2.0]})])
    (row,) = decided(measures, MapComparison("ours", "lift", 0.0, below=1.0))
    assert (row["difference"], row["n"], row["num_networks"]) == (0.5, 3, 2)


def test_what_was_not_measured_is_said():
    measures = table(merit={"ours": [2.0, 3.0] * 10, "theirs": [1.0, 1.0] * 10})
    absent = MapComparison("ours", "on_object", "theirs")
    claims = [Claim("None.", (absent,)), Claim("Some.", (absent, HIGHER)), Claim("All.", (LOWER,)), Claim("No.", ())]
    found = decide(measures, claims=claims)
    assert found[["claim", "verdict", "measure", "holds"]].to_numpy().tolist() == [
        ["None.", "no data", "on_object", "open"],
        ["Some.", "undecided", "on_object", "open"],
        ["Some.", "undecided", "merit", "yes"],
        ["All.", "not supported", "merit", "no"],
    ]
    assert found["reason"].isna().to_list() == [False, False, True, True]
    assert found["n"].isna().to_list() == [True, True, False, False]
    assert found["reason"][0] == "on_object was not measured, or is not kept here"


def test_zero_has_no_minus():
    assert _difference_in_words([-0.01, -0.04, 0.06], 1) == "+0.0 (+0.0 to +0.1)"
    assert _difference_in_words([-0.06, NAN, NAN], 1) == "−0.1 (one seed)"


@pytest.mark.parametrize("absent", [MapComparison("ours", "merit", "absent"), MapComparison("absent", "merit", "ours")])
def test_a_map_that_was_not_measured_is_compared_with_nothing(absent):
    measures = table(merit={"ours": [2.0, 3.0], "theirs": [1.0, 1.0]})
    first, second = decided(measures, absent, HIGHER)
    assert (first["n"], second["n"]) == (None, 2)
    assert first["reason"] == f"merit of {absent.of} and {absent.than} was not measured, or is not kept here"
    assert [row["verdict"] for row in decided(measures, absent)] == ["no data"]


def test_maps_without_an_image_in_common_are_not_compared():
    measures = pd.concat([table(merit={"ours": [2.0, 3.0]}), table(first=2, merit={"theirs": [1.0, NAN]})])
    assert [(row["verdict"], row["n"]) for row in decided(measures, HIGHER)] == [("no data", None)]


def test_a_measure_of_some_maps_is_compared_for_these():
    measures = table(merit={"ours": [1.0, 1.0], "theirs": [3.0, 3.0]}, other={"ours": [7.0, 8.0]})
    (row,) = decided(measures, HIGHER)
    assert row["difference"] == -2.0


def test_images_without_a_value_of_both_are_left_out():
    # Of image 0 and of image 3 one value is missing, image 4 has one map only: 5 - 1 and 2 - 4 are left.
    measures = table(merit={"ours": [NAN, 5.0, 2.0, 9.0, 9.0], "theirs": [0.0, 1.0, 4.0, NAN]})
    (row,) = decided(measures, HIGHER)
    assert (row["n"], row["difference"], row["low"], row["high"]) == (2, 1.0, -2.0, 4.0)


def test_infinite_values_are_left_out():
    measures = table(merit={"ours": [float("inf"), 5.0, 2.0], "theirs": [0.0, 1.0, float("-inf")]})
    (row,) = decided(measures, HIGHER)
    assert (row["n"], row["difference"]) == (1, 4.0)


def test_an_image_counts_once_with_its_mean_over_networks():
    # Differences: image 0: 1 and 0, image 1: 0.5 and 0, image 2, of one network: 0. The mean of the five would be 0.3.
    measures = pd.concat(
        [
            table("t0", merit={"ours": [1.0, 0.5], "theirs": [0.0, 0.0]}),
            table("t1", merit={"ours": [4.0, 4.0, 4.0], "theirs": [4.0, 4.0, 4.0]}),
        ]
    )
    (row,) = decided(measures, HIGHER)
    assert (row["difference"], row["n"], row["num_networks"]) == (0.25, 3, 2)
    assert (row["low"], row["high"]) == bootstrap_interval(np.array([0.5, 0.25, 0.0]))[1:]


def test_maps_are_paired_within_a_network_before_networks_are_averaged():
    # Of image 0 the second network has one map only: its 100 is compared with nothing. Of image 1 neither has both.
    measures = pd.concat(
        [
            table("t0", merit={"ours": [2.0, NAN, 3.0], "theirs": [1.0, 7.0, 1.0]}),
            table("t1", merit={"ours": [100.0, 50.0, 8.0], "theirs": [NAN, NAN, 4.0]}),
        ]
    )
    (row,) = decided(measures, HIGHER)
    assert (row["difference"], row["n"], row["num_networks"]) == (2.0, 2, 2)
    assert (row["low"], row["high"]) == (1.0, 3.0)


def test_a_network_without_any_pair_does_not_count():
    measures = pd.concat(
        [
            table("t0", merit={"ours": [2.0, 3.0], "theirs": [1.0, 1.0]}),
            table("t1", merit={"ours": [9.0, 9.0], "theirs": [NAN, NAN]}),
            table("t2", merit={"ours": [9.0, 9.0], "others": [1.0, 1.0]}),
        ]
    )
    first, second, third = decided(
        measures, HIGHER, MapComparison("ours", "merit", "others"), MapComparison("ours", "merit", 1.0)
    )
    assert (first["difference"], first["num_networks"]) == (1.5, 1)
    assert (second["difference"], second["num_networks"]) == (8.0, 1)
    assert third["num_networks"] == 3


def test_trials_of_the_same_name_in_two_runs_are_two_networks():
    one = table(merit={"ours": [2.0, NAN], "theirs": [1.0, 1.0]})
    two = table(merit={"ours": [5.0, 5.0], "theirs": [NAN, 3.0]})
    (row,) = decided(pd.concat([one.assign(run="a"), two.assign(run="b")]), HIGHER)
    assert (row["difference"], row["n"], row["num_networks"]) == (1.5, 2, 2)


def test_measures_of_one_network_need_no_name_of_it():
    measures = table(merit={"ours": [2.0, 3.0], "theirs": [1.0, 1.0]})
    (row,) = decided(measures.drop(columns="trial_id"), HIGHER)
    assert row == decided(measures, HIGHER)[0]
    assert row["num_networks"] == 1


def test_more_networks_of_the_same_images_do_not_narrow_the_interval():
    values = {"ours": [1.0, 2.0, 4.0, 8.0], "theirs": [0.0, 0.0, 0.0, 0.0]}
    one = decided(table(merit=values), HIGHER)
    many = decided(pd.concat([table(f"t{i}", merit=values) for i in range(5)]), HIGHER)
    assert many == [one[0] | {"num_networks": 5}]


def test_networks_are_those_that_have_the_measure():
    both = {"ours": [2.0, 2.0], "theirs": [1.0, 1.0]}
    measures = pd.concat([table("t0", merit=both, other=both), table("t1", other=both)])
    merit, other = decided(measures, HIGHER, MapComparison("ours", "other", "theirs"))
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


TYPES = pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in CLAIM_COLUMNS.items()}).dtypes


def test_columns_and_types_are_those_documented():
    measures = table(merit={"ours": [2.0, 3.0], "theirs": [1.0, 1.0]})
    found = decide(measures, claims=[Claim("It is so.", (HIGHER, MapComparison("ours", "merit", 1.0, control=True)))])
    assert " ".join(found.columns) == (
        "claim verdict of measure than below by control difference low high holds n unit num_networks epoch reason"
    )
    pd.testing.assert_series_equal(found.dtypes, TYPES)
    assert found["control"].to_list() == [False, True]
    for name in ("claim", "verdict", "of", "measure", "than", "holds"):
        assert found[name].map(type).unique().tolist() == [str]


@pytest.mark.parametrize("kind", ["no rows", "no such measure", "controls only", "as load_measures gives it"])
def test_without_data_every_claim_stands_there_with_the_reason(kind):
    measures = table()
    if kind == "no such measure":
        measures = table(other={"ours": [1.0]})
    elif kind == "controls only":
        measures = table(patch_fidelity={"gradcam": [1.0] * 20, "random": [0.0] * 20})
    elif kind == "as load_measures gives it":
        measures = measures.astype({"image": object, "value": object})
    found = decide(measures)
    assert set(found["claim"]) == {claim.sentence for claim in CLAIMS}
    assert set(found["verdict"]) == {"no data"}
    assert found.loc[~found["control"], "reason"].notna().all()
    pd.testing.assert_series_equal(found.dtypes, TYPES)


# --- the shipped claims ---


def test_comparisons_of_the_shipped_claims_are_with_controls_where_they_say_so():
    for claim in OF_MAPS:
        assert not claim.comparisons[0].control
        for comparison in claim.comparisons:
            assert comparison.control == bool({comparison.of, comparison.than} & set(CONTROLS))


def for_claims() -> dict[str, dict[str, list[float]]]:
    """As the claims say, on 100 images."""
    every = ("saliency", "gradcam", *CONTROLS)
    best = {name: [2.0 if name == "gradcam" else 1.0] * 100 for name in every}
    noise = {name: [{"saliency": 3.0, "gradcam": 1.0}.get(name, 2.0)] * 100 for name in every}
    return {
        "high_frequency_share": noise,
        "max_sensitivity": {name: noise[name] for name in ("saliency", "gradcam", "pooled_saliency")},
        "energy_lift": {name: ([0.5] * 10 + [1.5] * 10) * 5 if name == "saliency" else [1.5] * 100 for name in every},
        **dict.fromkeys(("energy_on_object", "rank_accuracy", "grid_pointing", "patch_fidelity"), best),
    }


def verdicts(measures: pd.DataFrame) -> dict[str, str]:
    return dict(decide(measures, claims=OF_MAPS).drop_duplicates("claim")[["claim", "verdict"]].to_numpy().tolist())


def test_the_shipped_claims_follow_from_a_table_made_for_them():
    found = decide(table(**for_claims()), claims=OF_MAPS)
    assert found["claim"].to_list() == [claim.sentence for claim in OF_MAPS for _ in claim.comparisons]
    assert set(found["holds"]) == {"yes"}
    assert set(found["verdict"]) == {"supported"}
    assert len(OF_MAPS) == 4


@pytest.mark.parametrize(
    ("measure", "name", "values", "claim"),
    [
        ("high_frequency_share", "saliency", [0.5], 0),
        ("high_frequency_share", "pooled_saliency", [1.0], 0),  # as coarse, as smooth
        ("high_frequency_share", "random", [0.0, 2.0], 0),
        ("high_frequency_share", "sobel", [3.0], 0),  # the edges of the picture
        ("max_sensitivity", "saliency", [0.5], 0),
        ("max_sensitivity", "pooled_saliency", [1.0], 0),
        ("energy_lift", "saliency", [1.5], 1),
        ("energy_lift", "random", [0.5, 1.5], 1),  # as often as by chance
        ("energy_lift", "sobel", [0.5], 1),
        ("energy_on_object", "saliency", [3.0], 2),
        ("energy_on_object", "gaussian", [2.5], 2),
        ("rank_accuracy", "random", [1.0, 3.0], 2),
        ("grid_pointing", "sobel", [2.0], 3),
        ("patch_fidelity", "pooled_saliency", [2.5], 3),
    ],
)
def test_one_comparison_that_fails_takes_its_claim_with_it(measure, name, values, claim):
    measures = for_claims()
    measures[measure] = {**measures[measure], name: values * (100 // len(values))}
    expected = ["supported"] * 4
    expected[claim] = "not supported"
    assert list(verdicts(table(**measures)).values()) == expected


def test_without_masks_nothing_is_said_of_the_object():
    measures = for_claims()
    for measure in ("energy_lift", "energy_on_object", "rank_accuracy"):
        del measures[measure]
    assert list(verdicts(table(**measures)).values()) == ["supported", "no data", "no data", "supported"]


def test_without_a_control_or_a_rival_a_claim_is_undecided():
    measures = for_claims()
    del measures["max_sensitivity"]
    measures["rank_accuracy"] = {k: v for k, v in measures["rank_accuracy"].items() if k != "sobel"}
    measures["grid_pointing"] = {k: v for k, v in measures["grid_pointing"].items() if k != "saliency"}
    expected = ["undecided", "supported", "undecided", "undecided"]
    assert list(verdicts(table(**measures)).values()) == expected
