"""What several test modules share: one small finished study, made once."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import ray
import torch
from PIL import Image

# Ray of the tests, also where a test lets a command start it, has one CPU: trials run one at a time, so that ASHA
# decides the same every time, and in one thread, for beside other processes the threads of a trial wait for each other.
os.environ["RAY_OVERRIDE_RESOURCES"] = json.dumps({"CPU": 1, "GPU": 0})
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"

# Small enough for seconds; the trials with a learning rate of 1e-7 learn nothing, so ASHA stops them.
TINY = (
    "dataset=folder",
    "train_size=null",
    "val_fraction=0.25",
    "max_epochs=3",
    "grace_period=1",
    "fixed.width=4",
    "fixed.batch_size=16",
    "fixed.precision=fp32",
    "fixed.warmup_epochs=0",
    "space.lr=[0.05,1e-7]",
    "space.augmentation=[none,flip+crop]",
    "space.optimizer=[sgd]",
    "seed=1",
)
COLORS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40), "white": (230, 230, 230)}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures in four easily told classes, 40 of each."""
    directory = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, color in COLORS.items():
        (directory / name).mkdir()
        for i in range(40):
            noisy = np.array(color) + rng.normal(0, 25, (32, 32, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(directory / name / f"{i}.png")
    return directory


@pytest.fixture(scope="session")
def tiny(pictures: Path) -> tuple[str, ...]:
    """Overrides of the preset demo for a study of four trials that takes seconds."""
    return (*TINY, f"data_dir={pictures}")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with its own directory, for all studies of the tests; nobody else's Ray is touched."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as directory:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, _temp_dir=directory)
        yield
        ray.shutdown()


@pytest.fixture
def on_two_cpus(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """A function that runs a command in the test's folder, with a Ray of its own that has two CPUs."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as directory:
        own = {"RAY_TMPDIR": directory, "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 2, "GPU": 0})}
        environment = os.environ | own | {"PYTHONPATH": str(Path(__file__).parent.parent)}

        def run(*words: str) -> None:
            command = [sys.executable, *words]
            ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert ran.returncode == 0, ran.stdout + ran.stderr

        yield run


@pytest.fixture(scope="session")
def finished_run(ray_session: None, tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a tiny study that ran to its end."""
    from study import load_settings, run_study

    run = tmp_path_factory.mktemp("runs") / "tiny"
    assert run_study(load_settings("demo", tiny), run, show=False)
    return run


@pytest.fixture(autouse=True)
def _single_thread() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the modules that take longest: with several processes, none is left alone with one at the end."""
    longest = ["test_study.py", "test_faults.py", "test_commands.py", "test_report.py", "test_remote.py"]
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what became of the studies to which something was done, in whichever process."""
    reports = [report for group in terminalreporter.stats.values() for report in group]
    ended = [report for report in reports if getattr(report, "when", "") == "teardown"]
    rows = [json.loads(text) for report in ended for name, text in report.user_properties if name == "fault"]
    if rows:
        terminalreporter.section("faults: trials lost, rows doubled, epochs redone by the trial with the most")
        terminalreporter.write_line(pd.DataFrame(rows).to_string(index=False, na_rep=""))
