"""One plan on its way through a probe: loaded, held against its golden vectors, timed in turn with others.

Invariants: what does not load, or is wrong, ends as an outcome with a reason and with its session closed.
Runs that are compared alternate in one process, and the order changes every round, so that what else the
machine does meets all of them alike and nobody always follows the same one. A timing in which they ran far
slower than they were seen to run is made again: it would say how things stood for a second, not for good.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TypeVar

from edgeward_runtime import golden, parity, plans, resources
from edgeward_runtime.golden import Arrays
from edgeward_runtime.plans import VariantFacts
from edgeward_runtime.ports import constants, initial_states
from edgeward_runtime.sessions import (
    NotLoaded,
    Placement,
    RunFailed,
    Session,
    WrongProvider,
    open_session,
    profiled_placement,
)
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import Limits
from edgeward_wire.verdict import Outcome, Plan, PlanOutcome

_RESERVE_MB = 32.0
_SLOWED = 1.2
"""Times as long as a trial was seen to take: something is in the way."""
_AGAIN = 3
"""Times that one timing is made again, if the probe's patience allows."""
PAUSE_S = 0.5
"""Between two timings of the same trials: long enough for the system to put their threads elsewhere."""

T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    """One variant's files."""

    facts: VariantFacts
    file: Path
    golden: Path | bytes
    cosine: float


@dataclass(frozen=True)
class Subject:
    """What is probed."""

    contract: Contract
    variants: Mapping[str, Candidate]
    preprocess: Path | bytes | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(eq=False)
class Trial:
    """One plan and what is known of it so far."""

    plan: Plan
    outcome: Outcome = "passed"
    reason: str = ""
    session: Session | None = None
    feeds: list[Arrays] = field(default_factory=list)
    placement: Placement | None = None
    parity: float | None = None
    load_ms: float | None = None
    memory_mb: float | None = None
    times: list[float] = field(default_factory=list)
    """Milliseconds of each run of the last timing."""
    calm_ms: float = math.inf
    """The least median of its timings so far: what a run takes when nothing is in the way."""
    slowness: float = 0.0
    """Milliseconds of a run, by what was measured in turn with it where something was."""
    ratio: float | None = None

    def fail(self, outcome: Outcome, reason: str) -> None:
        self.outcome, self.reason = outcome, reason
        self.close()

    def close(self) -> None:
        if self.session is not None:
            self.session.close()
            self.session = None
            resources.give_back()

    @property
    def p50_ms(self) -> float | None:
        return median(self.times) if self.times else None

    @property
    def p99_ms(self) -> float | None:
        return quantile(self.times, 0.99) if self.times else None

    def result(self) -> PlanOutcome:
        placement = self.placement
        return PlanOutcome(
            plan=self.plan,
            outcome=self.outcome,
            reason=self.reason,
            nodes_on_provider=placement.on_provider if placement else None,
            nodes_total=placement.total if placement else None,
            parity=self.parity,
            p50_ms=self.p50_ms,
            p99_ms=self.p99_ms,
            ratio=self.ratio,
            load_ms=self.load_ms,
            memory_mb=self.memory_mb,
            unverified=plans.unverified(self.plan),
        )


@dataclass(frozen=True)
class Rounds:
    """How long a timing goes on: about `goal_s` seconds, at least and at most so many rounds."""

    goal_s: float
    least: int
    most: int


@dataclass(frozen=True)
class _Golden:
    """What one variant must give, and what it would give if its sums saturated."""

    vectors: list[parity.Vector]
    cuts: list[Arrays]


class Examiner:
    """Loads plans of one subject, and knows what each variant must give."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._goldens: dict[str, _Golden] = {}

    def examine(self, trial: Trial) -> None:
        """Load it and hold it against its golden vectors: it has an open session, or has failed.

        Raises:
            Unavailable: the golden vectors cannot be read.
        """
        try:
            self._load(trial)
            if self._right(trial):
                self._fits(trial)
        except WrongProvider as error:
            trial.fail("wrong_provider", error.what)
        except NotLoaded as error:
            trial.fail("not_loaded", error.what)
        except RunFailed as error:
            trial.fail("not_loaded", f"It loads, but does not run. {error.what}")
        except Rejected as error:
            trial.fail("wrong_output", error.what)

    def _load(self, trial: Trial) -> None:
        """Open the session, run it once, and see what it took."""
        variant = self._subject.variants[trial.plan.variant]
        fixed = {**constants(self._subject.contract), **initial_states(self._subject.contract)}
        trial.feeds = [{**fixed, **inputs} for inputs, _ in self._golden(trial.plan.variant).vectors]
        before = resources.private_mb()
        started = time.perf_counter()
        trial.session = open_session(variant.file, trial.plan, placement=True)
        trial.session.run(trial.feeds[0])
        trial.load_ms = (time.perf_counter() - started) * 1e3
        after = resources.private_mb()
        if before is not None and after is not None:
            trial.memory_mb = max(0.0, after - before)
        trial.placement = trial.session.placement()
        if trial.placement is None and trial.plan.provider != plans.CPU:
            trial.placement = profiled_placement(variant.file, trial.plan, trial.feeds[0])
        if trial.placement is not None and not trial.placement.on_provider:
            raise WrongProvider("The provider runs none of the nodes: all of them fell to the CPU.")

    def _right(self, trial: Trial) -> bool:
        variant = self._subject.variants[trial.plan.variant]
        assert trial.session is not None
        made = self._golden(trial.plan.variant)
        held = parity.hold(trial.session, made.vectors, self._subject.contract, made.cuts)
        trial.parity = held.cosine
        least = parity.gate(variant.cosine, variant.facts.precision, trial.plan.provider)
        if held.cosine < least:
            wrong = f"have cosine {held.cosine:.4f}, below {least}"
            wrong += ", or are not finite" if held.cosine <= -1 else ""  # -1 stands for both
            trial.fail("wrong_output", f"Against the golden outputs its own {wrong}.")
            return False
        if held.leaning is not None and held.leaning >= parity.LEANING:
            trial.fail(
                "wrong_output",
                f"Its outputs lean towards what saturating sums give ({held.leaning:.2f} of the way,"
                f" {parity.LEANING} is too far): this processor needs exact sums or another variant.",
            )
            return False
        return True

    def _fits(self, trial: Trial) -> None:
        took, limit = trial.memory_mb or 0.0, self._subject.limits.memory_mb
        left = resources.available_mb()
        if limit is not None and took > limit:
            trial.fail("over_limit", f"It takes {took:.0f} MB; the manifest allows {limit:.0f}.")
        elif left is not None and left < _RESERVE_MB:
            trial.fail("over_limit", f"With it, the machine has only {left:.0f} MB left.")

    def _golden(self, variant: str) -> _Golden:
        if variant not in self._goldens:
            arrays = golden.read_npz(self._subject.variants[variant].golden)
            self._goldens[variant] = _Golden(golden.vectors(arrays), golden.cuts(arrays))
        return self._goldens[variant]


def time_in_turn(trials: Sequence[Trial], rounds: Rounds) -> float:
    """Run each trial once a round, and note the milliseconds in place of those before.

    Returns the share of the wall clock that single-threaded runs were on a core: below 1 where others
    wanted it too. Raises RunFailed.
    """
    for trial in trials:
        trial.times = []
    started = time.perf_counter()
    wall = cpu = 0.0
    k = 0
    while k < rounds.least or (k < rounds.most and time.perf_counter() - started < rounds.goal_s):
        for trial in in_turn(trials, k):
            assert trial.session is not None
            feeds = trial.feeds[k % len(trial.feeds)]
            on_core, begun = time.thread_time(), time.perf_counter()
            trial.session.run(feeds)
            took = time.perf_counter() - begun
            trial.times.append(took * 1e3)
            if trial.plan.threads == 1 and trial.plan.provider == plans.CPU:
                wall, cpu = wall + took, cpu + time.thread_time() - on_core
        k += 1
    return cpu / wall if wall else 1.0


@dataclass
class Patience:
    """How many timings of one probe may still be made again: on a busy machine, too, it has to end."""

    left: int = 4


def time_steadily(
    trials: Sequence[Trial],
    rounds: Rounds,
    patience: Patience,
    *,
    timing: Callable[[Sequence[Trial], Rounds], float] = time_in_turn,
    pause: Callable[[float], None] = time.sleep,
) -> float:
    """As `time_in_turn`; again after a pause, where one of them ran far slower than it was seen to run.

    Threads that have to share one core for a second make two look as slow as one. The timing in which they
    were slowed down least counts. Raises RunFailed.
    """
    tries: list[tuple[float, list[list[float]]]] = []

    def slowed(tried: tuple[float, list[list[float]]]) -> float:
        return max(median(times) / trial.calm_ms for trial, times in zip(trials, tried[1], strict=True))

    while True:
        share = timing(trials, rounds)
        tries.append((share, [trial.times for trial in trials]))
        for trial in trials:
            trial.calm_ms = min(trial.calm_ms, median(trial.times))
        if slowed(tries[-1]) < _SLOWED or len(tries) > _AGAIN or not patience.left:
            break
        patience.left -= 1
        pause(PAUSE_S)
    best = min(tries, key=slowed)
    slow_for_good = slowed(best) >= _SLOWED
    for trial, times in zip(trials, best[1], strict=True):
        trial.times = times
        if slow_for_good:  # what it was before says nothing of how the machine is now
            trial.calm_ms = median(times)
    return best[0]


def paired_ratio(trial: Trial, reference: Trial) -> float:
    """The median of one's latency over the other's of the same round; below 1 it is faster."""
    return median(a / b for a, b in zip(trial.times, reference.times, strict=True))


def in_turn(everyone: Sequence[T], k: int) -> list[T]:
    """The order of round `k`: every second one backwards, and the start moves on every two."""
    start = (k // 2) % len(everyone)
    order = [*everyone[start:], *everyone[:start]]
    return order[::-1] if k % 2 else order


def quantile(times: Sequence[float], q: float) -> float:
    """The q-quantile of at least one number: the smallest that q of them do not exceed."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, max(0, -(-int(q * 1e6) * len(ordered) // 1_000_000) - 1))]
