"""Ray: connecting to it or starting it, and explaining trials on it. Imported only where Ray is asked for."""

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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import ray

from trainables.errors import UserError

Result = TypeVar("Result")


class ClusterError(UserError):
    """Ray cannot be reached or started, or cannot do what is asked of it."""


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
    # A terminal that closes tells all of its processes; Ray's, which inherit this, are to outlive ours.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise ClusterError(f"Ray at {address!r} could not be reached or started: {error}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
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


def compute_on_cluster(
    compute: Callable[..., Result],
    jobs: Iterable[tuple[Any, ...]],
    shared: tuple[Any, ...],
    address: str,
    device: str = "auto",
) -> Iterator[tuple[int, Result]]:
    """Yield each job's number and ``compute(*job, *shared)`` as they are ready; all run on the cluster at once.

    A job gets a GPU of its own, where ``device`` is CUDA, or is ``auto`` and the cluster has one, else an equal share
    of the cores. What is shared is sent to each node once.

    Raises:
        ClusterError: if there is no cluster at the address, or it loses a worker; and whatever a job raises.
    """
    with ray_session(address):
        jobs = list(jobs)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        has_gpu = any(resources.get("GPU", 0) >= 1 for resources in nodes)
        num_gpus = 1 if device.startswith("cuda") or (device == "auto" and has_gpu) else 0
        cores = [int(resources.get("CPU", 0)) for resources in nodes]
        num_cpus = 1 if num_gpus else max(1, min(max(cores), sum(cores) // len(jobs)))
        task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(compute)
        handles = [ray.put(part) for part in shared]
        numbers = {task.remote(*job, *handles): number for number, job in enumerate(jobs)}
        try:
            while numbers:
                (ready, *_), _ = ray.wait(list(numbers))
                yield numbers.pop(ready), ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            raise ClusterError(f"Ray at {address!r}: a worker was lost ({error})") from error
        finally:
            for left in numbers:
                ray.cancel(left)
