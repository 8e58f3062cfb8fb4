"""A device's report fits into one message, whatever its pipelines have been through."""

from __future__ import annotations

import pytest

from edgeward_wire.document import parse
from edgeward_wire.manifest import ModelRef
from edgeward_wire.reported import PipelineReport, Reported, Result, Serving, SourceReport, Update, fitted
from edgeward_wire.topics import MAX_PAYLOAD_BYTES
from edgeward_wire.verdict import MAX_PLANS, Plan, PlanOutcome, Verdict

HASH = "ab" * 32
MODEL = ModelRef(path="models/cats/1.json", sha256=HASH)
PLAN = Plan(provider="CPUExecutionProvider", variant="int8", session={"session.x64quantprecision": "1"})


def pipeline(
    result: Result | None = "succeeded",
    finished_at: float = 1,
    reason: str = "",
    detail: str = "",
    sources: int = 1,
) -> PipelineReport:
    tried = PlanOutcome(plan=PLAN, outcome="not_loaded", reason=reason, parity=1.0, p50_ms=1.5, p99_ms=2.5)
    return PipelineReport(
        serving=Serving(model=MODEL, variant="int8", provider="CPU", plan=PLAN, committed=True),
        update=Update(
            rollout="r",
            model=MODEL,
            attempt=1,
            state="idle" if result else "probation",
            result=result,
            reason=reason,
            finished_at=finished_at if result else None,
            verdict=Verdict(model_sha256=HASH, key=HASH, chosen=PLAN, plans=(tried,) * MAX_PLANS),
        ),
        sources={f"camera-{k}": SourceReport(up=False, detail=detail) for k in range(sources)},
        fault=reason,
    )


def reported(**pipelines: PipelineReport) -> Reported:
    return Reported(device="edge-01a", boot_id="0" * 32, time=1, pipelines=pipelines)


def plans(report: Reported, name: str) -> int:
    update = report.pipelines[name].update
    return len(update.verdict.plans) if update and update.verdict else -1


def test_a_report_that_fits_is_left_alone() -> None:
    one = reported(main=pipeline())
    assert fitted(one) is one


def test_reasons_are_cut_before_a_plan_goes() -> None:
    short = fitted(reported(main=pipeline(reason="r" * 2000)))
    update = short.pipelines["main"].update
    assert update
    assert update.verdict
    assert {len(o.reason) for o in update.verdict.plans} == {160}
    assert len(update.verdict.plans) == MAX_PLANS
    assert len(update.reason) == 2000, "why the update ended is not why a plan lost"


def test_the_plans_of_the_updates_that_ended_first_go_first() -> None:
    ages = {f"p{n}": pipeline(finished_at=100 - n, reason="r" * 200) for n in range(8)}
    short = fitted(reported(now=pipeline(result=None, reason="r" * 200), **ages))
    kept = [name for name in short.pipelines if plans(short, name)]
    assert "now" in kept
    assert 1 < len(kept) < 9
    assert kept[1:] == [f"p{n}" for n in range(len(kept) - 1)], "the newest of those that ended"


@pytest.mark.parametrize("result", ["failed_no_change", None])
def test_the_longest_report_fits(result: Result | None) -> None:
    worst = pipeline(result=result, reason="é" * 2000, detail="é" * 200, sources=64)
    whole = reported(**{f"pipeline-{n}": worst for n in range(16)})
    short = fitted(whole)
    raw = short.to_bytes()
    assert len(raw) <= MAX_PAYLOAD_BYTES
    assert parse(Reported, raw, limit=MAX_PAYLOAD_BYTES) == short
    for name, report in short.pipelines.items():
        assert report.serving == worst.serving, name
        assert report.update
        assert report.update.result == result
        assert {source.up for source in report.sources.values()} == {False}
