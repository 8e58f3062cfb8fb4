"""What is shown: rows from what the cloud tells, and nothing made up."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from edgeward_ctl import screen, views
from edgeward_wire.api import Device, LogEntry, StageFigures, Telemetry
from edgeward_wire.event import Event, Fault, Finished, StateChanged
from edgeward_wire.manifest import ModelRef
from edgeward_wire.reported import PipelineReport, Reported, Serving, SourceReport, Update
from edgeward_wire.result import ResultMessage, Seen
from edgeward_wire.verdict import Plan, PlanOutcome, Verdict
from edgeward_wire.vitals import Vitals

MODEL = ModelRef(path="models/lite0/3.json", sha256="0" * 64)
PLAN = Plan(
    provider="CPUExecutionProvider", variant="int8", threads=2, session={"session.x64quantprecision": "1"}
)
SERVING = Serving(model=MODEL, variant="int8", provider="CPUExecutionProvider", plan=PLAN, committed=True)
BOOT = "0" * 32


def device(report: PipelineReport | None, **fields: Any) -> Device:
    reported = Reported(device="d1", boot_id=BOOT, time=1, pipelines={"main": report}) if report else None
    seen = ResultMessage(
        pipeline="main",
        source="cam",
        time=1,
        model="lite0",
        version="3",
        latency_ms=12,
        top=(Seen(label="tabby, tabby cat", index=281, score=0.834),),
    )
    return Device(
        **{
            "id": "d1",
            "fleet": "f",
            "admission": "accepted",
            "online": True,
            "reported": reported,
            "results": (seen,),
            **fields,
        }
    )


def series(**fields: Any) -> Telemetry:
    figures = StageFigures(count=10, p50=11.5, p90=12, p99=14.25, max=20)
    return Telemetry(
        **{
            "device": "d1",
            "pipeline": "main",
            "source": "cam",
            "model": MODEL,
            "variant": "int8",
            "provider": "CPUExecutionProvider",
            "windows": 3,
            "frames": 100,
            "dropped": 0,
            "errors": 0,
            "fps": 9.9,
            "last": 10,
            "stages": {"end_to_end": figures},
            **fields,
        }
    )


UP = {"cam": SourceReport(up=True)}


def update(**fields: Any) -> Update:
    return Update(**{"rollout": "r", "model": MODEL, "attempt": 1, "state": "idle", **fields})


def test_a_device_that_is_slowed_down_says_so() -> None:
    one = device(PipelineReport(serving=SERVING, sources=UP))
    assert one.reported is not None
    hot = Vitals(throttled=True, temperatures_c={"cpu": 88.4})
    slowed = one.model_copy(update={"reported": one.reported.model_copy(update={"vitals": hot})})
    assert [row.state for row in views.overview([slowed], [])] == ["serving; throttled at 88 °C"]
    away = slowed.model_copy(update={"online": False})
    assert "throttled" not in views.overview([away], [])[0].state, "nobody knows how it is now"
    assert [row.state for row in views.overview([one], [])] == ["serving"]


def test_a_serving_device_has_its_figures() -> None:
    (row,) = views.overview([device(PipelineReport(serving=SERVING, sources=UP))], [series()])
    assert (row.model, row.provider, row.variant) == ("lite0 3", "CPU", "int8")
    assert (row.fps, row.p50, row.p99) == (9.9, 11.5, 14.25)
    assert (row.sees, row.state) == ("tabby 83 %", "serving")


def test_the_newest_series_counts_and_the_fleets_merged_one_does_not() -> None:
    old = series(fps=1.0, last=5, model=ModelRef(path="models/lite0/2.json", sha256="1" * 64))
    merged = series(device=None, fps=99.0, last=99)
    (row,) = views.overview([device(PipelineReport(serving=SERVING, sources=UP))], [old, series(), merged])
    assert row.fps == 9.9


def test_an_offline_device_shows_no_live_figures() -> None:
    (row,) = views.overview([device(PipelineReport(serving=SERVING, sources=UP), online=False)], [series()])
    assert (row.online, row.fps, row.sees) == (False, None, "")
    assert row.model == "lite0 3"


def test_what_matters_most_is_the_state() -> None:
    def state(report: PipelineReport) -> str:
        return views.overview([device(report)], [])[0].state

    busy = update(state="downloading", progress=0.4)
    assert state(PipelineReport(serving=SERVING, update=busy, sources=UP)) == "downloading 3 40 %"
    failed = update(result="failed_rolled_back", reason="p99 went up")
    assert "rolled back: p99 went up" in state(PipelineReport(serving=SERVING, update=failed, sources=UP))
    down = {"cam": SourceReport(up=False, detail="no such device")}
    assert "source down: no such device" in state(PipelineReport(serving=SERVING, sources=down))
    trial = SERVING.model_copy(update={"committed": False})
    assert state(PipelineReport(serving=trial, sources=UP)) == "probation"
    assert state(PipelineReport()) == "nothing deployed"


def test_each_source_has_its_row_and_a_bare_device_one() -> None:
    two = {"a": SourceReport(up=True), "b": SourceReport(up=True)}
    assert [r.source for r in views.overview([device(PipelineReport(serving=SERVING, sources=two))], [])] == [
        "a",
        "b",
    ]
    (row,) = views.overview([device(None, admission="pending")], [])
    assert row.state == "pending"


def entry(seq: int, what: Any) -> LogEntry:
    return LogEntry(received_at=seq, event=Event(boot_id=BOOT, seq=seq, time=seq, what=what))


def test_a_log_is_told_in_deployments() -> None:
    verdict = Verdict(
        model_sha256="0" * 64,
        key="0" * 64,
        chosen=PLAN,
        plans=(PlanOutcome(plan=PLAN, outcome="chosen", p50_ms=10, p99_ms=12, ratio=1, parity=0.999),),
    )
    done = update(
        result="succeeded", started_at=2, finished_at=9, numbers={"p50_ms": 10, "p99_ms": 12}, verdict=verdict
    )
    entries = [
        entry(20, Fault(subject="source:cam", detail="gone")),
        entry(9, Finished(pipeline="main", update=done)),
        entry(5, StateChanged(pipeline="main", state="preparing", update=update(state="preparing"))),
        entry(3, StateChanged(pipeline="main", state="pending", update=update(rollout="q", state="pending"))),
    ]
    fault, ended, waiting = views.chapters(entries)
    assert (fault.what, fault.reason) == ("source:cam", "gone")
    assert (ended.what, ended.result, ended.took_s) == ("main: lite0 3", "succeeded", 7)
    assert waiting.result == "pending"
    shown = render(screen.chapters_table([ended]), screen.verdict_table(verdict))
    assert "10.0 / 12.0" in shown
    assert "CPU int8 x2 x64quantprecision=1" in shown


def render(*things: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    for thing in things:
        console.print(thing)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_tables_hold_every_row_on_a_line_of_its_own() -> None:
    rows = views.overview([device(PipelineReport(serving=SERVING, sources=UP))], [series()])
    head, line = render(screen.overview_table(rows)).splitlines()
    assert "p99 ms" in head
    for part in ("d1", "lite0 3", "CPU", "int8", "9.9", "11.5", "14.2", "tabby 83 %", "serving"):
        assert part in line


def narrow(rows: list[views.Row], width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(screen.overview_table(rows, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_narrow_terminal_shows_what_matters_most() -> None:
    """As the demo's, in 80 columns: names, rates and states are whole, and nothing is half a column."""
    fleet = [
        views.Row(f"edge-01-{x}", "edge-01", True, "main", "cam", "efficientnet-lite0 1", "CPU", "int8",
                  9.9, 11.5, 14.25, "Egyptian cat 65 %", "serving")
        for x in "abc"
    ]  # fmt: skip
    for width in (60, 80, 100, 120, 200):
        head, *lines = narrow(fleet, width)
        assert len(lines) == 3
        assert {"device", "fps", "state"} <= set(head.split())
        for line, row in zip(lines, fleet, strict=True):
            assert {row.device, "9.9", "serving"} <= set(line.split())
            assert "\u2026" not in line
    assert "variant" in narrow(fleet, 200)[0]
    assert "variant" not in narrow(fleet, 80)[0]


def test_a_long_state_is_folded_and_two_sources_are_told_apart() -> None:
    rows = [
        views.Row("edge-01-a", "edge-01", True, "main", source, "efficientnet-lite0 1", "CPU", "int8", 9.9,
                  11.5, 14.25, "Egyptian cat 65 %", "failed, rolled back: p99 rose from 10 to 30 ms")
        for source in ("door", "gate")
    ]  # fmt: skip
    shown = narrow(rows, 60)
    text = " ".join(shown)
    for part in ("door", "gate", "edge-01-a", "9.9", "failed,", "30 ms"):
        assert part in text
    assert all(len(line) <= 60 for line in shown)


def test_markup_in_what_devices_say_is_text() -> None:
    failed = update(result="rejected", reason="bad [bold]tag[/nonsense]")
    rows = views.overview([device(PipelineReport(update=failed, sources=UP))], [])
    assert "[/nonsense]" in render(screen.overview_table(rows))
    chapters = views.chapters([entry(1, Finished(pipeline="main", update=failed))])
    assert "[/nonsense]" in render(screen.chapters_table(chapters))
