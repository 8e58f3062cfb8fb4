"""What runs on a device now, and why: retained, replaced whole on every change.

`update` is the way of the newest assignment through the state table; `serving` is what frames go
through at this moment. Both are there at once while a new model is prepared beside the old.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal

from pydantic import Field

from edgeward_wire.document import Open
from edgeward_wire.identifiers import (
    BootId,
    DeviceId,
    Key,
    PipelineName,
    Reason,
    Revision,
    ShortText,
    SourceName,
    UnixTime,
    VariantName,
)
from edgeward_wire.manifest import ModelRef
from edgeward_wire.topics import MAX_PAYLOAD_BYTES
from edgeward_wire.verdict import Plan, Verdict
from edgeward_wire.vitals import Vitals

MAX_PIPELINES = 16
"""In one report."""
_SHORT = 160
"""Of a text, where the whole document would be too long."""

State = Literal[
    "idle",
    "pending",
    "downloading",
    "verifying",
    "preparing",
    "validating",
    "switching",
    "probation",
    "rolling_back",
]
Result = Literal[
    "succeeded",
    "failed_no_change",
    "failed_rolled_back",
    "failed_unable_to_roll_back",
    "rejected",
    "superseded",
    "canceled",
]


class Serving(Open):
    """The model that frames go through."""

    model: ModelRef
    variant: VariantName
    provider: Key
    plan: Plan
    committed: bool
    """False in probation."""
    below_floor: bool = False
    stale: bool = False
    """Live latencies no longer fit the verdict that chose the plan."""


class Update(Open):
    """One attempt at one model."""

    rollout: Key
    model: ModelRef
    attempt: int = Field(ge=1)
    state: State
    result: Result | None = None
    reason: Reason = ""
    progress: float = Field(default=0, ge=0, le=1)
    """Within the state; 1 when it is done."""
    detail: ShortText = ""
    started_at: UnixTime = 0
    finished_at: UnixTime | None = None
    numbers: dict[Key, float] = Field(default_factory=dict, max_length=64)
    verdict: Verdict | None = None


class SourceReport(Open):
    """Whether a source delivers, and if not, why."""

    up: bool
    detail: ShortText = ""


class PipelineReport(Open):
    """One pipeline: what serves, what is under way, and how its sources are."""

    serving: Serving | None = None
    update: Update | None = None
    sources: dict[SourceName, SourceReport] = Field(default_factory=dict, max_length=64)
    fault: Reason = ""


class Reported(Open):
    """The whole device."""

    schema_: Literal["edgeward.reported/1"] = Field(default="edgeward.reported/1", alias="schema")
    device: DeviceId
    boot_id: BootId
    time: UnixTime
    revision: Revision = 0
    """The revision of the newest verified assignment."""
    pipelines: dict[PipelineName, PipelineReport] = Field(default_factory=dict, max_length=MAX_PIPELINES)
    registry: ShortText = ""
    """Empty when the last look at the registry succeeded, else why not."""
    vitals: Vitals | None = None
    """As of `time`; told anew when throttling begins or ends, or the heat has changed by some degrees."""


def fitted(reported: Reported) -> Reported:
    """The same within `MAX_PAYLOAD_BYTES`: reasons of plans are cut first, then plans go, then longer texts.

    The plans of updates that have ended go first, the oldest before the others: the event of their end has
    told them. What serves and each update's state and result are always told.
    """
    ended = {n: p.update for n, p in reported.pipelines.items() if p.update and p.update.result}
    oldest = sorted(ended, key=lambda name: ended[name].finished_at or 0)
    everyone = tuple(reported.pipelines)
    steps: list[tuple[Collection[str], Callable[[PipelineReport], PipelineReport]]] = [
        (everyone, _without_long_reasons),
        *(((name,), _without_plans) for name in oldest),
        (everyone, _without_plans),
        (everyone, _without_verdict),
        (everyone, _without_details),
    ]
    for names, shorter in steps:
        if len(reported.to_bytes()) <= MAX_PAYLOAD_BYTES:
            break
        pipelines = {n: shorter(p) if n in names else p for n, p in reported.pipelines.items()}
        reported = reported.model_copy(update={"pipelines": pipelines})
    return reported


def _without_long_reasons(report: PipelineReport) -> PipelineReport:
    verdict = report.update.verdict if report.update else None
    if verdict is None:
        return report
    plans = tuple(o.model_copy(update={"reason": o.reason[:_SHORT]}) for o in verdict.plans)
    return _updated(report, verdict=verdict.model_copy(update={"plans": plans}))


def _without_plans(report: PipelineReport) -> PipelineReport:
    verdict = report.update.verdict if report.update else None
    return report if verdict is None else _updated(report, verdict=verdict.model_copy(update={"plans": ()}))


def _without_verdict(report: PipelineReport) -> PipelineReport:
    return _updated(report, verdict=None)


def _without_details(report: PipelineReport) -> PipelineReport:
    sources = {name: source.model_copy(update={"detail": ""}) for name, source in report.sources.items()}
    short = report.model_copy(update={"sources": sources, "fault": report.fault[:_SHORT]})
    return _updated(short, reason=report.update.reason[:_SHORT], detail="") if report.update else short


def _updated(report: PipelineReport, **changes: object) -> PipelineReport:
    if report.update is None:
        return report
    return report.model_copy(update={"update": report.update.model_copy(update=changes)})
