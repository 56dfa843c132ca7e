"""What a study makes of a machine or cluster: what each trial gets of it, and storage that all its nodes see."""

import secrets
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from analysis.ray_session import ClusterError
from study.settings import StudySettings
from trainables.device import resolve_device
from trainables.tune_trial import SHARE


@dataclass(frozen=True)
class Resources:
    """What each trial gets, and how many run at once.

    Attributes:
        device: ``cpu``, ``mps``, or what was asked for; ``cuda`` where a trial gets a GPU.
        cpus: CPU cores, and threads, of a trial.
        gpus: GPUs of a trial; fractions share one.
        concurrent: trials that fit at once into the nodes there are now; 0 on a cluster that has yet to grow.
        limit: trials that may be begun at once; None on a cluster, which may grow. Without a limit Ray Tune queues
            more, and lets them pass a trial whose worker died.
    """

    device: str
    cpus: int
    gpus: float
    concurrent: int
    limit: int | None = None


def share_out(settings: StudySettings, address: str, num_trials: int) -> Resources:
    """Share the machine or cluster among trials: GPUs whole, or CPU cores so that threads add up to the cores.

    Raises:
        ClusterError: if no trial could ever run.
    """
    # A trial runs on one node.
    nodes = [(int(n["Resources"].get("CPU", 0)), n["Resources"].get("GPU", 0.0)) for n in ray.nodes() if n["Alive"]]
    cpus, gpus = (sum(amounts) for amounts in zip(*nodes, strict=True))
    largest = max(cores for cores, _ in nodes)
    here = resolve_device().type if address == "local" else "cuda"  # what nodes of a cluster can use, they say there
    wants_gpu = settings.device == "cuda" or (settings.device == "auto" and gpus > 0 and here == "cuda")
    gpus_per_trial = settings.gpus_per_trial
    if gpus_per_trial is None:
        gpus_per_trial = 1.0 if wants_gpu else 0.0
    cpus_per_trial = settings.cpus_per_trial or (
        1 if gpus_per_trial else max(1, min(largest, cpus // max(1, num_trials)))
    )
    slots = sum(_fitting(cores, there, cpus_per_trial, gpus_per_trial) for cores, there in nodes)
    # On a cluster that grows by itself more may come; here it cannot, and Ray Tune would wait for ever.
    if address == "local" and not slots:
        raise ClusterError(
            f"a trial needs {cpus_per_trial} CPUs and {gpus_per_trial:g} GPUs, but there are {cpus} and {gpus:g}; "
            "lower cpus_per_trial or gpus_per_trial"
        )
    device = settings.device
    if device == "auto":
        device = "cuda" if gpus_per_trial else "mps" if here == "mps" else "cpu"
    if device == "mps":
        slots = 1  # Ray does not know Apple's GPU: every core would run a trial on it
    return Resources(device, cpus_per_trial, gpus_per_trial, slots, slots if address == "local" else None)


def _fitting(cpus: int, gpus: float, cpus_per_trial: int, gpus_per_trial: float) -> int:
    """Return how many trials fit onto a node: fractions of GPUs share one, and none spans two."""
    slots = cpus // cpus_per_trial
    if not gpus_per_trial:
        return slots
    return min(slots, int(gpus) * int(1 / gpus_per_trial) if gpus_per_trial < 1 else int(gpus / gpus_per_trial))


def check_storage_is_shared(run: Path) -> None:
    """See that every node can write where the run directory lies.

    Raises:
        ClusterError: naming a node that cannot.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    marker = run / f".shared-{secrets.token_hex(4)}"
    marker.touch()
    try:
        asked = []
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_write_to)
            asked.append((node, task.remote(str(marker))))
        for node, answer in asked:
            try:
                problem = ray.get(answer, timeout=60)
            except ray.exceptions.RayError as error:
                if any(other["NodeID"] == node["NodeID"] and other["Alive"] for other in ray.nodes()):
                    problem = f"it did not answer: {error}"
                else:  # it has gone meanwhile
                    problem = None
            if problem:
                raise ClusterError(
                    f"{run}: is not shared by all nodes: {node['NodeManagerAddress']} cannot write there ({problem}); "
                    f"{SHARE}"
                )
    finally:
        marker.unlink(missing_ok=True)


def _write_to(marker: str) -> str | None:
    """Return why a file that is there cannot be written to, or None if it can."""
    try:
        with Path(marker).open("r+") as file:
            file.write("seen")
    except OSError as error:
        return str(error)
    return None
