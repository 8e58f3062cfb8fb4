"""The daemon's side of local serving: starts the process, and brings it back.

It loads nothing of HTTP. Invariants: at most one process; a death is followed by a pause that grows; an
address that cannot be had is said once and tried again; the token leaves its file only over the socket.
"""

from __future__ import annotations

import logging
import queue
import stat
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from edgeward_agent.backoff import Backoff
from edgeward_agent.config import ServeSettings
from edgeward_agent.lifetime import Pulse
from edgeward_agent.local_socket import RUN
from edgeward_agent.serving.wire import FROM_SERVER, Listening, Refused, Start
from edgeward_agent.workers import Child, Exit
from edgeward_wire.errors import Rejected

log = logging.getLogger(__name__)

PULSE_S = 30.0
LEAST_TOKEN = 16
_COMMAND = (sys.executable, "-m", "edgeward_agent.serving")
_MOST_TOKEN = 4096
_TURN_S = 1.0
_STEADY_S = 60.0
_END_S = 3.0


def read_token(path: Path) -> str:
    """The first line of the token's file. Raises Rejected: unreadable, too short, or open to others."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(path.stat().st_mode)
            token = file.read(_MOST_TOKEN).split(b"\n")[0].strip().decode("ascii")
    except OSError as error:
        raise Rejected(f"{path} cannot be read: {error.strerror}.", "Correct [serve] token_file.") from error
    except UnicodeDecodeError as error:
        raise Rejected(f"{path} holds no token: it is not ASCII text.", "Write one line of text.") from error
    if mode & 0o007:
        raise Rejected(f"{path} can be read by everybody.", f"chmod o= {path}")
    if len(token) < LEAST_TOKEN:
        raise Rejected(f"{path} holds a token of fewer than {LEAST_TOKEN} characters.", "Make it longer.")
    return token


def order(settings: ServeSettings, pipelines: Sequence[str], state: Path) -> Start:
    """What the process is told. Raises Rejected."""
    return Start(
        run=str((state / RUN).absolute()),
        pipelines=tuple(pipelines),
        host=settings.host,
        port=settings.port or 0,
        token=read_token(Path(settings.token_file)) if settings.token_file else "",
        max_body=settings.max_body,
        queue=settings.queue,
    )


class Serving:
    """A thread that keeps one serving process alive."""

    def __init__(
        self,
        start: Start,
        *,
        command: Sequence[str] = _COMMAND,
        listening: Callable[[int], None] = lambda _port: None,
        backoff: Backoff | None = None,
    ) -> None:
        """`listening` is told the port each time that the process takes requests."""
        self._start = start
        self._command = command
        self._listening = listening
        self._backoff = backoff or Backoff(1.0, 60.0)
        self._heard: queue.SimpleQueue[Listening | Refused | Exit | None] = queue.SimpleQueue()
        self._said = ""

    def stop(self, _orderly: bool) -> None:
        """End the thread and the process."""
        self._heard.put(None)

    def run(self, pulse: Pulse) -> None:
        """Until `stop`."""
        while True:
            began = time.monotonic()
            try:
                child: Child[Listening | Refused] = Child(
                    "serving", self._command, FROM_SERVER, self._heard.put, self._heard.put
                )
            except OSError as error:
                self._heard.put(Exit(1, f"it cannot be started: {error}"))
            else:
                child.send(self._start)
                if not self._watch(pulse):
                    child.end(_END_S)
                    return
            if time.monotonic() - began > _STEADY_S:
                self._backoff.reset()
            if not self._pause(pulse, self._backoff.next()):
                return

    def _watch(self, pulse: Pulse) -> bool:
        """Until the process has ended; False: stop."""
        refused = ""
        while True:
            said = self._next(pulse)
            if said is None:
                return False
            if isinstance(said, Listening):
                log.info("Local serving on http://%s:%d.", self._start.host, said.port)
                self._said = ""
                self._listening(said.port)
            elif isinstance(said, Refused):
                refused = said.reason
            else:
                why = f"Local serving ended: {refused or said.text}"
                log.log(logging.ERROR if why != self._said else logging.DEBUG, "%s", why)
                self._said = why
                return True

    def _next(self, pulse: Pulse) -> Listening | Refused | Exit | None:
        while True:
            pulse.beat()
            try:
                return self._heard.get(timeout=_TURN_S)
            except queue.Empty:
                continue

    def _pause(self, pulse: Pulse, length_s: float) -> bool:
        until = time.monotonic() + length_s
        while (left := until - time.monotonic()) > 0:
            pulse.beat()
            try:
                if self._heard.get(timeout=min(left, _TURN_S)) is None:
                    return False
            except queue.Empty:
                continue
        return True
