"""The search for one target, carried out: make what `search` asks for, measure it, and settle the matter.

Invariants: decisions are those of `search`; every finished step is in the workspace; a candidate's fault
is its `excluded`, with the reason. Latency is always paired with FP32's: in groups while searching, then
once more among the best, longer, and those figures decide. The test samples are seen only by what was
chosen; what fails on them is passed over, and that is said.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edgeward_models import search
from edgeward_models.elsewhere import unmeasured
from edgeward_models.findings import Candidate, Final, TargetReport
from edgeward_models.race import GROUP, Contender, Timing, race_steadily
from edgeward_models.ranking import UNTOUCHED_DB, rank
from edgeward_models.schemes import Scheme, Target, unsupported
from edgeward_models.search import Measured, Space
from edgeward_models.sensitivity import Layer
from edgeward_models.statistics import Interval
from edgeward_models.study import (
    Study,
    check_tests,
    float_s,
    held_out,
    here,
    in_its_name,
    judge,
    make_file,
)
from edgeward_models.trials import Judged, saturation
from edgeward_models.workspace import file_digest
from edgeward_runtime import sessions
from edgeward_wire.errors import Rejected
from edgeward_wire.verdict import Plan

FINALISTS = 6
BUDGET_ENDED = (
    "The budget ended the search: run it again, or with a larger --budget, and it goes on from here."
)
_WALKS = 3
_RANK_SHARE = 0.2
_RESERVE = 0.1  # of the budget, for the finals, at least
_BOTH = 1.6  # FP32's time, of both files on a test sample


def search_targets(study: Study, targets: Sequence[Target]) -> list[TargetReport]:
    """What was found for each target, in their order.

    Those that this machine can measure come first and have equal shares of the time, what one leaves going to
    the next. Another one gets its base scheme, with the float layers of the first that found something.
    Raises Rejected: FP32 itself is no good on the test samples.
    """
    check_tests(study)
    providers = sessions.available_providers()
    measured = [one for one in targets if one.measurable(platform.machine(), providers)]
    found = {}
    for k, target in enumerate(measured):
        found[target.name] = search_target(share(study, time.monotonic(), len(measured), k), target)
    like = next((one for one in found.values() if one.offered is not None), None)
    for target in targets:
        if target.name not in found:
            found[target.name] = unmeasured(study, target, like)
    return [found[target.name] for target in targets]


def share(study: Study, now: float, targets: int, done: int) -> Study:
    """The study with the time of the next of so many targets.

    The budget, which figures depend on, is the same in every run; when it ends follows the clock.
    """
    left = max(0.0, study.deadline - now) / (targets - done)
    return replace(study, budget_s=study.budget_s / targets, deadline=now + left)


def search_target(study: Study, target: Target) -> TargetReport:
    """Search for one target that this machine can measure."""
    hunt = _Hunt(study, target)
    hunt.search()
    hunt.finals()
    return hunt.report()


class _Hunt:
    """One search on its way."""

    def __init__(self, study: Study, target: Target) -> None:
        self.study, self.target = study, target
        self.space = Space(target.schemes, study.aim, keep_float=study.keep_float)
        self.plan = Plan(provider=target.provider, variant="int8", threads=study.float_plan.threads)
        self.found: list[Candidate] = []
        self.fp32: Timing | None = None
        self.chosen: int | None = None
        self.final: Final | None = None
        self.notes: list[str] = []
        self.tests_s = study.effort.test * _BOTH * float_s(study)
        goal_s = max(0.5, min(10.0, 0.03 * study.budget_s))
        groups = math.ceil(FINALISTS / (GROUP - 1))
        self.finals_goal_s = goal_s
        self.end = study.deadline - max(_RESERVE * study.budget_s, self.tests_s + groups * goal_s)
        """Of the search: the rest is for the finals."""
        self.ranked: list[Layer] = []
        """What was measured, the most sensitive first."""

    @property
    def measured(self) -> list[Measured]:
        return [one.measured for one in self.found]

    def report(self) -> TargetReport:
        return TargetReport(
            target=self.target.name,
            gate=self.study.must,
            why=self.study.why,
            here=True,
            candidates=tuple(self.found),
            chosen=self.chosen,
            final=self.final,
            front=tuple(search.front_of(self.measured)),
            fp32=self.fp32,
            layers=tuple(
                {"name": one.name, "macs_share": one.macs_share, "sqnr_db": one.sqnr_db}
                for one in self.ranked
            ),
            unsupported=tuple(unsupported(self.target, self.study.operators)),
            notes=tuple(self.notes),
        )

    # --- the search

    def search(self) -> None:
        study = self.study
        began, ranking = time.monotonic(), 0.0
        while True:
            now = time.monotonic()
            # The base is tried however short the time is.
            each = (now - began - ranking) / len(self.found) if self.found else 0.0
            left = int((self.end - now) / max(each, 1e-3)) if self.found else search.BATCH
            batch = search.next_candidates(self.space, self.measured, left)
            if batch:
                self._try(batch)
            elif left <= 0:
                self.notes.append(BUDGET_ENDED)
                break
            elif not self._rank():
                break
            else:
                ranking += time.monotonic() - now
        study.progress("searching: done", 1, 1)

    def _rank(self) -> bool:
        """Rank the layers, once; whether there is anything to go on with."""
        study, root = self.study, search.root(self.space, self.measured)
        if self.space.layers or root is None:
            return False
        self._say("ranking the layers")
        passes = any(study.aim.passes(one) for one in self.measured)
        part = _RANK_SHARE / 2 if passes else _RANK_SHARE  # there is less to gain
        now = time.monotonic()
        self.ranked = rank(study, root, now + max(1.0, min(self.end - now, part * study.budget_s)))
        found = {one.name: one for one in self.ranked}
        every = [name for name in study.names if name not in root.keep_float]
        if len(found) < len(every):
            self.notes.append(
                f"{len(found)} of {len(every)} layers were ranked in time: the next run goes on from there."
            )
        # A layer that was not reached counts as harmless: it still has its place between the others.
        self.space = replace(
            self.space,
            layers=tuple(found.get(name, Layer(name, "", 0.0, UNTOUCHED_DB)) for name in study.names),
        )
        return bool(found)

    def _try(self, batch: Sequence[Scheme]) -> None:
        """Make, judge and race a few candidates."""
        fresh = []
        for scheme in batch:
            self._say(scheme.title)
            fresh.append(self._judged(scheme))
        files = [one.file for one in fresh if one.file is not None and not one.measured.excluded]
        goal_s = max(0.1, min(2.0, self.study.budget_s / 300))
        timings = iter(self._raced(files, goal_s, least=6, late=self.end)[1:])
        self.found += [one if one.measured.excluded else one.timed(next(timings)) for one in fresh]

    def _judged(self, scheme: Scheme) -> Candidate:
        study = self.study
        try:
            file = make_file(study, scheme)
        except Rejected as error:
            return Candidate(Measured(scheme, excluded=in_its_name(study, error)))
        if search.needs_proof(self.target.hints) and (unproved := saturation(file)):
            return Candidate.of(scheme, file, Judged(unproved))
        return Candidate.of(scheme, file, judge(study, file, self.plan, scheme, study.effort.fit))

    def _raced(self, files: Sequence[Path], goal_s: float, least: int, late: float) -> list[Timing]:
        """FP32's timing and those of the files, side by side."""
        if not files:
            return []
        study = self.study
        fp32 = Contender("FP32", study.whole, self.plan.model_copy(update={"variant": "fp32"}))
        contenders = [fp32, *(Contender(file.stem, file, self.plan) for file in files)]
        key = {
            **study.key,
            **here(),
            "files": [file_digest(file) for file in files],
            "plan": self.plan.model_dump(),
            "goal_s": goal_s,
        }
        plain = study.work.json(
            "raced",
            key,
            lambda: [
                asdict(timing)
                for timing in race_steadily(contenders, study.feeds, goal_s=goal_s, least=least, late=late)
            ],
        )
        return [_timing(one) for one in plain]

    def _say(self, what: str) -> None:
        study = self.study
        used = study.budget_s - max(0.0, study.deadline - time.monotonic())
        # One short of the end until it is: the bar is the budget.
        study.progress(f"searching: {what}", min(int(used), int(study.budget_s) - 1), int(study.budget_s))

    # --- the end

    def finals(self) -> None:
        """Race the best once more, longer; then hold the choice against the test samples."""
        self._race_finalists()
        self._settle()

    def _settle(self) -> None:
        """Take what passes on the test samples too, or the next best that does, while there is time."""
        for walk in range(_WALKS):
            k = self._choice()
            if k is None:
                break
            if walk and time.monotonic() > self.study.deadline:
                self.notes.append(BUDGET_ENDED)
                break
            judged = self._tested(self.found[k])
            final = Final.of(judged)
            lacks = judged.excluded or self.study.must.lacks(final.measured)
            if not lacks:
                self.chosen, self.final = k, final
                break
            self.found[k] = self.found[k].excluding(
                f"It passed while searching, but not on the test samples: {lacks.removesuffix('.')}."
            )
        self.study.progress("testing: done", 1, 1)

    def _choice(self) -> int | None:
        """What reaches what the search aimed for, or at least what must be reached."""
        aimed = search.choose(self.measured, self.study.aim)
        return search.choose(self.measured, self.study.must) if aimed is None else aimed

    def _race_finalists(self) -> None:
        ranked = self._finalists()
        if not ranked:
            return
        self.study.progress("finals: racing the best", 0, 1)
        files = [file for k in ranked if (file := self.found[k].file) is not None]
        late = self.study.deadline - self.tests_s
        timings = self._raced(files, self.finals_goal_s, least=20, late=late)
        self.fp32 = timings[0]
        for k, timing in zip(ranked, timings[1:], strict=True):
            self.found[k] = self.found[k].timed(timing)
        self.study.progress("finals: racing the best", 1, 1)

    def _finalists(self) -> list[int]:
        """Those that pass and are fastest, and those of the front beside them."""
        measured = self.measured
        passing = [k for k, one in enumerate(measured) if one.pays and self.study.must.passes(one)]
        passing.sort(key=lambda k: measured[k].ratio or 1.0)
        aimed = [k for k in passing if self.study.aim.passes(measured[k])]
        members = [k for k in search.front_of(measured) if measured[k].pays]
        nearest = search.nearest(measured, self.study.must)
        wanted = [*aimed[:3], *passing[:2], *([] if nearest is None else [nearest]), *members[::-1]]
        return list(dict.fromkeys(wanted))[:FINALISTS]

    def _tested(self, one: Candidate) -> Judged:
        assert one.file is not None
        self.study.progress("testing: what was chosen", 0, 1)
        return held_out(self.study, one.file, self.plan, self.study.effort.test)


def _timing(plain: Mapping[str, Any]) -> Timing:
    interval = plain["interval"]
    return Timing(**{**plain, "interval": None if interval is None else Interval(*interval)})
