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

from edgeward_models import search, sensitivity
from edgeward_models.findings import Candidate, Final, TargetReport
from edgeward_models.race import Contender, FullFeeds, Timing, race
from edgeward_models.schemes import Scheme, Target, unsupported
from edgeward_models.search import Gate, Measured, Space
from edgeward_models.statistics import Interval
from edgeward_models.study import Study, here, judge, make_file
from edgeward_models.trials import Judged, saturation, side_by_side
from edgeward_models.workspace import file_digest
from edgeward_runtime import sessions
from edgeward_runtime.sessions import CPU
from edgeward_wire.errors import Rejected
from edgeward_wire.verdict import Plan

FINALISTS = 6
BUDGET_ENDED = (
    "The budget ended the search: run it again, or with a larger --budget, and it goes on from here."
)
_WALKS = 3
_EXACT_SAMPLES = 128  # for what only its exact outputs can tell about: slow
_UNMEASURED = "It could not be measured here: the device's probe decides whether it pays."
TEST_SEED = 3
HALF_DB = 30.0
"""FP16 is far better than INT8, or it is broken: sums beyond 65504."""
_UNTOUCHED_DB = 300.0
_RANK_SHARE = 0.2
_BLURRED = 0.08
_RESERVE = 0.1  # of the budget, for the finals


def search_target(study: Study, target: Target, like: TargetReport | None = None) -> TargetReport:
    """Search for one target; `like` is what another one's search found.

    A target that this machine cannot measure gets its base scheme, with the float layers of `like`.
    """
    if not target.measurable(platform.machine(), sessions.available_providers()):
        return _unmeasured(study, target, like)
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

    @property
    def measured(self) -> list[Measured]:
        return [one.measured for one in self.found]

    def report(self) -> TargetReport:
        ranked = sorted(self.space.layers, key=lambda layer: layer.sqnr_db)
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
                {"name": one.name, "macs_share": one.macs_share, "sqnr_db": one.sqnr_db} for one in ranked
            ),
            unsupported=tuple(unsupported(self.target, self.study.operators)),
            notes=tuple(self.notes),
        )

    # --- the search

    def search(self) -> None:
        study = self.study
        end = study.deadline - _RESERVE * study.budget_s
        began, ranking = time.monotonic(), 0.0
        while True:
            now = time.monotonic()
            # The base is tried however short the time is.
            each = (now - began - ranking) / len(self.found) if self.found else 0.0
            left = int((end - now) / max(each, 1e-3)) if self.found else search.BATCH
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
        key = {**study.key, "scheme": root.key(), "count": study.effort.rank}
        passes = any(study.aim.passes(one) for one in self.measured)
        share = _RANK_SHARE / 2 if passes else _RANK_SHARE  # there is less to gain
        room = min(study.deadline - time.monotonic(), share * study.budget_s)

        def make() -> list[dict[str, Any]]:
            layers = sensitivity.rank_layers(
                study.prepared,
                root,
                study.ranges(root.calibration),
                study.full_feeds(study.effort.rank),
                deadline=time.monotonic() + max(1.0, room),
                progress=study.progress,
            )
            return [{**asdict(one), "sqnr_db": min(one.sqnr_db, _UNTOUCHED_DB)} for one in layers]

        found = {one["name"]: sensitivity.Layer(**one) for one in study.work.json("layers", key, make)}
        # A layer that the deadline cut off counts as harmless: it still has its place between the others.
        self.space = replace(
            self.space,
            layers=tuple(
                found.get(name, sensitivity.Layer(name, "", 0.0, _UNTOUCHED_DB)) for name in study.names
            ),
        )
        return bool(found)

    def _try(self, batch: Sequence[Scheme]) -> None:
        """Make, judge and race a few candidates."""
        fresh = []
        for scheme in batch:
            self._say(scheme.title)
            fresh.append(self._judged(scheme))
        files = [one.file for one in fresh if one.file is not None and not one.measured.excluded]
        timings = iter(self._raced(files, max(0.1, min(2.0, self.study.budget_s / 300)), least=6)[1:])
        self.found += [one if one.measured.excluded else one.timed(next(timings)) for one in fresh]

    def _judged(self, scheme: Scheme) -> Candidate:
        study = self.study
        try:
            file = make_file(study, scheme)
        except Rejected as error:
            return Candidate(Measured(scheme, excluded=_in_its_name(study, error)))
        if search.needs_proof(self.target.hints) and (unproved := saturation(file)):
            return Candidate.of(scheme, file, Judged(unproved))
        return Candidate.of(scheme, file, judge(study, file, self.plan, scheme, study.effort.fit))

    def _raced(self, files: Sequence[Path], goal_s: float, least: int) -> list[Timing]:
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
            lambda: [asdict(t) for t in race(contenders, study.feeds, goal_s=goal_s, least=least)],
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
        for _ in range(_WALKS):
            k = self._choice()
            if k is None:
                break
            final = self._tested(self.found[k])
            if self.study.must.passes(_as_measured(final)):
                self.chosen, self.final = k, final
                break
            self._pass_over(k, final)
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
        goal = max(0.5, min(10.0, 0.03 * self.study.budget_s))
        timings = self._raced(files, goal, least=20)
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

    def _tested(self, one: Candidate) -> Final:
        study, file = self.study, one.file
        assert file is not None
        study.progress("testing: what was chosen", 0, 1)
        key = {**study.key, "file": file_digest(file), "plan": self.plan.model_dump()}

        def make() -> dict[str, Any]:
            samples = study.samples.stream("test", study.effort.test, TEST_SEED)
            return side_by_side(
                study.contract, (study.whole, study.float_plan), (file, self.plan), samples
            ).plain()

        return _final(Judged.of(study.work.json("tested", {**key, "test": study.effort.test}, make)))

    def _pass_over(self, k: int, final: Final) -> None:
        lacks = self.study.must.lacks(_as_measured(final))
        self.found[k] = self.found[k].excluding(
            f"It passed while searching, but not on the test samples: {lacks}."
        )


def race_steadily(
    contenders: Sequence[Contender], feeds: Sequence[FullFeeds], goal_s: float, least: int
) -> list[Timing]:
    """A race; where other work on the machine blurred a ratio, it runs again, and the clearer one counts."""
    timings = race(contenders, feeds, goal_s=goal_s, least=least)
    blurred = [k for k, one in enumerate(timings) if _blur(one) > _BLURRED]
    if blurred:
        again = race(
            [contenders[0], *(contenders[k] for k in blurred)], feeds, goal_s=2 * goal_s, least=least
        )
        for k, one in zip(blurred, again[1:], strict=True):
            timings[k] = min(timings[k], one, key=_blur)
    return timings


def _blur(timing: Timing) -> float:
    """The width of the ratio's interval over the ratio."""
    if timing.ratio is None or timing.interval is None:
        return 0.0
    return (timing.interval.high - timing.interval.low) / timing.ratio


# --- what this machine cannot measure


def _unmeasured(study: Study, target: Target, like: TargetReport | None) -> TargetReport:
    """The target's base scheme with the float layers that another search found, judged by its exact outputs.

    How fast it is there nobody knows, so the first that passes is taken: what was chosen there, then the more
    accurate ones of its front.
    """
    half = target.schemes[0].method == "fp16"
    gate = Gate(sqnr_db=HALF_DB) if half else study.must
    found: list[Candidate] = []
    for scheme in _alike(study, target, like):
        study.progress(f"writing for {target.name}: {scheme.title}", 0, 1)
        found.append(_judged_exactly(study, scheme))
        if gate.passes(found[-1].measured):
            break
    last = found[-1]
    notes = [_UNMEASURED]
    if not gate.passes(last.measured):
        notes.append(
            f"It is not offered: {last.measured.excluded or gate.lacks(last.measured)}.".replace("..", ".")
        )
    study.progress(f"writing for {target.name}: done", 1, 1)
    return TargetReport(
        target=target.name,
        gate=gate,
        why="the default of FP16" if half else study.why,
        here=False,
        candidates=tuple(found),
        chosen=len(found) - 1 if gate.passes(last.measured) else None,
        final=_tested_exactly(study, last) if gate.passes(last.measured) else None,
        unsupported=tuple(unsupported(target, study.operators)),
        notes=tuple(notes),
    )


def _alike(study: Study, target: Target, like: TargetReport | None) -> list[Scheme]:
    base = replace(target.schemes[0], keep_float=study.keep_float)
    if like is None or like.chosen is None or base.method != "static":
        return [base]
    chosen = like.candidates[like.chosen].measured
    better = [like.candidates[k].measured for k in like.front]
    more = [one for one in better if (one.sqnr_db or 0.0) > (chosen.sqnr_db or 0.0)]
    static = [one.scheme for one in (chosen, *more) if one.scheme.method == "static"]
    like_these = [replace(base, keep_float=s.keep_float, calibration=s.calibration) for s in static]
    return like_these[:_WALKS] or [base]


def _judged_exactly(study: Study, scheme: Scheme) -> Candidate:
    try:
        file = make_file(study, scheme)
    except Rejected as error:
        return Candidate(Measured(scheme, excluded=_in_its_name(study, error)))
    few = min(_EXACT_SAMPLES, study.effort.fit)
    return Candidate.of(scheme, file, judge(study, file, None, scheme, few))


def _tested_exactly(study: Study, one: Candidate) -> Final:
    """On the test samples, with all optimisation off."""
    file = one.file
    assert file is not None
    count = min(_EXACT_SAMPLES, study.effort.test)
    plan = Plan(provider=CPU, variant="exact", threads=1, optimisation="none")
    key = {**study.key, "file": file_digest(file), "plan": plan.model_dump(), "test": count}

    def make() -> dict[str, Any]:
        samples = study.samples.stream("test", count, TEST_SEED)
        return side_by_side(study.contract, (study.whole, study.float_plan), (file, plan), samples).plain()

    return _final(Judged.of(study.work.json("tested", key, make)))


def _in_its_name(study: Study, error: Rejected) -> str:
    """What is wrong, said of the model rather than of the copy that was prepared."""
    return error.what.replace(study.prepared.name, study.whole.name)


def _timing(plain: Mapping[str, Any]) -> Timing:
    interval = plain["interval"]
    return Timing(**{**plain, "interval": None if interval is None else Interval(*interval)})


def _final(judged: Judged) -> Final:
    sqnr, agreement = judged.sqnr(), judged.agreement()
    value, interval = sqnr if sqnr is not None else (-math.inf, Interval(-math.inf, -math.inf))
    return Final(
        samples=len(judged.energies),
        sqnr_db=value,
        sqnr_interval=interval,
        agreement=agreement[0] if agreement else None,
        agreement_interval=agreement[1] if agreement else None,
    )


def _as_measured(final: Final) -> Measured:
    return Measured(Scheme("static"), final.sqnr_db, final.agreement)
