"""What is written for a target that this machine cannot measure: judged by its exact outputs, and said so.

Invariant: it is offered only where its exact outputs pass the gate; no figure of speed stands with it.
"""

from __future__ import annotations

from dataclasses import replace

from edgeward_models.findings import Candidate, Final, TargetReport
from edgeward_models.schemes import Scheme, Target, unsupported
from edgeward_models.search import Measured
from edgeward_models.study import Study, held_out, in_its_name, judge, make_file
from edgeward_models.trials import Judged
from edgeward_runtime.sessions import CPU
from edgeward_wire.errors import Rejected
from edgeward_wire.verdict import Plan

HALF_DB = 30.0
"""FP16 is far better than INT8, or it is broken: sums beyond 65504."""
_EXACT_SAMPLES = 128  # slow
_ALIKE = 3
_UNMEASURED = "It could not be measured here: the device's probe decides whether it pays."


def unmeasured(study: Study, target: Target, like: TargetReport | None) -> TargetReport:
    """The target's base scheme with the float layers that another search found, judged by its exact outputs.

    How fast it is there nobody knows, so the first that passes is taken: what was chosen there, then the more
    accurate ones of its front.
    """
    half = target.schemes[0].method == "fp16"
    gate = replace(study.must, agreement=None, sqnr_db=HALF_DB) if half else study.must
    found: list[Candidate] = []
    final = None
    for scheme in _alike(study, target, like):
        study.progress(f"writing for {target.name}: {scheme.title}", 0, 1)
        found.append(_judged_exactly(study, scheme))
        if gate.passes(found[-1].measured):
            judged = _tested_exactly(study, found[-1])
            found[-1] = found[-1].excluding(judged.excluded)
            final = None if judged.excluded else Final.of(judged)
        if final is not None:
            break
    last = found[-1]
    notes = [_UNMEASURED]
    if final is None:
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
        chosen=None if final is None else len(found) - 1,
        final=final,
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
    return like_these[:_ALIKE] or [base]


def _judged_exactly(study: Study, scheme: Scheme) -> Candidate:
    try:
        file = make_file(study, scheme)
    except Rejected as error:
        return Candidate(Measured(scheme, excluded=in_its_name(study, error)))
    few = min(_EXACT_SAMPLES, study.effort.fit)
    return Candidate.of(scheme, file, judge(study, file, None, scheme, few))


def _tested_exactly(study: Study, one: Candidate) -> Judged:
    """On the test samples, with all optimisation off."""
    assert one.file is not None
    plan = Plan(provider=CPU, variant="exact", threads=1, optimisation="none")
    return held_out(study, one.file, plan, min(_EXACT_SAMPLES, study.effort.test))
