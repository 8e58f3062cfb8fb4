"""Probation's gates as a table: what is seen, and what follows."""

from __future__ import annotations

from agent.models import deployment, manifest, row, verdict
from edgeward_agent.gates import NO_FRAMES_S, LatencyWatch, Probation
from edgeward_agent.states import Breached, Held
from edgeward_wire.histogram import Recorder
from edgeward_wire.reported import SourceReport
from edgeward_wire.telemetry import Measures

UP, DOWN = {"cam": SourceReport(up=True)}, {"cam": SourceReport(up=False, detail="unplugged")}
MODEL = manifest("1", p99_ms=50.0)


def probation(duration_s: float = 10.0, spent_s: float = 0.0) -> Probation:
    return Probation(deployment(MODEL, probation_s=duration_s), now=100.0, spent_s=spent_s)


def window(ms: float, n: int = 60, version: str = "1") -> Measures:
    recorder = Recorder()
    for _ in range(n):
        recorder.record(ms)
    inference = recorder.take()
    return Measures(
        pipeline="main",
        source="cam",
        model=row(manifest(version, p99_ms=50.0)).model,
        variant="int8",
        provider="CPUExecutionProvider",
        start=0,
        duration_s=1,
        frames=n,
        stages={"inference": inference, "end_to_end": inference},
    )


def test_frames_for_its_whole_time_hold() -> None:
    p = probation()
    p.heartbeat(1000, 7, 100)
    p.heartbeat(1100, 7, 105)
    p.windows([window(5)])
    assert p.judge(105, UP) is None
    assert p.progress(105) == 0.5
    assert "100 frames, 5 s to go" in p.detail(105, UP)
    held = p.judge(110, UP)
    assert isinstance(held, Held)
    assert held.numbers["probation_frames"] == 100
    assert 4.8 < held.numbers["live_inference_p99_ms"] < 5.2


def test_no_frames_never_pass() -> None:
    p = probation()
    p.heartbeat(1000, 0, 100)
    assert p.judge(111, DOWN) is None
    assert "down: cam: unplugged" in p.detail(111, DOWN)
    p.heartbeat(1001, 0, 112)
    assert p.judge(112, UP) is None, "the clock stood still while the camera was away"
    p.heartbeat(1100, 0, 121)
    assert isinstance(p.judge(122, UP), Held)


def test_a_pipeline_without_sources_has_nothing_to_prove() -> None:
    assert isinstance(probation(duration_s=0).judge(100, {}), Held)


def test_a_source_that_delivers_and_no_frames_is_a_breach() -> None:
    p = probation(3600)
    p.heartbeat(5, 0, 100)
    p.heartbeat(10, 0, 120)
    assert p.judge(120 + NO_FRAMES_S, UP) is None
    breach = p.judge(121 + NO_FRAMES_S, UP)
    assert isinstance(breach, Breached)
    assert "cam delivers" in breach.reason


def test_time_with_the_camera_away_does_not_count_against_the_model() -> None:
    p = probation(3600)
    p.judge(150, DOWN)
    assert p.judge(151, UP) is None


def test_errors() -> None:
    p = probation()
    p.heartbeat(0, 0, 100)
    p.heartbeat(15, 4, 101)
    assert p.judge(101, UP) is None, "too few to say"
    p.heartbeat(19, 2, 102)
    breach = p.judge(102, UP)
    assert isinstance(breach, Breached)
    assert "2 of 21 frames failed" in breach.reason
    few = probation()
    few.heartbeat(0, 0, 100)
    few.heartbeat(2, 1, 110)
    assert isinstance(few.judge(110, UP), Breached), "at the end, few are enough"


def test_the_manifests_p99() -> None:
    p = probation()
    p.heartbeat(0, 0, 100)
    p.heartbeat(60, 0, 101)
    p.windows([window(60, n=40)])
    assert p.judge(101, UP) is None
    p.windows([window(60, n=40)])
    assert isinstance(p.judge(101, UP), Breached)
    other = probation()
    other.windows([window(60, version="2")])
    other.heartbeat(0, 0, 100)
    other.heartbeat(60, 0, 101)
    assert other.judge(101, UP) is None, "another model's windows do not count"


def test_time_before_a_restart_counts() -> None:
    p = probation(10, spent_s=9)
    p.heartbeat(0, 0, 100)
    p.heartbeat(9, 0, 101)
    assert p.spent_s(101) == 10
    assert isinstance(p.judge(101, UP), Held)


def test_a_verdict_is_stale_once_live_frames_are_slow_for_long() -> None:
    watch, committed = LatencyWatch(), deployment(MODEL, judged=True)  # its verdict says 5 ms
    assert not any(watch.look(committed, [window(ms)]) for ms in (5, 7, 7))
    assert not watch.stale, "twice is an accident"
    assert watch.look(committed, [window(7)])
    assert watch.stale
    assert "7.0 ms" in watch.finding
    assert not watch.look(committed, [window(7)]), "said once"
    assert not watch.look(committed, [window(5)])
    assert not watch.stale
    assert not any(watch.look(committed, [window(70, n=3)]) for _ in range(9)), "too few frames say nothing"


def test_a_window_is_weighed_once_however_many_sources_it_has() -> None:
    watch, committed = LatencyWatch(), deployment(MODEL, judged=True)
    assert not watch.look(committed, [window(7)] * 4)
    assert not watch.stale, "four cameras in one slow window"
    for _ in range(2):
        watch.look(committed, [window(7, n=60), window(5, n=10)])
    assert watch.stale, "most frames are slow, whichever source comes last"
    few = LatencyWatch()
    assert [few.look(committed, [window(7, n=10)] * 4) for _ in range(3)] == [False, False, True]


def test_another_verdict_starts_afresh() -> None:
    watch = LatencyWatch()
    for _ in range(3):
        watch.look(deployment(MODEL, judged=True), [window(7)])
    assert watch.stale
    slower = verdict(MODEL, p50_ms=7.0)
    watch.look(deployment(MODEL).model_copy(update={"verdict": slower}), [window(7)])
    assert not watch.stale
