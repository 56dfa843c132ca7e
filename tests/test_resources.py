"""What a study makes of a machine or a cluster."""

from pathlib import Path

import pytest
import ray
import torch

from analysis.ray_session import ClusterError
from study import load_settings
from study.resources import check_storage_is_shared, share_out


@pytest.mark.parametrize(
    ("overrides", "num_trials", "cpus", "concurrent"),
    [([], 1, 2, 1), ([], 2, 1, 2), ([], 48, 1, 2), (["cpus_per_trial=2"], 48, 2, 1), (["cpus_per_trial=1"], 1, 1, 2)],
)
def test_cores_are_shared_among_trials(
    overrides: list[str], num_trials: int, cpus: int, concurrent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    resources = share_out(load_settings("demo", ["device=cpu", *overrides]), "local", num_trials)
    assert (resources.cpus, resources.gpus, resources.concurrent) == (cpus, 0, concurrent)


CPU_NODE, GPU_NODE = {"CPU": 8.0}, {"CPU": 6.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("nodes", "overrides", "concurrent"),
    [
        ([CPU_NODE, {"CPU": 3.0}], ["device=cpu", "cpus_per_trial=2"], 5),  # a trial runs on one node
        ([CPU_NODE, {}], ["device=cpu", "cpus_per_trial=9"], 0),  # which may yet come
        ([CPU_NODE, GPU_NODE], ["device=cuda"], 2),
        ([GPU_NODE, GPU_NODE], ["device=cuda", "gpus_per_trial=0.4"], 8),  # two on each: a trial has one GPU
        ([GPU_NODE, GPU_NODE], ["device=cuda", "gpus_per_trial=0.25"], 12),  # for which there must be CPUs
        ([GPU_NODE, CPU_NODE], ["device=cuda", "gpus_per_trial=4"], 0),
    ],
)
def test_trials_at_once_are_those_that_fit_into_nodes(
    nodes: list[dict[str, float]], overrides: list[str], concurrent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    settings = load_settings("demo", overrides)
    assert share_out(settings, "auto", 48).concurrent == concurrent
    if not concurrent:
        with pytest.raises(ClusterError, match="lower cpus_per_trial or gpus_per_trial"):
            share_out(settings, "local", 48)


@pytest.mark.parametrize("usable", [True, False])
def test_a_gpu_is_taken_where_torch_can_use_it(usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray counts it also where torch was built without CUDA, or the driver is too old."""
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": GPU_NODE}])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    resources = share_out(load_settings("demo"), "local", 3)
    assert (resources.device, resources.gpus, resources.concurrent) == (("cuda", 1, 2) if usable else ("cpu", 0, 3))
    assert share_out(load_settings("demo"), "10.0.0.1:6379", 3).device == "cuda"  # which its nodes have


@pytest.mark.usefixtures("ray_session")
def test_storage_that_a_node_does_not_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's node stands for two; what it cannot write to stands for what is mounted on one of them only."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    monkeypatch.setattr(ray, "nodes", lambda: nodes * 2)
    check_storage_is_shared(tmp_path)
    gone, answers = nodes[0] | {"NodeID": "ab" * 28}, []
    monkeypatch.setattr(ray, "nodes", lambda: [nodes[0]] if answers else answers.append(1) or [nodes[0], gone])
    check_storage_is_shared(tmp_path)  # of a node that has gone meanwhile nothing is wanted
    monkeypatch.setattr(ray, "nodes", lambda: nodes * 2)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(Path, "touch", lambda self: None)
    with pytest.raises(ClusterError, match=r"is not shared by all nodes: .* cannot write there \(.*No such file"):
        check_storage_is_shared(tmp_path)
