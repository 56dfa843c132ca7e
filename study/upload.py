"""Keeps a run at a URI up to date while the study runs in its local copy."""

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from analysis.remote import HEARTBEAT, RemoteError, TakenError, open_storage, upload
from study.supervise import Interruption

_EVERY_SECONDS, _AT_LEAST_EVERY_SECONDS = 5.0, 20.0


class Uploads:
    """Sends what has changed every few seconds, and at the end; a context manager.

    While storage cannot be reached, nothing is lost: the local copy has it, and it is tried again. If it was away for
    so long that the study was gone on with on another machine, the study ends here, and sends nothing more.

    Args:
        run: the local copy.
        uri: where it belongs.
        interruption: asked for if the study has gone on elsewhere.
    """

    def __init__(self, run: Path, uri: str, interruption: Interruption) -> None:
        self._run, self._uri, self._interruption = run, uri, interruption
        self._sent: dict[str, int] = {}
        self._later: deque[Callable[[], None]] = deque()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._send_on, daemon=True)

    def __enter__(self) -> None:
        self._send()
        self._thread.start()

    def later(self, act: Callable[[], None]) -> None:
        """Do something, in another thread, once all that is in the copy now has been sent."""
        self._later.append(act)

    def _send(self) -> None:
        waiting = len(self._later)
        upload(self._run, self._uri, self._sent)
        until = time.monotonic() + _EVERY_SECONDS
        while waiting and time.monotonic() < until:  # the next sign of life must not wait for all of it
            self._later.popleft()()
            waiting -= 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        self._thread.join()
        try:
            self._send()
            while self._later:
                self._send()
            storage, base = open_storage(self._uri)
            storage.delete_file(f"{base}/{HEARTBEAT}")
        except (RemoteError, OSError) as error:
            if kind is not None:  # what ended the study is what is to be told
                return
            if isinstance(error, TakenError):
                raise
            raise RemoteError(f"{error}; what is missing there is in {self._run}: go on on this machine") from error

    def _send_on(self) -> None:
        pause = _EVERY_SECONDS
        while not self._over.wait(pause):
            start = time.monotonic()
            try:
                self._send()
            except TakenError:
                self._interruption.asked = True
                return
            except Exception:  # whatever it is, it may be over the next time, and the copy has everything
                continue
            # A long log takes long to send: no more than a tenth of the time, as far as signs of life allow it.
            pause = min(max(_EVERY_SECONDS, 10 * (time.monotonic() - start)), _AT_LEAST_EVERY_SECONDS)
