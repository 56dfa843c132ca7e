"""``python -m study check-cluster``: the shipped file passes, and what is broken is refused with its place."""

import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from study.__main__ import main
from study.check_cluster import TOKEN, check_cluster

ROOT = Path(__file__).parents[1]
SHIPPED = (ROOT / "cluster.yaml").read_text()
RAY = version("ray")
TOKEN_MODE = "--env RAY_AUTH_MODE=token"
OPEN = "RAY_AUTH_MODE=token is missing"

# An on-premise cluster, of machines that are there.
LOCAL = f"""
cluster_name: lab
provider: {{type: local, head_ip: 192.0.2.1, worker_ips: [192.0.2.2, 192.0.2.3]}}
auth: {{ssh_user: me}}
file_mounts: {{{TOKEN}: {TOKEN}}}
head_start_ray_commands:
  - ray stop
  - RAY_AUTH_MODE=token ray start --head --port=6379 --dashboard-host=127.0.0.1
worker_start_ray_commands:
  - ray stop
  - RAY_AUTH_MODE=token ray start --address=$RAY_HEAD_IP:6379
"""

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory without a token."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a cluster's file is to be written, beside what it copies."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "requirements.txt").touch()
    monkeypatch.chdir(folder)
    return folder / "cluster.yaml"


def put_token(home: Path) -> None:
    (home / ".ray").mkdir()
    (home / ".ray/auth_token").write_text("0" * 64)
    (home / ".ray/auth_token").chmod(0o600)


def write(file: Path, text: str, change: Change | None = None) -> Path:
    if change:
        config = yaml.safe_load(text)
        change(config)
        text = yaml.safe_dump(config, sort_keys=False)
    file.write_text(text)
    return file


def command(file: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["check-cluster", str(file)])
    return code, *capsys.readouterr()


def refused(file: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The sentences in which a file is refused, without its name."""
    code, out, err = command(file, capsys)
    assert (code, out) == (2, "")
    lines = err.splitlines()
    for line in lines:
        assert line.startswith(f"error: {file}: ")
    return [line.removeprefix(f"error: {file}: ") for line in lines]


# ---- What passes


def test_shipped_file_has_no_errors_and_says_what_is_left_to_do(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    wrong, to_do = check_cluster(ROOT / "cluster.yaml")
    assert wrong == []
    code, out, err = command(ROOT / "cluster.yaml", capsys)
    assert (code, err) == (0, "")
    file = ROOT / "cluster.yaml"
    assert out.splitlines() == [
        f"{file}: nothing is wrong, as far as can be seen offline",
        *(f"before ray up: {sentence}" for sentence in to_do),
        f"next: ray up {file}",
    ]
    assert [sentence.split(":")[0] for sentence in to_do] == [
        "make the cluster's token",
        "put your own in place of fs-00000000",
    ]


def test_missing_token_is_left_to_do_until_it_exists(file, home):
    write(file, SHIPPED)
    wrong, to_do = check_cluster(file)
    assert wrong == []
    assert f"make the cluster's token: ray get-auth-token --generate && chmod 600 {TOKEN}" in to_do
    put_token(home)
    (home / ".ray/auth_token").chmod(0o644)  # as Ray makes it
    assert f"let nobody else read the cluster's token: chmod 600 {TOKEN}" in check_cluster(file)[1]
    (home / ".ray/auth_token").chmod(0o600)
    assert check_cluster(file) == ([], ["put your own in place of fs-00000000"])


def test_nothing_is_left_to_do_once_the_placeholder_is_replaced(file, home):
    put_token(home)
    assert check_cluster(write(file, SHIPPED.replace("fs-00000000", "fs-0123456789abcdef0"))) == ([], [])


@pytest.mark.parametrize("placeholder", ["CHANGE_ME", "FIXME"])
def test_other_placeholders_are_left_to_do_too(placeholder, file, home):
    put_token(home)
    write(file, SHIPPED, lambda c: c["auth"].update(ssh_user=placeholder))
    assert check_cluster(file) == ([], [f"put your own in place of {placeholder}, fs-00000000"])


def test_file_is_left_as_it_is(file):
    write(file, SHIPPED)
    check_cluster(file)
    assert file.read_text() == SHIPPED
    assert sorted(path.name for path in file.parent.iterdir()) == ["cluster.yaml", "requirements.txt"]


def test_on_premise_file_passes(file, home, capsys):
    put_token(home)
    code, out, err = command(write(file, LOCAL), capsys)
    assert (code, err) == (0, "")
    assert "before ray up" not in out


def test_what_the_readme_says_of_your_own_machines_passes(file):
    (snippet,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)

    def change(config: dict[str, Any]) -> None:
        for name in ("head_node_type", "available_node_types", "initialization_commands"):
            del config[name]
        config.update(yaml.safe_load(snippet))

    assert check_cluster(write(file, SHIPPED, change))[0] == []


PASSING: dict[str, Change] = {
    "dashboard where Ray puts it": lambda c: c["head_start_ray_commands"].__setitem__(1, "ray start --head"),
    "dashboard on localhost": lambda c: c["head_start_ray_commands"].__setitem__(
        1, "ray start --head --dashboard-host localhost"
    ),
    "one image for all": lambda c: c.update(
        docker={"image": f"rayproject/ray:{RAY}", "container_name": "ray", "run_options": [TOKEN_MODE]}
    ),
    "token mode in the commands": lambda c: (
        c.pop("docker"),
        c["head_start_ray_commands"].insert(0, "export RAY_AUTH_MODE=token"),
        c["worker_start_ray_commands"].insert(0, "export RAY_AUTH_MODE=token"),
    ),
    "no zone": lambda c: c["provider"].pop("availability_zone"),
    "zones with spaces": lambda c: c["provider"].update(availability_zone="us-west-2a, us-west-2c"),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_is_right_passes(name, file):
    assert check_cluster(write(file, SHIPPED, PASSING[name]))[0] == []


def test_key_that_exists_passes(file, home):
    (home / "key.pem").touch()
    assert check_cluster(write(file, SHIPPED, lambda c: c["auth"].update(ssh_private_key="~/key.pem")))[0] == []


# ---- What is refused, and in which words


def worker(config: dict[str, Any]) -> dict[str, Any]:
    return config["available_node_types"]["gpu-worker"]


# A change of the shipped file, and what each sentence must hold.
BROKEN: dict[str, tuple[Change, list[list[str]]]] = {
    "misspelt key": (
        lambda c: c.update(max_worker=c.pop("max_workers")),
        [["max_worker: is not known here (did you mean max_workers?)"]],
    ),
    "misspelt key of docker": (
        lambda c: c["docker"].update(run_option=c["docker"].pop("run_options")),
        [["docker.run_option: is not known here (did you mean run_options?)"]],
    ),
    "misspelt key of a node type": (
        lambda c: worker(c).update(max_worker=worker(c).pop("max_workers")),
        [["available_node_types.gpu-worker.max_worker: is not known here (did you mean max_workers?)"]],
    ),
    "number that is none": (
        lambda c: c.update(idle_timeout_minutes="ten"),
        [["idle_timeout_minutes: ", "'ten'", "number"]],
    ),
    "more workers at least than at most": (
        lambda c: worker(c).update(min_workers=5),
        [["max_workers", "smaller", "min_workers"]],
    ),
    "head of no type": (
        lambda c: c.update(head_node_type="boss"),
        [["head_node_type", "must be one of", "available_node_types"]],
    ),
    "node type without resources": (
        lambda c: worker(c).pop("resources"),
        [["available_node_types.gpu-worker: 'resources' is missing"]],
    ),
    "unknown provider": (lambda c: c["provider"].update(type="awz"), [["provider", "awz"]]),
    "docker without a container's name": (lambda c: c["docker"].pop("container_name"), [["container"]]),
    "docker without an image": (lambda c: c["docker"].pop("worker_image"), [["image"]]),
    "nothing there to copy": (
        lambda c: c["file_mounts"].update({"~/requirements.txt": "requirement.txt"}),
        [["file_mounts.~/requirements.txt: ", "there is no requirement.txt"]],
    ),
    "image with another Ray": (
        lambda c: c["docker"].update(head_image="rayproject/ray:2.9.0-py311"),
        [["docker.head_image: ", "rayproject/ray:2.9.0-py311 has Ray 2.9.0", f"here is {RAY}"]],
    ),
    "both images with another Ray": (
        lambda c: c["docker"].update(head_image="rayproject/ray:2.9.0", worker_image="rayproject/ray-ml:2.9.1-gpu"),
        [["docker.head_image: ", "has Ray 2.9.0"], ["docker.worker_image: ", "has Ray 2.9.1"]],
    ),
    "another Ray set up": (
        lambda c: c.update(setup_commands=['pip install "ray[tune]==2.9.0"']),
        [["setup_commands: ", "installs Ray 2.9.0", f"here is {RAY}"]],
    ),
    "another Ray set up on workers": (
        lambda c: c.update(worker_setup_commands=["pip install ray==2.9.0"]),
        [["worker_setup_commands: ", "installs Ray 2.9.0"]],
    ),
    "image of whatever version": (
        lambda c: c["docker"].update(worker_image="rayproject/ray:latest-gpu"),
        [["docker.worker_image: ", "rayproject/ray:latest-gpu does not pin", f"write rayproject/ray:{RAY}-"]],
    ),
    "image without a version": (
        lambda c: c["docker"].update(worker_image="rayproject/ray"),
        [["docker.worker_image: ", "rayproject/ray does not pin"]],
    ),
    "no commands that start the head": (
        lambda c: c.pop("head_start_ray_commands"),
        [["head_start_ray_commands: is missing", "dashboard"]],
    ),
    "no commands that start workers": (
        lambda c: c.update(worker_start_ray_commands=["ray stop"]),
        [["worker_start_ray_commands: has no ray start"]],
    ),
    "workers without the head's address": (
        lambda c: c.update(worker_start_ray_commands=["ray stop", "ray start --object-manager-port=8076"]),
        [["worker_start_ray_commands: ", "no --address=$RAY_HEAD_IP"]],
    ),
    "head that is none": (
        lambda c: c.update(head_start_ray_commands=["ray stop", "ray start --port=6379"]),
        [["head_start_ray_commands: ", "no --head"]],
    ),
    "a quote that does not end": (
        lambda c: c.update(head_start_ray_commands=["ray start --head --labels='a=b"]),
        [["head_start_ray_commands: ", "no shell could read it (No closing quotation)"]],
    ),
    "dashboard for everyone": (
        lambda c: c.update(head_start_ray_commands=["ray start --head --dashboard-host=0.0.0.0"]),
        [["head_start_ray_commands: ", "--dashboard-host 0.0.0.0", "use 127.0.0.1"]],
    ),
    "dashboard for everyone, with a space": (
        lambda c: c.update(head_start_ray_commands=["ray start --head --dashboard-host 0.0.0.0 --port=6379"]),
        [["head_start_ray_commands: ", "--dashboard-host 0.0.0.0", "use 127.0.0.1"]],
    ),
    "open to everyone": (
        lambda c: c["docker"]["run_options"].remove(TOKEN_MODE),
        [["head_start_ray_commands: ", OPEN], ["worker_start_ray_commands: ", OPEN]],
    ),
    "open to everyone without docker": (
        lambda c: c.pop("docker"),
        [["head_start_ray_commands: ", OPEN], ["worker_start_ray_commands: ", OPEN]],
    ),
    "token that stays here": (lambda c: c["file_mounts"].pop(TOKEN), [["file_mounts: ", f"has no {TOKEN}"]]),
    "no files at all": (lambda c: c.pop("file_mounts"), [["file_mounts: ", f"has no {TOKEN}"]]),
    "key that is not there": (
        lambda c: c["auth"].update(ssh_private_key="~/.ssh/none.pem"),
        [["auth.ssh_private_key: ", "there is no ~/.ssh/none.pem"]],
    ),
    "zone elsewhere": (
        lambda c: c["provider"].update(availability_zone="us-west-2a, us-east-1b"),
        [["provider.availability_zone: ", "us-east-1b is not in us-west-2"]],
    ),
    "machine of no type": (
        lambda c: worker(c)["node_config"].pop("InstanceType"),
        [["available_node_types.gpu-worker.node_config: ", "InstanceType is missing"]],
    ),
    "several at once": (
        lambda c: (c["auth"].update(ssh_private_key="no.pem"), c["provider"].update(availability_zone="eu-west-1a")),
        [["auth.ssh_private_key: ", "no.pem"], ["provider.availability_zone: ", "eu-west-1a"]],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_refused_with_its_place(name, file, capsys):
    change, expected = BROKEN[name]
    sentences = refused(write(file, SHIPPED, change), capsys)
    assert len(sentences) == len(expected), sentences
    for sentence, parts in zip(sentences, expected, strict=True):
        for part in parts:
            assert part in sentence


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("- cluster_name: a\n", ["must be a mapping", "list"]),
        ("cluster\n", ["must be a mapping", "str"]),
        ("", ["is empty"]),
        ("# cluster_name: a\n", ["is empty"]),
        (SHIPPED.replace("provider:\n", "provider\n"), ["not readable as YAML", "line 24", "':'"]),
        (SHIPPED.replace("  type: aws", "\ttype: aws"), ["not readable as YAML", "line 24", r"'\t'"]),
        (SHIPPED + "\nmax_workers: 5\n", ["not readable as YAML", "max_workers stands there twice"]),
        (SHIPPED.replace("type: aws\n", "type: aws\n  type: gcp\n"), ["line 25", "type stands there twice"]),
        (SHIPPED + "\n---\ncluster_name: b\n", ["not readable as YAML", "another document"]),
    ],
)
def test_text_that_is_no_cluster_is_refused(text, parts, file, capsys):
    (sentence,) = refused(write(file, text), capsys)
    for part in parts:
        assert part in sentence


def test_file_that_cannot_be_read_is_refused(file, capsys):
    (sentence,) = refused(file.parent / "nowhere.yaml", capsys)
    assert sentence.startswith("cannot be read (")
    assert "No such file" in sentence
    (sentence,) = refused(file.parent, capsys)
    assert "Is a directory" in sentence
    file.write_bytes(b"cluster_name: \xff\n")
    (sentence,) = refused(file, capsys)
    assert sentence.startswith("cannot be read (")


LOCAL_BROKEN: dict[str, tuple[Change, list[str]]] = {
    "no workers": (lambda c: c["provider"].pop("worker_ips"), ["head_ip", "worker_ips"]),
    "empty list of workers": (
        lambda c: c["provider"].update(worker_ips=[]),
        ["provider.worker_ips: is empty", "head_ip"],
    ),
    "no head": (lambda c: c["provider"].pop("head_ip"), ["head_ip", "worker_ips"]),
    "node types": (
        lambda c: c.update(available_node_types={"a": {"resources": {}, "node_config": {}}}, head_node_type="a"),
        ["available_node_types", "not supported for on-premise clusters"],
    ),
    "workers open to everyone": (
        lambda c: c["worker_start_ray_commands"].__setitem__(1, "ray start --address=$RAY_HEAD_IP:6379"),
        ["worker_start_ray_commands: ", OPEN],
    ),
}


@pytest.mark.parametrize("name", LOCAL_BROKEN)
def test_broken_on_premise_file_is_refused(name, file, capsys):
    change, parts = LOCAL_BROKEN[name]
    (sentence,) = refused(write(file, LOCAL, change), capsys)
    for part in parts:
        assert part in sentence


# ---- What Ray itself says in Python's words, or does not see

WRONG: dict[str, tuple[Change, list[str]]] = {
    # Sentences that name no place, or are Python's and not the user's.
    "docker without a container's name": (lambda c: c["docker"].pop("container_name"), ["docker", "container_name"]),
    "unknown provider": (lambda c: c["provider"].update(type="awz"), ["provider.type", "awz"]),
    "no type of provider": (lambda c: c["provider"].pop("type"), ["provider", "type"]),
    "provider is a word": (lambda c: c.update(provider="aws"), ["provider: 'aws'"]),
    "docker is a word": (lambda c: c.update(docker="rayproject/ray"), ["docker: 'rayproject/ray'"]),
    "node type is empty": (
        lambda c: c["available_node_types"].update({"gpu-worker": None}),
        ["available_node_types.gpu-worker"],
    ),
    "files are empty": (lambda c: c.update(file_mounts=None), ["file_mounts"]),
    "file is a number": (lambda c: c["file_mounts"].update({"~/a": 3}), ["file_mounts", "~/a"]),
    "set-up is a word": (lambda c: c.update(setup_commands="pip install boto3"), ["setup_commands"]),
    # A traceback.
    "option is a number": (lambda c: c["docker"]["run_options"].append(3), ["docker.run_options", "3"]),
    # What passes, and then fails in `ray up` or leaves the cluster open.
    "options of a container that is not used": (
        lambda c: c.update(docker={"run_options": [TOKEN_MODE], "container_name": ""}),
        ["docker.container_name", "none of its options"],
    ),
    "token where no node looks for it": (
        lambda c: c["file_mounts"].update({"~/elsewhere": c["file_mounts"].pop(TOKEN)}),
        ["file_mounts", TOKEN],
    ),
    "no region": (lambda c: c["provider"].pop("region"), ["provider", "region"]),
    "more workers of a type at least than at most": (
        lambda c: worker(c).update(min_workers=3, max_workers=2),
        ["gpu-worker", "min_workers"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_broken_file_is_refused_with_its_place_too(name, file, capsys):
    change, parts = WRONG[name]
    sentence = refused(write(file, SHIPPED, change), capsys)[0]
    for part in parts:
        assert part in sentence


RIGHT: dict[str, Change] = {
    "address with a space": lambda c: c.update(
        worker_start_ray_commands=["ray start --address $RAY_HEAD_IP:6379 --object-manager-port=8076"]
    ),
    "address in quotes": lambda c: c.update(worker_start_ray_commands=['ray start --address="$RAY_HEAD_IP:6379"']),
    "dashboard in quotes": lambda c: c.update(
        head_start_ray_commands=["ray start --head --dashboard-host='127.0.0.1'"]
    ),
    "options of heads and workers": lambda c: c["docker"].update(
        run_options=[], head_run_options=[TOKEN_MODE], worker_run_options=[TOKEN_MODE]
    ),
    "package that only ends in ray": lambda c: c["setup_commands"].append("pip install xgboost-ray==0.1.19"),
    "token by its full path": lambda c: c["file_mounts"].update({TOKEN: str(Path(TOKEN).expanduser())}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes_too(name, file, home):
    put_token(home)
    assert check_cluster(write(file, SHIPPED, RIGHT[name]))[0] == []


def test_on_premise_file_with_a_coordinator_passes(file):
    provider = {"type": "local", "coordinator_address": "192.0.2.9:1234"}
    write(file, LOCAL, lambda c: c.update(provider=provider, max_workers=2))
    assert check_cluster(file)[0] == []
