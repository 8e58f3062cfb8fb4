"""Starts threads, watches their progress, and ends them in order.

Invariants: systemd's watchdog is fed only while every thread made progress lately. The first exception of
any thread turns into one stop of all, in the reverse order of their start, and a non-zero exit. SIGTERM and
SIGINT are an orderly stop; after a second one no thread is waited for, and the rest is closed in order.
"""

from __future__ import annotations

import logging
import queue
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType

from edgeward_agent.notify import Notifier
from edgeward_wire.errors import EdgewardError

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_JOIN_S = 0.2


@dataclass
class Pulse:
    """A thread's proof of progress: it calls `beat` at least each `limit_s` seconds."""

    name: str
    limit_s: float
    last: float = field(default_factory=time.monotonic)

    def beat(self) -> None:
        """Progress was made just now."""
        self.last = time.monotonic()

    @property
    def stuck(self) -> bool:
        """Whether the last beat is too long ago."""
        return time.monotonic() - self.last > self.limit_s


@dataclass(frozen=True)
class _Part:
    name: str
    stop: Callable[[bool], None]
    join_s: float
    thread: threading.Thread | None = None
    pulse: Pulse | None = None
    start: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class _Signal:
    number: int


class Lifetime:
    """One run of the daemon."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._parts: list[_Part] = []
        # SimpleQueue.put is safe in a signal handler, where taking an Event's lock could deadlock.
        self._wake: queue.SimpleQueue[_Signal | BaseException] = queue.SimpleQueue()
        self._stuck: set[str] = set()
        self._hurry = False
        self._clean = True

    def thread(
        self,
        name: str,
        run: Callable[[Pulse], None],
        stop: Callable[[bool], None],
        *,
        limit_s: float,
        join_s: float = 10.0,
    ) -> None:
        """Add a thread. `stop(orderly)` asks it, from the main thread, to return from `run`."""
        pulse = Pulse(name, limit_s)

        def body() -> None:
            try:
                run(pulse)
            except BaseException as error:  # noqa: BLE001 the supervisor's boundary: any exception stops all
                self.failed(error)

        thread = threading.Thread(target=body, name=name, daemon=True)
        self._parts.append(_Part(name, stop, join_s, thread, pulse))

    def closing(self, name: str, stop: Callable[[bool], None]) -> None:
        """Add something that only needs to be closed, in its place in the order."""
        self.service(name, lambda: None, stop)

    def service(
        self,
        name: str,
        start: Callable[[], None],
        stop: Callable[[bool], None],
        pulse: Pulse | None = None,
    ) -> None:
        """Add something that has threads of its own, and says by `pulse` that they make progress."""
        self._parts.append(_Part(name, stop, 0.0, pulse=pulse, start=start))

    def failed(self, error: BaseException) -> None:
        """From any thread: this must not happen; stop all."""
        self._wake.put(error)

    def run(self) -> int:
        """Start all, wait, stop all. Returns the process's exit code."""
        before = {n: signal.signal(n, self._on_signal) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            for part in self._parts:
                if part.pulse is not None:
                    part.pulse.beat()
                part.start()
                if part.thread is not None:
                    part.thread.start()
            self._notifier.ready("serving")
            cause = self._wait()
            self._notifier.stopping()
            self._stop(orderly=isinstance(cause, _Signal))
            return 0 if self._clean and isinstance(cause, _Signal) else 1
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._wake.put(_Signal(number))

    def _wait(self) -> _Signal | BaseException:
        every = min(_LOOK_S, (self._notifier.watchdog_s or 4 * _LOOK_S) / 4)
        while True:
            try:
                cause = self._wake.get(timeout=every)
            except queue.Empty:
                self._watch()
                continue
            if isinstance(cause, _Signal):
                log.info("Stopping on %s.", signal.Signals(cause.number).name)
            else:
                _report(cause)
            return cause

    def _watch(self) -> None:
        stuck = {
            p.name
            for p in self._parts
            if p.pulse and p.pulse.stuck and (p.thread is None or p.thread.is_alive())
        }
        for name in sorted(stuck - self._stuck):
            log.error("Thread %s makes no progress; the watchdog is not fed.", name)
        for name in sorted(self._stuck - stuck):
            log.info("Thread %s makes progress again.", name)
        self._stuck = stuck
        if not stuck:
            self._notifier.watchdog()

    def _stop(self, *, orderly: bool) -> None:
        for part in reversed(self._parts):
            try:
                part.stop(orderly)
            except EdgewardError as error:
                log.error("Stopping %s: %s", part.name, error)
                self._clean = False
            if part.thread is not None and part.thread.ident is not None:
                self._join(part, part.thread)
        self._hear()

    def _join(self, part: _Part, thread: threading.Thread) -> None:
        deadline = time.monotonic() + part.join_s
        thread.join(_JOIN_S)  # what ends at once may, even in a hurry
        self._hear()
        while thread.is_alive() and not self._hurry and time.monotonic() < deadline:
            self._notifier.watchdog()  # a long stop is bounded by join_s, not by the watchdog
            thread.join(_JOIN_S)
            self._hear()
        if thread.is_alive():
            patience = "before a second signal came" if self._hurry else f"within {part.join_s:.0f} s"
            log.error("Thread %s did not end %s.", part.name, patience)
            self._clean = False

    def _hear(self) -> None:
        """What came since the stop began: a signal is a person who will not wait."""
        while not self._wake.empty():
            late = self._wake.get()
            if isinstance(late, _Signal):
                self._hurry = True
            else:
                _report(late)
                self._clean = False


def _report(error: BaseException) -> None:
    if isinstance(error, EdgewardError):
        log.error("%s", error)
    else:
        log.critical("This is a bug; the agent stops.", exc_info=error)
