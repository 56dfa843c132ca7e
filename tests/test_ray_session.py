"""Ray: starting it, connecting to it, and computing on it."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from analysis.ray_session import ClusterError, _make_token, compute_on_cluster, ray_session

SESSION = """
import json, os, signal, stat, sys
from pathlib import Path
from analysis.ray_session import ray_session
import ray
signal.signal(signal.SIGHUP, lambda *ignored: print("told", flush=True))
with ray_session("local"):
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    print(json.dumps({
        "mode": stat.S_IMODE(token.stat().st_mode), "folder": stat.S_IMODE(token.parent.stat().st_mode),
        "token": token.read_text(), "file": str(token), "home": [p.name for p in Path.home().iterdir()],
        "address": ray.get_runtime_context().gcs_address, "usage": os.environ["RAY_USAGE_STATS_ENABLED"],
        "dashboard": ray._private.worker.get_dashboard_url(),
    }), flush=True)
    sys.stdin.readline()
"""
STRANGER = """
import sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False)
except Exception as error:
    print(error)
else:
    print("came in")
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    folder = Path("/tmp") / f"study-{os.getpid()}-session"  # Ray's sockets want a short path
    (folder / "home").mkdir(parents=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def run(code: str, *words: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own |= {"PYTHONPATH": str(Path(__file__).parent.parent), **environment}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code, *words]
    return subprocess.Popen(command, env=own, stdin=pipe, stdout=pipe, text=True, start_new_session=True)


def test_nobody_without_the_token_comes_in_and_ray_outlives_the_terminal(directory: Path) -> None:
    home = {"HOME": str(directory / "home"), "RAY_TMPDIR": str(directory / "r")}
    session = run(SESSION, environment=home)
    assert session.stdout
    said: dict[str, Any] = json.loads(session.stdout.readline())
    assert (said["mode"], said["folder"]) == (0o600, 0o700)
    assert len(said["token"]) == 64
    assert ".ray" not in said["home"]  # which may not even be writable
    assert said["usage"] == "0"
    assert not said["dashboard"]
    os.killpg(session.pid, signal.SIGHUP)  # as a terminal does that closes
    assert session.stdout.readline() == "told\n"
    other = directory / "other"
    other.mkdir()
    for token, comes_in in (("0" * 64, False), (said["token"], True)):
        (other / "token").write_text(token)
        variables = {**home, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(other / "token")}
        guest = run(STRANGER, said["address"], environment=variables)
        output, _ = guest.communicate(timeout=120)
        assert (output.strip().splitlines()[-1] == "came in") == comes_in
    session.communicate("\n", timeout=60)
    assert session.returncode == 0
    assert not Path(said["file"]).exists()


@pytest.mark.parametrize(
    ("chosen", "makes"),
    [
        ({}, True),
        ({"RAY_AUTH_MODE": "token"}, True),
        ({"RAY_AUTH_MODE": "disabled"}, False),
        ({"RAY_AUTH_TOKEN": "a"}, False),
    ],
)
def test_a_token_that_only_the_user_can_read_is_made_unless_one_was_chosen(
    chosen: dict[str, str], makes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray, told to use one and finding none, would write one that all can read."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    _make_token()
    assert ("RAY_AUTH_TOKEN_PATH" in os.environ) == makes
    if makes:
        assert stat.S_IMODE(Path(os.environ["RAY_AUTH_TOKEN_PATH"]).stat().st_mode) == 0o600
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)


def test_a_cluster_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would end the process after a minute."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"^Ray at '{address}' could not be reached: "), ray_session(address):
            raise AssertionError("it was reached")


def test_rays_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ClusterError, match="use ray job submit"), ray_session("ray://127.0.0.1:10001"):
        raise AssertionError("it was reached")


@pytest.mark.usefixtures("ray_session")
def test_a_session_that_is_there_is_kept() -> None:
    before = ray.get_runtime_context().gcs_address
    with ray_session("local"):
        assert ray.get_runtime_context().gcs_address == before
    assert ray.is_initialized()


@pytest.mark.usefixtures("ray_session")
def test_jobs_of_a_cluster_come_back_with_their_numbers_and_their_errors_as_they_are() -> None:
    def compute(number: int, base: list[int], word: str) -> tuple[int, str]:
        if number == 3:
            raise ClusterError("three is too many")
        return base[0] + number, word

    results = compute_on_cluster(compute, ((i,) for i in (1, 2)), ([10], "word"), "auto")
    assert sorted(results) == [(0, (11, "word")), (1, (12, "word"))]
    assert ray.is_initialized()  # a session that was there is kept
    with pytest.raises(ClusterError, match=r"^three is too many$"):
        list(compute_on_cluster(compute, [(1,), (3,)], ([10], "word"), "auto"))
