"""One capture thread for each source: open, read, hand over; and again, for ever, when it goes away.

Invariants: a frame is stamped with the monotonic clock when it is captured; a source that is not there,
ends, or stops delivering is reported once, and once when it is back; nothing is handed on in between.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from edgeward_runtime.backoff import Backoff
from edgeward_runtime.slots import Buffers, Frame, Slots
from edgeward_runtime.sources import open_source
from edgeward_runtime.sources.base import Source
from edgeward_runtime.sources.options import SourceOptions
from edgeward_wire.errors import EdgewardError, Rejected, Unavailable

STALE_S = 5.0
END_OF_FILE = "end of file"
_STEADY_S = 5.0
_DEFAULT_FPS = 25.0

OnChange = Callable[[str, bool, str], None]
"""(source, up, detail), from the capture thread or from whoever calls `check_stale`."""


class Capture(threading.Thread):
    """Reads one source until `stop`. An exception that nobody foresaw goes to `on_crash`."""

    def __init__(
        self,
        index: int,
        options: SourceOptions,
        slots: Slots,
        *,
        on_change: OnChange,
        on_crash: Callable[[BaseException], None],
        backoff: Backoff | None = None,
    ) -> None:
        super().__init__(name=f"capture-{options.name}", daemon=True)
        self._index, self._options, self._slots = index, options, slots
        self._on_change, self._on_crash = on_change, on_crash
        self._backoff = backoff or Backoff()
        self._stopping = threading.Event()
        self._buffers = Buffers()
        self._reading_since = 0.0
        self._up: bool | None = None
        self._detail = ""
        self._report_lock = threading.Lock()

    def stop(self) -> None:
        """Ask the thread to end; it may still be inside a read of the device."""
        self._stopping.set()

    def check_stale(self, now: float) -> None:
        """Report the source as down when opening or reading takes too long. `now` is monotonic."""
        since = self._reading_since
        if since and now - since > STALE_S and self._up is not False:
            self._report(False, f"no frame for {STALE_S:.0f} s")

    def run(self) -> None:
        try:
            while not self._stopping.is_set():
                started = time.monotonic()
                if self._attempt():
                    return
                if time.monotonic() - started > _STEADY_S:
                    self._backoff.reset()
                self._stopping.wait(self._backoff.wait_s())
        except BaseException as error:  # noqa: BLE001  the thread's last act: its owner stops the process
            self._on_crash(error)

    def _attempt(self) -> bool:
        """Open and read once. True: there is nothing more to come."""
        self._reading_since = time.monotonic()
        try:
            source = open_source(self._options)
        except EdgewardError as error:
            self._report(False, error.what)
            return False
        finally:
            self._reading_since = 0.0
        try:
            self._deliver(source)
        except EdgewardError as error:
            self._report(False, error.what)
            return False
        finally:
            self._reading_since = 0.0
            source.close()
        if not self._stopping.is_set():
            self._report(False, END_OF_FILE)
        return True

    def _deliver(self, source: Source) -> None:
        """Hand on frames until the source ends. Raises Unavailable when it fails or gives nothing."""
        pace = Pace(self._options.fps or source.fps or _DEFAULT_FPS) if self._options.paced else None
        delivered = 0
        while not self._stopping.is_set():
            if pace is not None:
                self._stopping.wait(pace.wait_s(time.monotonic()))
            started = self._reading_since = time.monotonic()
            more = source.grab()
            self._reading_since = 0.0
            if more:
                frame = self._frame(source, started)
                if frame is not None:
                    delivered += 1
                    self._report(True, "")
                    if not self._slots.put(frame):
                        return
            elif not delivered:
                raise Unavailable(f"{self._options.uri} holds no frame that can be read.", "Check the file.")
            elif self._options.loop:
                delivered = 0
                source.rewind()
            else:
                return

    def _frame(self, source: Source, started: float) -> Frame | None:
        """The frame that was grabbed; None for a picture that is none, among others that may be."""
        captured = time.monotonic()
        try:
            image = source.retrieve(self._buffers.take())
        except Rejected:
            return None
        decoded = time.monotonic()
        return Frame(
            source=self._index,
            data=image,
            captured_at=captured,
            capture_ms=(captured - started) * 1e3,
            decode_ms=(decoded - captured) * 1e3,
            buffers=self._buffers,
        )

    def _report(self, up: bool, detail: str) -> None:
        with self._report_lock:
            if up is self._up and (up or detail == self._detail):
                return
            self._up, self._detail = up, detail
        self._on_change(self._options.name, up, detail)


class Pace:
    """When the next frame of a file is due, so that it plays at `fps`. One that is late is not caught up."""

    def __init__(self, fps: float) -> None:
        self._period_s = 1 / fps
        self._due = 0.0

    def wait_s(self, now: float) -> float:
        """Seconds until the next frame is due; call it once a frame."""
        self._due = max(self._due, now - self._period_s)
        wait = max(0.0, self._due - now)
        self._due += self._period_s
        return wait
