"""One thread captures each source: open, read, hand over; and again, for ever, when it goes away.

Invariants: a frame is stamped with the monotonic clock when it is captured; a source that is not there,
ends, or stops delivering is reported once, and once when it is back; nothing is handed on in between, and
nothing is made up: sound that is missing is told with the chunk after it, and reported, once or summed up.

A read that hangs for good leaves its thread behind and a fresh one opens the source again; no more than
`MAX_STUCK` are ever left behind at a time, and one that comes back to life only cleans up after itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from edgeward_runtime.backoff import Backoff
from edgeward_runtime.slots import Buffers, Frame, Slots
from edgeward_runtime.sources import open_source
from edgeward_runtime.sources.address import shown
from edgeward_runtime.sources.base import CHUNK_S, Source
from edgeward_runtime.sources.framing import Framing
from edgeward_runtime.sources.options import SourceOptions
from edgeward_wire.errors import EdgewardError, Rejected, Unavailable

STALE_S = 5.0
STUCK_S = 30.0
"""Longer than any time limit of a source: what takes longer will not come back by itself."""
MAX_STUCK = 3
GAPS_QUIET_S = 60.0
"""Gaps in sound are reported together, so often."""
END_OF_FILE = "end of file"
_STEADY_S = 5.0
_DEFAULT_FPS = 25.0

OnChange = Callable[[str, bool, str], None]
"""(source, up, detail), from the capture thread or from whoever calls `check_stale`."""


class Capture:
    """Reads one source from `start` to `stop`. An exception that nobody foresaw goes to `on_crash`."""

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
        self.index, self.options, self.slots = index, options, slots
        self.backoff = backoff or Backoff()
        self.on_crash = on_crash
        self._on_change = on_change
        self._up: bool | None = None
        self._detail = ""
        self._lock = threading.Lock()
        """Of what is reported, and of who may report and hand over."""
        self._reading = _Reading(self)
        self._stuck: list[_Reading] = []
        self._gaps = Gaps()
        self._heard_until = 0.0
        """When the last chunk of live sound ended that was handed over; 0: none was."""

    def start(self) -> None:
        """Begin to read."""
        self._reading.start()

    def stop(self) -> None:
        """Ask the thread to end; it may still be inside a read of the device."""
        self._reading.stopping.set()

    def is_alive(self) -> bool:
        """Whether its thread still runs."""
        return self._reading.is_alive()

    def join(self, timeout: float | None = None) -> None:
        """Wait for its thread."""
        self._reading.join(timeout)

    def check_stale(self, now: float) -> None:
        """Report the source as down when opening or reading takes too long, and what else is due.

        `now` is monotonic.
        """
        self._tell_gaps(now)
        reading = self._reading
        since = reading.since
        if not since or reading.stopping.is_set() or now - since <= STALE_S:
            return
        if self._up is not False:
            self.report(reading, False, f"no frame for {STALE_S:.0f} s")
        self._stuck = [old for old in self._stuck if old.is_alive()]
        if now - since > STUCK_S and len(self._stuck) < MAX_STUCK:
            self._replace(reading)

    def _replace(self, reading: _Reading) -> None:
        with self._lock:
            reading.stopping.set()
            self._stuck.append(reading)
            self._reading = _Reading(self)
        self._reading.start()

    # --- called by the reading threads

    def put(self, reading: _Reading, frame: Frame) -> float | None:
        """Hand a frame over, unless the reading was replaced meanwhile.

        Returns the seconds of sound that were dropped for it; None: there is no more to do.
        """
        return self.slots.put(frame) if reading is self._reading else None

    def report(self, reading: _Reading, up: bool, detail: str) -> None:
        """Tell what changed, if it did."""
        with self._lock:  # while it is told too: what is told last has to be what is true
            if reading is not self._reading or (up is self._up and (up or detail == self._detail)):
                return
            self._up, self._detail = up, detail
            self._gaps.unsaid()
            self._on_change(self.options.name, up, detail)

    def missed(self, fresh: bool, begin: float, end: float) -> float:
        """Seconds that nobody heard before live sound from `begin` to `end`. `fresh`: it was just opened."""
        before, self._heard_until = self._heard_until, end
        return max(begin - before, 1e-3) if fresh and before else 0.0

    def lost(self, seconds: float, now: float) -> None:
        """Sound is missing: reported now, or with what will be missing in the next minute."""
        with self._lock:
            self._gaps.lost(seconds)
        self._tell_gaps(now)

    def _tell_gaps(self, now: float) -> None:
        with self._lock:
            detail = self._gaps.due(now) if self._up else None
            if detail is not None:
                self._on_change(self.options.name, True, detail)


class _Reading(threading.Thread):
    """The thread that reads, until it is told to stop or there is nothing more to come."""

    def __init__(self, capture: Capture) -> None:
        super().__init__(name=f"capture-{capture.options.name}", daemon=True)
        self.stopping = threading.Event()
        self.since = 0.0
        """When the read began in which it is; 0 between reads."""
        self._fresh = True
        """Whether the source was opened since the last frame."""
        self._refused_s = 0.0
        """Of sound, that came and was none, since the last chunk."""
        self._capture, self._options = capture, capture.options
        self._framing = Framing(self._options.rotate, self._options.crop)
        self._buffers = Buffers()
        self._unturned = None if not self._framing.copies else Buffers()

    def run(self) -> None:
        try:
            while not self.stopping.is_set():
                if self._attempt():
                    return
                self.stopping.wait(self._capture.backoff.wait_s())
        except BaseException as error:  # noqa: BLE001  the thread's last act: its owner stops the process
            self._capture.on_crash(error)

    def _attempt(self) -> bool:
        """Open and read once. True: there is nothing more to come."""
        self.since, self._fresh = time.monotonic(), True
        try:
            source = open_source(self._options)
            self.since = 0.0
            try:
                self._deliver(source)
            finally:
                source.close()  # before the report: whoever acts on it finds the device free
        except EdgewardError as error:
            self._report(False, error.what)
            return False
        finally:
            self.since = 0.0
        if not self.stopping.is_set():
            self._report(False, END_OF_FILE)
        return True

    def _deliver(self, source: Source) -> None:
        """Hand on frames until the source ends. Raises Unavailable when it fails or gives nothing."""
        pace = Pace(self._fps(source)) if self._options.paced or source.recorded else None
        opened = good = time.monotonic()
        delivered, rewound = 0, False
        while not self.stopping.is_set():
            if pace is not None and not rewound:  # the end of a file took the turn of the first frame
                self.stopping.wait(pace.wait_s(time.monotonic()))
            rewound = False
            started = self.since = time.monotonic()
            more = source.grab()
            self.since = 0.0
            if more:
                try:
                    frame = self._frame(source, started)
                except Rejected:  # a picture or chunk that is none, among others that may be
                    self._refused_s += 0.0 if source.rate is None else CHUNK_S
                    if self._options.live and time.monotonic() - good > STALE_S:
                        raise
                    continue
                delivered, good = delivered + 1, frame.captured_at
                if good - opened > _STEADY_S:
                    self._capture.backoff.reset()
                self._report(True, "")
                if not self._hand_over(frame):
                    return
            elif not delivered:
                raise Unavailable(
                    f"{shown(self._options.uri)} holds no frame that can be read.", "Check the file."
                )
            elif self._options.loop:
                delivered, rewound = 0, True
                source.rewind()
            else:
                return

    def _fps(self, source: Source) -> float:
        asked = self._options.fps if source.rate is None else None
        return asked or source.fps or _DEFAULT_FPS

    def _frame(self, source: Source, started: float) -> Frame:
        """The frame that was grabbed, turned and cut. Raises Rejected, Unavailable."""
        captured = time.monotonic()
        if source.rate is not None:
            return self._chunk(source, started, captured)
        if self._unturned is None:
            memory = source.retrieve(self._buffers.take())
            data = self._framing.cut(memory)
        else:
            picture = source.retrieve(self._unturned.take())
            memory = data = self._framing.turn(self._framing.cut(picture), self._buffers.take())
            self._unturned.give(picture)
        return Frame(
            source=self._capture.index,
            data=data,
            captured_at=captured,
            capture_ms=(captured - started) * 1e3,
            decode_ms=(time.monotonic() - captured) * 1e3,
            buffers=self._buffers,
            memory=memory,
        )

    def _chunk(self, source: Source, started: float, captured: float) -> Frame:
        assert source.rate is not None
        data, lost = source.retrieve(None), source.lost_s + self._refused_s
        self._refused_s = 0.0
        if self._options.live:
            lost += self._capture.missed(self._fresh, captured - len(data) / source.rate, captured)
        self._fresh = False
        return Frame(
            source=self._capture.index,
            data=data,
            captured_at=captured,
            capture_ms=(captured - started) * 1e3,
            decode_ms=(time.monotonic() - captured) * 1e3,
            rate=source.rate,
            lost_s=lost,
        )

    def _hand_over(self, frame: Frame) -> bool:
        if frame.lost_s:
            self._capture.lost(frame.lost_s, frame.captured_at)
        dropped_s = self._capture.put(self, frame)
        if dropped_s:
            self._capture.lost(dropped_s, frame.captured_at)
        return dropped_s is not None

    def _report(self, up: bool, detail: str) -> None:
        self._capture.report(self, up, detail)


class Gaps:
    """What is missing of a source's sound, put together so that it is said rarely, and whole."""

    def __init__(self) -> None:
        self._waiting_s = 0.0
        self._said = False
        self._said_at = float("-inf")

    def lost(self, seconds: float) -> None:
        """So much more is missing."""
        self._waiting_s += seconds

    def due(self, now: float) -> str | None:
        """What to say; None: nothing now; empty: what was said is over."""
        if now - self._said_at < GAPS_QUIET_S or not (self._waiting_s or self._said):
            return None
        if not self._waiting_s:
            self._said = False
            return ""
        detail = f"{self._waiting_s:.3g} s of sound were lost"
        self._waiting_s, self._said, self._said_at = 0.0, True, now
        return detail

    def unsaid(self) -> None:
        """Something else was said of the source since."""
        self._said = False


class Pace:
    """When the next frame of a file is due, so that it plays at `fps`. One that is late is not caught up."""

    def __init__(self, fps: float) -> None:
        self._period_s = 1 / fps
        self._due: float | None = None

    def wait_s(self, now: float) -> float:
        """Seconds until the next frame is due, the first one now; call it once a frame."""
        self._due = now if self._due is None else max(self._due, now - self._period_s)
        wait = max(0.0, self._due - now)
        self._due += self._period_s
        return wait
