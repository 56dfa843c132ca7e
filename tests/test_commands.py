"""The three commands as a newcomer types them, in processes of their own."""

import importlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pandas as pd
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

import study.__main__ as study_main
from analysis import compare_recipes, decide, load_epochs, load_measures, load_trials, search_space_health
from analysis.__main__ import KEY_COLUMNS, TABLES

ROOT = Path(__file__).parent.parent
SMALL = ("train_size=300", "max_epochs=2", "space.augmentation=[none]", "fixed.width=8", "fixed.batch_size=50")


@pytest.fixture(scope="module")
def ray_directory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as directory:
        yield directory


def _environment(ray_directory: str) -> dict[str, str]:
    return {**os.environ, "RAY_TMPDIR": ray_directory, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def _command(ray_directory: str, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=cwd, env=_environment(ray_directory), capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def workplace(ray_directory: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a small study of shapes100 was run and reported on."""
    cwd = tmp_path_factory.mktemp("workplace")
    ran = _command(ray_directory, cwd, "study", "run", "--name", "small", *SMALL)
    assert ran.returncode == 0, ran.stderr
    assert "4 trials: " in ran.stdout
    assert ran.stdout.rstrip().endswith("next: python -m analysis report runs/small")
    reported = _command(ray_directory, cwd, "analysis", "report", "runs/small", "--top", "2")
    assert reported.returncode == 0, reported.stderr
    assert "report: runs/small/report/report.html" in reported.stdout
    return cwd


def test_progress_says_how_each_trial_ended(workplace: Path, ray_directory: str) -> None:
    status = _command(ray_directory, workplace, "study", "status", "runs/small")
    assert status.returncode == 0
    for trial_id in load_trials(workplace / "runs/small")["trial_id"]:
        assert trial_id in status.stdout
    listing = _command(ray_directory, workplace, "study", "list")
    assert "runs/small  finished  shapes100  4/4" in listing.stdout


def test_report_holds_what_it_should(workplace: Path) -> None:
    report = workplace / "runs/small/report"
    html = (report / "report.html").read_text()
    best = load_trials(workplace / "runs/small").sort_values("val_accuracy").iloc[-1]
    titles = ("Accuracy of each recipe", "What can be claimed", "What the networks look at", "What the search found",
              "All trials", "How it was measured", "How to reproduce it")  # fmt: skip
    places = [html.index(f">{title}</h2>") for title in titles]
    assert places == sorted(places)
    for text in ("Learning curves", "What is taken for what", "Is it as right as it is confident?", "Who ran when"):
        assert text in html
    for text in (best["trial_id"], "python -m study run --name small", "of its Grad-CAM and"):
        assert text in html
    for control in ("Pooled saliency", "Random map", "Edges (Sobel)", "Middle of the image"):
        assert f'<th scope="col" class="n">{control}</th>' in html
    claims = decide(load_measures(workplace / "runs/small"), load_trials(workplace / "runs/small"))
    claims = claims[claims["verdict"] != "no data"].drop_duplicates("claim")
    assert len(claims) == 4  # those about maps; it has neither setups nor plain training
    for row in claims.itertuples():
        assert f'<td class="words">{row.claim}</td><td>{row.verdict}</td>' in html
    # One file: every picture inside, nothing from elsewhere.
    assert html.count("data:image/png;base64,") >= 4
    assert "http://" not in html
    assert "https://" not in html
    assert html.count("<script") == 1  # of its own, with its hash in the page's policy
    markdown = (report / "report.md").read_text()
    assert "| Recipe | Validation | Test |" in markdown
    for name in ("accuracy", "curves", "learning_rate", "panel", "isolation", "pareto", "confusion", "timeline"):
        assert f"figures/{name}.png" in markdown
        with Image.open(report / "figures" / f"{name}.png") as figure:
            assert min(figure.size) > 200


def test_report_again_reads_what_was_computed(workplace: Path, ray_directory: str) -> None:
    arrays = sorted((workplace / "runs/small/explanations").glob("*/arrays.npz"))
    assert len(arrays) == 2
    before = [file.stat().st_mtime_ns for file in arrays]
    again = _command(
        ray_directory, workplace, "analysis", "report", "runs/small", "--top", "2", "--output", "elsewhere"
    )
    assert again.returncode == 0
    assert [file.stat().st_mtime_ns for file in arrays] == before
    assert (workplace / "elsewhere/report.html").exists()


def test_all_trials_are_explained_when_asked_and_their_measures_are_tables(workplace: Path, ray_directory: str) -> None:
    run = workplace / "runs/small"
    with_checkpoint = load_trials(run)["checkpoint"].notna()
    done = _command(ray_directory, workplace, "analysis", "explain", "runs/small", "--all")
    assert done.returncode == 0, done.stderr
    assert f"{with_checkpoint.sum()} trials are explained: runs/small/explanations" in done.stdout
    assert f"{with_checkpoint.sum() - 2} of {with_checkpoint.sum() - 2}" in done.stderr  # two were, for the report
    trials = load_trials(run)
    for column in ("test_accuracy", "saliency_energy_on_object", "gradcam_patch_fidelity_low", "gradcam_gini_high"):
        assert (trials[column].notna() == with_checkpoint).all()
    words = ("claims", "runs/small", "--columns", "claim,verdict,difference", "--format", "csv")
    claims = pd.read_csv(io.StringIO(_command(ray_directory, workplace, "analysis", *words).stdout))
    expected = decide(load_measures(run), trials)
    assert claims["claim"].to_list() == expected["claim"].to_list()
    assert claims["difference"].to_list() == pytest.approx(expected["difference"].to_list(), nan_ok=True)
    words = ("measures", "runs/small", "--query", "measure == 'grid_pointing'", "--format", "csv")
    measures = pd.read_csv(io.StringIO(_command(ray_directory, workplace, "analysis", *words).stdout))
    assert set(measures["measure"]) == {"grid_pointing"}


def test_trials_on_the_command_line_are_those_of_python(workplace: Path, ray_directory: str) -> None:
    query = "optimizer == 'muon' and lr < 0.005"
    shown = _command(ray_directory, workplace, "analysis", "trials", "runs/small", "--query", query, "--format", "csv")
    assert shown.returncode == 0
    expected = load_trials(workplace / "runs/small").query(query)
    assert len(expected) == 1
    got = pd.read_csv(io.StringIO(shown.stdout), dtype={"trial_id": str})
    assert list(got["trial_id"]) == list(expected["trial_id"])
    assert list(got.columns) == list(expected.columns)
    assert got["val_accuracy"].to_list() == expected["val_accuracy"].to_list()


@pytest.mark.parametrize("fmt", ["csv", "json", "parquet", "table"])
def test_epochs_in_every_format(workplace: Path, ray_directory: str, fmt: str) -> None:
    words = ("epochs", "runs/small", "--sort=-val_accuracy", "--columns", "trial_id,epoch,val_accuracy")
    written = _command(ray_directory, workplace, "analysis", *words, "--output", f"e.{fmt}")
    assert written.returncode == 0, written.stderr
    file = workplace / f"e.{fmt}"
    if fmt == "table":
        assert file.read_text().splitlines()[0].split() == ["trial_id", "epoch", "val_accuracy"]
        return
    table = {"csv": pd.read_csv, "json": pd.read_json, "parquet": pd.read_parquet}[fmt](file)
    assert list(table.columns) == ["trial_id", "epoch", "val_accuracy"]
    assert table["val_accuracy"].is_monotonic_decreasing
    assert len(table) == load_trials(workplace / "runs/small")["epochs"].sum()


def test_anyones_pictures_are_explained(workplace: Path, ray_directory: str) -> None:
    Image.new("RGBA", (300, 200), (255, 0, 0, 128)).save(workplace / "red.png")
    (workplace / "broken.jpg").write_bytes(b"no picture")
    images = ("--images", "red.png", "broken.jpg", "absent.png")
    done = _command(ray_directory, workplace, "explain", "runs/small", *images)
    assert done.returncode == 2
    assert "-> maps/red.png" in done.stdout
    assert "broken.jpg: not a picture that can be read" in done.stderr
    assert "absent.png: not a picture that can be read" in done.stderr
    assert "2 of 3 files were skipped" in done.stderr
    with Image.open(workplace / "maps/red.png") as picture:
        assert picture.width > 3 * picture.height
    trial_id = load_trials(workplace / "runs/small")["trial_id"].iloc[-1]
    named = _command(ray_directory, workplace, "explain", "runs/small", "--trial", trial_id, "--images", "red.png")
    assert named.returncode == 0, named.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["study", "run", "max_epoch=5"], "max_epoch is not a setting of a study (did you mean max_epochs?)"),
        (["study", "run", "--preset", "demmo"], "no preset 'demmo' (did you mean demo?)"),
        (["study", "run", "--name", "../x"], "must be a plain folder name"),
        (["study", "run", "--name", "small"], "runs/small: exists"),
        (["study", "run", "device=gpu"], "device: 'gpu' should be 'auto', 'cpu'"),
        (["study", "resume", "runs/none"], "runs/none: no such run"),
        (["study", "status", "."], "is no run directory"),
        (["study", "list", "nowhere"], "nowhere: no such directory"),
        (["analysis", "trials", "runs/none"], "no such run"),
        (["analysis", "trials", "runs/small", "--query", "lrr > 1"], "columns are trial_id, status,"),
        (["analysis", "trials", "runs/small", "--sort", "acc"], "--sort 'acc': no such column"),
        (["analysis", "trials", "runs/small", "--columns", "lr,acc"], "--columns 'acc': no such column"),
        (["analysis", "trials", "runs/small", "--format", "parquet"], "give --output FILE"),
        (["analysis", "trials", "runs/small", "--output", "no/where.txt"], "cannot be written"),
        (["analysis", "report", "runs/small", "--top", "-1"], "must be 0 or more"),
        (["analysis", "report", "runs/none"], "no such run"),
        (["analysis", "explain", "runs/small", "--top", "0"], "must be 1 or more"),
        (["analysis", "explain", "runs/none"], "no such run"),
        (["analysis", "claims", "runs/none"], "no such run"),
        (["analysis", "measures", "runs/small", "--query", "map"], "is not true or false for each row"),
        (["explain", "runs/small", "--trial", "zzz", "--images", "x"], "no trial with a checkpoint"),
        (["explain", "runs/none", "--images", "x"], "no such run"),
    ],
)
def test_bad_input_ends_in_a_sentence(
    workplace: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(workplace)
    assert importlib.import_module(f"{words[0]}.__main__").main(words[1:]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_settings_may_stand_anywhere_in_a_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    args = study_main._parse(["run", "max_epochs=3", "--name", "x", "fixed.width=4", "--quiet", "fixed.lr=0.1"])
    assert (args.name, args.overrides) == ("x", ["max_epochs=3", "fixed.width=4", "fixed.lr=0.1"])
    for words in (["run", "--naem=x"], ["run", "a=1", "--quiet", "more"], ["status", "runs/x", "max_epochs=3"]):
        with pytest.raises(SystemExit) as ended:
            study_main._parse(words)
        assert ended.value.code == 2
        assert f"unrecognized arguments: {words[-1]}\n" in capsys.readouterr().err


@pytest.mark.parametrize("lost", [False, True])
def test_a_study_all_of_whose_trials_failed_has_not_gone_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    run = tmp_path / "run"
    shutil.copytree(ROOT / "tests/runs/demo", run)
    told = [{"event": "trial_lost", "error": "no"}] * lost + [{"event": "trial_failed", "error": "no", "lost": lost}]
    failed = [event | {"trial_id": name} for name in load_trials(run)["trial_id"] for event in told]
    (run / "events.jsonl").write_text("".join(json.dumps({"time": 1.0, **line}) + "\n" for line in failed))
    monkeypatch.setattr(study_main, "resume_study", lambda *ignored, **options: True)
    assert study_main.main(["resume", str(run)]) == 2
    shown = capsys.readouterr()
    assert "8 trials: 8 failed" in shown.out
    again = f"; python -m study resume {run} tries what was lost again" if lost else ""
    assert shown.err == f"error: {run}: no trial came to an accuracy, so there is nothing to report on{again}\n"


@pytest.mark.parametrize("package", ["study", "analysis", "explain"])
def test_help_is_there(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"{package}.__main__").main(["--help"])
    assert ended.value.code == 0
    assert f"usage: python -m {package}" in capsys.readouterr().out


def test_recipes_and_health_are_tables(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    main = importlib.import_module("analysis.__main__").main
    assert main(["recipes", "runs/small", "--format", "json"]) == 0
    recipes = json.loads(capsys.readouterr().out)
    assert [row["recipe"] for row in recipes] == compare_recipes(load_trials("runs/small"), 30)["recipe"].to_list()
    assert recipes[0]["test_seeds"] == 1
    assert 0 < recipes[0]["gradcam_energy_on_object_low"] < recipes[0]["gradcam_energy_on_object"] < 1
    assert main(["recipes", "runs/small"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["budget", "recipe", "lr", *KEY_COLUMNS["recipes"][2:]]
    assert len(rows) == len(recipes)
    assert main(["health", "runs/small"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == search_space_health(load_trials("runs/small"), 30)["text"].to_list()
    assert main(["health", "runs/small", "--query", "warning == 'none'"]) == 0
    assert capsys.readouterr().out.startswith("no rows; columns: warning, ")


@pytest.mark.parametrize("name", list(TABLES))
def test_every_table_is_a_command(
    workplace: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the terminal with a row or a sentence, and as a file that holds what Python's function returns."""
    monkeypatch.chdir(workplace)
    main = importlib.import_module("analysis.__main__").main
    assert main([name, "runs/small"]) == 0
    assert capsys.readouterr().out.strip()
    assert main([name, "runs/small", "--format", "parquet", "--output", f"{name}.parquet"]) == 0
    expected = TABLES[name][0](Path("runs/small"))
    got = pd.read_parquet(f"{name}.parquet")
    pd.testing.assert_frame_equal(got, expected, check_dtype=name not in ("recipes",))


def test_tensorboard_finds_the_curves_in_the_run_directory(workplace: Path) -> None:
    """Read as the format is defined: of each record its length, a checksum, an event, and another checksum."""
    run = workplace / "runs/small"
    epochs = load_epochs(run)
    for trial_id, curve in epochs.groupby("trial_id"):
        (file,) = (run / "tune/attempt-1" / trial_id).glob("events.out.tfevents.*")
        content, place, found = file.read_bytes(), 0, []
        while place < len(content):
            (length,) = struct.unpack("<Q", content[place : place + 8])
            event = Event.FromString(content[place + 12 : place + 12 + length])
            found += [value.simple_value for value in event.summary.value if value.tag == "ray/tune/val_accuracy"]
            place += 12 + length + 4
        assert found == pytest.approx(curve["val_accuracy"].to_list(), rel=1e-6)


def test_claims_in_the_terminal_are_sentences(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    assert importlib.import_module("analysis.__main__").main(["claims", "runs/small"]) == 0
    lines = capsys.readouterr().out.splitlines()
    claims = decide(load_measures("runs/small"), load_trials("runs/small")).drop_duplicates("claim")
    for row in claims.itertuples():
        assert lines[lines.index(row.claim) + 1].startswith(f"  {row.verdict}")
    assert max(map(len, lines)) <= 140


def test_a_run_is_exported_for_optuna_dashboard(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    main = importlib.import_module("analysis.__main__").main
    assert main(["export", "runs/small", "--optuna", "small.log"]) == 0
    assert "optuna-dashboard small.log" in capsys.readouterr().out
    study = optuna.load_study(study_name="small", storage=JournalStorage(JournalFileBackend("small.log")))
    trials = load_trials("runs/small")
    assert [trial.user_attrs["trial_id"] for trial in study.trials] == trials["trial_id"].to_list()
    assert study.best_value == trials.query("status == 'completed'")["val_accuracy"].max()
    assert main(["export", "runs/small", "--optuna", "small.log"]) == 2
    assert "small.log: exists already" in capsys.readouterr().err


# SIGTERM takes the same way, in tests/test_faults.py.
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_end_it_cleanly_and_resume_goes_on(
    workplace: Path, ray_directory: str, number: signal.Signals
) -> None:
    """The terminal tells all of its processes, also Ray's."""
    run = workplace / f"runs/stopped-{number}"
    command = [sys.executable, "-m", "study", "run", "--name", run.name, *SMALL, "max_epochs=4", "train_size=600"]
    process = subprocess.Popen(
        command,
        cwd=workplace,
        env=_environment(ray_directory),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # tests in the background inherit it ignored
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and '"event": "epoch"' not in _log(run):
        time.sleep(0.1)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"go on: python -m study resume runs/{run.name}" in output
    assert "Traceback" not in output
    before = load_trials(run)
    assert len(before) == 4
    assert set(before["status"]) & {"pending"}
    assert before["epochs"].sum() >= 1
    resumed = _command(ray_directory, workplace, "study", "resume", f"runs/{run.name}")
    assert resumed.returncode == 0, resumed.stderr
    after = load_trials(run)
    assert set(after["status"]) <= {"completed", "stopped", "diverged"}
    assert (after["epochs"] >= before["epochs"]).all()
    # What was done before the interruption was not done again.
    events = [json.loads(line) for line in _log(run).splitlines()]
    assert [e["reason"] for e in events if e["event"] == "attempt_ended"] == ["interrupted", "finished"]
    ran = [(e["trial_id"], e["epoch"]) for e in events if e["event"] == "epoch"]
    assert len(set(ran)) == len(ran)


def _log(run: Path) -> str:
    return (run / "events.jsonl").read_text() if (run / "events.jsonl").exists() else ""
