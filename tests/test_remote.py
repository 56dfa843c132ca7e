"""Runs on an S3 server: a stand-in for one, on loopback."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pandas as pd
import pytest
from moto.server import ThreadedMotoServer

from analysis import load_decisions, load_epochs, load_trials, read_study
from analysis.__main__ import main as analysis
from analysis.remote import (
    RemoteError,
    TakenError,
    copy_of,
    fetch_checkpoint,
    local_run,
    open_storage,
    run_path,
    source,
    upload,
)
from analysis.run_log import is_running
from explain.__main__ import main as explain
from study import StudyError, load_settings, resume_study, run_study
from study.__main__ import main as study_command
from study.supervise import Interruption, holding
from study.upload import Uploads
from trainables import load_checkpoint

URI = "s3://bucket/runs/small"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which s3:// means a server of this test."""
    s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    host, port = s3.get_host_and_port()
    variables = {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_EC2_METADATA_DISABLED": "true",
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield variables
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    s3.stop()


def study(*words: str, cache: Path, ray: Path) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent.parent), "XDG_CACHE_HOME": str(cache), "RAY_TMPDIR": str(ray),
    }  # fmt: skip
    command = [sys.executable, "-m", "study", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def run(server: dict[str, str], tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of a study whose driver was killed, with its machine, and that went on on another one."""
    ray = Path("/tmp") / f"study-{os.getpid()}-s3"
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    ray.mkdir()
    try:
        words = ("run", "--preset", "demo", "--out", "s3://bucket/runs", "--name", "small", *tiny)
        driver = study(*words, cache=first, ray=ray)
        deadline = time.monotonic() + 120
        while "trial_started" not in sent():
            assert driver.poll() is None, driver.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
        shutil.rmtree(first)
        refused, _ = study("resume", URI, cache=second, ray=ray).communicate(timeout=60)
        assert f"{URI}: is running now" in refused  # as far as its last sign of life tells
        storage, base = open_storage(URI)
        storage.delete_file(f"{base}/heartbeat")  # as if a minute had passed
        goes_on = study("resume", URI, cache=second, ray=ray)
        output, _ = goes_on.communicate(timeout=120)
        assert goes_on.returncode == 0, output
        assert f"python -m analysis report {URI}" in output
    finally:
        shutil.rmtree(ray, ignore_errors=True)
    return URI


def sent() -> str:
    storage, base = open_storage(URI)
    try:
        with storage.open_input_stream(f"{base}/events.jsonl") as stream:
            return stream.readall().decode()
    except FileNotFoundError:
        return ""


def test_a_run_at_a_uri_is_the_run_on_a_disk(run: str, finished_run: Path) -> None:
    for load in (load_trials, load_epochs, load_decisions):
        here, there = load(finished_run), load(run)
        drop = [n for n in ("train_seconds", "images_per_second", "epoch_seconds", "checkpoint") if n in here]
        pd.testing.assert_frame_equal(there.drop(columns=drop), here.drop(columns=drop))
    assert read_study(run)["settings"]["space"] == read_study(finished_run)["settings"]["space"]
    assert not is_running(run)


def test_checkpoints_come_when_they_are_used(run: str) -> None:
    trial = load_trials(run).dropna(subset="checkpoint").iloc[0]
    folder = Path(trial["checkpoint"])
    shutil.rmtree(folder)
    folder.mkdir()
    state = load_checkpoint(fetch_checkpoint(folder), "cpu")
    assert (state.settings.key(), state.epoch) == (trial["trial_id"], trial["best_epoch"])


def test_only_the_best_checkpoints_are_left_there(run: str) -> None:
    """Of each trial that ended one, and nothing of what the killed driver left unrecorded."""
    storage, base = open_storage(run)
    from pyarrow import fs

    files = [info.path for info in storage.get_file_info(fs.FileSelector(f"{base}/tune", recursive=True))]
    folders = {Path(file).parent for file in files if file.endswith("weights.pt")}
    trials = load_trials(run)
    assert len(folders) == trials["checkpoint"].notna().sum() == len(trials)


def test_commands_take_the_uri(
    run: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert analysis(["trials", run, "--format", "csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert analysis(["report", run, "--top", "1", "--device", "cpu"]) == 0
    assert "small-report/report.html" in capsys.readouterr().out
    assert run in (tmp_path / "small-report/report.html").read_text()
    assert explain([run, "--images", str(pictures / "red/0.png"), "--device", "cpu"]) == 0
    assert (tmp_path / "maps/0.png").exists()


def test_the_same_name_is_refused(run: str, tiny: tuple[str, ...]) -> None:
    with pytest.raises(StudyError, match=f"{URI}: exists; go on with it by python -m study resume {URI}"):
        run_study(load_settings("demo", tiny), URI, show=False)


def test_going_on_with_what_has_ended_changes_nothing(run: str) -> None:
    before = sent()
    assert resume_study(run, show=False)
    assert sent() == before


def beat(copy: str, seconds_ago: float) -> None:
    storage, base = open_storage(URI)
    with storage.open_output_stream(f"{base}/heartbeat") as stream:
        stream.write(json.dumps({"time": time.time() - seconds_ago, "copy": copy}).encode())


def test_a_sign_of_life_from_another_copy_keeps_others_away(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.remote._FRESH_SECONDS", 0.0)
    storage, base = open_storage(run)
    (local_run(run) / ".id").write_text("mine")
    try:
        for copy, seconds_ago, runs in (("elsewhere", 5, True), ("elsewhere", 90, False), ("mine", 5, False)):
            beat(copy, seconds_ago)
            assert is_running(run) == runs
            if runs:
                with pytest.raises(StudyError, match=f"{URI}: is running now"):
                    resume_study(run, show=False)
            else:
                with holding(local_run(run)):
                    assert storage.get_file_info(f"{base}/heartbeat").is_file
                assert not storage.get_file_info(f"{base}/heartbeat").is_file  # its own, which it takes along
    finally:
        with contextlib.suppress(FileNotFoundError):
            storage.delete_file(f"{base}/heartbeat")
    assert not is_running(run)


def test_a_study_that_went_on_elsewhere_ends_here_and_sends_nothing_more(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine slept, say, and another one took the study over."""
    monkeypatch.setattr("study.upload._EVERY_SECONDS", 0.1)
    copy, interruption = local_run(run), Interruption()
    before, mine = sent(), (copy / "events.jsonl").read_text()
    uploads = Uploads(copy, run, interruption)
    uploads.__enter__()
    try:
        beat("elsewhere", 1)
        deadline = time.monotonic() + 20
        while not interruption.asked:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with (copy / "events.jsonl").open("a") as log:
            log.write('{"time": 1.0, "event": "attempt_started", "attempt": 9}\n')
        with pytest.raises(TakenError, match=f"{URI}: is run by another process"):
            uploads.__exit__(None)
        assert sent() == before
    finally:
        (copy / "events.jsonl").write_text(mine)
        storage, base = open_storage(run)
        storage.delete_file(f"{base}/heartbeat")


def test_what_waits_for_the_log_is_done_when_storage_has_it(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A little at a time, so that signs of life do not wait for it; and all of it at the end."""
    copy, seen = local_run(run), []
    mine, before = (copy / "events.jsonl").read_text(), sent()

    def is_away(*ignored: object) -> None:
        raise RemoteError("away")

    try:
        uploads = Uploads(copy, run, Interruption())
        with uploads:
            monkeypatch.setattr("study.upload._EVERY_SECONDS", 0.1)
            with (copy / "events.jsonl").open("a") as log:
                log.write('{"time": 1.0, "event": "attempt_started", "attempt": 9}\n')
            for _ in range(3):
                uploads.later(lambda: (time.sleep(0.11), seen.append(sent())))
            with monkeypatch.context() as storage_is_away:
                storage_is_away.setattr("study.upload.upload", is_away)
                with pytest.raises(RemoteError):
                    uploads._send()
            assert (seen, sent()) == ([], before)
            uploads._send()
            assert len(seen) == 1
        assert seen == [(copy / "events.jsonl").read_text()] * 3 != [before] * 3
    finally:
        (copy / "events.jsonl").write_text(mine)
        storage, base = open_storage(run)
        with storage.open_output_stream(f"{base}/events.jsonl") as stream:
            stream.write(before.encode())


def test_of_two_that_claim_a_run_at_once_one_gets_it(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "study.supervise.time.sleep", lambda seconds: beat("elsewhere", 0)
    )  # the other one's, meanwhile
    try:
        with pytest.raises(StudyError, match=f"{URI}: is running now"), holding(local_run(run)):
            raise AssertionError("it was got")
    finally:
        storage, base = open_storage(run)
        storage.delete_file(f"{base}/heartbeat")


def test_a_copy_that_is_ahead_is_kept_and_one_of_another_study_is_not(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver of this host may have died before it sent its last lines."""
    monkeypatch.setattr("analysis.remote._FRESH_SECONDS", 0.0)
    copy = local_run(run)
    whole = (copy / "events.jsonl").read_text()
    (copy / "events.jsonl").write_text(whole + '{"time": 1.0, "event": "attempt_started", "attempt": 9}\n')
    assert (local_run(run) / "events.jsonl").read_text() != whole
    (copy / "events.jsonl").write_text(whole.replace("attempt", "ATTEMPT") + "more\n")  # it went on elsewhere since
    assert (local_run(run) / "events.jsonl").read_text() == whole
    (copy / "study.yaml").write_text("settings: {}\n")
    (copy / "explanations").mkdir(exist_ok=True)
    assert (local_run(run) / "events.jsonl").read_text() == whole
    assert not (copy / "explanations").exists()


def test_a_copy_in_which_a_study_runs_is_left_alone(server: dict[str, str], tmp_path: Path) -> None:
    """It has just begun, and nothing of it is at the URI yet."""
    uri = "s3://bucket/runs/just-begun"
    copy = copy_of(uri)
    copy.mkdir(parents=True)
    (copy / "study.yaml").write_text("settings: {}\ndata: {}\n")
    with holding(copy):
        assert (local_run(uri) / "study.yaml").exists()
        assert is_running(uri)
    (copy / ".uri").unlink()
    with pytest.raises(RemoteError, match=f"{uri}: no such run"):
        local_run(uri)
    assert (copy / "study.yaml").exists()  # perhaps the only one that is left


def test_runs_at_a_uri_are_listed(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert study_command(["list", "s3://bucket/runs"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if URI in line]
    assert "finished" in line
    assert study_command(["list", "s3://bucket/nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: s3://bucket/nothing: no such directory")


def test_only_what_has_grown_is_sent(server: dict[str, str], tmp_path: Path) -> None:
    uri, done = "s3://bucket/runs/growing", {}
    storage, base = open_storage(uri)
    (tmp_path / "events.jsonl").write_text("one\n")
    upload(tmp_path, uri, done)
    storage.delete_file(f"{base}/events.jsonl")
    upload(tmp_path, uri, done)
    assert "events.jsonl" not in [
        Path(i.path).name for i in storage.get_file_info([f"{base}/events.jsonl"]) if i.is_file
    ]
    (tmp_path / "events.jsonl").write_text("one\ntwo\n")
    upload(tmp_path, uri, done)
    with storage.open_input_stream(f"{base}/events.jsonl") as stream:
        assert stream.readall() == b"one\ntwo\n"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://no-such-bucket/runs/x", "no such run"),
        ("s3://bucket/runs/none", "no such run"),
        ("nonsense://bucket/x", "nor a URI that can be used"),
        ("s3://bucket/x?region=x", "give options by the environment"),
    ],
)
def test_what_is_not_there_says_so(
    server: dict[str, str], uri: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analysis(["trials", uri]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {uri}")
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_server_that_does_not_answer_says_so(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        with pytest.raises(RemoteError, match="s3://bucket/runs/other: storage cannot be used"):
            load_trials("s3://bucket/runs/other")


def test_paths_stay_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run_path("runs/x") == Path("runs/x")
    assert run_path("s3://bucket/x/") == "s3://bucket/x"
    assert run_path("file:///my%20runs/x#1") == Path("/my runs/x#1")
    with pytest.raises(RemoteError, match="file://runs/x: not a path, nor a URI that can be used"):
        open_storage(run_path("file://runs/x"))
    assert local_run("runs/x") == Path("runs/x")
    assert source(Path("runs/x")) == "runs/x"
    assert copy_of("s3://bucket/x").parent == tmp_path / "recipe-studies"
    assert copy_of("s3://bucket/x") != copy_of("s3://other/x")
    folder = tmp_path / "checkpoint"
    assert fetch_checkpoint(folder) == folder
