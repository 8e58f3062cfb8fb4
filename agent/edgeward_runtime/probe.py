"""Try every plan of a model on this machine, and say which one runs it right and fastest.

Each plan is loaded, held against the golden vectors, and screened with a few runs. The best three of
those that pass run against one another and the incumbent in turn, so that what else the machine does
meets all of them alike. What does not load, or is wrong, is an outcome with a reason. How many runs
there are follows from how long one takes: the times below are goals, the counts are minimums.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol

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
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import Limits
from edgeward_wire.verdict import Outcome, Plan, PlanOutcome

FINALISTS = 3
_SCREEN_S, _SCREEN_RUNS, _SCREEN_MOST = 0.2, 3, 30
_FINAL_S, _FINAL_ROUNDS, _FINAL_MOST = 1.6, 8, 150
_RESERVE_MB = 32.0
_CROWDED = 0.8


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


@dataclass(frozen=True)
class Findings:
    """What came of it."""

    outcomes: tuple[PlanOutcome, ...]
    chosen: Plan | None
    reason: str
    """Why nothing was chosen."""
    provisional: bool
    took_s: float


Progress = Callable[[str, int, int, str], None]
"""(phase: preparing | validating, done, total, note)."""


class Calm(Protocol):
    """Whether the machine is in a state to be measured."""

    def wait(self) -> float:
        """Return when it is, or when there is no point in waiting longer; the seconds waited."""
        ...

    def disturbed(self) -> bool:
        """Whether something was measured while it was not."""
        ...


class _Counted:
    """Never waits; knows when cores were slowed down meanwhile, where the kernel counts that."""

    def __init__(self) -> None:
        self._before = resources.throttle_count()

    def wait(self) -> float:
        return 0.0

    def disturbed(self) -> bool:
        return resources.throttle_count() > self._before


@dataclass
class _Trial:
    """One plan on its way."""

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


def quantile(times: Sequence[float], q: float) -> float:
    """The q-quantile of at least one number: the smallest that q of them do not exceed."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, max(0, -(-int(q * 1e6) * len(ordered) // 1_000_000) - 1))]


def probe(
    subject: Subject,
    candidates: Sequence[Plan],
    *,
    incumbent: Plan | None = None,
    progress: Progress | None = None,
    budget_s: float = 900.0,
    calm: Calm | None = None,
) -> Findings:
    """Try `candidates` (and the incumbent). What is left after `budget_s` seconds of work is skipped.

    Before each plan, and before the finals, `calm` may let the machine cool down.
    """
    return _Probe(subject, candidates, incumbent, progress, budget_s=budget_s, calm=calm or _Counted()).run()


@dataclass(frozen=True)
class _Golden:
    """What one variant must give, and what it would give if its sums saturated."""

    vectors: list[parity.Vector]
    cuts: list[Arrays]


class _Probe:
    def __init__(
        self,
        subject: Subject,
        candidates: Sequence[Plan],
        incumbent: Plan | None,
        progress: Progress | None,
        *,
        budget_s: float,
        calm: Calm,
    ) -> None:
        self.subject, self.incumbent = subject, incumbent
        self.trials = [_Trial(plan) for plan in candidates]
        if incumbent is not None and incumbent not in candidates and incumbent.variant in subject.variants:
            self.trials.append(_Trial(incumbent))
        self.say = progress or (lambda *_: None)
        self.started = time.perf_counter()
        self.deadline = self.started + budget_s
        self.calm = calm
        self.crowded = False
        self.goldens: dict[str, _Golden] = {}

    def run(self) -> Findings:
        try:
            self._preprocess()
        except Rejected as error:
            for trial in self.trials:
                trial.fail("skipped", "The preprocessing does not match.")
            return self._findings(error.what)
        open_trials: list[_Trial] = []
        for k, trial in enumerate(self.trials):
            self.deadline += self.calm.wait()
            self.say("preparing", k, len(self.trials), trial.plan.title)
            if time.perf_counter() > self.deadline:
                trial.fail("skipped", "There was no time left to try it.")
                continue
            self._screen(trial)
            open_trials = self._keep_best([*open_trials, trial])
        self._finals(open_trials)
        for trial in open_trials:
            trial.close()
        return self._findings()

    def _preprocess(self) -> None:
        if self.subject.preprocess is not None:
            arrays = golden.read_npz(self.subject.preprocess, "preprocessing vectors")
            parity.check_preprocess(self.subject.contract, golden.picture_pairs(arrays))

    # --- one plan by itself

    def _screen(self, trial: _Trial) -> None:
        """Load it, hold it against its golden vectors, take a first look at its speed."""
        try:
            self._load(trial)
            if self._right(trial) and self._fits(trial):
                _time([trial], _SCREEN_S, _SCREEN_RUNS, _SCREEN_MOST)
        except WrongProvider as error:
            trial.fail("wrong_provider", error.what)
        except NotLoaded as error:
            trial.fail("not_loaded", error.what)
        except RunFailed as error:
            trial.fail("not_loaded", f"It loads, but does not run. {error.what}")
        except Rejected as error:
            trial.fail("wrong_output", error.what)

    def _load(self, trial: _Trial) -> None:
        """Open the session, run it once, and see what it took."""
        variant = self.subject.variants[trial.plan.variant]
        fixed = {**constants(self.subject.contract), **initial_states(self.subject.contract)}
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

    def _right(self, trial: _Trial) -> bool:
        variant = self.subject.variants[trial.plan.variant]
        assert trial.session is not None
        made = self._golden(trial.plan.variant)
        held = parity.hold(trial.session, made.vectors, self.subject.contract, made.cuts)
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

    def _fits(self, trial: _Trial) -> bool:
        took, limit = trial.memory_mb or 0.0, self.subject.limits.memory_mb
        left = resources.available_mb()
        if limit is not None and took > limit:
            trial.fail("over_limit", f"It takes {took:.0f} MB; the manifest allows {limit:.0f}.")
        elif left is not None and left < _RESERVE_MB:
            trial.fail("over_limit", f"With it, the machine has only {left:.0f} MB left.")
        else:
            return True
        return False

    def _golden(self, variant: str) -> _Golden:
        if variant not in self.goldens:
            arrays = golden.read_npz(self.subject.variants[variant].golden)
            self.goldens[variant] = _Golden(golden.vectors(arrays), golden.cuts(arrays))
        return self.goldens[variant]

    # --- the best against one another

    def _keep_best(self, trials: list[_Trial]) -> list[_Trial]:
        """Those that go on: the fastest few, and the incumbent; the others are closed."""
        passed = sorted((t for t in trials if t.outcome == "passed"), key=lambda t: t.p50_ms or 0.0)
        kept = passed[:FINALISTS] + [t for t in passed[FINALISTS:] if t.plan == self.incumbent]
        for trial in passed:
            if trial not in kept:
                trial.close()
        return kept

    def _finals(self, finalists: list[_Trial]) -> None:
        """Run them in turn, and set each one's latencies and its ratio to the fastest."""
        if not finalists:
            return
        names = ", ".join(trial.plan.title for trial in finalists)
        self.calm.wait()
        self.say("validating", 0, 1, names)
        for trial in finalists:
            trial.times = []
        try:
            self.crowded = _time(finalists, _FINAL_S, _FINAL_ROUNDS, _FINAL_MOST) < _CROWDED
        except RunFailed as error:
            # It ran in the screening: the machine changed under us (memory, a device that went away).
            raise Unavailable(f"The probe was cut short. {error.what}", "It is tried again later.") from error
        reference = min(finalists, key=lambda t: t.p50_ms or 0.0)
        limit = self.subject.limits.p99_ms
        for trial in finalists:
            trial.ratio = median(a / b for a, b in zip(trial.times, reference.times, strict=True))
            if limit is not None and (trial.p99_ms or 0.0) > limit:
                trial.fail("over_limit", f"p99 is {trial.p99_ms:.1f} ms; the manifest allows {limit:g}.")
        self.say("validating", 1, 1, names)

    def _findings(self, reason: str = "") -> Findings:
        outcomes = [trial.result() for trial in self.trials]
        winner = plans.choose(outcomes, self.incumbent)
        if winner is not None:
            outcomes[winner] = outcomes[winner].model_copy(update={"outcome": "chosen"})
        elif not reason:
            reason = _why_none(outcomes)
        return Findings(
            outcomes=tuple(outcomes),
            chosen=outcomes[winner].plan if winner is not None else None,
            reason=reason,
            provisional=self.calm.disturbed() or self.crowded,
            took_s=time.perf_counter() - self.started,
        )


def _time(trials: Sequence[_Trial], goal_s: float, least: int, most: int) -> float:
    """Run each trial in turn, round after round, and note the milliseconds.

    Returns the share of the wall clock that single-threaded runs were on a core: below 1 where others
    wanted it too.
    """
    started = time.perf_counter()
    wall = cpu = 0.0
    rounds = 0
    while rounds < least or (rounds < most and time.perf_counter() - started < goal_s):
        for trial in trials:
            assert trial.session is not None
            feeds = trial.feeds[rounds % len(trial.feeds)]
            on_core, begun = time.thread_time(), time.perf_counter()
            trial.session.run(feeds)
            took = time.perf_counter() - begun
            trial.times.append(took * 1e3)
            if trial.plan.threads == 1 and trial.plan.provider == plans.CPU:
                wall, cpu = wall + took, cpu + time.thread_time() - on_core
        rounds += 1
    return cpu / wall if wall else 1.0


def _why_none(outcomes: Sequence[PlanOutcome]) -> str:
    """One sentence for a model that no plan runs."""
    if not outcomes:
        return "No plan fits this machine: no variant's hints allow it."
    first = outcomes[0]
    same = all(o.reason == first.reason for o in outcomes)
    return f"No plan passed. {'' if same else first.plan.title + ': '}{first.reason}"
