from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import analysis.measures as measures_module
from analysis.claims import CLAIMS, MapComparison, decide
from analysis.claims import CONTROLS as CLAIMED_CONTROLS
from analysis.measures import CONTROLS, OWN, STEPS, measure_maps, with_controls
from explain import (
    deletion,
    energy_on_object,
    explain,
    grid_pointing,
    insertion,
    max_sensitivity,
    patch_drops,
    patch_fidelity,
    randomisation_check,
    rearranged,
    tile,
    total_variation,
    upsample,
)
from trainables import ResNet18

MAPS = ("saliency", "gradcam", "pooled_saliency", "random", "sobel", "gaussian")
SHAPE = ("gini", "entropy", "total_variation", "high_frequency_share")
ON_OBJECT = ("energy_on_object", "energy_lift", "pointing_game", "rank_accuracy")
ASKED = ("deletion", "insertion", "patch_fidelity")
REDRAWN = ("max_sensitivity", "likeness_untrained")  # of maps that ask the network

INDICES = np.array([3, 11, 12, 17])  # images that have maps
GRIDS = np.array([[5, 7, 9, 2], [0, 11, 18, 1]])
LABELS = np.arange(20) % 5
NAN = float("nan")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def resnet() -> ResNet18:
    torch.manual_seed(0)
    return ResNet18(num_classes=5, width=4).eval()


def pixels(size: int = 32) -> Callable[[NDArray[np.int64]], Tensor]:
    bank = random(20, 3, size, size, seed=1)
    return lambda indices: bank[torch.from_numpy(indices)]


def masks() -> NDArray[np.bool_]:
    """The upper half, the left half, the middle and nothing."""
    found = np.zeros((4, 32, 32), np.bool_)
    found[0, :16] = found[1, :, :16] = found[2, 8:24, 8:24] = True
    return found


def noise() -> Tensor:
    """What orders the random maps of the four images: the first draws of a seeded generator."""
    return random(4, 4, 4)


def measured(size: int = 32, batch: int = 250, grids: NDArray[np.int64] = GRIDS, **given: object) -> pd.DataFrame:
    model, to_input = resnet(), pixels(size)
    maps = explain(model, to_input(INDICES), dtype=torch.float32)
    return measure_maps(model, to_input, INDICES, maps, given.get("masks"), grids, LABELS, batch)


def values_of(table: pd.DataFrame, name: str, measure: str) -> pd.Series:
    """A map's values of one measure by image."""
    return table[(table["map"] == name) & (table["measure"] == measure)].set_index("image")["value"]


def assert_values(table: pd.DataFrame, name: str, measure: str, images: NDArray[np.int64], expected: Tensor) -> None:
    found = values_of(table, name, measure)
    assert found.index.to_list() == images.tolist()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what does not depend on how often the network is asked."""
    monkeypatch.setattr(measures_module, "STEPS", 1)
    monkeypatch.setattr(measures_module, "NUM_ASKED", 1)


@pytest.fixture(scope="module")
def whole() -> pd.DataFrame:
    torch.set_num_threads(1)  # conftest does so after fixtures of modules are made
    return measured(masks=masks())


# --- what is there ---


def test_every_measure_of_every_map_is_there_once_an_image(whole):
    expected = {(name, measure) for name in MAPS for measure in (*SHAPE, *ON_OBJECT, *ASKED, "grid_pointing")}
    expected |= {(name, "agreement_with_gradcam") for name in MAPS if name != "gradcam"}
    expected |= {(name, measure) for name in ("saliency", "gradcam", "pooled_saliency") for measure in REDRAWN}
    found = {
        (name, measure): sorted(group["image"])
        for (name, measure), group in whole.groupby(["map", "measure"], observed=True)
    }
    assert found == {
        (name, measure): sorted(GRIDS[:, 0] if measure == "grid_pointing" else INDICES) for name, measure in expected
    }


def test_columns_and_types_are_those_documented(whole):
    assert [str(kind) for kind in whole.dtypes] == ["category", "category", "int64", "float32"]
    assert list(whole.columns) == ["map", "measure", "image", "value"]
    assert list(whole.index) == list(range(len(whole)))


def test_controls_of_the_claims_are_those_that_are_measured():
    assert CLAIMED_CONTROLS == CONTROLS
    assert (*OWN, *CONTROLS) == MAPS


def test_every_comparison_of_the_claims_finds_its_measures(whole):
    of_maps = [claim for claim in CLAIMS if isinstance(claim.comparisons[0], MapComparison)]
    claims = [comparison for claim in of_maps for comparison in claim.comparisons]
    sides = [(comparison.of, comparison.measure) for comparison in claims]
    sides += [(comparison.than, comparison.measure) for comparison in claims if isinstance(comparison.than, str)]
    there = set(zip(whole["map"], whole["measure"], strict=True))
    assert not set(sides) - there
    found = decide(whole.assign(trial_id="t0"), claims=of_maps)
    assert found["claim"].to_list() == [claim.sentence for claim in of_maps for _ in claim.comparisons]
    of_grids = found["measure"] == "grid_pointing"
    assert (found["n"][of_grids] == len(GRIDS)).all()
    assert (found["n"][~of_grids] >= 3).all()  # one has no object
    assert set(found["verdict"]) == {"undecided"}  # of so few images


def test_measures_that_are_not_defined_are_nan_and_no_others(whole):
    nowhere = whole[whole["value"].isna()]
    assert set(nowhere["image"]) == {17}  # its mask is empty
    assert set(nowhere["measure"]) == set(ON_OBJECT)
    assert len(nowhere) == len(ON_OBJECT) * len(MAPS)
    assert np.isfinite(whole["value"].dropna()).all()


def test_without_masks_there_are_no_measures_of_the_object(whole, cheap):
    expected = set(whole["measure"]) - set(ON_OBJECT)
    assert set(measured()["measure"]) == expected


def test_without_grids_there_is_no_grid_pointing(whole, cheap):
    found = measured(masks=masks(), grids=np.empty((0, 4), np.int64))
    assert set(found["measure"]) == set(whole["measure"]) - {"grid_pointing"}


@pytest.mark.parametrize(("size", "patches"), [(16, 16), (20, 16), (15, 25), (9, 9), (14, 4), (17, None)])
def test_patches_fill_the_input_or_there_is_no_patch_fidelity(size, patches, cheap, monkeypatch):
    asked = []

    def seen(*args: object) -> Tensor:
        asked.append(patch_drops(*args))
        return asked[-1]

    monkeypatch.setattr(measures_module.perturb, "patch_drops", seen)
    found = measured(size, grids=np.empty((0, 4), np.int64))
    assert ("patch_fidelity" in set(found["measure"])) == (patches is not None)
    assert [tuple(drops.shape) for drops in asked] == ([] if patches is None else [(1, patches)])
    assert {"deletion", "insertion", *REDRAWN} < set(found["measure"])


def test_the_network_is_asked_about_a_seeded_choice_of_images(whole, monkeypatch):
    monkeypatch.setattr(measures_module, "NUM_ASKED", 2)
    found = measured(grids=np.empty((0, 4), np.int64))
    chosen = values_of(found, "saliency", "insertion").index
    assert len(set(chosen)) == 2
    assert set(chosen) < set(INDICES)
    compared = [("random", measure) for measure in ASKED]
    compared += [("saliency", measure) for measure in (*ASKED, *REDRAWN)]
    for name, measure in compared:
        again = values_of(found, name, measure)
        np.testing.assert_allclose(again, values_of(whole, name, measure)[chosen], rtol=1e-4, atol=1e-6)
    assert values_of(found, "saliency", "gini").index.to_list() == INDICES.tolist()


# --- values ---


def test_measures_of_single_maps_are_those_of_explain(whole):
    model, x = resnet(), pixels()(INDICES)
    maps = explain(model, x, dtype=torch.float32)
    cam, on_object = upsample(maps.cam.relu(), (32, 32)), torch.from_numpy(masks())
    assert_values(whole, "saliency", "energy_on_object", INDICES, energy_on_object(maps.saliency, on_object))
    assert_values(whole, "gradcam", "energy_on_object", INDICES, energy_on_object(cam, on_object))
    half = energy_on_object(cam, on_object)[:2] / 0.5
    np.testing.assert_allclose(values_of(whole, "gradcam", "energy_lift").loc[[3, 11]], half, rtol=1e-5)
    differences = cam.diff(dim=2).abs().mean((1, 2)) + cam.diff(dim=1).abs().mean((1, 2))
    assert_values(whole, "gradcam", "total_variation", INDICES, differences / cam.mean((1, 2)))
    ranks = [[pd.Series(heat.flatten()).rank() for heat in each] for each in (maps.saliency, cam)]
    agreement = [a.corr(b) for a, b in zip(*ranks, strict=True)]
    assert_values(whole, "saliency", "agreement_with_gradcam", INDICES, torch.tensor(agreement))


def test_controls_are_measured_as_they_are_made(whole):
    # A bell in the middle has the same on both halves, whatever the image.
    assert values_of(whole, "gaussian", "energy_on_object").loc[[3, 11]].to_list() == pytest.approx([0.5, 0.5])
    assert values_of(whole, "gaussian", "gini").nunique() == 1
    assert values_of(whole, "gaussian", "pointing_game").loc[12] == 1.0
    assert values_of(whole, "random", "gini").nunique() == 4


def test_the_random_control_has_the_values_of_grad_cam_in_a_seeded_order(whole):
    model, x = resnet(), pixels()(INDICES)
    maps = explain(model, x, dtype=torch.float32)
    control = upsample(rearranged(maps.cam.relu(), noise()), (32, 32))
    assert_values(whole, "random", "total_variation", INDICES, total_variation(control))
    assert_values(whole, "random", "energy_on_object", INDICES, energy_on_object(control, torch.from_numpy(masks())))
    assert_values(whole, "random", "insertion", INDICES, insertion(model, x, control, maps.target, STEPS))


def test_measures_that_ask_the_network_are_those_of_explain(whole):
    model, x = resnet(), pixels()(INDICES)
    maps = explain(model, x, dtype=torch.float32)
    cam, target = upsample(maps.cam.relu(), (32, 32)), maps.target
    assert_values(whole, "saliency", "deletion", INDICES, deletion(model, x, maps.saliency, target, STEPS))
    assert_values(whole, "gradcam", "insertion", INDICES, insertion(model, x, cam, target, STEPS))
    assert_values(whole, "gradcam", "patch_fidelity", INDICES, patch_fidelity(cam, patch_drops(model, x, target, 8)))

    def redrawn(network: nn.Module, changed: Tensor) -> Tensor:
        return explain(network, changed, target, dtype=torch.float32).saliency

    sensitivity = max_sensitivity(lambda changed: redrawn(model, changed), x)
    assert_values(whole, "saliency", "max_sensitivity", INDICES, sensitivity)
    likeness = list(randomisation_check(model, lambda network: redrawn(network, x)).values())
    assert_values(whole, "saliency", "likeness_untrained", INDICES, likeness[-1])


def test_of_some_images_the_network_is_asked_about_the_same_random_maps(cheap):
    model, to_input, indices = resnet(), pixels(), np.arange(8)
    maps = explain(model, to_input(indices), dtype=torch.float32)
    found = measure_maps(model, to_input, indices, maps, None, np.empty((0, 4), np.int64), LABELS)
    (chosen,) = values_of(found, "random", "insertion").index
    assert chosen != 0, "the order of the first image would do"
    control = upsample(rearranged(maps.cam.relu(), random(8, 4, 4)), (32, 32))
    expected = insertion(model, to_input(indices), control, maps.target, 1)
    assert_values(found, "random", "insertion", indices[[chosen]], expected[[chosen]])
    patches = patch_fidelity(control, patch_drops(model, to_input(indices), maps.target, 8))
    assert_values(found, "random", "patch_fidelity", indices[[chosen]], patches[[chosen]])


def test_the_class_that_was_explained_is_asked_for_and_not_the_predicted_one(cheap):
    model, to_input = resnet(), pixels()
    x = to_input(INDICES[:1])
    target = (explain(model, x).target + 1) % 5
    maps = explain(model, x, target, dtype=torch.float32)
    found = measure_maps(model, to_input, INDICES[:1], maps, None, np.empty((0, 4), np.int64), LABELS)
    expected = deletion(model, x, maps.saliency, target, 1)
    assert expected.item() != pytest.approx(deletion(model, x, maps.saliency, (target + 4) % 5, 1).item(), rel=1e-3)
    assert_values(found, "saliency", "deletion", INDICES[:1], expected)


def test_in_grids_the_class_of_each_cell_is_explained(whole):
    model, x = resnet(), pixels()(np.arange(20))
    maps = explain(model, tile(x, torch.from_numpy(GRIDS)), torch.from_numpy(LABELS[GRIDS]), dtype=torch.float32)
    assert maps.saliency.shape == (2, 4, 64, 64)
    firsts = GRIDS[:, 0]
    assert_values(whole, "saliency", "grid_pointing", firsts, grid_pointing(maps.saliency).mean(1))
    cam = upsample(maps.cam.relu().flatten(0, 1), (64, 64)).view(2, 4, 64, 64)
    assert_values(whole, "gradcam", "grid_pointing", firsts, grid_pointing(cam).nan_to_num(0.25).mean(1))
    # The middle of the grid belongs to all cells alike.
    assert_values(whole, "gaussian", "grid_pointing", firsts, torch.full((2,), 0.25))


def test_in_grids_a_map_that_is_nowhere_positive_counts_as_chance(cheap):
    model, to_input = resnet(), pixels()
    with torch.no_grad():  # features are at least 0
        model.head.weight.copy_(-0.1 - model.head.weight.abs())
        model.head.weight[2].neg_()
    maps = explain(model, to_input(INDICES), dtype=torch.float32)
    found = measure_maps(model, to_input, INDICES, maps, None, GRIDS, LABELS)
    assert LABELS[GRIDS].tolist() == [[0, 2, 4, 2], [0, 1, 3, 1]]
    target = torch.tensor([[2, 2, 2, 2]])
    of_third = explain(model, tile(to_input(np.arange(20)), torch.from_numpy(GRIDS[:1])), target, dtype=torch.float32)
    cam = upsample(of_third.cam.flatten(0, 1), (64, 64)).view(1, 4, 64, 64)
    shares = grid_pointing(cam)[0]
    expected = torch.tensor([(shares[1] + shares[3] + 2 * 0.25) / 4, 0.25])
    assert_values(found, "gradcam", "grid_pointing", GRIDS[:, 0], expected)
    for control in ("pooled_saliency", "random"):
        assert values_of(found, control, "grid_pointing").iloc[1] == 0.25


def test_masks_are_reduced_to_the_resolution_of_the_input(cheap):
    given = np.zeros((4, 32, 32), np.bool_)
    given[0, :9] = True  # half of the fifth row of 16
    given[1, 6, 6] = True  # a quarter of one pixel: no object is left
    given[2, 8:10, 20:22] = given[2, 0, 0] = True
    given[3] = True
    found = measured(16, masks=given)
    maps = explain(resnet(), pixels(16)(INDICES), dtype=torch.float32)
    whole = maps.saliency.sum((1, 2))
    on_object = torch.stack([maps.saliency[0, :5].sum(), torch.tensor(NAN), maps.saliency[2, 4, 10], whole[3]])
    assert_values(found, "saliency", "energy_on_object", INDICES, on_object / whole)
    lift = on_object / whole * torch.tensor([16 / 5, NAN, 256, 1])
    assert_values(found, "saliency", "energy_lift", INDICES, lift)


# --- the same again ---


def test_the_same_maps_have_the_same_measures(cheap):
    torch.manual_seed(5)
    first = measured(masks=masks())
    torch.manual_seed(6)
    pd.testing.assert_frame_equal(measured(masks=masks()), first)


def test_the_network_stays_as_it_was(cheap):
    model, to_input = resnet().train(), pixels()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    maps = explain(model, to_input(INDICES), dtype=torch.float32)
    measure_maps(model, to_input, INDICES, maps, masks(), GRIDS, LABELS)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def by_batch(batch: int, names: tuple[str, ...]) -> pd.Series:
    found = measured(batch=batch, masks=masks())
    chosen = found[found["map"].isin(names)]
    return chosen.astype({"map": str, "measure": str}).set_index(["map", "measure", "image"])["value"].sort_index()


def test_measures_do_not_depend_on_the_batch(monkeypatch):
    monkeypatch.setattr(measures_module, "STEPS", 2)
    names = ("saliency", "gradcam", "pooled_saliency", "sobel", "gaussian")
    whole = by_batch(250, names)
    assert len(whole) == 5 * (4 * len((*SHAPE, *ON_OBJECT, *ASKED)) + 2) + 4 * 4 + 3 * 4 * len(REDRAWN)
    pd.testing.assert_series_equal(by_batch(4, names), whole, rtol=1e-3, atol=1e-5)


def test_the_random_control_does_not_depend_on_the_batch(cheap):
    pd.testing.assert_series_equal(by_batch(4, ("random",)), by_batch(250, ("random",)), rtol=1e-5)


def test_no_two_images_have_the_same_random_order(cheap, monkeypatch):
    orders = []

    def seen(cam: Tensor, order: Tensor) -> Tensor:
        orders.append(order)
        return rearranged(cam, order)

    monkeypatch.setattr(measures_module.controls, "rearranged", seen)
    monkeypatch.setattr(measures_module.controls, "pooled", lambda maps, cam: maps)
    measured(batch=2, grids=np.empty((0, 1), np.int64))
    assert torch.equal(torch.cat(orders[:2]), noise())
    assert len(noise().flatten(1).argsort(1).unique(dim=0)) == len(INDICES)


def test_batches_may_be_smaller_than_a_grid(cheap):
    found = measured(batch=3)
    assert values_of(found, "saliency", "grid_pointing").index.to_list() == GRIDS[:, 0].tolist()


# --- with_controls ---


def test_compared_maps_are_those_named_at_the_resolution_of_the_images():
    x, saliency, cam = random(3, 3, 24, 32), random(3, 24, 32, seed=1), random(3, 3, 4, seed=2) - 0.5
    order = random(3, 3, 4, seed=3)
    compared = with_controls(x, saliency, cam, order)
    assert tuple(compared) == MAPS
    for heat in compared.values():
        assert heat.shape == (3, 24, 32)
        assert (heat >= 0).all()
        assert (heat.flatten(1).amax(1) > heat.flatten(1).amin(1)).all()
    assert torch.equal(compared["saliency"], saliency)
    rectified = torch.where(cam > 0, cam, torch.zeros(()))
    torch.testing.assert_close(compared["gradcam"], upsample(rectified, (24, 32)))
    torch.testing.assert_close(compared["random"], upsample(rearranged(rectified, order), (24, 32)))
    # Before the enlargement: Grad-CAM's values in the order of averages over blocks of 8 x 8.
    blocks = saliency.view(3, 3, 8, 4, 8).mean((2, 4))
    torch.testing.assert_close(compared["pooled_saliency"], upsample(rearranged(rectified, blocks), (24, 32)))


def test_controls_know_no_more_than_they_should():
    x, saliency, cam = random(3, 3, 32, 32), random(3, 32, 32, seed=1), random(3, 4, 4, seed=2) - 0.5
    before = with_controls(x, saliency, cam, noise()[:3])

    def changed(**other: Tensor) -> set[str]:
        given = {"images": x, "saliency": saliency, "cam": cam, "noise": noise()[:3], **other}
        after = with_controls(**given)
        return {name for name in MAPS if not torch.equal(before[name], after[name])}

    assert changed(saliency=saliency.flip(2)) == {"saliency", "pooled_saliency"}
    assert changed(cam=cam.flip(2)) == {"gradcam"}  # the same values at other places
    assert changed(cam=2 * cam) == {"gradcam", "pooled_saliency", "random"}
    assert changed(cam=torch.where(cam < 0, 3 * cam, cam)) == set()
    assert changed(images=1 - x.square()) == {"sobel"}
    assert changed(noise=noise()[1:]) == {"random"}


def test_controls_of_a_grad_cam_that_is_nowhere_positive_are_nowhere_positive_either():
    x, saliency = random(2, 3, 16, 16), random(2, 16, 16, seed=1)
    compared = with_controls(x, saliency, -random(2, 2, 2, seed=2), random(2, 2, 2, seed=3))
    assert {name for name, heat in compared.items() if not heat.any()} == {"gradcam", "pooled_saliency", "random"}
