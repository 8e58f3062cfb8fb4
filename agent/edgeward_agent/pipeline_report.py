"""What is told of pipelines: in the device's report, as events, and in the answers to commands. Pure.

Invariants: record and parts are read and never changed. An update that has ended is told as it was
journalled; one that is under way, with the progress of the part that works on it. What serves while a
probation lasts is not told as committed. A state is an event when it is entered (a pending one also when its
reason changes), and a result once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from edgeward_agent.fetching import Fetching
from edgeward_agent.pipeline import Pipeline
from edgeward_agent.qualifying import Qualifying
from edgeward_agent.states import Event, Lacking, Record
from edgeward_wire.event import Finished, StateChanged
from edgeward_wire.reported import MAX_PIPELINES, PipelineReport, Serving, State, Update

NAMED = 10
"""Of the pipelines that are left out, so many by name."""


def shown(pipelines: Iterable[Pipeline]) -> tuple[list[Pipeline], str]:
    """Those that the device's report has room for, and what is left out, in words; empty when nothing is.

    Those of agent.toml come first. Of the others, which serve nothing, a model that is asked for tells more
    than one that only waits for its pipeline to come back.
    """
    ranked = sorted(pipelines, key=lambda p: (not p.configured, p.record.candidate is None, p.name))
    left = [p.name for p in ranked[MAX_PIPELINES:]]
    if not left:
        return ranked, ""
    names = ", ".join(left[:NAMED]) + (", ..." if len(left) > NAMED else "")
    what = f"The report has room for {MAX_PIPELINES} of {len(ranked)} pipelines and leaves out {len(left)}"
    return ranked[:MAX_PIPELINES], f"{what} that agent.toml does not have: {names}."


def report(pipeline: Pipeline, floor: Callable[[str], int]) -> PipelineReport:
    """How it stands now. `floor`: the security floor of a model's name."""
    update = pipeline.record.update
    if update is not None and update.result is None:
        update = _live(pipeline, update)
    return PipelineReport(
        serving=_serving(pipeline, floor),
        update=update,
        sources=dict(pipeline.running.sources),
        fault=pipeline.running.fault or _unconfigured(pipeline),
    )


def happening(pipeline: str, before: Record, after: Record, event: Event) -> Finished | StateChanged | None:
    """What `event` made of its update, for the device's event stream; None when that is nothing to tell."""
    update, old = after.update, before.update
    if update is None:
        return None
    if update.result is not None:
        if old is None or old.result is None or old.started_at != update.started_at:
            return Finished(pipeline=pipeline, update=update)
    elif update.state != before.state or isinstance(event, Lacking):
        return StateChanged(pipeline=pipeline, state=update.state, update=update)
    return None


def under_way(pipelines: Iterable[Pipeline]) -> str:
    """The updates that are under way, in words; empty when there are none."""
    busy = [p for p in pipelines if p.record.state not in ("idle", "pending")]
    return ", ".join(f"pipeline {p.name} is {p.record.state.replace('_', ' ')}" for p in busy)


def what_serves(pipelines: Iterable[Pipeline]) -> tuple[str, ...]:
    """A line for each pipeline that serves."""
    served = [(p.name, p.running.serving) for p in pipelines]
    return tuple(
        f"{name}: {d.title}, {d.verdict.chosen.title}"
        for name, d in served
        if d and d.verdict and d.verdict.chosen
    )


def _live(pipeline: Pipeline, update: Update) -> Update:
    parts: dict[State, Fetching | Qualifying] = {
        "downloading": pipeline.fetching,
        "verifying": pipeline.fetching,
        "preparing": pipeline.qualifying,
        "validating": pipeline.qualifying,
    }
    part = parts.get(pipeline.record.state, pipeline)
    change: dict[str, object] = {"progress": round(part.progress, 3)}
    if part.detail:
        change["detail"] = part.detail[:200]
    return update.model_copy(update=change)


def _serving(pipeline: Pipeline, floor: Callable[[str], int]) -> Serving | None:
    serving = pipeline.running.serving
    plan = serving.verdict.chosen if serving and serving.verdict else None
    if serving is None or plan is None:
        return None
    model, committed = serving.row.model, pipeline.record.committed
    proven = committed is not None and committed.row.model == model and pipeline.probation is None
    return Serving(
        model=model,
        variant=plan.variant,
        provider=plan.provider,
        plan=plan,
        committed=proven,
        below_floor=serving.contents.security_epoch < floor(model.name),
        stale=pipeline.latency.stale,
    )


def _unconfigured(pipeline: Pipeline) -> str:
    """Why a committed model is not served although nothing failed."""
    committed = pipeline.record.committed
    if committed is None or pipeline.configured:
        return ""
    return f"{committed.title} is not served: agent.toml has no pipeline {pipeline.name}."
