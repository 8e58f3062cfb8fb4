"""Which of several files runs faster here: in one process, in turn, against one reference.

Invariants: every figure of speed is a ratio to the first contender, from runs side by side, so that what
else the machine does meets both alike; the order changes every round, so that nobody always goes first
or always follows the same one; warm-up is discarded; sessions never spin. What does not load or fails to
run is a timing with the reason, never an exception. At most `GROUP` sessions are open at any time,
however many contenders there are: groups share the reference.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy.typing as npt

from edgeward_models.progress import Progress, silent
from edgeward_models.statistics import Interval, paired_ratio
from edgeward_runtime import resources
from edgeward_runtime.probe import quantile
from edgeward_runtime.sessions import NotLoaded, RunFailed, Session, open_session
from edgeward_wire.verdict import Plan

GROUP = 5
WARM_UP = 2
MAX_RUNS = 10_000
MAX_CONTENDERS = 256

T = TypeVar("T")
FullFeeds = Mapping[str, npt.NDArray[Any]]
"""All inputs of one run, constants and states included."""


@dataclass(frozen=True)
class Contender:
    """One file under one plan (which states its threads)."""

    name: str
    file: Path
    plan: Plan


@dataclass(frozen=True)
class Timing:
    """How one contender did. Milliseconds of the wall clock; figures are None where it did not run."""

    name: str
    runs: int
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    ratio: float | None = None
    """Median of its latency over the first contender's of the same round; below 1 is faster."""
    interval: Interval | None = None
    """Of the ratio, at 95 %."""
    loaded: bool = True
    reason: str = ""
    """Why there are no figures."""


def race(
    contenders: Sequence[Contender],
    feeds: Sequence[FullFeeds],
    *,
    goal_s: float = 2.0,
    least: int = 10,
    most: int = 400,
    progress: Progress = silent,
) -> list[Timing]:
    """Time all contenders, in their order; the first is what the others are compared with.

    Each group of `GROUP` runs for about `goal_s` seconds, but at least `least` and at most `most` rounds.

    Raises:
        ValueError: no feeds, or counts out of bounds.
    """
    if not feeds or not 1 <= least <= most <= MAX_RUNS or len(contenders) > MAX_CONTENDERS:
        raise ValueError(f"cannot race {len(contenders)} on {len(feeds)} feeds, {least} to {most} rounds")
    runners = [_Runner(contender) for contender in contenders]
    if not runners:
        return []
    reference, others = runners[0], runners[1:]
    groups = [others[k : k + GROUP - 1] for k in range(0, len(others), GROUP - 1)] or [[]]
    reference.open(feeds)
    try:
        for k, group in enumerate(groups):
            progress("timing", k, len(groups))
            _run_group(reference, group, feeds, _Rounds(goal_s, least, most))
    finally:
        reference.close()
    progress("timing", len(groups), len(groups))
    return [runner.timing(reference) for runner in runners]


@dataclass(frozen=True)
class _Rounds:
    goal_s: float
    least: int
    most: int


@dataclass
class _Runner:
    """One contender on its way. `times` has its latency in seconds by round, beside the reference's."""

    contender: Contender
    session: Session | None = None
    times: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    loaded: bool = True
    reason: str = ""

    def open(self, feeds: Sequence[FullFeeds]) -> None:
        """Load and warm; a fault becomes the reason."""
        try:
            self.session = open_session(self.contender.file, self.contender.plan)
            for k in range(WARM_UP):
                self.session.run(feeds[k % len(feeds)])
        except NotLoaded as error:
            self.loaded, self.reason = False, f"It does not load: {error.what}"
            self.close()
        except RunFailed as error:
            self.fail(error)

    def once(self, feeds: FullFeeds) -> float | None:
        """Seconds of one run, or None: a fault ends its race."""
        if self.session is None:
            return None
        begun = time.perf_counter()
        try:
            self.session.run(feeds)
        except RunFailed as error:
            self.fail(error)
            return None
        return time.perf_counter() - begun

    def fail(self, error: RunFailed) -> None:
        self.reason = f"It loads, but does not run. {error.what}"
        self.times.clear()
        self.beside.clear()
        self.close()

    def close(self) -> None:
        if self.session is not None:
            self.session.close()
            self.session = None
            resources.give_back()

    def timing(self, reference: _Runner) -> Timing:
        name, times = self.contender.name, self.times
        if not times:
            return Timing(name, 0, loaded=self.loaded, reason=self.reason)
        p50, p90, p99 = (quantile(times, q) * 1e3 for q in (0.5, 0.9, 0.99))
        if self is reference:
            return Timing(name, len(times), p50, p90, p99, 1.0, Interval(1.0, 1.0))
        if len(self.beside) != len(times):
            return Timing(name, len(times), p50, p90, p99, reason="The reference did not run.")
        ratio, interval = paired_ratio(times, self.beside)
        return Timing(name, len(times), p50, p90, p99, ratio, interval)


def _run_group(
    reference: _Runner, group: Sequence[_Runner], feeds: Sequence[FullFeeds], rounds: _Rounds
) -> None:
    try:
        for runner in group:
            runner.open(feeds)
        everyone = [reference, *group]
        if reference.session is not None:
            reference.once(feeds[0])  # what the others' loading threw out of its caches comes back
        started, k = time.perf_counter(), 0
        while k < rounds.least or (k < rounds.most and time.perf_counter() - started < rounds.goal_s):
            if not any(runner.session is not None for runner in everyone):
                return
            _one_round(reference, everyone, feeds[k % len(feeds)], k)
            k += 1
    finally:
        for runner in group:
            runner.close()


def _one_round(reference: _Runner, everyone: Sequence[_Runner], feeds: FullFeeds, k: int) -> None:
    took = {id(runner): runner.once(feeds) for runner in in_turn(everyone, k)}
    beside = took[id(reference)]
    for runner in everyone:
        mine = took[id(runner)]
        if mine is None:
            continue
        runner.times.append(mine)
        if beside is not None:
            runner.beside.append(beside)


def in_turn(everyone: Sequence[T], k: int) -> list[T]:
    """The order of round `k`: every second one backwards, and the start moves on every two."""
    start = (k // 2) % len(everyone)
    order = [*everyone[start:], *everyone[:start]]
    return order[::-1] if k % 2 else order
