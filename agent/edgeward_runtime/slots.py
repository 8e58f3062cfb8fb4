"""Slots hand frames from the capture threads to the one inference thread.

`latest`: the newest frame wins, and the one that it replaces is counted as dropped; sound waits for a
while instead, because each sample of it counts. `every`: the capture
waits until its frame has been taken, so that a file plays as fast as inference goes and no faster.
The sources are taken in turn, and served work (`jobs`) goes between them. Invariant: a frame is handed out
once, or counted as dropped, or given back when the slots close; a job is handed out, or fails then.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeward_runtime.images import U8
from edgeward_runtime.jobs import MAX_WAITING, Busy, Job, Schedule
from edgeward_runtime.sources.options import SlotPolicy
from edgeward_wire.errors import Unavailable

BUFFERS = 2
"""Pictures of one source in memory: one that is read, one on its way. At 1080p each has 6 MB."""
MAX_WAITING_S = 2.0
"""Sound of one source that may wait for inference."""
_RELEASE_WAIT_S = 0.05


class Buffers:
    """The memory of one source's pictures, used again and again: new memory for each costs a millisecond."""

    def __init__(self) -> None:
        self._free: queue.SimpleQueue[U8] = queue.SimpleQueue()
        self._made = 0

    def take(self) -> U8 | None:
        """Memory that is free, soon at the latest; None: make some. Only for the capture thread."""
        with contextlib.suppress(queue.Empty):
            return self._free.get_nowait()
        if self._made < BUFFERS:
            self._made += 1
            return None
        # Preparation reads a picture for a millisecond or two; who takes longer has lost it.
        with contextlib.suppress(queue.Empty):
            return self._free.get(timeout=_RELEASE_WAIT_S)
        return None

    def give(self, image: U8) -> None:
        """From any thread."""
        if self._free.qsize() < BUFFERS:
            self._free.put(image)


@dataclass
class Frame:
    """A picture or a chunk of sound on its way. Times: monotonic clock, seconds; durations: milliseconds."""

    source: int
    data: npt.NDArray[Any]
    """A picture: (height, width, 3) uint8 BGR. Sound: (n,) float32, mono, -1..1."""
    captured_at: float
    capture_ms: float
    decode_ms: float
    rate: int | None = None
    """Of sound, in samples a second; None for a picture."""
    lost_s: float = 0.0
    """Sound that is missing before this chunk, in seconds."""
    buffers: Buffers | None = field(default=None, repr=False)
    memory: U8 | None = field(default=None, repr=False)
    """What a picture is a view of, where that is larger."""

    held: bool = field(default=False, repr=False)
    """Whether somebody will read the picture once more after it was looked at: then `release` does nothing,
    and `let_go` does."""

    @property
    def sound_s(self) -> float:
        """How much sound it holds, in seconds; 0 for a picture."""
        return len(self.data) / self.rate if self.rate else 0.0

    def let_go(self) -> None:
        """The end of a picture that was held, or was not."""
        self.held = False
        self.release()

    def release(self) -> None:
        """Give the picture's memory back for the next one: it must not be read any more."""
        if self.buffers is not None and not self.held:
            self.buffers.give(self.data if self.memory is None else self.memory)
            self.buffers = None


def joined(before: Frame, frame: Frame) -> tuple[Frame, bool]:
    """What a slot holds when `frame` comes while `before` waits, and whether something was dropped.

    A picture replaces the one before. Sound is put behind what waits, up to `MAX_WAITING_S`; past that
    the waiting sound is dropped, and the new chunk says how much is missing.
    """
    if frame.rate is None:
        return frame, True
    if frame.rate != before.rate or frame.lost_s or before.sound_s >= MAX_WAITING_S:
        return replace(frame, lost_s=before.lost_s + before.sound_s + frame.lost_s), True
    data = np.concatenate([before.data, frame.data])
    return replace(before, data=data, decode_ms=before.decode_ms + frame.decode_ms), False


class Slots:
    """One slot for each source. `put` is for capture threads, `take` for the inference thread."""

    def __init__(self, policies: Sequence[SlotPolicy]) -> None:
        self._policies = tuple(policies)
        self._frames: list[Frame | None] = [None] * len(policies)
        self._dropped = [0] * len(policies)
        self._turn = 0
        self._closed = False
        self._waiting = False
        self._jobs: deque[Job] = deque()
        self._schedule = Schedule(len(policies))
        self._lock = threading.Lock()
        self._filled = threading.Condition(self._lock)
        self._emptied = threading.Condition(self._lock)

    def put(self, frame: Frame) -> float | None:
        """Hand a frame over; with `every` this returns when it was taken.

        Returns how much sound was dropped for it, in seconds; None: the slots are closed.
        """
        at, dropped_s = frame.source, 0.0
        with self._lock:
            if self._closed:
                return None
            before = self._frames[at]
            if before is not None:
                frame, dropped = joined(before, frame)
                self._dropped[at] += dropped
                dropped_s = before.sound_s if dropped else 0.0
                before.release()
            self._schedule.arrived(at, time.monotonic())
            self._frames[at] = frame
            self._filled.notify()
            if self._policies[at] == "every":
                self._emptied.wait_for(lambda: self._closed or self._frames[at] is not frame)
            return None if self._closed else dropped_s

    def submit(self, job: Job, *, again: bool = False) -> None:
        """Let this go between frames; `again`: its next step. Raises Busy, and Unavailable once closed."""
        with self._lock:
            if self._closed:
                raise Unavailable("The pipeline stops.", "Ask again in a moment.")
            if len(self._jobs) >= MAX_WAITING and not again:
                raise Busy(f"{MAX_WAITING} requests wait already.", "Ask less often.")
            self._jobs.append(job)
            self._filled.notify()

    def take(self, stop: Callable[[], bool]) -> Frame | Job | None:
        """What the inference thread does next, frames of the sources in turn and jobs between them.

        None once `stop()` holds or the slots are closed (see `wake`).
        """
        with self._lock:
            while not (self._closed or stop()):
                if self._jobs and self._schedule.overdue:
                    return self._jobs.popleft()
                frame = self._next_frame()
                if frame is not None:
                    return frame
                wait_s = self._schedule.wait_s(time.monotonic()) if self._jobs else None
                if wait_s == 0:
                    return self._jobs.popleft()
                self._waiting = True
                self._filled.wait(wait_s)
                self._waiting = False
            return None

    def _next_frame(self) -> Frame | None:
        for step in range(len(self._frames)):
            at = (self._turn + step) % len(self._frames)
            frame = self._frames[at]
            if frame is not None:
                self._frames[at] = None
                self._turn = at + 1
                self._emptied.notify_all()
                if self._jobs:
                    self._schedule.live_ran()
                return frame
        return None

    def served(self, took_s: float) -> None:
        """A step of a job took so long."""
        with self._lock:
            self._schedule.served_ran(took_s)

    def wake(self) -> None:
        """Let everyone who waits in `take` look at its `stop` again."""
        with self._lock:
            self._filled.notify_all()

    def idle(self) -> bool:
        """Whether all frames that were handed over have been dealt with: who takes them waits for more."""
        with self._lock:
            return self._waiting and not any(self._frames)

    def take_dropped(self) -> list[int]:
        """How many frames each source lost since the last call."""
        with self._lock:
            dropped, self._dropped = self._dropped, [0] * len(self._dropped)
            return dropped

    def close(self) -> None:
        """Everybody returns, now and from here on."""
        with self._lock:
            self._closed = True
            jobs, self._jobs = self._jobs, deque()
            self._filled.notify_all()
            self._emptied.notify_all()
        for job in jobs:
            job.fail(Unavailable("The pipeline stops.", "Ask again in a moment."))
