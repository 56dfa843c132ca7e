"""Claims about trials: by which configurations, epochs and seeds they are decided, and how often they err."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_compare import table

from analysis.claims import CLAIMS, KINDS, MARGIN, Claim, TrialComparison, decide
from analysis.compare import best_over_seeds
from analysis.intervals import bootstrap_interval, difference_of_means, paired_over_seeds, student_t95
from analysis.study_file import RunError

NAN = float("nan")
HIGHER = TrialComparison("optimizer == 'adam'", "val_accuracy", "optimizer == 'sgd'")
OF_TRIALS = [claim for claim in CLAIMS if isinstance(claim.comparisons[0], TrialComparison)]


def decided(trials: pd.DataFrame, comparison: TrialComparison = HIGHER, epochs: Any = None) -> dict[str, Any]:
    (row,) = decide(trials=trials, epochs=epochs, claims=[Claim("It is so.", (comparison,))]).to_dict("records")
    return {name: None if pd.isna(value) else value for name, value in row.items()}


def seeds(accuracies: Any, first: int = 0, **values: Any) -> list[dict[str, Any]]:
    return [{"seed": seed, "val_accuracy": value, **values} for seed, value in enumerate(accuracies, first)]


# --- how often the intervals cover the truth, and claims err ---


def draws(n: int, times: int = 2000, effect: float = 0.0) -> np.ndarray:
    """Two groups' values of n seeds, (times, 2, n): noise of 1 and what a seed does to both, of 2."""
    rng = np.random.default_rng(n)
    values = rng.normal(0, 1, (times, 2, n)) + rng.normal(0, 2, (times, 1, n))
    values[:, 0] += effect
    return values


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_paired_interval_covers_the_true_difference_in_95_of_100_studies(n):
    differences = np.subtract(*draws(n, effect=0.5).swapaxes(0, 1))
    means, half = differences.mean(1), student_t95(n - 1) * differences.std(1, ddof=1) / np.sqrt(n)
    assert np.mean(np.abs(means - 0.5) <= half) == pytest.approx(0.95, abs=0.015)
    # That is the interval that the function gives.
    for a, b in draws(n, effect=0.5)[:5]:
        mean, low, high, count = paired_over_seeds(pd.Series(a), pd.Series(b))
        spread = student_t95(n - 1) * (a - b).std(ddof=1) / np.sqrt(n)
        assert (mean, low, high) == pytest.approx((np.mean(a - b), np.mean(a - b) - spread, np.mean(a - b) + spread))
        assert count == n


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_interval_over_separate_seeds_covers_at_least_as_much_as_it_says(n):
    # Conservative: degrees of freedom are those of the smaller group, not nearly twice as many.
    rng = np.random.default_rng(n)
    found = [difference_of_means(a, b) for a, b in rng.normal(0, 1, (2000, 2, n))]
    assert np.mean([low <= 0 <= high for _, low, high in found]) >= 0.935


def test_the_bootstrap_over_five_seeds_covers_too_little():
    # This is why intervals over seeds are Student's.
    found = [bootstrap_interval(values) for values in np.random.default_rng(0).normal(0, 1, (1000, 5))]
    assert np.mean([low <= 0 <= high for _, low, high in found]) < 0.92


def verdicts(values: np.ndarray, by: float = 0.0) -> list[str]:
    """What is said of each study, by the interval that decides; the first ten are put through a whole claim."""
    comparison = TrialComparison(HIGHER.of, HIGHER.measure, HIGHER.than, by=by)
    trials = table(*(row for name in ("adam", "sgd") for row in seeds([0.0] * values.shape[2], optimizer=name)))
    intervals = [paired_over_seeds(pd.Series(a), pd.Series(b)) for a, b in values]
    said = ["supported" if low > by else "not supported" if high < by else "undecided" for _, low, high, _ in intervals]
    assert [decided(trials.assign(val_accuracy=v.ravel()), comparison)["verdict"] for v in values[:10]] == said[:10]
    return said


@pytest.mark.parametrize("by", [0.0, -0.5])
def test_a_claim_without_an_effect_is_seldom_supported(by):
    # At the margin the true difference is by itself; 2.5 % lie beyond the interval on this side.
    assert np.mean([verdict == "supported" for verdict in verdicts(draws(5, effect=by), by)]) <= 0.05


def test_an_effect_of_three_standard_deviations_is_found_with_five_seeds():
    assert np.mean([verdict == "supported" for verdict in verdicts(draws(5, effect=3.0))]) >= 0.9


# --- what is compared ---


def test_trials_are_paired_by_the_seeds_that_they_share():
    # Shared are 1 and 2, with differences of 0.10 and 0.12: 0.11 -+ 12.706 * 0.01.
    trials = table(*seeds([0.9, 0.5, 0.72], optimizer="adam"), *seeds([0.4, 0.6, 0.1], first=1, optimizer="sgd"))
    row = decided(trials)
    assert (row["difference"], row["low"], row["high"]) == pytest.approx((0.11, 0.11 - 0.12706, 0.11 + 0.12706))
    assert (row["n"], row["unit"], row["num_networks"], row["holds"]) == (2, "seeds", 6, "open")
    assert (row["reason"], row["epoch"], row["by"], row["below"]) == (None, None, 0.0, None)


@pytest.mark.parametrize("first", [1, 2])
def test_trials_that_share_fewer_than_two_seeds_are_compared_unpaired(first):
    trials = table(*seeds([0.70, 0.72], optimizer="adam"), *seeds([0.60, 0.64], first=first))
    row = decided(trials)
    assert (row["difference"], row["low"], row["high"]) == pytest.approx(difference_of_means([0.7, 0.72], [0.6, 0.64]))
    assert row["n"] == 2


@pytest.mark.parametrize("accuracy", [0.1, 0.6, 1.0])
def test_one_seed_is_undecided_whatever_the_difference(accuracy):
    for theirs in (1, 3):
        row = decided(table({"optimizer": "adam", "val_accuracy": accuracy}, *seeds([0.5] * theirs)))
        assert (row["verdict"], row["holds"], row["reason"], row["n"]) == ("undecided", "open", "one seed", 1)
        assert row["difference"] == pytest.approx(accuracy - 0.5)


def test_what_holds_but_for_a_control_of_one_seed_is_undecided():
    trials = table(*seeds([0.8, 0.8], optimizer="adam"), *seeds([0.5, 0.5]), {"optimizer": "muon"})
    control = TrialComparison(HIGHER.of, HIGHER.measure, "optimizer == 'muon'", control=True)
    assert set(decide(trials=trials, claims=[Claim("So.", (HIGHER, control))])["verdict"]) == {"undecided"}


def test_trials_of_a_missing_kind_give_no_data_with_the_reason():
    row = decided(table(*seeds([0.5, 0.6])))
    assert (row["verdict"], row["holds"], row["n"]) == ("no data", "open", None)
    assert row["reason"] == "no trial with an epoch is of the kind optimizer == 'adam'"
    for trials in (None, table({}).head(0)):
        found = decide(trials=trials, claims=OF_TRIALS)
        assert set(found["verdict"]) == {"no data"}
        assert set(found["reason"]) == {"no trials were given"}


@pytest.mark.parametrize("status", ["pending", "running", "diverged", "failed", "stopped"])
def test_trials_without_an_accuracy_give_no_data(status):
    rows = seeds([NAN, NAN], optimizer="adam", status=status, epochs=0)
    assert decided(table(*rows, *seeds([0.5, 0.6])))["verdict"] == "no data"


@pytest.mark.parametrize("status", ["failed", "diverged"])
def test_a_kind_with_a_seed_that_crashed_gives_no_data_with_the_reason(status):
    rows = seeds([0.7, NAN], optimizer="adam")
    rows[1] |= {"status": status, "epochs": 0}
    trials = table(*rows, *seeds([0.5, 0.6]))
    row = decided(trials)
    why = "no configuration of the kind optimizer == 'adam' was trained to the end with all its seeds"
    assert (row["verdict"], row["reason"]) == ("no data", f"{why}, and no epochs were given")
    epochs = pd.DataFrame(
        [{"trial_id": f"t{i}", "epoch": 9, "train_accuracy": 0.9, "val_accuracy": 0.5} for i in (0, 2, 3)]
    )
    why = why.replace("was trained to the end", "reached epoch 9")
    assert decided(trials, epochs=epochs)["reason"] == why
    row = decided(trials.assign(status=trials["status"].where(trials["val_accuracy"].isna(), "running")), epochs=epochs)
    assert row["reason"].endswith(" was trained to the end with all its seeds")


def test_a_measure_that_is_not_known_gives_no_data():
    trials = table(*seeds([0.8, 0.8], optimizer="adam"), *seeds([0.5, 0.5]))
    row = decided(trials, TrialComparison(HIGHER.of, "test_accuracy", HIGHER.than))
    assert (row["verdict"], row["reason"]) == ("no data", "test_accuracy is not known of trials that can be compared")


@pytest.mark.parametrize("query", ["colour == 'red'", "lr ==", "optimizer"])
def test_a_query_that_is_none_raises_and_names_the_columns(query):
    with pytest.raises(RunError, match=r"columns are .*optimizer, lr"):
        decided(table({}), TrialComparison(query, "val_accuracy", HIGHER.than))


def test_the_best_configuration_of_a_kind_stands_for_it():
    trials = table(
        *seeds([0.8, 0.82, 0.81], optimizer="adam", lr=0.1),
        *seeds([0.99, 0.1, 0.2], optimizer="adam", lr=0.01),
        *seeds([0.5, 0.52, 0.51]),
    )
    row = decided(trials)
    assert (row["difference"], row["num_networks"], row["verdict"]) == (pytest.approx(0.3), 6, "supported")


def test_which_configuration_is_the_best_is_decided_by_the_other_seeds():
    # Seed 0 is judged where seeds 1 and 2 are best (lr 0.01), 1 and 2 where 0 and the other one are (lr 0.1).
    trials = table(*seeds([0.9, 0.5, 0.5], lr=0.1), *seeds([0.1, 0.6, 0.6], lr=0.01))
    assert best_over_seeds(trials, "val_accuracy").to_dict() == {0: 0.1, 1: 0.5, 2: 0.5}
    of_gap = best_over_seeds(trials.assign(generalization_gap=trials["val_accuracy"] + 1), "generalization_gap")
    assert of_gap.to_list() == pytest.approx([1.1, 1.5, 1.5])


@pytest.mark.parametrize("n", [3, 5])
def test_the_best_of_eight_equal_configurations_seldom_beats_a_ninth(n):
    values = np.random.default_rng(n).normal(0.5, 0.01, (2000, 9, n))
    eight, ninth, studies = values[:, :8], values[:, 8], np.arange(2000)
    others = (eight.sum(axis=2, keepdims=True) - eight).argmax(axis=1)  # of each seed, the best by the other ones
    differences = np.stack([eight[studies, others[:, s], s] for s in range(n)], axis=1) - ninth
    half = student_t95(n - 1) * differences.std(1, ddof=1) / np.sqrt(n)
    supported = differences.mean(1) > half
    assert supported.mean() <= 0.05
    # That is what is said of a claim; chosen by the same seeds, the best would have won too often.
    kinds = [{"optimizer": "adam", "lr": 0.1 * (i + 1)} for i in range(8)] + [{"optimizer": "sgd"}]
    trials = table(*(row for kind in kinds for row in seeds([0.0] * n, **kind)))
    for study in [*np.flatnonzero(supported)[:2], *np.flatnonzero(~supported)[:2]]:
        verdict = decided(trials.assign(val_accuracy=values[study].ravel()))["verdict"]
        assert (verdict == "supported") == supported[study]
    naive = eight[studies, eight.mean(axis=2).argmax(axis=1)] - ninth
    assert (naive.mean(1) > student_t95(n - 1) * naive.std(1, ddof=1) / np.sqrt(n)).mean() > 0.07


def test_confirmed_configurations_alone_speak_where_there_are_any():
    trials = table(
        {"optimizer": "adam", "lr": 0.1, "val_accuracy": 0.99},
        {"optimizer": "adam", "lr": 0.01, "val_accuracy": 0.95},
        *seeds([0.7, 0.72], first=5, optimizer="adam", lr=0.01, phase="confirm"),
        *seeds([0.6, 0.62], first=5, phase="confirm"),
    )
    row = decided(trials)
    assert (row["difference"], row["n"], row["num_networks"]) == (pytest.approx(0.1), 2, 4)


@pytest.mark.parametrize("status", ["diverged", "stopped", "failed", "running"])
def test_a_configuration_with_a_seed_that_was_not_trained_to_the_end_does_not_speak(status):
    lucky = seeds([0.9, 0.9, 0.2], optimizer="adam", lr=0.1)
    lucky[2]["status"] = status
    trials = table(*lucky, *seeds([0.6, 0.6], optimizer="adam", lr=0.01), *seeds([0.5, 0.5]))
    assert decided(trials)["difference"] == pytest.approx(0.1)


def test_only_fresh_seeds_speak_for_a_confirmed_configuration():
    trials = table(
        *seeds([0.9, 0.9], optimizer="adam"),
        *seeds([0.6, 0.6], first=5, optimizer="adam", phase="confirm"),
        *seeds([0.5, 0.5]),
        *seeds([0.5, 0.5], first=5, phase="confirm"),
    )
    row = decided(trials)
    assert (row["difference"], row["n"], row["num_networks"]) == (pytest.approx(0.1), 2, 4)


def test_trainings_of_unequal_length_are_never_compared():
    long, short = {"max_epochs": 9, "epochs": 9}, {"max_epochs": 3, "epochs": 3}
    trials = table(
        *seeds([0.9, 0.9], optimizer="adam", max_epochs=27, epochs=27),
        *seeds([0.7, 0.7], optimizer="adam", **long),
        *seeds([0.8, 0.8], optimizer="adam", **short),
        *seeds([0.5, 0.5], **long),
        *seeds([0.1, 0.1], **short),
    )
    assert decided(trials)["difference"] == pytest.approx(0.2)
    row = decided(trials[trials["max_epochs"] != 9][lambda t: (t["optimizer"] == "sgd") | (t["max_epochs"] == 27)])
    assert (row["verdict"], row["reason"]) == ("no data", "the trials were to last for different numbers of epochs")


def stopped_early() -> tuple[pd.DataFrame, pd.DataFrame]:
    """All of sgd were stopped, after 4 and 3 epochs, and adam went on to 9; by epoch, adam gains 0.1 and sgd 0.05."""
    trials = table(
        *seeds([0.95, 0.95], optimizer="adam"),
        {"val_accuracy": 0.25, "epochs": 4, "status": "stopped"},
        {"val_accuracy": 0.15, "epochs": 3, "status": "stopped", "seed": 1},
    )
    gains = {"t0": 0.1, "t1": 0.1, "t2": 0.05, "t3": 0.05}
    rows = [
        {"trial_id": i, "epoch": e, "val_accuracy": gains[i] * e, "train_accuracy": gains[i] * e * 2, "val_loss": 1.0}
        for i, n in zip(gains, trials["epochs"], strict=True)
        for e in range(1, n + 1)
    ]
    return trials, pd.DataFrame(rows)


def test_under_early_stopping_trials_are_compared_at_the_last_epoch_that_all_reached():
    trials, epochs = stopped_early()
    row = decided(trials, epochs=epochs)
    assert (row["epoch"], row["n"], row["verdict"]) == (3, 2, "supported")
    assert row["difference"] == pytest.approx(0.3 - 0.15)
    gap = decided(trials, TrialComparison(HIGHER.of, "generalization_gap", HIGHER.than), epochs)
    assert (gap["epoch"], gap["difference"]) == (3, pytest.approx(0.3 - 0.15))


def test_under_early_stopping_without_the_epochs_there_are_no_data():
    row = decided(stopped_early()[0])
    assert (row["verdict"], row["epoch"], row["n"]) == ("no data", None, None)
    assert row["reason"].endswith(" was trained to the end with all its seeds, and no epochs were given")


def test_a_seed_that_diverged_counts_at_a_common_epoch_too():
    # Of sgd at 1.0 one seed was lucky; at 0.1 both were sound. The lucky one does not speak alone.
    trials, epochs = stopped_early()
    lucky = table(
        {"lr": 1.0, "val_accuracy": 0.9, "epochs": 3, "status": "stopped"},
        {"lr": 1.0, "val_accuracy": NAN, "epochs": 3, "status": "diverged", "seed": 1},
    ).assign(trial_id=["u0", "u1"])
    values = {"train_accuracy": 0.9, "val_loss": 1.0}
    more = [{"trial_id": i, "epoch": 3, "val_accuracy": v, **values} for i, v in (("u0", 0.9), ("u1", NAN))]
    row = decided(
        pd.concat([trials, lucky], ignore_index=True), epochs=pd.concat([epochs, pd.DataFrame(more)], ignore_index=True)
    )
    assert (row["epoch"], row["n"], row["difference"]) == (3, 2, pytest.approx(0.15))


def test_what_was_measured_at_the_end_is_not_told_of_an_earlier_epoch():
    trials, epochs = stopped_early()
    for name in ("test_accuracy", "gradcam_rank_accuracy"):
        row = decided(trials.assign(**{name: 0.5}), TrialComparison(HIGHER.of, name, HIGHER.than), epochs)
        assert row["verdict"] == "no data", name


@pytest.mark.parametrize(
    ("difference", "by", "holds"),
    [(0.02, 0.01, "yes"), (0.0, 0.01, "no"), (0.0, -0.01, "yes"), (-0.005, -0.01, "yes"), (-0.02, -0.01, "no")],
)
def test_a_difference_has_to_exceed_the_margin(difference, by, holds):
    trials = table(*seeds([0.5 + difference, 0.6 + difference], optimizer="adam"), *seeds([0.5, 0.6]))
    row = decided(trials, TrialComparison(HIGHER.of, HIGHER.measure, HIGHER.than, by=by))
    assert (row["holds"], row["by"], row["difference"]) == (holds, by, pytest.approx(difference))


def test_trials_that_a_search_has_not_yet_chosen_are_of_no_kind():
    trials = table(*seeds([0.8, 0.8], lr=0.1), *seeds([0.5, 0.5], lr=0.01))
    pending = pd.DataFrame([{"trial_id": "pending-5", "status": "pending", "phase": "search", "epochs": 0}])
    both = pd.concat([trials, pending], ignore_index=True).astype({n: trials.dtypes[n] for n in ("status", "phase")})
    row = decided(both, TrialComparison("lr != 0.01", "val_accuracy", "lr != 0.1"))
    assert (row["verdict"], row["difference"]) == ("supported", pytest.approx(0.3))


# --- the shipped claims ---

STUDY = {  # validation and train accuracy
    "augmentation": (0.80, 0.85),
    "plain": (0.70, 0.95),
    "saliency": (0.65, 0.95),
    "saliency_control": (0.66, 0.95),
    "gradcam": (0.75, 0.95),
    "other": (0.78, 0.84),
}


def study(**changed: tuple[float, float]) -> pd.DataFrame:
    """Three seeds of each setup, and of augmentation at another learning rate, with the effects of the claims."""
    rows = []
    for name, (val, train) in (STUDY | changed).items():
        setup = "augmentation" if name == "other" else name
        values = {
            "setup": setup,
            "augmentation": "flip+crop" if setup == "augmentation" else "none",
            "lr": 0.001 if name == "augmentation" else 0.01,
        }
        noise = (0.0, 0.001, 0.002) if name == "plain" else (0.0, 0.002, 0.001)
        rows += [{**values, "seed": s, "val_accuracy": val + e, "train_accuracy": train} for s, e in enumerate(noise)]
    return table(*rows)


def of_study(trials: pd.DataFrame) -> list[str]:
    found = decide(trials=trials, claims=OF_TRIALS)
    return found.drop_duplicates("claim")["verdict"].to_list()


def test_the_shipped_claims_follow_from_a_study_made_for_them():
    assert len(OF_TRIALS) == 5
    assert of_study(study()) == ["supported"] * 5


@pytest.mark.parametrize(
    ("changed", "claims"),
    [
        # Without augmentation 0.85, which is better than all.
        ({"plain": (0.85, 0.99)}, {0, 4}),
        # Augmentation overfits more than plain training.
        ({"augmentation": (0.80, 0.99), "plain": (0.70, 0.80)}, {1}),
        # Saliency training gains two points over plain training.
        ({"saliency": (0.72, 0.95)}, {2}),
        ({"gradcam": (0.60, 0.95)}, {3}),
        ({"gradcam": (0.90, 0.95)}, {3, 4}),
        ({"other": (0.85, 0.90)}, {4}),
    ],
)
def test_an_effect_that_is_turned_around_takes_its_claim_with_it(changed, claims):
    expected = ["not supported" if i in claims else "supported" for i in range(5)]
    assert of_study(study(**changed)) == expected


def test_less_than_a_point_is_no_improvement():
    assert MARGIN == 0.01
    assert of_study(study(saliency=(0.703, 0.95), saliency_control=(0.70, 0.95)))[2] == "supported"


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_is_a_query_of_the_study(kind):
    assert len(study().query(KINDS[kind])) == {"augmentation": 6, "the best other configuration": 15}.get(kind, 3)


def test_a_study_of_one_setup_leaves_claims_of_others_without_data():
    assert of_study(study()[lambda t: t["setup"] == "augmentation"]) == ["no data"] * 4 + ["supported"]
