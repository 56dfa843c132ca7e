"""Ray for a study: connecting or starting it, what a trial gets of it, and storage that all its nodes see."""

import atexit
import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from study.settings import StudySettings
from trainables.device import resolve_device
from trainables.errors import UserError
from trainables.tune_trial import SHARE


class ClusterError(UserError):
    """Ray cannot be reached or started, or cannot run the study's trials."""


@contextlib.contextmanager
def ray_session(address: str) -> Iterator[None]:
    """Connect to Ray, or start it here; a session that already has one keeps it.

    Ray that is started here has no dashboard, reports nothing to its makers, and wants a token that only this user can
    read on every port that it opens; it opens them on all interfaces, which cannot be changed.

    Raises:
        ClusterError: if it cannot be reached or started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The live view is ours; Ray Tune's own would print a header between.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {}
    _check_reachable(address)
    if address == "local":
        options = {"include_dashboard": False}
        _make_token()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise ClusterError(f"Ray at {address!r} could not be reached or started: {error}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own there
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """See that there is something at HOST:PORT: Ray would try for a minute, and then end this process."""
    if address.startswith("ray://"):
        raise ClusterError(
            f"Ray at {address!r}: studies do not run over Ray's client; use ray job submit, as in README.md"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ClusterError(f"Ray at {address!r} could not be reached: {error}") from error


def _make_token() -> None:
    """Give Ray a token of this process, unless the user chose one.

    Ray would write its own into the home directory, readable by all, and fail where it cannot.
    """
    chosen = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if chosen or os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    folder = Path(tempfile.mkdtemp(prefix="study-"))  # mode 0700
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = folder / "ray_token"
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32))
    # That a local Ray wants a token is its default. RAY_AUTH_MODE would come too late: it was read at import.
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(file)


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
    wants_gpu = settings.device.startswith("cuda") or (settings.device == "auto" and gpus > 0)
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
        here = resolve_device().type if address == "local" else "cpu"
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
