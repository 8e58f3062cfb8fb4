"""The machine with a real journal, real floors, a real spool and real child processes."""

from __future__ import annotations

import errno
import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.models import assignment, manifest, row
from edgeward_agent import machine as machinery
from edgeward_agent.backoff import Backoff
from edgeward_agent.blobs import BlobStore
from edgeward_agent.config import Config, Pipeline, QualifySettings, Source, TelemetrySettings
from edgeward_agent.floors import Floors
from edgeward_agent.journal import Journal
from edgeward_agent.lifetime import Pulse
from edgeward_agent.machine import Machine, Wanted
from edgeward_agent.reporting import Reporter
from edgeward_agent.running import Patience
from edgeward_agent.sensors import Sensors
from edgeward_agent.spool import Spool
from edgeward_agent.status import StatusFile, read_status
from edgeward_agent.supply import Supply, Ticket
from edgeward_agent.sysinfo import this_machine
from edgeward_agent.workers import Programs
from edgeward_wire.errors import Rejected
from edgeward_wire.event import Finished
from edgeward_wire.histogram import Recorder
from edgeward_wire.manifest import Manifest, TargetHints
from edgeward_wire.reported import PipelineReport, Update
from edgeward_wire.telemetry import Measures

CHILDREN = Path(__file__).parent / "children"
WAIT_S = 60.0
PROGRAMS = Programs(
    runner=(sys.executable, str(CHILDREN / "runner.py")),
    qualify=(sys.executable, str(CHILDREN / "qualify.py")),
)
HASTY = Patience(silence_s=WAIT_S, end_s=5.0, base_s=0.01, cap_s=0.05)


class Device:
    """One device's machine and blob thread. `stop` and `start` it as a person would the daemon."""

    def __init__(self, state: Path, uri: str = "/dev/null", root: Path = Path("/")) -> None:
        self.state = state
        self.root = root
        self.hardware = this_machine()
        self.config = Config(
            telemetry=TelemetrySettings(window_s=1),
            qualify=QualifySettings(lock=str(state / "lock")),
            pipelines={"main": Pipeline(sources=(Source(name="cam", uri=uri),))},
        )
        self.revision = 0
        self.failure: list[BaseException] = []
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        state = self.state
        self.floors = Floors(state / "floors.json")
        self.spool = Spool(state / "spool", f"{self.starts:032x}", 1 << 20)
        self.events: list[Any] = []
        self.reporter = Reporter(
            device="edge-01a",
            fleet="edge-01",
            boot_id=f"{self.starts:032x}",
            state=state,
            spool=self.spool,
            machine=self.hardware,
            pipelines={"main": ("cam",)},
        )
        self.supply = Supply(BlobStore(state / "blobs"), None, None)
        self.machine = Machine(
            config=self.config,
            state=state,
            journal=Journal(state / "journal.json"),
            floors=self.floors,
            supply=self.supply,
            reporter=self.reporter,
            hardware=self.hardware,
            programs=PROGRAMS,
            patience=HASTY,
            sensors=Sensors(self.root),
        )
        self.threads = [
            # daemons: one that hangs fails its test, and does not keep the whole run from ending
            threading.Thread(target=self._guard, args=(run,), daemon=True)
            for run in (self.machine.run, self.supply.run)
        ]
        for thread in self.threads:
            thread.start()

    def _guard(self, run: Callable[[Pulse], None]) -> None:
        try:
            run(Pulse("test", 60))
        except BaseException as error:  # noqa: BLE001 told by `stop`
            self.failure.append(error)

    def stop(self, *, orderly: bool = True) -> None:
        self.machine.stop(orderly)
        self.supply.stop()
        for thread in self.threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        self.spool.close()
        if self.failure:
            raise self.failure[0]

    def restart(self, *, orderly: bool = True) -> None:
        self.stop(orderly=orderly)
        self.start()

    def assign(self, model: Manifest | None, *, blobs: bool = True, **of_row: Any) -> None:
        """The newest verified assignment: `main` runs this model; no row when there is none."""
        if model is not None and blobs:
            self._let_the_blob_thread_finish()
            put(self.state, model)
        self.ask({} if model is None else {"main": model}, **of_row)

    def ask(self, models: Mapping[str, Manifest], **of_row: Any) -> None:
        """The newest verified assignment: these pipelines run these models."""
        self.revision += 1
        rows = {name: row(model, **of_row) for name, model in models.items()}
        signed = assignment(self.revision, **rows)
        texts = {name: model.to_bytes().decode() for name, model in models.items()}
        self.machine.wanted(Wanted(signed, signed.to_bytes(), texts))

    def _let_the_blob_thread_finish(self) -> None:
        """A commit's pruning may still be queued, and would take what we are about to put there."""
        if any(thread.is_alive() for thread in self.threads):
            done = threading.Event()
            self.supply.submit(Ticket(refs=(), done=lambda _fault: done.set()))
            assert done.wait(WAIT_S)

    def status(self) -> StatusFile | None:
        try:
            return read_status(self.state)
        except Rejected:
            return None

    def until(self, holds: Callable[[PipelineReport], object], what: str = "") -> PipelineReport:
        return self.all_until(lambda told: "main" in told and holds(told["main"]), what)["main"]

    def all_until(
        self, holds: Callable[[Mapping[str, PipelineReport]], object], what: str = ""
    ) -> Mapping[str, PipelineReport]:
        deadline = time.monotonic() + WAIT_S
        told: Mapping[str, PipelineReport] = {}
        while time.monotonic() < deadline and not self.failure:
            status = self.status()
            told = status.reported.pipelines if status else {}
            if status is not None and status.reported.boot_id == f"{self.starts:032x}" and holds(told):
                return told
            time.sleep(0.02)
        if self.failure:
            raise self.failure[0]
        raise AssertionError(f"never: {what}; last: {told}")

    def ended(self, model: Manifest, attempt: int = 1) -> Update:
        """Wait until the update to this model has ended."""

        def over(main: PipelineReport) -> bool:
            update = main.update
            return (
                update is not None
                and update.model == row(model).model
                and update.attempt == attempt
                and update.result is not None
            )

        update = self.until(over, f"the end of {model.version}").update
        assert update is not None
        return update

    def deploy(self, model: Manifest, attempt: int = 1, **of_row: Any) -> Update:
        self.assign(model, attempt=attempt, **of_row)
        return self.ended(model, attempt)

    def serves(self, model: Manifest, *, committed: bool = True) -> PipelineReport:
        def so(main: PipelineReport) -> bool:
            serving = main.serving
            return (
                serving is not None and serving.model == row(model).model and serving.committed == committed
            )

        return self.until(so, f"serving {model.version}")

    def told(self, kind: str) -> list[dict[str, Any]]:
        """What happened of this kind since this start of the daemon, unless it was asked for before."""
        found = [json.loads(message.payload) for message in self.spool.next_batch(1000)]
        boot = f"{self.starts:032x}"
        return [m["what"] for m in found if m["boot_id"] == boot and m.get("what", {}).get("kind") == kind]

    def runner(self) -> int:
        pid = self.machine._pipelines["main"].running.pid
        assert pid is not None
        return pid

    def wait_for_a_model(self, serve_s: float) -> None:
        """How long the runner may take with one."""
        running = self.machine._pipelines["main"].running
        running._patience = replace(running._patience, serve_s=serve_s)

    def journal(self) -> dict[str, Any]:
        saved: dict[str, Any] = json.loads((self.state / "journal.json").read_bytes())
        return saved

    def qualified(self) -> list[str]:
        path = self.state / "engines" / "starts"
        return path.read_text().split() if path.exists() else []


def put(state: Path, model: Manifest) -> None:
    """All its blobs, as if they had been fetched."""
    manifest(model.version, name=model.name, blobs=state / "blobs")


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    device = Device(tmp_path / "state")
    yield device
    if any(thread.is_alive() for thread in device.threads):
        device.stop()


ONE, TWO, THREE = manifest("1"), manifest("2"), manifest("3")


def test_the_first_deployment(device: Device) -> None:
    update = device.deploy(ONE)
    assert (update.result, update.reason) == ("succeeded", "")
    assert update.numbers["p50_ms"] == 5.0
    assert update.numbers["gap_ms"] == 1.5
    assert update.numbers["probation_frames"] > 0
    main = device.serves(ONE)
    assert main.serving
    assert main.serving.variant == "int8"
    assert main.sources["cam"].up
    kinds = [json.loads(m.payload) for m in device.spool.next_batch(100)]
    changes = [k["what"]["state"] for k in kinds if k.get("what", {}).get("kind") == "state"]
    assert changes == ["downloading", "verifying", "preparing", "validating", "switching", "probation"]
    assert any(k["schema"] == "edgeward.telemetry/1" for k in kinds)
    assert sum(k.get("what", {}).get("kind") == "finished" for k in kinds) == 1
    assert Finished.model_validate(
        next(k["what"] for k in kinds if k.get("what", {}).get("kind") == "finished")
    )


def test_an_upgrade_keeps_the_runner_and_forgets_old_blobs(device: Device) -> None:
    device.deploy(ONE)
    pid = device.runner()
    device.deploy(TWO)
    assert device.runner() == pid, "the model is switched, the runner lives on"
    device.deploy(THREE)
    device.serves(THREE)
    here = {path.name for path in (device.state / "blobs").iterdir()}
    deadline = time.monotonic() + WAIT_S
    while ONE.variants["int8"].model.sha256 in here and time.monotonic() < deadline:
        here = {path.name for path in (device.state / "blobs").iterdir()}
    assert ONE.variants["int8"].model.sha256 not in here
    assert TWO.variants["int8"].model.sha256 in here, "previous stays, for the way back"


def test_a_way_back_is_an_assignment_and_needs_no_new_trial(device: Device) -> None:
    device.deploy(ONE)
    device.deploy(TWO)
    assert device.deploy(ONE, rollout="back").result == "succeeded"
    device.serves(ONE)
    assert device.qualified() == ["1", "2"]


@pytest.mark.parametrize(
    ("annotations", "result", "reason"),
    [
        ({"qualify": "none"}, "failed_no_change", "wrong output (0.71)"),
        ({"qualify": "crash"}, "failed_no_change", "SIGSEGV"),
        ({"qualify": "exit"}, "failed_no_change", "no such thing"),
        ({"qualify": "babble"}, "failed_no_change", "do not understand"),
        ({"qualify": "hungry"}, "failed_no_change", "MB of memory"),
        ({"serve": "fail"}, "failed_no_change", "it is not loadable"),
        ({"serve": "crash"}, "failed_rolled_back", "SIGSEGV"),
        ({"serve": "hang"}, "failed_rolled_back", "could not serve the model within 2 s"),
        ({"live": "crash"}, "failed_rolled_back", "SIGABRT"),
        ({"live": "errors"}, "failed_rolled_back", "frames failed in probation"),
        ({"live": "stall"}, "failed_rolled_back", "stuck in one inference"),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("first", [False, True], ids=["second", "first"])
def test_a_bad_model_never_takes_the_good_one_with_it(
    device: Device, annotations: dict[str, str], result: str, reason: str, first: bool
) -> None:
    if not first:
        device.deploy(ONE)
    bad = manifest("2", annotations=annotations)
    if annotations == {"serve": "hang"}:  # only here: a machine under load may be as slow with a good one
        device.wait_for_a_model(2.0)
    update = device.deploy(bad, probation_s=30)
    device.wait_for_a_model(HASTY.serve_s)
    if first and result == "failed_rolled_back":
        result = "failed_unable_to_roll_back"
        assert "no committed model" in update.reason
    assert update.result == result
    assert reason in update.reason
    if first:
        assert device.until(lambda main: main.serving is None)
    else:
        device.serves(ONE)
    assert device.deploy(THREE).result == "succeeded", "and the next one finds its way"


def test_a_slow_model_breaks_its_own_limit(device: Device) -> None:
    device.deploy(ONE)
    slow = manifest("2", annotations={"live": "slow"}, p99_ms=50.0)
    update = device.deploy(slow, probation_s=30)
    assert update.result == "failed_rolled_back"
    assert "the manifest allows 50.0 ms" in update.reason
    assert update.numbers["live_inference_p99_ms"] > 400


def test_what_failed_is_not_tried_again_until_a_new_attempt(device: Device) -> None:
    bad = manifest("2", annotations={"qualify": "none"})
    device.deploy(bad)
    device.assign(bad, rollout="again")
    device.until(lambda main: main.update and main.update.rollout == "again")
    update = device.ended(bad)
    assert update.result == "rejected"
    assert "wrong output" in update.reason
    assert device.deploy(bad, attempt=2).result == "failed_no_change"
    assert device.qualified() == ["2", "2"]


def test_a_model_that_the_new_runtime_has_no_variant_for_is_tried_once(device: Device) -> None:
    """From [gpu], where it was denied, to [cpu], for which it is not meant."""
    device.stop()
    device.hardware = replace(device.hardware, runtime={"onnxruntime-gpu": "1.23"})
    device.start()
    model = manifest("2", annotations={"qualify": "none"}, targets=TargetHints(providers=("CUDA",)))
    assert device.deploy(model).result == "failed_no_change"
    device.stop()
    device.hardware = replace(device.hardware, runtime={"onnxruntime": "1.23"})
    device.start()
    device.assign(model)
    main = device.until(lambda main: main.update and main.update.result == "rejected")
    assert main.update
    assert "No variant of it is meant for this device" in main.update.reason
    assert device.deploy(THREE).result == "succeeded"
    assert [what["update"]["result"] for what in device.told("finished")] == ["rejected", "succeeded"]


def test_qualify_that_cannot_work_now_is_tried_again(device: Device) -> None:
    assert device.deploy(manifest("1", annotations={"qualify": "later"})).result == "succeeded"
    assert device.qualified() == ["1", "1"]


def test_a_newer_assignment_takes_over_while_qualify_hangs(device: Device) -> None:
    device.assign(manifest("1", annotations={"qualify": "hang"}))
    device.until(lambda main: main.update and main.update.state == "preparing" and main.update.detail)
    assert device.deploy(TWO).result == "succeeded"
    results = [
        k["what"]["update"]["result"]
        for k in (json.loads(m.payload) for m in device.spool.next_batch(100))
        if k.get("what", {}).get("kind") == "finished"
    ]
    assert results == ["superseded", "succeeded"]


def test_a_newer_assignment_takes_over_in_probation(device: Device) -> None:
    device.deploy(ONE)
    device.assign(TWO, probation_s=3600)
    device.serves(TWO, committed=False)
    assert device.deploy(THREE).result == "succeeded"
    assert device.journal()["pipelines"]["main"]["previous"]["row"]["model"]["path"].endswith("/1.json")


def test_a_row_that_goes_away_cancels_the_update_and_keeps_the_model(device: Device) -> None:
    device.deploy(ONE)
    device.assign(TWO, probation_s=3600)
    device.serves(TWO, committed=False)
    device.assign(None)
    assert device.ended(TWO).result == "canceled"
    device.serves(ONE)


def test_a_restart_serves_what_was_committed(device: Device) -> None:
    device.deploy(ONE)
    for orderly in (True, False):
        device.restart(orderly=orderly)
        device.serves(ONE)


def test_an_orderly_restart_continues_a_probation(device: Device) -> None:
    device.deploy(ONE)
    device.assign(TWO, probation_s=3600)
    device.serves(TWO, committed=False)
    device.restart(orderly=True)
    device.serves(TWO, committed=False)
    record = device.journal()["pipelines"]["main"]
    assert record["state"] == "probation"
    assert record["probation_spent_s"] > 0


def test_a_crash_in_probation_rolls_back(device: Device) -> None:
    device.deploy(ONE)
    device.assign(TWO, probation_s=3600)
    device.serves(TWO, committed=False)
    device.restart(orderly=False)
    update = device.ended(TWO)
    assert update.result == "failed_rolled_back"
    assert "restarted unexpectedly in probation" in update.reason
    device.serves(ONE)


def test_a_stop_in_qualify_begins_it_again(device: Device) -> None:
    device.assign(manifest("1", annotations={"qualify": "hang"}))
    device.until(lambda main: main.update and main.update.state == "preparing" and main.update.detail)
    device.restart(orderly=False)
    device.until(lambda main: main.update and main.update.state == "preparing" and main.update.detail)
    assert device.qualified() == ["1", "1"]


class Held(Backoff):
    """Until a test has seen what it wants to see."""

    def next(self) -> float:
        self.failures += 1
        return 3600.0


def test_a_runner_that_dies_is_brought_back_with_its_model(device: Device) -> None:
    device.deploy(ONE)
    pid, running = device.runner(), device.machine._pipelines["main"].running
    running.backoff = Held(0.0, 0.0)
    os.kill(pid, signal.SIGKILL)
    device.until(lambda main: "SIGKILL" in main.fault and main.serving is None)
    device.machine.poke(lambda: setattr(running, "_again_at", 0.0))
    device.until(lambda main: not main.fault)
    device.serves(ONE)
    assert device.runner() != pid


def test_a_hint_for_other_hardware_is_rejected(device: Device) -> None:
    alien = manifest("1", targets=TargetHints(arch=("riscv128",)))
    update = device.deploy(alien)
    assert update.result == "rejected"
    assert "No variant of it is meant for this device" in update.reason


def test_a_model_that_needs_more_than_we_can_stays_pending(device: Device) -> None:
    device.assign(manifest("1", requires=("telepathy",)))
    main = device.until(lambda main: main.update and main.update.state == "pending")
    assert main.update
    assert "telepathy" in main.update.reason
    device.restart()
    device.until(lambda main: main.update and main.update.state == "pending")
    assert device.deploy(TWO).result == "succeeded"


def test_a_pipeline_that_the_device_does_not_have_is_pending_until_nobody_asks(device: Device) -> None:
    device.ask({"other": ONE})
    update = device.all_until(lambda told: "other" in told and told["other"].update)["other"].update
    assert update
    assert update.state == "pending"
    assert "no such pipeline" in update.reason
    device.restart()
    device.all_until(lambda told: "other" in told)
    device.ask({})
    device.all_until(lambda told: "other" not in told)
    (end,) = device.told("finished")
    assert (end["pipeline"], end["update"]["result"]) == ("other", "canceled")
    assert list(device.journal()["pipelines"]) == ["main"]


def test_a_refusal_for_a_pipeline_that_the_device_does_not_have_is_told_once(device: Device) -> None:
    signed = assignment(1, other=row(ONE))
    refused = Wanted(signed, signed.to_bytes(), {}, {"other": "The signature is wrong."})
    for _ in range(3):  # as often as somebody looks
        device.machine.wanted(refused)
        device.all_until(lambda told: "other" in told and told["other"].update)
    device.deploy(ONE)
    results = [(end["pipeline"], end["update"]["result"]) for end in device.told("finished")]
    assert results == [("other", "rejected"), ("main", "succeeded")]


def faults(device: Device, subject: str) -> list[str]:
    return [what["detail"] for what in device.told("fault") if what["subject"] == subject]


def test_an_assignment_may_name_more_pipelines_than_a_report_has_room_for(device: Device) -> None:
    others = [f"a{n:02}" for n in range(16)]
    device.ask(dict.fromkeys(others, ONE))
    for _ in range(2):
        told = device.all_until(lambda told: "a14" in told)
        assert list(told) == [*others[:15], "main"]
        (detail,) = faults(device, "pipelines")
        assert "room for 16 of 17 pipelines and leaves out 1" in detail
        assert detail.endswith(": a15.")
        device.restart()
    assert device.deploy(ONE).result == "succeeded"
    assert list(device.journal()["pipelines"]) == ["main"]


def test_pipelines_that_left_agent_toml_never_crowd_out_those_that_are_there(device: Device) -> None:
    device.deploy(ONE)
    device.stop()
    saved = device.journal()
    served = [f"a{n:02}" for n in range(20)]
    saved["pipelines"] |= dict.fromkeys(served, saved["pipelines"]["main"])
    saved["pipelines"] |= {f"b{n:02}": {"state": "idle"} for n in range(20)}
    (device.state / "journal.json").write_text(json.dumps(saved))
    device.start()
    device.ask({"other": ONE, "main": ONE})
    told = device.all_until(lambda told: "other" in told)
    assert list(told) == [*served[:14], "main", "other"]
    (detail,) = faults(device, "pipelines")
    assert "leaves out 5" in detail, "before `other` was asked for; a change of the number is nothing new"
    assert list(device.journal()["pipelines"]) == [*served, "main", "other"]
    device.serves(ONE)


def test_the_security_floor_rises_at_commit_and_holds(device: Device) -> None:
    safe = manifest("2", security_epoch=2)
    device.deploy(safe)
    assert Floors(device.state / "floors.json").security("m") == 2
    update = device.deploy(manifest("3", security_epoch=1))
    assert update.result == "rejected"
    assert "floor 2" in update.reason
    device.serves(safe)


def test_a_model_below_the_floor_serves_on_and_says_so(device: Device) -> None:
    device.deploy(ONE)
    device.floors.raise_security("m", 5)
    device.until(lambda main: main.serving and main.serving.below_floor)


def test_a_refused_manifest_is_reported_and_nothing_lost(device: Device) -> None:
    device.deploy(ONE)
    signed = assignment(9, main=row(TWO))
    device.machine.wanted(Wanted(signed, signed.to_bytes(), {}, {"main": "The signature is wrong."}))
    update = device.ended(TWO)
    assert (update.result, update.reason) == ("rejected", "The signature is wrong.")
    device.serves(ONE)


def test_a_camera_that_is_not_there_is_reported_and_probation_waits(tmp_path: Path) -> None:
    device = Device(tmp_path / "state", uri="/nowhere/video0")
    try:
        device.assign(ONE)
        main = device.until(
            lambda main: main.update and "waits for frames; down: cam: not there" in main.update.detail
        )
        assert not main.sources["cam"].up
    finally:
        device.stop()


def test_probation_also_waits_for_a_source_that_was_not_heard_of_yet(tmp_path: Path) -> None:
    device = Device(tmp_path / "state", uri="/later/cam")
    try:
        device.assign(ONE)
        main = device.until(lambda main: main.update and "waits for frames" in main.update.detail)
        assert main.update
        assert main.update.detail == "waits for frames; down: cam: no frame yet"
        assert main.update.result is None
    finally:
        device.stop()


def test_a_pipeline_without_sources_passes_without_frames(device: Device) -> None:
    device.stop()
    device.config = device.config.model_copy(update={"pipelines": {"main": Pipeline()}})
    device.start()
    update = device.deploy(ONE)
    assert (update.result, update.numbers["probation_frames"]) == ("succeeded", 0)


def test_a_download_without_a_registry_waits_visibly(device: Device) -> None:
    device.assign(ONE, blobs=False)
    main = device.until(lambda main: main.update and "Again in" in main.update.detail)
    assert main.update
    assert main.update.state == "downloading"
    put(device.state, ONE)
    assert device.ended(ONE).result == "succeeded"


def test_a_lost_blob_of_the_committed_model_is_fetched_again(device: Device) -> None:
    device.deploy(ONE)
    device.stop()
    (device.state / "blobs" / ONE.variants["int8"].model.sha256).unlink()
    device.start()
    device.until(lambda main: "missing" in main.fault)
    put(device.state, ONE)
    device.serves(ONE)


def test_lost_golden_vectors_are_fetched_again_while_the_model_serves(device: Device) -> None:
    device.deploy(ONE)
    device.stop()
    (device.state / "blobs" / ONE.variants["int8"].golden.sha256).unlink()
    device.start()
    device.until(lambda main: "missing" in main.fault and main.serving)
    pid, tries = device.runner(), device.machine._pipelines["main"].running.backoff
    deadline = time.monotonic() + WAIT_S
    while tries.failures < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert tries.failures >= 3, "there is no registry, so it is tried again"
    put(device.state, ONE)
    device.until(lambda main: not main.fault and main.serving)
    assert device.runner() == pid, "the runner went on serving"


def test_a_damaged_blob_of_the_committed_model_is_found_and_fetched_again(device: Device) -> None:
    model = manifest("1", annotations={"serve": "whole"})
    device.deploy(model)
    device.stop()
    path = device.state / "blobs" / model.variants["int8"].model.sha256
    path.write_bytes(b"\0" * path.stat().st_size)
    device.start()
    # "does not load: Protobuf ..." may be over before anybody looks; that the blob is missing stays
    device.until(lambda main: "missing" in main.fault)
    put(device.state, model)
    device.until(lambda main: not main.fault)
    device.serves(model)


def test_a_disk_that_loses_blobs_ends_the_update_with_that_reason(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(_store: BlobStore, _ref: object) -> bool:
        return False  # a disk that gives other bytes than it was given; a test has none

    device.deploy(ONE)
    monkeypatch.setattr(BlobStore, "verify", lost)
    update = device.deploy(TWO)
    assert update.result == "failed_no_change"
    assert "The disk loses what is written to it" in update.reason
    device.serves(ONE)


def test_a_committed_model_whose_pipeline_left_agent_toml_says_so(device: Device) -> None:
    device.deploy(ONE)
    device.stop()
    pipelines, device.config = device.config.pipelines, device.config.model_copy(update={"pipelines": {}})
    device.start()
    device.until(lambda main: "agent.toml has no pipeline main" in main.fault)
    device.stop()
    device.config = device.config.model_copy(update={"pipelines": pipelines})
    device.start()
    device.until(lambda main: not main.fault)
    device.serves(ONE)


def leave_agent_toml(device: Device, *, orderly: bool, spent_s: float = 0.0) -> None:
    """The daemon starts again, `spent_s` into a probation, without any pipeline."""
    device.stop(orderly=orderly)
    saved = device.journal()
    saved["pipelines"]["main"]["probation_spent_s"] = spent_s
    (device.state / "journal.json").write_text(json.dumps(saved))
    device.config = device.config.model_copy(update={"pipelines": {}})
    device.start()


@pytest.mark.parametrize("orderly", [False, True], ids=["after-a-crash", "in-order"])
def test_an_update_whose_pipeline_left_agent_toml_ends(device: Device, orderly: bool) -> None:
    pipelines = device.config.pipelines
    device.deploy(ONE)
    device.assign(TWO, probation_s=3600)
    device.serves(TWO, committed=False)
    leave_agent_toml(device, orderly=orderly, spent_s=3600)
    main = device.until(lambda main: main.update and main.update.result)
    assert main.update
    assert main.update.result == "failed_unable_to_roll_back"
    assert "agent.toml has no such pipeline" in main.update.reason
    assert main.serving is None
    assert "agent.toml has no pipeline main" in main.fault
    device.stop()
    device.config = device.config.model_copy(update={"pipelines": pipelines})
    device.start()
    device.serves(ONE)


def test_a_first_model_without_sources_that_it_had_is_not_committed(device: Device) -> None:
    pipelines = device.config.pipelines
    device.assign(ONE, probation_s=3600)
    device.serves(ONE, committed=False)
    leave_agent_toml(device, orderly=True, spent_s=3600)
    update = device.ended(ONE)
    assert update.result == "failed_unable_to_roll_back"
    assert device.machine._pipelines["main"].running.pid is None
    device.stop()
    device.config = device.config.model_copy(update={"pipelines": pipelines})
    device.start()
    assert device.deploy(ONE, attempt=2).result == "succeeded"


def test_a_full_disk_fails_the_update_and_the_old_model_goes_on(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.deploy(ONE)
    real = os.fsync

    def full(descriptor: int) -> None:
        # The kernel's answer on a full disk; a test cannot fill this one.
        if "journal" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    update = device.deploy(TWO)
    assert update.result == "failed_no_change"
    assert "disk full" in update.reason
    device.serves(ONE)
    monkeypatch.setattr(os, "fsync", real)
    assert device.deploy(TWO, attempt=2).result == "succeeded"


def test_a_full_disk_at_commit_rolls_back(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.deploy(ONE)
    real = os.fsync
    is_full = threading.Event()

    def fill(descriptor: int) -> None:
        """From the first journal on that has the new model committed, the disk takes nothing more."""
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name == ".journal.json.new" and not is_full.is_set():
            main = json.loads(path.read_bytes())["pipelines"]["main"]
            if main["committed"]["row"]["model"]["path"] == row(TWO).model.path:
                is_full.set()
        if is_full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fill)
    update = device.deploy(TWO)
    assert is_full.is_set()
    assert update.result == "failed_rolled_back"
    device.serves(ONE)
    monkeypatch.setattr(os, "fsync", real)


def test_slow_live_frames_make_the_verdict_stale(device: Device) -> None:
    device.deploy(manifest("1", annotations={"live": "slow"}))
    device.until(lambda main: main.serving and main.serving.stale)
    assert not list((device.state / "verdicts").glob("*.json"))


def slow_window() -> Measures:
    recorder = Recorder()
    for _ in range(60):
        recorder.record(500.0)
    return Measures(
        pipeline="main",
        source="cam",
        model=row(ONE).model,
        variant="int8",
        provider="CPUExecutionProvider",
        start=0,
        duration_s=1,
        frames=60,
        stages={"inference": recorder.take()},
    )


def test_a_model_that_was_asked_for_twice_is_still_watched(device: Device) -> None:
    device.deploy(ONE)
    assert device.deploy(ONE, attempt=2).reason == "It serves already."
    pipeline, seen = device.machine._pipelines["main"], queue.SimpleQueue[bool]()

    def look() -> None:  # in one go: the runner's own windows are fast
        for _ in range(3):
            pipeline._windows((slow_window(),))
        seen.put(pipeline.latency.stale)

    device.machine.poke(look)
    assert seen.get(timeout=WAIT_S)


def test_a_damaged_journal_is_set_aside_and_said(device: Device) -> None:
    device.deploy(ONE)
    device.stop()
    (device.state / "journal.json").write_bytes(b"{ half of")
    device.start()
    device.until(lambda main: main.serving is None and main.update is None)
    assert (device.state / "journal.json.damaged").exists()
    device.assign(ONE)
    device.serves(ONE)


def test_an_unknown_state_goes_back_to_the_committed_model(device: Device) -> None:
    device.deploy(ONE)
    device.stop()
    saved = device.journal()
    saved["pipelines"]["main"]["state"] = "teleporting"
    (device.state / "journal.json").write_text(json.dumps(saved))
    device.start()
    device.serves(ONE)


def test_remote_settings_reach_the_runner(device: Device) -> None:
    device.deploy(ONE)
    signed = assignment(50, main=row(ONE)).model_copy(
        update={"config": machinery.RemoteConfig(poll_interval_s=7, telemetry_window_s=3)}
    )
    device.machine.wanted(Wanted(signed, signed.to_bytes(), {"main": ONE.to_bytes().decode()}))
    device.until(lambda _: device.machine.remote.poll_interval_s == 7)
    assert device.machine._pipelines["main"].configure().window_s == 3
    device.restart()
    assert device.machine.remote.telemetry_window_s == 3, "known before the registry answers"


def test_a_throttled_device_says_so_once(tmp_path: Path) -> None:
    orin = shutil.copytree(Path(__file__).parent / "jetson_orin", tmp_path / "orin")
    (orin / "sys/class/thermal/cooling_device1/cur_state").write_text("2\n")
    device = Device(tmp_path / "state", root=orin)
    try:
        device.until(lambda _main: (status := device.status()) is not None and status.reported.vitals)
        status = device.status()
        told = [json.loads(message.payload)["what"] for message in device.spool.next_batch(50)]
    finally:
        device.stop()
    assert status is not None
    assert status.reported.vitals is not None
    assert status.reported.vitals.throttled_by == ("cpufreq-cpu0",)
    faults = [what for what in told if what.get("subject") == "throttling"]
    assert [(fault["recovered"], fault["detail"]) for fault in faults] == [
        (False, "The device is slowed down: 52 °C, throttled (cpufreq-cpu0), 7.3 W.")
    ]
