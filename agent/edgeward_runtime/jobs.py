"""Served work between live frames: when a run may start, and what waits.

A served run starts when it will be over before the next live frame is expected: the frames' rhythm and
the length of served runs are learned as moving averages. Where there is never room, one served run goes
in after every `PER_LIVE` live frames, or once no frame has come for a while, so that nobody starves: a
frame that comes rarely waits for one run at most. Invariants: `Schedule` is pure (times go
in, seconds come out); a job ends exactly once, with an answer or a fault; what waits is bounded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from edgeward_wire.errors import EdgewardError, Unavailable

if TYPE_CHECKING:
    from edgeward_runtime.engine import Engine

MAX_WAITING = 16
PER_LIVE = 8
"""Live frames, at most, between two steps of served work that waits."""
_WEIGHT = 0.2
_DOUBT = 4.0
"""So many mean deviations more than usual may a served run take; TCP waits for an answer as long."""
_GONE = 3.0
"""A source that is late by so many of its intervals is not waited for."""
_MOST_RUNS, _MOST_S = 4.0, 0.2
"""Nor is any for longer than so many served runs, or seconds where that is more. Regular frames come before:
work only waits for the end of an interval that has less room than a run takes."""


class Busy(Unavailable):
    """As much waits as may."""


class Changed(Unavailable):
    """Another model serves than the one that the work was meant for."""


class Schedule:
    """When served work may start. Times are of one monotonic clock, in seconds."""

    def __init__(self, sources: int) -> None:
        self._last: list[float | None] = [None] * sources
        self._interval = [0.0] * sources
        self._jitter = [0.0] * sources
        self._run_s = self._run_off_s = 0.0
        self._live = 0
        self._waits_since: float | None = None
        """From when on there has been work that waits, and no frame."""

    def arrived(self, source: int, now: float) -> None:
        """A live frame came."""
        self._waits_since = None
        last, self._last[source] = self._last[source], now
        if last is None:
            return
        interval, known = now - last, self._interval[source]
        if not known or interval > _GONE * known:
            # The first, or the first after a pause: a pause says nothing of the rhythm.
            self._interval[source] = known or interval
            return
        off = abs(interval - known)
        self._interval[source] += _WEIGHT * (interval - known)
        self._jitter[source] += _WEIGHT * (off - self._jitter[source])

    def live_ran(self) -> None:
        """A live frame was dealt with while served work waited."""
        self._live += 1

    def served_ran(self, took_s: float) -> None:
        """One step of served work is over."""
        if self._run_s:
            self._run_off_s += _WEIGHT * (abs(took_s - self._run_s) - self._run_off_s)
            self._run_s += _WEIGHT * (took_s - self._run_s)
        else:
            self._run_s = took_s
        self._live, self._waits_since = 0, None

    @property
    def overdue(self) -> bool:
        """Whether served work goes before the next live frame, even if that is there already."""
        return self._live >= PER_LIVE

    def wait_s(self, now: float) -> float:
        """With no live frame waiting: for how long none is to be started; 0 means now."""
        longest = 0.0 if self.overdue else self._until_room(now)
        if not longest:
            return 0.0
        if self._waits_since is None:
            self._waits_since = now
        most = max(_MOST_RUNS * self._run_s, _MOST_S)
        return max(0.0, min(longest, self._waits_since + most - now))

    def _until_room(self, now: float) -> float:
        """0 when a run will be over before any frame that is expected; else until none is, at the latest."""
        longest, run_s = 0.0, self._run_s + _DOUBT * self._run_off_s
        for last, interval, jitter in zip(self._last, self._interval, self._jitter, strict=True):
            if last is None or not interval or now > last + _GONE * interval:
                continue
            if now + run_s > last + interval - 2 * jitter:
                longest = max(longest, last + _GONE * interval - now)
        return longest


class Job:
    """Work for the inference thread, in steps with live frames between them. `wait` for it elsewhere."""

    def __init__(self, model: str, work: Callable[[Engine], Iterator[None]]) -> None:
        """`model` is the sha256 of the manifest that it is meant for; each `yield` of `work` ends a step."""
        self._model = model
        self._work = work
        self._steps: Iterator[None] | None = None
        self._engine: Engine | None = None
        """The one that its first step ran on."""
        self._ended = threading.Event()
        self._fault: EdgewardError | None = None
        self._abandoned = False

    def step(self, engine: Engine, model: str) -> bool:
        """On the inference thread: one step; whether there are more."""
        if self._abandoned:
            self.fail(Unavailable("Nobody waits for it any more."))
            return False
        if model != self._model or self._engine not in (None, engine):
            # Or another plan of the same model: the session of the engine that it began with is closed.
            self.fail(Changed("Another model took over while the request waited.", "Ask again."))
            return False
        try:
            if self._steps is None:
                self._steps, self._engine = self._work(engine), engine
            next(self._steps)
        except StopIteration:
            self._end()
            return False
        except EdgewardError as error:
            self.fail(error)
            return False
        return True

    def fail(self, fault: EdgewardError) -> None:
        """It ends with this."""
        self._fault = fault
        self._end()

    def _end(self) -> None:
        self._steps = self._engine = None
        self._ended.set()

    def wait(self, limit_s: float) -> None:
        """Until it has ended. Raises its fault, or Unavailable when it did not end in time."""
        if not self._ended.wait(limit_s):
            self._abandoned = True
            raise Unavailable(f"The model did not get to it within {limit_s:g} s.", "Ask less often.")
        if self._fault is not None:
            raise self._fault
