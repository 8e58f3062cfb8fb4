"""What people are shown, as plain rows. Pure: no terminal, no network, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgeward_ctl.follow import Followed
from edgeward_wire.api import Device, LogEntry, TargetProgress, Telemetry
from edgeward_wire.event import Fault, Finished, StateChanged
from edgeward_wire.reported import PipelineReport, Update
from edgeward_wire.result import headline
from edgeward_wire.verdict import Verdict

RESULT_WORDS = {
    "succeeded": "succeeded",
    "failed_no_change": "failed, nothing changed",
    "failed_rolled_back": "failed, rolled back",
    "failed_unable_to_roll_back": "failed, could not roll back",
    "rejected": "rejected",
    "superseded": "superseded by a newer one",
    "canceled": "canceled",
}
_WAY = {
    "pending": 0.0,
    "downloading": 0.05,
    "verifying": 0.30,
    "preparing": 0.35,
    "validating": 0.60,
    "switching": 0.85,
    "probation": 0.88,
    "rolling_back": 0.90,
    "idle": 1.0,
}
_NEXT = [*sorted(_WAY.values()), 1.0]


def way(target: TargetProgress) -> float:
    """How far a device is on its way through the states, 0..1."""
    if target.result is not None:
        return 1.0
    start = _WAY.get(target.state, 0.0)
    end = next(value for value in _NEXT if value > start) if start < 1 else 1.0
    return start + (end - start) * min(max(target.progress, 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class Row:
    """A source of a pipeline of a device, now."""

    device: str
    fleet: str
    online: bool
    pipeline: str = ""
    source: str = ""
    model: str = ""
    provider: str = ""
    variant: str = ""
    fps: float | None = None
    p50: float | None = None
    p99: float | None = None
    sees: str = ""
    state: str = ""


def overview(devices: Iterable[Device], telemetry: Sequence[Telemetry]) -> list[Row]:
    """A row for each source of each pipeline; a device without any has one row that says why."""
    newest: dict[tuple[str, str, str], Telemetry] = {}
    for series in telemetry:
        if series.device is None or series.source is None:
            continue
        key = (series.device, series.pipeline, series.source)
        if key not in newest or series.last > newest[key].last:
            newest[key] = series
    return [row for device in sorted(devices, key=lambda d: d.id) for row in _rows(device, newest)]


def _rows(device: Device, newest: Mapping[tuple[str, str, str], Telemetry]) -> Iterable[Row]:
    if device.admission != "accepted" or device.reported is None or not device.reported.pipelines:
        state = "nothing deployed" if device.admission == "accepted" else device.admission
        yield Row(device.id, device.fleet, device.online, state=state)
        return
    for pipeline, report in sorted(device.reported.pipelines.items()):
        told = device.birth.pipelines.get(pipeline, ()) if device.birth else ()
        for source in sorted({*report.sources, *told}) or [""]:
            series = newest.get((device.id, pipeline, source)) if device.online else None
            yield _row(device, pipeline, report, source, series)


def _row(device: Device, pipeline: str, report: PipelineReport, source: str, series: Telemetry | None) -> Row:
    serving = report.serving
    figures = series.stages.get("end_to_end") if series else None
    return Row(
        device.id,
        device.fleet,
        device.online,
        pipeline=pipeline,
        source=source,
        model=f"{serving.model.name} {serving.model.version}" if serving else "",
        provider=short_provider(serving.provider) if serving else "",
        variant=serving.variant if serving else "",
        fps=series.fps if series else None,
        p50=figures.p50 if figures else None,
        p99=figures.p99 if figures else None,
        sees=_sees(device, pipeline, source),
        state=_state(report, source) + _slowed(device),
    )


def _sees(device: Device, pipeline: str, source: str) -> str:
    if not device.online:
        return ""
    for result in device.results:
        if (result.pipeline, result.source) != (pipeline, source):
            continue
        if result.top:
            return f"{result.top[0].label.split(',')[0]} {result.top[0].score:.0%}".replace("%", " %")
        return headline(result)
    return ""


def _slowed(device: Device) -> str:
    vitals = device.reported.vitals if device.reported and device.online else None
    if vitals is None or not vitals.throttled:
        return ""
    heat = "" if vitals.temperature_c is None else f" at {vitals.temperature_c:.0f} °C"
    return f"; throttled{heat}"


def _state(report: PipelineReport, source: str) -> str:
    """The one thing that matters most about a pipeline."""
    parts = []
    update = report.update
    if update is not None and update.result is None and update.state != "idle":
        parts.append(f"{update.state} {update.model.version}" + _percent(update.progress))
    elif update is not None and update.result not in (None, "succeeded"):
        parts.append(f"{RESULT_WORDS[update.result]}: {update.reason}"[:80])
    elif report.serving is not None:
        parts.append("serving" if report.serving.committed else "probation")
    else:
        parts.append("nothing deployed")
    seen = report.sources.get(source)
    if seen is not None and not seen.up:
        parts.append(f"source down: {seen.detail}" if seen.detail else "source down")
    if report.fault:
        parts.append(report.fault[:80])
    if report.serving is not None and report.serving.below_floor:
        parts.append("below the security floor")
    return "; ".join(parts)


def _percent(share: float) -> str:
    return f" {share * 100:.0f} %" if 0 < share < 1 else ""


def short_provider(provider: str | None) -> str:
    """ONNX Runtime's name without its suffix."""
    return (provider or "").removesuffix("ExecutionProvider")


# --- the end of a deployment


@dataclass(frozen=True, slots=True)
class Ending:
    """How it went for one device."""

    device: str
    result: str
    succeeded: bool | None
    """None: not decided."""
    variant: str
    provider: str
    p50: float | None
    p99: float | None
    serving_after_s: float | None
    reason: str


def endings(followed: Followed) -> list[Ending]:
    """A row for each device of the rollout."""
    rows = []
    for target in sorted(followed.rollout.targets, key=lambda t: t.device):
        if target.result is not None:
            result, succeeded = RESULT_WORDS[target.result], target.result == "succeeded"
        elif target.device in followed.judgement.offline:
            result, succeeded = "offline, pending", None
        else:
            result, succeeded = target.state, None
        rows.append(
            Ending(
                target.device,
                result,
                succeeded,
                target.variant or "",
                short_provider(target.provider),
                p50(target.numbers),
                p99(target.numbers),
                followed.serving_after_s.get(target.device),
                target.reason or (target.detail if target.result is None else ""),
            )
        )
    return rows


def p50(numbers: Mapping[str, float] | None) -> float | None:
    """End to end on live frames (ms) where there were any, else inference as qualify measured it."""
    return _number(numbers or {}, "p50_ms")


def p99(numbers: Mapping[str, float] | None) -> float | None:
    """End to end on live frames (ms) where there were any, else inference as qualify measured it."""
    return _number(numbers or {}, "p99_ms")


def _number(numbers: Mapping[str, float], key: str) -> float | None:
    keys = (f"live_end_to_end_{key}", f"live_inference_{key}", key)
    return next((numbers[k] for k in keys if k in numbers), None)


# --- a device's log


@dataclass(frozen=True, slots=True)
class Chapter:
    """One deployment, or one fault, of a device."""

    at: float
    what: str
    result: str
    took_s: float | None = None
    reason: str = ""
    numbers: Mapping[str, float] | None = None
    verdict: Verdict | None = None


def chapters(entries: Sequence[LogEntry]) -> list[Chapter]:
    """A device's events as its deployments, newest first; one that is under way has its newest state."""
    found: list[Chapter] = []
    told: set[tuple[str, str, int]] = set()
    for entry in entries:
        what = entry.event.what
        if isinstance(what, Fault):
            words = "works again" if what.recovered else "fault"
            found.append(Chapter(entry.event.time, what.subject, words, reason=what.detail))
            continue
        key = (what.pipeline, what.update.rollout, what.update.attempt)
        if key not in told:
            told.add(key)
            found.append(_chapter(entry.event.time, what))
    return found


def _chapter(at: float, what: StateChanged | Finished) -> Chapter:
    update: Update = what.update
    result = RESULT_WORDS[update.result] if update.result else update.state
    took = (update.finished_at or at) - update.started_at if update.started_at else None
    name = f"{what.pipeline}: {update.model.name} {update.model.version}"
    if update.attempt > 1:
        name += f" (attempt {update.attempt})"
    return Chapter(at, name, result, took, update.reason, update.numbers, update.verdict)
