"""Which of several files runs faster here: in one process, in turn, against one reference.

Invariants: every figure of speed is a ratio to the first contender, from runs side by side, so that what
else the machine does meets both alike; the order changes every round, so that nobody always goes first
or always follows the same one; warm-up is discarded; sessions spin only within runs, where a contender's plan
says so. Where one thread on the CPU does all the work, a round in which another process took its core away
does not count (its processor time tells), unless there are too few others. What does not load or fails to
run is a timing with the reason, never an exception. At most `GROUP` sessions are open at any time, however
many contenders there are: groups share the reference.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt

from edgeward_models.progress import Progress, silent
from edgeward_models.statistics import Interval, paired_ratio
from edgeward_runtime import resources
from edgeward_runtime.sessions import CPU, NotLoaded, RunFailed, Session, open_session
from edgeward_runtime.trials import in_turn, quantile
from edgeward_wire.verdict import Plan

GROUP = 5
WARM_UP = 2
MAX_RUNS = 10_000
ON_CORE = 0.95
"""The share of a run's time that its thread was on a core, from which on it counts as undisturbed."""
_PATIENCE = 3.0  # times the goal, for enough undisturbed rounds
MAX_CONTENDERS = 256
PERCENT = 100
LATE = 6
"""Rounds that are enough where the time is up."""
_BLURRED = 0.08

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
    """Those that count."""
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
    late: float = math.inf,
    progress: Progress = silent,
) -> list[Timing]:
    """Time all contenders, in their order; the first is what the others are compared with.

    Each group of `GROUP` runs for about `goal_s` seconds, but at least `least` and at most `most` rounds;
    up to three times as long where other processes disturb. Past `late` (time.monotonic()) nobody is waited
    for: `LATE` rounds are enough, and disturbed ones count.

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
            told = partial(_tell, progress, k, len(groups))
            told(0)
            _run_group(reference, group, feeds, _Rounds(goal_s, least, most, late, told))
    finally:
        reference.close()
    progress("timing", PERCENT * len(groups), PERCENT * len(groups))
    return [runner.timing(reference, least) for runner in runners]


def race_steadily(
    contenders: Sequence[Contender],
    feeds: Sequence[FullFeeds],
    *,
    goal_s: float,
    least: int,
    late: float = math.inf,
) -> list[Timing]:
    """A race; where other work on the machine blurred a ratio it runs again, and the clearer one counts.

    Not so where it is `late` (see `race`).
    """
    timings = race(contenders, feeds, goal_s=goal_s, least=least, late=late)
    blurred = [k for k, one in enumerate(timings) if _blur(one) > _BLURRED]
    second_s = 2 * goal_s * math.ceil(len(blurred) / (GROUP - 1))
    if blurred and time.monotonic() + second_s < late:
        again = [contenders[0], *(contenders[k] for k in blurred)]
        second = race(again, feeds, goal_s=2 * goal_s, least=least, late=late)[1:]
        for k, one in zip(blurred, second, strict=True):
            timings[k] = min(timings[k], one, key=_blur)
    return timings


def _blur(timing: Timing) -> float:
    """The width of the ratio's interval over the ratio."""
    if timing.ratio is None or timing.interval is None:
        return 0.0
    return (timing.interval.high - timing.interval.low) / timing.ratio


@dataclass(frozen=True)
class _Rounds:
    goal_s: float
    least: int
    most: int
    late: float
    told: Callable[[int], None] = lambda percent: None
    """Hears how much of the group's rounds is done, in hundredths."""

    def percent(self, done: int, used_s: float) -> int:
        """About how much of it is done; a group that is disturbed takes longer than it seemed."""
        timed = used_s / self.goal_s if self.goal_s > 0 else 1.0
        return min(PERCENT - 1, int(PERCENT * max(done / self.most, min(done / self.least, timed))))

    def done(self, count: int, clean: int, used_s: float) -> bool:
        """Whether so many rounds, so many of them undisturbed, are enough after so many seconds."""
        late = time.monotonic() >= self.late
        patience = 1.0 if late or clean >= self.least else _PATIENCE
        least = min(self.least, LATE) if late else self.least
        return count >= least and used_s >= self.goal_s * patience


@dataclass(frozen=True)
class _Run:
    """One run. `beside` is the reference's of the same round, in seconds as `took` is."""

    took: float
    beside: float | None
    undisturbed: bool


@dataclass
class _Runner:
    """One contender on its way."""

    contender: Contender
    session: Session | None = None
    runs: list[_Run] = field(default_factory=list)
    clean: int = 0
    """Undisturbed runs of the present group."""
    loaded: bool = True
    reason: str = ""

    @property
    def alone(self) -> bool:
        """Whether the calling thread does all the work, so that its processor time can be compared."""
        return self.contender.plan.threads == 1 and self.contender.plan.provider == CPU

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

    def once(self, feeds: FullFeeds) -> tuple[float, bool] | None:
        """(seconds, undisturbed) of one run, or None: a fault ends its race."""
        if self.session is None:
            return None
        on_core, begun = time.thread_time(), time.perf_counter()
        try:
            self.session.run(feeds)
        except RunFailed as error:
            self.fail(error)
            return None
        took = time.perf_counter() - begun
        return took, not self.alone or time.thread_time() - on_core >= ON_CORE * took

    def fail(self, error: RunFailed) -> None:
        self.reason = f"It loads, but does not run. {error.what}"
        self.runs.clear()
        self.close()

    def close(self) -> None:
        if self.session is not None:
            self.session.close()
            self.session = None
            resources.give_back()

    def timing(self, reference: _Runner, least: int) -> Timing:
        name, runs = self.contender.name, _counting(self.runs, least)
        if not runs:
            return Timing(name, 0, loaded=self.loaded, reason=self.reason)
        times = [run.took for run in runs]
        p50, p90, p99 = (quantile(times, q) * 1e3 for q in (0.5, 0.9, 0.99))
        if self is reference:
            return Timing(name, len(times), p50, p90, p99, 1.0, Interval(1.0, 1.0))
        beside = [run.beside for run in runs if run.beside is not None]
        if len(beside) != len(times):
            return Timing(name, len(times), p50, p90, p99, reason="The reference did not run.")
        ratio, interval = paired_ratio(times, beside)
        return Timing(name, len(times), p50, p90, p99, ratio, interval)


def _counting(runs: Sequence[_Run], least: int) -> Sequence[_Run]:
    """The undisturbed runs; all of them where those are too few."""
    clean = [run for run in runs if run.undisturbed]
    return clean if len(clean) >= min(least, len(runs)) else runs


def _run_group(
    reference: _Runner, group: Sequence[_Runner], feeds: Sequence[FullFeeds], rounds: _Rounds
) -> None:
    try:
        for runner in group:
            runner.open(feeds)
        everyone = [reference, *group]
        reference.once(feeds[0])  # what the others' loading threw out of its caches comes back
        reference.clean = 0
        started, k, said = time.perf_counter(), 0, 0
        while k < rounds.most and any(runner.session is not None for runner in everyone):
            used = time.perf_counter() - started
            if rounds.done(k, min(one.clean for one in everyone if one.session is not None), used):
                return
            if rounds.percent(k, used) > said:  # seldom: telling takes time, too
                said = rounds.percent(k, used)
                rounds.told(said)
            _one_round(reference, everyone, feeds[k % len(feeds)], k)
            k += 1
    finally:
        for runner in group:
            runner.close()


def _tell(progress: Progress, group: int, groups: int, percent: int) -> None:
    progress("timing", PERCENT * group + percent, PERCENT * groups)


def _one_round(reference: _Runner, everyone: Sequence[_Runner], feeds: FullFeeds, k: int) -> None:
    took = {id(runner): runner.once(feeds) for runner in in_turn(everyone, k)}
    beside = took[id(reference)]
    for runner in everyone:
        mine = took[id(runner)]
        if mine is not None:
            seconds, clean = beside if beside is not None else (None, True)
            runner.runs.append(_Run(mine[0], seconds, mine[1] and clean))
            runner.clean += mine[1] and clean
