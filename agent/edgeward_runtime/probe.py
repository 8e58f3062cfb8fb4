"""Try the plans of a model on this machine, and say which one runs it right and fastest.

Each plan is loaded, held against the golden vectors, and screened with a few runs. The fastest of each
number of threads is then refined, one session option at a time: what an option gives is the ratio of runs
in turn with the plan that has it not. At the end the best three, and the incumbent, run in pairs with the
one that leads. What ran far slower than a moment before is timed again (docs/adr/0008). What does not load,
or is wrong, is an outcome with a reason. How many runs there are follows from how long one takes: the times
below are goals, the counts are minimums.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgeward_runtime import golden, parity, plans, resources
from edgeward_runtime.sessions import RunFailed
from edgeward_runtime.trials import Examiner, Patience, Rounds, Subject, Trial, paired_ratio, time_steadily
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.verdict import Plan, PlanOutcome

FINALISTS = 3
_SCREENING = Rounds(goal_s=0.2, least=3, most=100)
_DUEL = Rounds(goal_s=0.4, least=12, most=1000)
_FINALS = Rounds(goal_s=0.8, least=12, most=2000)
"""Each for one pair."""
_CROWDED = 0.8


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


def probe(
    subject: Subject,
    candidates: Sequence[Plan],
    *,
    incumbent: Plan | None = None,
    progress: Progress | None = None,
    budget_s: float = 900.0,
    calm: Calm | None = None,
) -> Findings:
    """Try `candidates` (and the incumbent), and refine the best. What is left after `budget_s` seconds of
    work is skipped.

    Before each plan, and before the finals, `calm` may let the machine cool down.

    Raises:
        Unavailable: the machine was in the way.
    """
    return _Probe(subject, candidates, incumbent, progress, budget_s=budget_s, calm=calm or _Counted()).run()


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
        self.trials = [Trial(plan) for plan in candidates]
        if incumbent is not None and incumbent not in candidates and incumbent.variant in subject.variants:
            self.trials.append(Trial(incumbent))
        self.examiner = Examiner(subject)
        self.say = progress or (lambda *_: None)
        self.started = time.perf_counter()
        self.deadline = self.started + budget_s
        self.calm = calm
        self.patience = Patience()
        self.crowded = False

    def run(self) -> Findings:
        try:
            self._preprocess()
        except Rejected as error:
            for trial in self.trials:
                trial.fail("skipped", "The preprocessing does not match.")
            return self._findings(error.what)
        best = self._screened()
        best = self._keep_best(self._refined(best))
        try:
            self._finals(best)
        except RunFailed as error:
            raise _cut_short(error) from error
        for trial in best:
            trial.close()
        return self._findings()

    def _preprocess(self) -> None:
        if self.subject.preprocess is not None:
            arrays = golden.read_npz(self.subject.preprocess, "preprocessing vectors")
            parity.check_preprocess(self.subject.contract, golden.picture_pairs(arrays))

    # --- each by itself

    def _screened(self) -> list[Trial]:
        """The best of those that are right, after a first look at their speed."""
        best: list[Trial] = []
        for trial in list(self.trials):
            if not self._examined(trial):
                continue
            try:
                time_steadily([trial], _SCREENING, self.patience)
            except RunFailed as error:
                trial.fail("not_loaded", f"It loads, but does not run. {error.what}")
                continue
            trial.slowness = trial.calm_ms
            best = self._keep_best([*best, trial])
        return best

    def _examined(self, trial: Trial) -> bool:
        """Whether it is right, and there was time to see it."""
        self.deadline += self.calm.wait()
        self.say("preparing", self.trials.index(trial), len(self.trials), trial.plan.title)
        if time.perf_counter() > self.deadline:
            trial.fail("skipped", "There was no time left to try it.")
        else:
            self.examiner.examine(trial)
        return trial.outcome == "passed"

    def _keep_best(self, trials: Sequence[Trial]) -> list[Trial]:
        """Those that go on: the fastest few, and the incumbent; the others are closed."""
        ordered = sorted(trials, key=lambda t: t.slowness)
        kept = ordered[:FINALISTS] + [t for t in ordered[FINALISTS:] if t.plan == self.incumbent]
        for trial in ordered:
            if trial not in kept:
                trial.close()
        return kept

    # --- one against another

    def _refined(self, best: list[Trial]) -> list[Trial]:
        """The same with options that make them faster, where some do."""
        for k in plans.worth_refining([(trial.plan, trial.slowness) for trial in best]):
            for refine in plans.REFINEMENTS:
                plan = refine(best[k].plan)
                if plan is None or any(trial.plan == plan for trial in self.trials):
                    continue
                if time.perf_counter() > self.deadline:
                    return best
                winner, loser = self._duel(best[k], plan)
                best[k] = winner
                if loser.plan == self.incumbent:
                    best.append(loser)  # it meets what is to replace it in the finals
                else:
                    loser.close()
        return best

    def _duel(self, holder: Trial, plan: Plan) -> tuple[Trial, Trial]:
        """The winner and the loser of a holder and a plan that differs from it in one option."""
        challenger = Trial(plan)
        self.trials.append(challenger)
        if not self._examined(challenger):
            return holder, challenger
        try:
            time_steadily([holder, challenger], _DUEL, self.patience)
        except RunFailed as error:
            raise _cut_short(error) from error
        ratio = paired_ratio(challenger, holder)
        challenger.slowness = holder.slowness * ratio
        return (challenger, holder) if ratio < plans.GAIN_TO_REFINE else (holder, challenger)

    def _finals(self, finalists: list[Trial]) -> None:
        """Set each one's latencies and its ratio to the one that leads, in pairs with it. Raises RunFailed.

        In pairs: of three in turn, each would find the caches full of two others.
        """
        if not finalists:
            return
        names = ", ".join(trial.plan.title for trial in finalists)
        self.calm.wait()
        self.say("validating", 0, 1, names)
        leader, *others = sorted(finalists, key=lambda t: t.slowness)
        shares, times = [], list[float]()
        for pair in [[leader, other] for other in others] or [[leader]]:
            shares.append(time_steadily(pair, _FINALS, self.patience))
            pair[-1].ratio = paired_ratio(pair[-1], leader)
            times += leader.times
        leader.ratio, leader.times = 1.0, times
        self.crowded = min(shares) < _CROWDED
        self._hold_to_limit(finalists)
        self.say("validating", 1, 1, names)

    def _hold_to_limit(self, finalists: Sequence[Trial]) -> None:
        limit = self.subject.limits.p99_ms
        for trial in finalists:
            if limit is not None and (trial.p99_ms or 0.0) > limit:
                trial.fail("over_limit", f"p99 is {trial.p99_ms:.1f} ms; the manifest allows {limit:g}.")

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


def _cut_short(error: RunFailed) -> Unavailable:
    """It ran in the screening: the machine changed under us (memory, a device that went away)."""
    return Unavailable(f"The probe was cut short. {error.what}", "It is tried again later.")


def _why_none(outcomes: Sequence[PlanOutcome]) -> str:
    """One sentence for a model that no plan runs."""
    if not outcomes:
        return "No plan fits this machine: no variant's hints allow it."
    # What lost against one that failed later has none.
    first = next((o for o in outcomes if o.reason), outcomes[0])
    same = all(o.reason == first.reason for o in outcomes)
    return f"No plan passed. {'' if same else first.plan.title + ': '}{first.reason}"
