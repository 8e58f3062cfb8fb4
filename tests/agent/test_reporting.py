"""What is told, when, and how often: a real spool, and an outlet that keeps what it gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent.models import manifest, plan, row
from edgeward_agent.reporting import Reporter
from edgeward_agent.spool import Spool
from edgeward_agent.status import read_status
from edgeward_agent.sysinfo import this_machine
from edgeward_wire.command import CommandResponse
from edgeward_wire.document import parse
from edgeward_wire.histogram import Recorder
from edgeward_wire.reported import PipelineReport, Reported, Serving, SourceReport, State, Update
from edgeward_wire.status import Birth
from edgeward_wire.telemetry import Measures
from edgeward_wire.topics import MAX_PAYLOAD_BYTES
from edgeward_wire.verdict import MAX_PLANS, PlanOutcome, Verdict
from edgeward_wire.vitals import Vitals

BOOT = "b" * 32
ONE = row(manifest("1"))


class Broker:
    """An outlet at the end of the line."""

    def __init__(self) -> None:
        self.connected = True
        self.trouble = ""
        self.told: list[tuple[str, bytes]] = []
        self.woken = 0

    def publish(self, kind: str, payload: bytes) -> bool:
        self.told.append((kind, payload))
        return True

    def respond(self, answer: CommandResponse) -> bool:
        self.told.append(("response", answer.to_bytes()))
        return True

    def wake(self) -> None:
        self.woken += 1

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.told]


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool", BOOT, 1 << 20)


@pytest.fixture
def reporter(tmp_path: Path, broker: Broker, spool: Spool) -> Reporter:
    reporter = Reporter(
        device="edge-01a",
        fleet="edge-01",
        boot_id=BOOT,
        state=tmp_path,
        spool=spool,
        machine=this_machine(),
        pipelines={"main": ("cam",)},
        clock_trusted=lambda: False,
    )
    reporter.attach(broker)
    return reporter


def report(state: State = "downloading", progress: float = 0.0) -> PipelineReport:
    update = Update(rollout="r", model=ONE.model, attempt=1, state=state, progress=progress)
    return PipelineReport(update=update, sources={"cam": SourceReport(up=True)})


def tell(reporter: Reporter, main: PipelineReport, now: float, registry: str = "") -> None:
    reporter.reported({"main": main}, revision=3, registry=registry, now=now)


def test_changes_are_told_at_once_and_progress_once_a_second(reporter: Reporter, broker: Broker) -> None:
    for n in range(30):
        tell(reporter, report(progress=n / 30), now=100 + n / 10)
    assert broker.kinds() == ["reported"] * 3
    tell(reporter, report("verifying"), now=103.01)
    assert broker.kinds() == ["reported"] * 4
    for n in range(100):
        tell(reporter, report("verifying"), now=104.0 + n)
    assert broker.kinds() == ["reported"] * 4, "nothing new, nothing told"
    newest = parse(Reported, broker.told[-1][1])
    assert newest.pipelines["main"].update
    assert newest.pipelines["main"].update.state == "verifying"
    assert newest.revision == 3


def test_everything_retained_is_told_again_on_connect(
    reporter: Reporter, broker: Broker, tmp_path: Path
) -> None:
    broker.connected, broker.trouble = False, "edge:8883: refused"
    tell(reporter, report(), now=1)
    assert broker.told == []
    assert read_status(tmp_path).broker_trouble == "edge:8883: refused"
    broker.connected, broker.trouble = True, ""
    reporter.connected()
    assert broker.kinds() == ["birth", "reported"]
    birth = parse(Birth, broker.told[0][1])
    assert birth.pipelines == {"main": ("cam",)}
    assert birth.cores >= 1


def test_what_is_too_long_for_a_message_is_told_shorter_and_kept_whole(
    reporter: Reporter, broker: Broker, tmp_path: Path
) -> None:
    tried = PlanOutcome(plan=plan(), outcome="not_loaded", reason="r" * 2000)
    verdict = Verdict(model_sha256="0" * 64, key="0" * 64, plans=(tried,) * MAX_PLANS)
    update = Update(
        rollout="r", model=ONE.model, attempt=1, state="idle", result="failed_no_change", verdict=verdict
    )
    reports = {name: PipelineReport(update=update) for name in ("main", "door")}
    reporter.reported(reports, revision=3, registry="", now=1)
    reporter.connected()
    told = [raw for kind, raw in broker.told if kind == "reported"]
    assert len(told) == 2
    for raw in told:
        assert len(raw) <= MAX_PAYLOAD_BYTES
        assert parse(Reported, raw, limit=MAX_PAYLOAD_BYTES).pipelines["door"].update is not None
    assert read_status(tmp_path).reported.pipelines == reports


def events(spool: Spool) -> list[dict[str, Any]]:
    return [json.loads(message.payload)["what"] for message in spool.next_batch(100)]


def test_faults_are_transitions(reporter: Reporter, spool: Spool) -> None:
    for detail in ("", "away", "away", "still away", "", "", "away"):
        reporter.fault("registry", detail)
    told = [(e["recovered"], e["detail"]) for e in events(spool)]
    assert told == [(False, "away"), (True, "away"), (False, "away")]


def test_windows_are_spooled_and_flattened(
    reporter: Reporter, broker: Broker, spool: Spool, tmp_path: Path
) -> None:
    recorder = Recorder()
    for _ in range(10):
        recorder.record(20.0)
    measures = Measures(
        pipeline="main",
        source="cam",
        model=ONE.model,
        variant="int8",
        provider="CPUExecutionProvider",
        start=0,
        duration_s=2,
        frames=10,
        stages={"end_to_end": recorder.take()},
        labels={"cat": 7, "dog": 3},
    )
    reporter.windows([measures])
    flat = json.loads(dict(broker.told)["metrics"])
    assert flat["main_cam_fps"] == 5
    assert all(isinstance(value, int | float) for value in flat.values())
    (message,) = spool.next_batch(10)
    window = json.loads(message.payload)
    assert window["frames"] == 10
    assert window["clock"] == "untrusted"
    assert broker.woken == 1
    tell(reporter, report(), now=1)
    figures = read_status(tmp_path).figures["main"]["cam"]
    assert (figures.fps, figures.seen) == (5, "cat")


def test_status_is_written_also_without_a_broker(tmp_path: Path, spool: Spool) -> None:
    reporter = Reporter(
        device="edge-01a",
        fleet="f",
        boot_id=BOOT,
        state=tmp_path,
        spool=spool,
        machine=this_machine(),
        pipelines={},
    )
    serving = Serving(model=ONE.model, variant="int8", provider="CPU", plan=plan(), committed=True)
    tell(reporter, PipelineReport(serving=serving), now=1, registry="away")
    status = read_status(tmp_path)
    assert not status.broker
    assert status.reported.registry == "away"
    assert status.reported.pipelines["main"].serving == serving


def test_a_status_that_could_not_be_written_is_written_when_it_can(
    reporter: Reporter, spool: Spool, tmp_path: Path
) -> None:
    obstacle = tmp_path / ".status.json.new"
    obstacle.mkdir()
    for now in (1, 2, 3):
        tell(reporter, report(), now=now)
    obstacle.rmdir()
    tell(reporter, report(), now=4)
    assert read_status(tmp_path).reported.revision == 3
    assert [e["recovered"] for e in events(spool)] == [False, True]


def test_answers_to_commands_are_not_kept_for_later(reporter: Reporter, broker: Broker) -> None:
    answer = CommandResponse(n=1, boot_id=BOOT, state="done")
    broker.connected = False
    reporter.response(answer)
    broker.connected = True
    assert broker.told == []
    reporter.response(answer)
    assert broker.told == [("response", answer.to_bytes())]


# --- sensors


WARM = Vitals(
    temperatures_c={"cpu": 60.0, "gpu": 55.5}, throttled=False, power_mw={"vdd_in": 7336.4}, cpu_load=0.5
)


def test_the_heat_is_told_with_the_rest_and_not_for_its_own_sake(reporter: Reporter, broker: Broker) -> None:
    reporter.connected()
    reporter.vitals(WARM)
    reporter.reported({"main": report()}, revision=1, registry="", now=0)
    for now in range(1, 200):
        reporter.vitals(WARM.model_copy(update={"temperatures_c": {"cpu": 60 + now % 5}}))
        reporter.reported({"main": report()}, revision=1, registry="", now=now)
    assert broker.kinds().count("reported") == 1
    reporter.vitals(WARM.model_copy(update={"temperatures_c": {"cpu": 65.0}}))
    reporter.reported({"main": report()}, revision=1, registry="", now=200)
    assert broker.kinds().count("reported") == 2
    assert parse(Reported, broker.told[-1][1]).vitals == Vitals(
        temperatures_c={"cpu": 65.0}, throttled=False, power_mw={"vdd_in": 7336.4}, cpu_load=0.5
    )


def test_throttling_is_told_at_once(reporter: Reporter, broker: Broker, tmp_path: Path) -> None:
    reporter.connected()
    reporter.vitals(WARM)
    reporter.reported({"main": report()}, revision=1, registry="", now=0)
    reporter.vitals(WARM.model_copy(update={"throttled": True, "throttled_by": ("cpufreq-cpu0",)}))
    reporter.reported({"main": report()}, revision=1, registry="", now=0.1)
    told = parse(Reported, broker.told[-1][1]).vitals
    assert told is not None
    assert told.throttled
    status = read_status(tmp_path).reported.vitals
    assert status is not None
    assert status.title == "60 °C, throttled (cpufreq-cpu0), 7.3 W"


def test_windows_and_metrics_carry_the_sensors(reporter: Reporter, broker: Broker, spool: Spool) -> None:
    reporter.connected()
    reporter.vitals(WARM)
    window = Measures(
        pipeline="main",
        source="cam",
        model=ONE.model,
        variant="int8",
        provider="CPU",
        start=0,
        duration_s=2,
        frames=1,
    )
    reporter.windows([window])
    flat = json.loads(next(raw for kind, raw in broker.told if kind == "metrics"))
    assert flat["temp_cpu_c"] == 60
    assert flat["temp_c"] == 60
    assert flat["throttled"] == 0
    assert flat["power_vdd_in_mw"] == 7336
    assert flat["power_mw"] == 7336.4
    assert flat["cpu_load"] == 0.5
    assert "gpu_load" not in flat, "what is not known is not there"
    assert "main_cam_fps" in flat
    (message,) = spool.next_batch(10)
    spooled = json.loads(message.payload)
    assert (spooled["temperature_c"], spooled["throttled"]) == (60, False)
