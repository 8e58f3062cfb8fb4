"""Keeps the local page running: a child of its own, brought back when it ends.

Invariant: nothing that becomes of the page reaches the rest of the daemon, but one line in the log.
"""

from __future__ import annotations

import logging
import queue
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from edgeward_agent.backoff import Backoff
from edgeward_agent.config import LOOPBACK, PageSettings
from edgeward_agent.lifetime import Pulse
from edgeward_agent.workers import Child, Exit
from edgeward_wire.document import Document

log = logging.getLogger(__name__)

PULSE_S = 30.0
COMMAND = (sys.executable, "-m", "edgeward_agent.page")
_LOOK_S = 1.0
_STEADY_S = 60.0
_END_S = 3.0


class PageSetup(Document):
    """The first line to the page."""

    state: str
    host: str
    port: int
    token: str | None
    window_s: float

    def to_bytes(self) -> bytes:
        """With the token's absence said."""
        return self.model_dump_json().encode()


class PageReady(Document):
    """The page listens."""

    kind: Literal["page_ready"] = "page_ready"
    port: int


class PageFailed(Document):
    """The page cannot listen."""

    kind: Literal["page_failed"] = "page_failed"
    reason: str = Field(max_length=500)


PageMessage = PageReady | PageFailed
_MESSAGES: TypeAdapter[PageMessage] = TypeAdapter(Annotated[PageMessage, Field(discriminator="kind")])


class PageKeeper:
    """A thread of the daemon: `run` until `stop`."""

    def __init__(
        self, settings: PageSettings, state: Path, *, window_s: float = 30.0, backoff: Backoff | None = None
    ) -> None:
        """`window_s`: how often what serves writes something new."""
        self._setup = PageSetup(
            state=str(state.absolute()),
            host=settings.host,
            port=settings.port,
            token=settings.token,
            window_s=window_s,
        )
        self._heard: queue.SimpleQueue[PageMessage | Exit | None] = queue.SimpleQueue()
        self._backoff = backoff or Backoff(1.0, 60.0)
        self._told = ""

    def stop(self) -> None:
        """End `run`, from any thread."""
        self._heard.put(None)

    def run(self, pulse: Pulse) -> None:
        """Start the page, and again when it ends."""
        child: Child[PageMessage] | None = None
        born, due = 0.0, time.monotonic()
        while True:
            pulse.beat()
            now = time.monotonic()
            if child is None and now >= due:
                born, due = now, now
                child = self._start()
                if child is None:
                    due = now + self._backoff.next()
            try:
                heard = self._heard.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
            if heard is None:
                break
            if isinstance(heard, Exit):
                if time.monotonic() - born > _STEADY_S:
                    self._backoff.reset()
                self._say(f"The local page ended: {heard.text}.")
                child, due = None, time.monotonic() + self._backoff.next()
            else:
                self._listen(heard)
        if child is not None:
            child.end(_END_S)

    def _start(self) -> Child[PageMessage] | None:
        try:
            child: Child[PageMessage] = Child(
                "page", COMMAND, _MESSAGES, self._heard.put, self._heard.put, nice=5
            )
        except OSError as error:
            self._say(f"The local page cannot be started: {error}.")
            return None
        child.send(self._setup)
        return child

    def _listen(self, message: PageMessage) -> None:
        if isinstance(message, PageFailed):
            self._say(message.reason)
            return
        host = f"[{self._setup.host}]" if ":" in self._setup.host else self._setup.host
        token = "" if self._setup.host in LOOPBACK and not self._setup.token else " (with its token)"
        self._told = ""
        log.info("The local page is at http://%s:%s/%s.", host, message.port, token)

    def _say(self, what: str) -> None:
        """Once, not at every try."""
        if not self._told:
            log.warning("%s", what)
        self._told = what
