"""Runs on other storage, at a URI such as s3://bucket/runs/NAME: a local copy of them, filled as far as it is needed.

The copy is an ordinary run directory under ~/.cache/recipe-studies (or XDG_CACHE_HOME). What is small is brought over
whenever it has changed; of checkpoints only the folders, until one of them is used.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote

from pyarrow import ArrowInvalid, fs

from trainables.errors import UserError

RunPath: TypeAlias = str | Path
SMALL_FILES = ("manifest.json", "events.jsonl", "study.yaml")  # study.yaml last: a directory that has it is a whole run
HEARTBEAT, HEARTBEAT_SECONDS = "heartbeat", 60.0
_URI, _ID = ".uri", ".id"
_FRESH_SECONDS = 2.0


class RemoteError(UserError):
    """Storage that cannot be reached or used."""


class TakenError(RemoteError):
    """A run at a URI that is run in another copy."""


def is_uri(run: RunPath) -> bool:
    """Return whether a run is given by a URI rather than a path."""
    return isinstance(run, str) and "://" in run


def run_path(text: str) -> RunPath:
    """Return a run as given on a command line: a URI as text, anything else, and one of a file, as a path."""
    if text.startswith("file:///"):
        return Path(unquote(text.removeprefix("file://")))
    return text.rstrip("/") if is_uri(text) else Path(text)


def source(run: Path) -> str:
    """Return what to call a run: the URI that a directory is the copy of, or the directory itself."""
    try:
        uri = (run / _URI).read_text()
    except (OSError, UnicodeDecodeError):
        return str(run)
    # Only what this module wrote is believed: a stranger's run may hold a file of that name.
    return uri if copy_of(uri) == run.absolute() else str(run)


def open_storage(run: RunPath) -> tuple[fs.FileSystem, str]:
    """Return the file system on which a run lies, and its path there.

    Raises:
        RemoteError: if the URI is of no known kind, or carries options.
    """
    if is_uri(run) and "?" in str(run):  # names are appended to it
        raise RemoteError(f"{run}: give options by the environment (AWS_REGION, AWS_ENDPOINT_URL), not in the URI")
    try:
        if is_uri(run):
            return fs.FileSystem.from_uri(str(run))
        return fs.LocalFileSystem(), str(Path(run).absolute())
    except (ArrowInvalid, OSError) as error:
        raise RemoteError(f"{run}: not a path, nor a URI that can be used ({error})") from error


def exists(path: RunPath) -> bool:
    """Return whether there is a file or folder at a path or URI.

    Raises:
        RemoteError: if the URI cannot be read.
    """
    storage, base = open_storage(path)
    with _explained(str(path)):
        return bool(storage.get_file_info(base).type != fs.FileType.NotFound)


def copy_of(uri: str) -> Path:
    """Return the directory in which a run at a URI has its local copy."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "recipe-studies" / f"{uri.rsplit('/', 1)[-1]}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"


def local_run(run: RunPath) -> Path:
    """Return a directory that holds a run's tables: the run itself, or the copy of what lies at a URI, made now.

    Raises:
        RemoteError: if the URI cannot be read.
    """
    if not is_uri(run):
        return Path(run)
    uri = str(run)
    copy = copy_of(uri)
    marker = copy / _URI
    if marker.exists() and 0 <= time.time() - marker.stat().st_mtime < _FRESH_SECONDS:
        return copy
    if not is_held(copy):  # else the study runs here, and what is there comes from here
        with _explained(uri):
            _bring(uri, copy)
    list_checkpoints(copy, uri)
    copy.mkdir(parents=True, exist_ok=True)
    marker.write_text(uri)
    return copy


def is_held(run: Path) -> bool:
    """Return whether a process on a machine that shares this directory runs the study in it now."""
    try:
        with (run / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no lock, or none that could be held
        pass
    return False


def is_run_elsewhere(run: Path) -> bool:
    """Return whether the copy of a run at a URI came with a recent sign of life from another copy of it."""
    if source(run) == str(run):  # no copy: whatever lies there
        return False
    try:
        return _is_of_another((run / HEARTBEAT).read_bytes(), run)
    except OSError:
        return False


def _is_of_another(sign: bytes, copy: Path) -> bool:
    try:
        beat = json.loads(sign)
        return bool(beat["copy"] != _id_of(copy) and time.time() - beat["time"] < HEARTBEAT_SECONDS)
    except (ValueError, TypeError, KeyError):
        return False


def _id_of(copy: Path) -> str:
    """Return what tells this copy from those on other machines, which may well have the same name."""
    file = copy / _ID
    if not file.exists():
        file.write_text(secrets.token_hex(8))
    return file.read_text()


def fetch_checkpoint(folder: Path) -> Path:
    """Return a checkpoint's folder with its files in it, bringing them over if it is of a run at a URI.

    Raises:
        RemoteError: if they cannot be read.
    """
    run = folder.parents[3] if len(folder.parents) > 3 else folder  # RUN/tune/attempt-N/TRIAL/checkpoint_N
    if source(run) == str(run) or (folder / "checkpoint.json").exists():
        return folder
    uri = source(run)
    with _explained(uri):
        storage, base = open_storage(uri)
        there = f"{base}/{folder.relative_to(run).as_posix()}"
        names = [info.base_name for info in storage.get_file_info(fs.FileSelector(there)) if info.is_file]
        for name in sorted(names, key=lambda name: name == "checkpoint.json"):  # it says that the others are there
            _download(storage, f"{there}/{name}", folder / name)
    return folder


def show_life(copy: Path, uri: str) -> None:
    """Leave at a URI the sign that a study runs in this copy of it.

    Raises:
        TakenError: if there is a recent sign of another copy.
        RemoteError: if the URI cannot be read or written.
    """
    with _explained(uri):
        storage, base = open_storage(uri)
        file = f"{base}/{HEARTBEAT}"
        if storage.get_file_info(file).is_file:
            with storage.open_input_stream(file) as stream:
                if _is_of_another(stream.readall(), copy):
                    raise TakenError(f"{uri}: is run by another process, on another machine")
        _write(storage, file, json.dumps({"time": time.time(), "copy": _id_of(copy)}).encode())


def end_life(copy: Path, uri: str) -> None:
    """Take the sign of life of this copy away again, if storage lets us: others then need not wait for it to age."""
    with contextlib.suppress(OSError, RemoteError):
        storage, base = open_storage(uri)
        with storage.open_input_stream(f"{base}/{HEARTBEAT}") as stream:
            sign = stream.readall()
        if not _is_of_another(sign, copy):
            storage.delete_file(f"{base}/{HEARTBEAT}")


def upload(run: Path, uri: str, sent: dict[str, int]) -> None:
    """Bring the small files of a run to its URI that have grown since, after a sign of life.

    Args:
        run: the local copy, in which the study runs.
        uri: where to.
        sent: size of each file when it was sent; kept up to date here.

    Raises:
        TakenError, RemoteError: see :func:`show_life`.
    """
    show_life(run, uri)
    with _explained(uri):
        storage, base = open_storage(uri)
        for name in SMALL_FILES:
            size = (run / name).stat().st_size if (run / name).exists() else 0
            if size != sent.get(name, 0):
                _write(storage, f"{base}/{name}", (run / name).read_bytes())
                sent[name] = size


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RemoteError(f"{uri}: storage cannot be used ({reason})") from error


def _bring(uri: str, copy: Path) -> None:
    storage, base = open_storage(uri)
    there = {info.base_name: info for info in storage.get_file_info(fs.FileSelector(base, allow_not_found=True))}
    if "study.yaml" not in there:
        raise RemoteError(f"{uri}: no such run; python -m study list shows the runs")
    with storage.open_input_stream(f"{base}/study.yaml") as stream:
        study = stream.readall()
    if (copy / "study.yaml").exists() and (copy / "study.yaml").read_bytes() != study:
        copy.rename(copy.with_name(f"{copy.name}.{time.time_ns()}"))  # another study has taken its place
    copy.mkdir(parents=True, exist_ok=True)
    for name in (*SMALL_FILES, HEARTBEAT):
        mine = (copy / name).read_bytes() if name == "events.jsonl" and (copy / name).exists() else b""
        if name in there and there[name].size != len(mine):
            _download(storage, f"{base}/{name}", copy / name, unless_before=mine)
    if HEARTBEAT not in there:
        (copy / HEARTBEAT).unlink(missing_ok=True)


def list_checkpoints(copy: Path, uri: str) -> None:
    """Make in the copy of a run the folders of the checkpoints that are at its URI, and no others.

    Raises:
        RemoteError: if the URI cannot be read.
    """
    with _explained(uri):
        storage, base = open_storage(uri)
        files = storage.get_file_info(fs.FileSelector(f"{base}/tune", recursive=True, allow_not_found=True))
    paths = [Path(info.path) for info in files if info.base_name == "checkpoint.json"]
    there = {path.parent.relative_to(base) for path in paths if ".." not in path.parts}  # S3 has such names
    for folder in copy.glob("tune/*/*/checkpoint_*"):
        if folder.relative_to(copy) not in there:
            shutil.rmtree(folder, ignore_errors=True)  # another process may be doing the same
    for name in there:
        (copy / name).mkdir(parents=True, exist_ok=True)


def _download(storage: fs.FileSystem, path: str, file: Path, unless_before: bytes = b"") -> None:
    """Bring a file over, unless it is what ``unless_before`` begins with: a log that is ahead of what was sent."""
    with storage.open_input_stream(path) as stream:
        content = stream.readall()
    if unless_before and unless_before.startswith(content):
        return
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_bytes(content)
    os.replace(draft, file)


def _write(storage: fs.FileSystem, path: str, content: bytes) -> None:
    with storage.open_output_stream(path) as stream:
        stream.write(content)
