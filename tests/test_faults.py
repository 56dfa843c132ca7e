"""Whatever happens to a study, no trial is lost, none is counted twice, and the result is the undisturbed one.

Each fault is done to the same study: one trial at a time, so that also every decision of ASHA must come out the same.
What was lost, doubled and redone is printed as a table at the end. `pytest -m slow` adds the faults that take minutes.
"""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from ray.exceptions import ActorDiedError, LocalRayletDiedError, NodeDiedError, RayTaskError
from ray.train._internal.storage import StorageContext
from ray.tune.experiment import Trial

import study.attempt
import study.recorder
import study.run
from analysis import load_decisions, load_epochs, load_trials, replay_decisions
from analysis.trials import ENDED
from study import StudyError, load_settings, resume_study, run_study

# Six trials of up to four epochs of a second or less; the rates of 1e-6 are stopped at the first rung or the second.
STUDY = (
    "dataset=folder", "train_size=null", "val_fraction=0.25", "max_epochs=4", "grace_period=1", "reduction_factor=2",
    "fixed.width=4", "fixed.batch_size=8", "fixed.warmup_epochs=0", "fixed.precision=fp32",
    "space.lr=[0.05,0.02,1e-6]", "space.augmentation=[none,flip+crop]", "space.optimizer=[sgd]", "seed=3",
)  # fmt: skip
NOT_COMPARED = ["train_seconds", "images_per_second", "epoch_seconds", "checkpoint", "device"]
TABLE: list[dict[str, Any]] = []  # printed by conftest.py


@pytest.fixture(autouse=True)
def _rows_of_the_table(request: pytest.FixtureRequest) -> Iterator[None]:
    before = len(TABLE)
    yield
    request.node.user_properties += [("fault", json.dumps(row, default=int)) for row in TABLE[before:]]


@pytest.fixture(scope="module")
def overrides(pictures: Path) -> list[str]:
    return [*STUDY, f"data_dir={pictures}"]


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run_study(load_settings("demo", overrides), run, show=False)
    trials = load_trials(run)
    assert set(trials["status"]) == {"completed", "stopped"}  # else there would be little to compare
    return run


def count(run: Path) -> dict[str, int]:
    """What became of a run: trials without a row or an end, epochs or decisions that are there twice, epochs redone."""
    trials, epochs, decisions = load_trials(run), load_epochs(run), load_decisions(run)
    asked = json.loads((run / "manifest.json").read_text())["trials"]
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines() if line.startswith("{")]
    ran = pd.Series([(e["trial_id"], e["epoch"]) for e in lines if e["event"] == "epoch"])
    return {
        "lost": len({entry["trial_id"] for entry in asked} ^ set(trials["trial_id"]))
        + (~trials["status"].isin(ENDED)).sum(),
        "duplicates": int(
            epochs.duplicated(["trial_id", "epoch"]).sum() + decisions.duplicated(["trial_id", "rung"]).sum()
        ),
        "redone": int(ran.duplicated().groupby(ran.str[0]).sum().max()),  # of the trial with the most
    }


def assert_as_undisturbed(fault: str, run: Path, undisturbed: Path, seconds: float, attempts: int) -> None:
    counts = count(run)
    TABLE.append({"fault": fault, **counts, "attempts": attempts, "seconds": round(seconds, 1)})
    assert (counts["lost"], counts["duplicates"]) == (0, 0)
    assert counts["redone"] <= 2
    for load in (load_trials, load_epochs, load_decisions):
        expected, found = load(undisturbed), load(run)
        drop = [name for name in NOT_COMPARED if name in expected]
        pd.testing.assert_frame_equal(found.drop(columns=drop), expected.drop(columns=drop))
    decisions = load_decisions(run)
    pd.testing.assert_frame_equal(replay_decisions(decisions, 2), decisions)
    started = [e["attempt"] for e in events(run) if e["event"] == "attempt_started"]
    assert len(started) == attempts


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def disturb(monkeypatch: pytest.MonkeyPatch, epoch: int, what: Callable[[], None], once: Path) -> None:
    """Let something happen in the worker of the third trial right after it has reported an epoch; once."""
    original = study.attempt.run_trial

    def run_trial(config: dict[str, Any], **arguments: Any) -> None:
        from ray import tune

        report = tune.report

        def report_and(metrics: dict[str, Any], **more: Any) -> None:
            report(metrics, **more)
            chosen = (config["trial"]["lr"], config["trial"]["augmentation"]) == (0.02, "flip+crop")
            if chosen and metrics["epoch"] == epoch and not once.exists():
                once.touch()
                what()

        tune.report = report_and  # type: ignore[assignment]
        try:
            original(config, **arguments)
        finally:
            tune.report = report  # type: ignore[assignment]

    monkeypatch.setattr(study.attempt, "run_trial", run_trial)


def of_ray(error: Exception) -> RayTaskError:
    """An error as Ray brings it from a worker."""
    with pytest.raises(type(error)) as raised:
        raise error
    text = "".join(traceback.format_exception(raised.value))
    return RayTaskError("run_trial", f"\x1b[36mray::run_trial()\n{text}", raised.value)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "CUDA error: an illegal access\n  Search for it\nCompile with TORCH_USE_CUDA_DSA.",
            "CUDA error: an illegal access",
        ),
        ('File "a.csv" is damaged\nDelete it', 'File "a.csv" is damaged'),
        ("one line", "one line"),
    ],
)
def test_an_error_is_told_by_the_first_line_of_its_message(message, line):
    """Of CUDA's errors, the last line says how to compile torch."""
    error = of_ray(RuntimeError(message))
    assert study.recorder.in_short(error) == f"RuntimeError: {line}"
    assert study.recorder.in_short(error.as_instanceof_cause()) == f"RuntimeError: {line}"
    assert study.recorder.in_short(RuntimeError(message)) == line
    assert study.recorder.in_short(RuntimeError()) == "RuntimeError"


@pytest.mark.parametrize(
    ("message", "own"),
    [
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle, ...)`", False),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA driver error: device not ready", False),
        ("CUDA error: uncorrectable ECC error encountered", False),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", False),
        ("CUDA error: no CUDA-capable device is detected", False),
        ("CUDA error: initialization error", False),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", False),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", False),
        ("CUDA error: device-side assert triggered", True),
        ("CUDA error: no kernel image is available for execution on the device", True),
        ("CUDA error: invalid argument", True),
        ("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm(handle, ...)`", True),
        ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED", True),
        ("mat1 and mat2 shapes cannot be multiplied", True),
    ],
)
def test_a_failing_gpu_is_not_the_trials_fault(message, own):
    assert study.recorder._is_own(of_ray(RuntimeError(message))) == own


def test_errors_that_ray_does_not_keep_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are they the trial's error before them, which lies there still."""
    monkeypatch.setattr("ray.train._internal.storage._get_ray_train_session_dir", lambda: str(tmp_path))
    storage = StorageContext(storage_path=str(tmp_path), experiment_dir_name="tune", trial_dir_name="a")
    trial = Trial("run_trial", stub=True, storage=storage)
    Path(trial.local_path).mkdir(parents=True)
    for error, own, line in (
        (NodeDiedError("the node went down"), False, "the node went down"),
        (of_ray(ValueError("a label of no class")), True, "ValueError: a label of no class"),
        (LocalRayletDiedError(), False, "The task's local raylet died."),
        (ActorDiedError(), False, "The actor died unexpectedly before finishing this task."),
        (
            of_ray(ValueError("Failure # 1 (occurred at noon)\nours")),
            True,
            "ValueError: Failure # 1 (occurred at noon)",
        ),
        (of_ray(ValueError("half\rways\r\n")), True, "ValueError: half"),
    ):
        trial.handle_error(error)
        found = study.recorder._error_of(trial)
        assert study.recorder._is_own(found) == own
        assert study.recorder.in_short(found).startswith(line)


@pytest.mark.parametrize("epoch", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_worker_is_killed(
    undisturbed: Path, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    """At epoch 1 the trial has a rung before it, which no other may reach first."""
    disturb(monkeypatch, epoch, lambda: os.kill(os.getpid(), signal.SIGKILL), tmp_path / "once")
    start = time.monotonic()
    assert run_study(load_settings("demo", overrides), tmp_path / "run", show=False)
    (lost,) = [e for e in events(tmp_path / "run") if e["event"] == "trial_lost"]
    assert "died" in lost["error"]
    assert_as_undisturbed("worker SIGKILL", tmp_path / "run", undisturbed, time.monotonic() - start, 1)


@pytest.mark.parametrize("name", ["SIGKILL", "without storage", "without GPU"])
def test_a_worker_is_lost_more_often_than_a_trial_may_fail(
    undisturbed: Path, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Not the trial's fault: the study begins again by itself, and the trial goes on."""

    def lose() -> None:
        if name == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "without GPU":
            raise RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle, ...)`")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(study.supervise, "_WAIT_SECONDS", 0.0)
    disturb(monkeypatch, 1, lose, tmp_path / "once")
    start = time.monotonic()
    assert run_study(load_settings("demo", [*overrides, "max_failures=0"]), tmp_path / "run", show=False)
    assert [e["reason"] for e in events(tmp_path / "run") if e["event"] == "attempt_ended"] == ["lost", "finished"]
    assert_as_undisturbed(f"worker {name}, no retries", tmp_path / "run", undisturbed, time.monotonic() - start, 2)


@pytest.mark.parametrize("epoch", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_checkpoint_is_damaged_with_its_worker(
    undisturbed: Path, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    """The one before it is gone on from, or where there is none the trial begins anew; ASHA judges nothing twice."""

    def damage_and_die() -> None:
        newest = max((tmp_path / "run").glob("tune/*/*/checkpoint_*/weights.pt"), key=lambda file: file.stat().st_mtime)
        newest.write_bytes(newest.read_bytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)

    disturb(monkeypatch, epoch, damage_and_die, tmp_path / "once")
    start = time.monotonic()
    assert run_study(load_settings("demo", overrides), tmp_path / "run", show=False)
    assert_as_undisturbed("checkpoint truncated", tmp_path / "run", undisturbed, time.monotonic() - start, 1)
    assert TABLE[-1]["redone"] == 1
    (passed_over,) = [e["passed_over"] for e in events(tmp_path / "run") if "passed_over" in e]
    assert "weights.pt: truncated" in passed_over[0]


def test_storage_that_fails_as_trials_end_does_no_harm(
    undisturbed: Path, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is raised as a trial ends would have Ray Tune begin it again."""

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def append(log: Any, event: str, **fields: Any) -> None:
        fail() if event == "trial_ended" else original(log, event, **fields)

    original = study.recorder.EventLog.append
    monkeypatch.setattr(study.recorder.EventLog, "append", append)
    monkeypatch.setattr(study.recorder.Checkpoints, "trial_ended", fail)
    start = time.monotonic()
    assert run_study(load_settings("demo", overrides), tmp_path / "run", show=False)
    assert_as_undisturbed("storage fails as trials end", tmp_path / "run", undisturbed, time.monotonic() - start, 1)
    assert TABLE[-1]["redone"] == 0


def test_a_worker_raises(
    undisturbed: Path, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("a cosmic ray")

    disturb(monkeypatch, 1, fail, tmp_path / "once")
    start = time.monotonic()
    assert run_study(load_settings("demo", overrides), tmp_path / "run", show=False)
    (retried,) = [e for e in events(tmp_path / "run") if e["event"] == "trial_retried"]
    assert retried["error"] == "RuntimeError: a cosmic ray"
    assert re.search(r"^  File .*, line \d+, in run_trial$", retried["traceback"], re.MULTILINE)
    assert retried["traceback"].endswith("\nRuntimeError: a cosmic ray")
    assert "\x1b" not in retried["traceback"]
    assert_as_undisturbed("worker exception", tmp_path / "run", undisturbed, time.monotonic() - start, 1)


@pytest.mark.slow
def test_only_a_trials_own_errors_are_its_failures(
    undisturbed: Path, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One failure is allowed, one loss comes before it: Ray Tune, which counts both, gives up; the study does not."""
    monkeypatch.setattr(study.supervise, "_WAIT_SECONDS", 0.0)

    def fail() -> None:
        raise RuntimeError("a cosmic ray")

    disturb(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGKILL), tmp_path / "lost")
    disturb(monkeypatch, 2, fail, tmp_path / "failed")
    start = time.monotonic()
    assert run_study(load_settings("demo", [*overrides, "max_failures=1"]), tmp_path / "run", show=False)
    assert [e["event"] for e in events(tmp_path / "run") if "error" in e] == ["trial_lost", "trial_retried"]
    assert_as_undisturbed("SIGKILL, then an exception", tmp_path / "run", undisturbed, time.monotonic() - start, 2)


def test_a_trial_whose_worker_always_dies_fails_in_the_end(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    original = study.attempt.run_trial

    def run_trial(config: dict[str, Any], **arguments: Any) -> None:
        if config["trial"]["lr"] == 0.05:
            os.kill(os.getpid(), signal.SIGKILL)
        original(config, **arguments)

    monkeypatch.setattr(study.attempt, "run_trial", run_trial)
    monkeypatch.setattr(study.recorder, "MAX_LOSSES", 1)
    monkeypatch.setattr(study.supervise, "_WAIT_SECONDS", 0.0)
    few = [*overrides, "space.lr=[0.05,0.02]", "space.augmentation=[none]", "max_failures=0", "max_epochs=1"]
    assert run_study(load_settings("demo", few), tmp_path / "run", show=False)
    trials = load_trials(tmp_path / "run").set_index("lr")
    assert trials.loc[0.05, "status"] == "failed"
    assert "died" in trials.loc[0.05, "error"]
    assert trials.loc[0.02, "status"] == "completed"


# What follows needs processes of its own: drivers that die, Ray that is set up otherwise.


@dataclass
class Drivers:
    """Starts studies as a user does, in processes of their own."""

    directory: Path
    settings: dict[str, str] = field(default_factory=dict)  # further environment variables

    @property
    def environment(self) -> dict[str, str]:
        project = Path(__file__).parent.parent
        own = {"PYTHONPATH": str(project), "RAY_TMPDIR": str(self.directory / "r"), "PYTHONUNBUFFERED": "1"}
        return os.environ | own | self.settings

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=self.directory,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end(self, *words: str) -> tuple[int, str]:
        process = self.start(*words)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output


@pytest.fixture
def drivers() -> Iterator[Drivers]:
    # Ray's sockets want a short path.
    directory = Path("/tmp") / f"study-{os.getpid()}-{random.randrange(10**6)}"
    directory.mkdir()
    yield Drivers(directory)
    shutil.rmtree(directory, ignore_errors=True)


RUN = ("-m", "study", "run", "--preset", "demo", "--name", "run")
RESUME = ("-m", "study", "resume", "runs/run")


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def recorded(run: Path, event: str) -> int:
    return sum(e["event"] == event for e in events(run)) if (run / "events.jsonl").exists() else 0


def test_sigterm_ends_cleanly(undisturbed: Path, overrides: list[str], drivers: Drivers) -> None:
    run, start = drivers.directory / "runs/run", time.monotonic()
    driver = drivers.start(*RUN, *overrides)
    wait_for(lambda: recorded(run, "epoch") >= 1 and "running" in set(load_trials(run)["status"]))
    driver.send_signal(signal.SIGSTOP)  # so that there is time to look
    code, output = drivers.end("-m", "study", "status", "runs/run")
    driver.send_signal(signal.SIGCONT)
    assert (code, re.search(r"^6 trials: .*\b1 running\b", output, re.MULTILINE) is not None) == (0, True), output
    assert "go on:" not in output
    with pytest.raises(StudyError, match="is running now, in another process"):
        resume_study(run, show=False)
    driver.terminate()
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert "go on: python -m study resume runs/run" in output
    assert "Traceback" not in output
    assert set(load_trials(run)["status"]) <= {"pending", *ENDED}
    assert events(run)[-1] | {"time": 0} == {"time": 0, "event": "attempt_ended", "attempt": 1, "reason": "interrupted"}
    code, output = drivers.end(*RESUME)
    assert code == 0, output
    assert_as_undisturbed("SIGTERM", run, undisturbed, time.monotonic() - start, 2)


def damage(run: Path, how: str) -> None:
    """Do to Ray Tune's own state what a crash or a full disk does."""
    files = [*run.glob("tune/attempt-*/experiment_state*"), *run.glob("tune/attempt-*/*.pkl")]
    assert files
    for file in files:
        if how == "truncated":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        else:
            file.unlink()


def test_who_reads_the_output_goes_away(undisturbed: Path, overrides: list[str], drivers: Drivers) -> None:
    """As where a connection breaks, or what the output was piped into ends: nobody is left to tell."""
    run, start = drivers.directory / "runs/run", time.monotonic()
    driver = drivers.start(*RUN, *overrides)
    wait_for(lambda: recorded(run, "epoch") >= 1)
    assert driver.stdout
    driver.stdout.close()
    assert driver.wait(timeout=120) == 0
    assert_as_undisturbed("output without a reader", run, undisturbed, time.monotonic() - start, 1)


@pytest.mark.parametrize("how", ["truncated", pytest.param("missing", marks=pytest.mark.slow)])
def test_the_driver_is_killed_and_its_state_is_damaged(
    undisturbed: Path, overrides: list[str], drivers: Drivers, how: str
) -> None:
    run, start = drivers.directory / "runs/run", time.monotonic()
    driver = drivers.start(*RUN, *overrides)
    wait_for(lambda: recorded(run, "epoch") >= 6)
    driver.kill()
    driver.communicate()
    damage(run, how)
    with (run / "events.jsonl").open("a") as log:
        log.write('{"time": 1.0, "event": "epo')  # what was being written
    assert "running" not in set(load_trials(run)["status"])
    code, output = drivers.end("-m", "study", "status", "runs/run")
    assert code == 0
    assert "go on: python -m study resume runs/run" in output
    assert "running" not in output
    code, output = drivers.end("-m", "analysis", "trials", "runs/run", "--query", "status == 'pending'")
    assert code == 0
    assert output.count("pending") == (load_trials(run)["status"] == "pending").sum()
    code, output = drivers.end(*RESUME)
    assert code == 0, output
    lines = (run / "events.jsonl").read_text().splitlines()
    (run / "events.jsonl").write_text("".join(line + "\n" for line in lines if line.endswith("}")))
    assert_as_undisturbed(f"driver SIGKILL, state {how}", run, undisturbed, time.monotonic() - start, 2)


@pytest.mark.slow
def test_the_driver_is_killed_at_twenty_random_moments(
    undisturbed: Path, overrides: list[str], drivers: Drivers
) -> None:
    """Five while the study starts, the others while it trains or ends; one that came to its end is begun anew."""
    run, start, rng = drivers.directory / "runs/run", time.monotonic(), random.Random(0)
    kills, after_epochs = 0, 0
    while kills < 20:
        trials, epochs = recorded(run, "trial_started"), recorded(run, "epoch")
        driver = drivers.start(*(RESUME if run.exists() else (*RUN, *overrides)))
        if kills % 4:
            wait_for(lambda d=driver, before=trials: recorded(run, "trial_started") > before or d.poll() is not None)
        try:
            driver.communicate(timeout=rng.uniform(0, 10))
        except subprocess.TimeoutExpired:
            driver.kill()
            driver.communicate()
            kills += 1
            after_epochs += recorded(run, "epoch") > epochs
            assert not run.exists() or "running" not in set(load_trials(run)["status"])
        else:
            assert count(run)["lost"] == 0
            shutil.rmtree(run)
    code, output = drivers.end(*(RESUME if run.exists() else (*RUN, *overrides)))
    assert code == 0, output
    assert after_epochs >= 5
    attempts = recorded(run, "attempt_started")
    assert_as_undisturbed("driver SIGKILL, 20 times", run, undisturbed, time.monotonic() - start, attempts)


def fill(file: Path) -> None:
    """Write until there is no room."""
    with contextlib.suppress(OSError), file.open("wb") as out:
        while True:
            out.write(bytes(2**16))


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


@pytest.mark.slow
def test_the_disk_of_temporary_files_is_full(undisturbed: Path, overrides: list[str], drivers: Drivers) -> None:
    """There a checkpoint is written before it goes into the run."""
    run, start = drivers.directory / "runs/run", time.monotonic()
    with small_disk(drivers.directory / "tmp", "200k"):
        drivers.settings = {"TMPDIR": str(drivers.directory / "tmp")}
        code, output = drivers.end(*RUN, *overrides)
    assert code == 2
    assert re.search(r"the disk is full \(.*No space left on device.*make room and go on by", output), output
    assert set(load_trials(run)["status"]) == {"pending"}
    drivers.settings = {}
    code, output = drivers.end(*RESUME)
    assert code == 0, output
    assert_as_undisturbed("disk of /tmp full", run, undisturbed, time.monotonic() - start, 2)


def test_the_disk_is_full(undisturbed: Path, overrides: list[str], drivers: Drivers) -> None:
    run, start = drivers.directory / "runs/run", time.monotonic()
    with small_disk(run.parent, "80m"):
        driver = drivers.start(*RUN, *overrides)
        wait_for(lambda: recorded(run, "epoch") >= 3)
        fill(run.parent / "ballast")
        output, _ = driver.communicate(timeout=120)
        assert driver.returncode == 2
        assert "the disk is full" in output
        assert "make room and go on by python -m study resume" in output
        assert "Traceback" not in output
        assert set(load_trials(run)["status"]) <= {"pending", *ENDED}
        (run.parent / "ballast").unlink()
        code, output = drivers.end(*RESUME)
        assert code == 0, output
        lines = (run / "events.jsonl").read_text().splitlines()
        (run / "events.jsonl").write_text("".join(line + "\n" for line in lines if line.endswith("}")))
        assert_as_undisturbed("disk full", run, undisturbed, time.monotonic() - start, 2)


MEMORY = """
import json, os, sys
from pathlib import Path
import ray
import study.attempt
from study import load_settings, run_study

once, original = Path("once"), study.attempt.run_trial

def take_memory():
    Path(once_file).touch()
    hog = [bytearray(os.urandom(1) * 2**26) for _ in range(int(megabytes) // 64)]
    import time; time.sleep(60)

def run_trial(config, **arguments):
    from ray import tune
    report = tune.report
    chosen = (config["trial"]["lr"], config["trial"]["augmentation"]) == (0.02, "flip+crop")
    if chosen and always:
        take_memory()
    def report_and(metrics, **more):
        report(metrics, **more)
        if chosen and metrics["epoch"] == 2 and not Path(once_file).exists():
            take_memory()
    tune.report = report_and
    try:
        original(config, **arguments)
    finally:
        tune.report = report

once_file, megabytes, always = str(once.absolute()), sys.argv[1], sys.argv[2] == "always"
study.attempt.run_trial = run_trial
print(run_study(load_settings("demo", sys.argv[3:]), Path("runs/run"), show=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["once", "always"])
def test_a_worker_is_killed_for_memory(undisturbed: Path, overrides: list[str], drivers: Drivers, how: str) -> None:
    run, start = drivers.directory / "runs/run", time.monotonic()
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(memory[name].split()[0]) / 1024 for name in ("MemTotal", "MemAvailable"))
    threshold = 1 - free / total + 3000 / total  # three GB above what is in use now
    if threshold > 0.95:
        pytest.skip("needs four GB of free memory")
    drivers.settings = {"RAY_memory_usage_threshold": f"{threshold:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    code, output = drivers.end("-c", MEMORY, "4000", how, *overrides)
    assert (drivers.directory / "once").exists()
    assert code == 0, output
    assert output.strip().endswith("True"), output
    errors = [e for e in events(run) if "error" in e]
    assert all("low on memory" in e["error"] for e in errors)
    if how == "once":
        assert [e["event"] for e in errors] == ["trial_lost"]
        assert_as_undisturbed("worker killed for memory", run, undisturbed, time.monotonic() - start, 2)
    else:
        assert [e["event"] for e in errors] == ["trial_lost"] * (study.recorder.MAX_LOSSES - 1) + ["trial_failed"]
        trials = load_trials(run)
        assert list(trials["status"]).count("failed") == 1
        assert trials["status"].isin(ENDED).all()
        table = {"fault": "a trial always killed for memory", **count(run), "attempts": study.recorder.MAX_LOSSES + 1}
        TABLE.append({**table, "seconds": round(time.monotonic() - start, 1)})


NODES = """
import json, os, sys, threading, time
from pathlib import Path
del os.environ["RAY_OVERRIDE_RESOURCES"]
import ray
from ray.cluster_utils import Cluster
from analysis import load_trials
from study import load_settings, run_study

run = Path("runs/run").absolute()
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
ray.init(address=cluster.address, log_to_driver=False)
nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
cluster.wait_for_nodes()
ended = []
settings = load_settings("demo", sys.argv[1:])
thread = threading.Thread(target=lambda: ended.append(run_study(settings, run, show=False, address=cluster.address)))
thread.start()

def epochs():
    file = run / "events.jsonl"
    return [e for e in map(json.loads, file.read_text().splitlines()) if e["event"] == "epoch"] if file.exists() else []

while len(epochs()) < 6:
    time.sleep(0.05)
free = ray._private.state.available_resources_per_node()
victim = next(node for node in nodes if free[node.node_id].get("CPU", 0) < 1)
killed = time.time()
cluster.remove_node(victim, allow_graceful=False)
thread.join()
Path("killed.json").write_text(json.dumps([killed, ended]))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_node_is_killed(ray_session: None, overrides: list[str], drivers: Drivers, tmp_path: Path) -> None:
    """Trials run side by side here, so that the order of ASHA's decisions is chance: all of them run to their end."""
    run, start = drivers.directory / "runs/run", time.monotonic()
    code, output = drivers.end("-c", NODES, *overrides, "early_stopping=none")
    seconds = time.monotonic() - start
    assert code == 0, output
    killed, ended = json.loads((drivers.directory / "killed.json").read_text())
    assert ended == [True]
    log = events(run)
    (again,) = {e["trial_id"] for e in log if e["event"] == "trial_lost"}
    progress = min(
        e["time"] for e in log if e.get("trial_id") == again and e["event"] == "epoch" and e["time"] > killed
    )
    undisturbed = tmp_path / "undisturbed"
    assert run_study(load_settings("demo", [*overrides, "early_stopping=none"]), undisturbed, show=False)
    attempts = recorded(run, "attempt_started")
    assert_as_undisturbed("node killed", run, undisturbed, seconds, attempts)
    TABLE[-1]["elsewhere_after_seconds"] = round(progress - killed, 1)
    assert progress - killed <= 10


def test_a_trial_diverges(undisturbed: Path, overrides: list[str], tmp_path: Path) -> None:
    """Its row survives, the others are what they would have been without it."""
    run, start = tmp_path / "run", time.monotonic()
    more = [*overrides, "space.augmentation=[none]", "space.lr=[0.05,100]", "space.weight_decay=[0.0005,1]"]
    assert run_study(load_settings("demo", [*more, "early_stopping=none"]), run, show=False)
    trials = load_trials(run)
    diverged = trials.query("lr == 100 and weight_decay == 1").iloc[0]
    assert diverged["status"] == "diverged"
    assert "training loss was" in diverged["stop_reason"]
    assert diverged["epochs"] < 4
    healthy = trials.query("lr == 0.05 and weight_decay == 0.0005")["trial_id"]
    metrics = ["epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy"]
    tables = [load_epochs(r) for r in (run, undisturbed)]
    here, there = (table[table["trial_id"].isin(healthy)][metrics].to_dict("records") for table in tables)
    assert len(there) >= 1
    assert here[: len(there)] == there
    TABLE.append({"fault": "NaN", **count(run), "attempts": 1, "seconds": round(time.monotonic() - start, 1)})


@pytest.mark.slow
def test_two_studies_at_once_do_not_touch_each_other(undisturbed: Path, overrides: list[str], drivers: Drivers) -> None:
    start = time.monotonic()
    both = [drivers.start(*RUN[:-1], name, *overrides) for name in ("one", "two")]
    for driver in both:
        output, _ = driver.communicate(timeout=300)
        assert driver.returncode == 0, output
    for name in ("one", "two"):
        run = drivers.directory / "runs" / name
        assert_as_undisturbed("another study beside it", run, undisturbed, time.monotonic() - start, 1)


def test_going_on_in_this_process_gives_the_undisturbed_result(
    undisturbed: Path, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the driver itself: its callbacks raise, attempt after attempt, the last time after the last epoch."""
    monkeypatch.setattr(study.supervise, "_WAIT_SECONDS", 0.0)
    original, calls, last = study.recorder.Recorder.on_trial_result, [], len(load_epochs(undisturbed))
    share_out, devices = study.run.share_out, []
    monkeypatch.setattr(study.run, "share_out", lambda s, *rest: devices.append(s.device) or share_out(s, *rest))

    def on_trial_result(self: Any, *arguments: Any, **more: Any) -> None:
        original(self, *arguments, **more)
        calls.append(1)
        if len(calls) in (3, 7, last):
            raise RuntimeError("the driver stumbles")

    monkeypatch.setattr(study.recorder.Recorder, "on_trial_result", on_trial_result)
    start = time.monotonic()
    assert run_study(load_settings("demo", overrides), tmp_path / "run", show=False)
    assert_as_undisturbed("fit() raises", tmp_path / "run", undisturbed, time.monotonic() - start, 3)
    assert devices == ["auto", "cpu", "cpu", "cpu"]  # what was found at first is kept
    assert resume_study(tmp_path / "run", show=False)
