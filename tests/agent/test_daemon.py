"""The whole daemon as a process, with real children and a real model, against a registry that signs for real.

No broker is there: the daemon must not need one to do its work.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edgeward_agent.status import StatusFile, read_status
from edgeward_wire.assignment import Assignment, PipelineAssignment
from edgeward_wire.document import parse
from edgeward_wire.enrolment import BrokerAddress, EnrolResponse, RenewRequest
from edgeward_wire.errors import Rejected
from edgeward_wire.identifiers import assignment_path, blob_path
from edgeward_wire.reported import PipelineReport, Update
from runtime.builders import picture_directory
from runtime.bundles import Bundle, colour_bundle
from sim.device import DEVICE, write_identity
from sim.pki import Authority
from sim.repository import Repository
from sim.server import Reply, Request, Server

WAIT_S = 90.0
CONFIG = """
[registry]
poll_interval_s = 1
[telemetry]
window_s = 1
[qualify]
lock = "qualify.lock"
[[pipelines.main.sources]]
name = "cam"
uri = "pictures"
loop = true
"""


@dataclass
class Daemon:
    """`edgeward-agent run` in a process of its own."""

    directory: Path
    notify: socket.socket
    process: subprocess.Popen[str] = field(init=False)

    @property
    def state(self) -> Path:
        return self.directory / "state"

    def start(self) -> None:
        log = (self.directory / "agent.log").open("a")
        with log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    *("-m", "edgeward_agent.cli", "run"),
                    *("--config", str(self.directory / "agent.toml"), "--state", str(self.state)),
                ],
                stderr=log,
                text=True,
                env={
                    **os.environ,
                    "NOTIFY_SOCKET": str(self.directory / "notify"),
                    "WATCHDOG_USEC": "4000000",
                },
            )

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)

    def log(self) -> str:
        return (self.directory / "agent.log").read_text()

    def status(self) -> StatusFile | None:
        with suppress(Rejected):
            found = read_status(self.state)
            return found if found.pid == self.process.pid else None
        return None

    def until(self, holds: Callable[[StatusFile], object]) -> StatusFile:
        deadline = time.monotonic() + WAIT_S
        status = None
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log()
            status = self.status()
            if status is not None and holds(status):
                return status
            time.sleep(0.05)
        raise AssertionError(f"never; last: {status}\n{self.log()}")

    def main(self, holds: Callable[[PipelineReport], object]) -> PipelineReport:
        def so(status: StatusFile) -> object:
            main = status.reported.pipelines.get("main")
            return main is not None and holds(main)

        return self.until(so).reported.pipelines["main"]

    def ended(self, rollout: str) -> Update:
        main = self.main(lambda m: m.update and m.update.rollout == rollout and m.update.result)
        assert main.update
        return main.update

    def serves(self, bundle: Bundle, *, committed: bool = True) -> PipelineReport:
        return self.main(
            lambda m: m.serving and m.serving.model == bundle.ref and m.serving.committed == committed
        )


@dataclass
class Cloud:
    """What an operator and the director do."""

    server: Server
    repository: Repository
    revision: int = 0

    def deploy(self, bundle: Bundle, rollout: str, *, probation_s: float = 1.0, attempt: int = 1) -> None:
        blobs = [bundle.blob(ref).read_bytes() for ref in bundle.manifest.blobs()]
        self.repository.now = time.time()
        ref = self.repository.release(bundle.manifest, blobs)
        row = PipelineAssignment(model=ref, rollout=rollout, attempt=attempt, probation_s=probation_s)
        self.revision = max(self.revision + 1, int(self.repository.now))
        document = Assignment(device=DEVICE, fleet="lab", revision=self.revision, pipelines={"main": row})
        role = self.repository.bin_of(DEVICE)
        self.repository.add_target(assignment_path(DEVICE), document.to_bytes(), role)
        self.repository.publish()


@pytest.fixture
def cloud(server: Server) -> Cloud:
    return Cloud(server, Repository(server.files, now=time.time()))


@pytest.fixture
def daemon(
    cloud: Cloud, server_authority: Authority, device_authority: Authority, tmp_path: Path
) -> Iterator[Daemon]:
    write_identity(
        tmp_path / "state",
        server_authority,
        device_authority,
        url=cloud.server.url,
        root=cloud.repository.root_bytes,
        broker_port=1,
    )
    (tmp_path / "agent.toml").write_text(CONFIG.replace("qualify.lock", str(tmp_path / "qualify.lock")))
    picture_directory(tmp_path / "pictures")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(WAIT_S)
        daemon = Daemon(tmp_path, notify)
        daemon.start()
        assert notify.recv(4096).startswith(b"READY=1")
        yield daemon
        if daemon.process.poll() is None:
            assert daemon.stop() == 0, daemon.log()


def test_its_certificate_is_renewed_at_half_of_life(
    cloud: Cloud, daemon: Daemon, device_authority: Authority
) -> None:
    def renew(request: Request) -> Reply:
        asked = parse(RenewRequest, request.body)
        answer = EnrolResponse(
            admission="accepted",
            device=DEVICE,
            fleet="lab",
            certificate_pem=device_authority.issue_for_csr(asked.csr_pem, DEVICE),
            broker=BrokerAddress(host="127.0.0.1", port=1),
            server_time=time.time(),
        )
        return Reply(200, answer.to_bytes())

    cloud.server.handlers["POST", "/v1/device/certificate"] = renew
    assert daemon.stop() == 0
    identity = daemon.state / "identity"
    before = (identity / "certificate.pem").read_bytes()
    enrolment = json.loads((identity / "enrolment.json").read_bytes())
    enrolment["issued_at"] -= 400 * 86_400
    (identity / "enrolment.json").write_text(json.dumps(enrolment))
    daemon.start()
    deadline = time.monotonic() + WAIT_S
    while "certificate was renewed" not in daemon.log():
        assert time.monotonic() < deadline, daemon.log()
        time.sleep(0.05)
    assert (identity / "certificate.pem").read_bytes() != before


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return colour_bundle(tmp_path_factory.mktemp("one"), version="1")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return colour_bundle(tmp_path_factory.mktemp("two"), version="2", salt=1)


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # threads end
            found += [int(n) for n in (task / "children").read_text().split()]
    return found


def runner_of(daemon: Daemon) -> int:
    """Its only child, once qualify has gone."""
    deadline = time.monotonic() + WAIT_S
    while len(found := children(daemon.process.pid)) != 1:
        assert time.monotonic() < deadline, f"qualify has gone, the runner stays: {found}"
        time.sleep(0.05)
    return found[0]


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_signed_model_runs_within_seconds_and_an_upgrade_follows(
    cloud: Cloud, daemon: Daemon, one: Bundle, two: Bundle
) -> None:
    daemon.until(lambda status: status.reported.revision == 0)
    cloud.deploy(one, "first")
    update = daemon.ended("first")
    assert update.result == "succeeded", update.reason
    assert update.verdict
    assert update.verdict.evidence == "strong"
    assert update.numbers["probation_frames"] > 0
    main = daemon.serves(one)
    assert main.sources["cam"].up
    status = daemon.until(lambda s: s.figures.get("main", {}).get("cam"))
    assert status.figures["main"]["cam"].fps > 0
    assert status.figures["main"]["cam"].seen in ("red", "green", "blue")
    assert not status.broker
    assert status.reported.revision == cloud.revision

    cloud.deploy(two, "second")
    assert daemon.ended("second").result == "succeeded"
    daemon.serves(two)
    runner = runner_of(daemon)
    assert daemon.stop() == 0
    assert has_ended(runner)
    assert "Traceback" not in daemon.log()
    assert list((daemon.state / "spool").rglob("*.jsonl")), "what nobody has stored yet waits on disk"


def test_without_registry_and_broker_it_serves_what_it_has(cloud: Cloud, daemon: Daemon, one: Bundle) -> None:
    cloud.deploy(one, "first")
    daemon.ended("first")
    assert daemon.stop() == 0
    cloud.server.close()
    daemon.start()
    daemon.serves(one)
    daemon.until(lambda status: status.reported.registry)


def test_a_tampered_blob_is_refused_and_the_old_model_serves(
    cloud: Cloud, daemon: Daemon, one: Bundle, two: Bundle
) -> None:
    cloud.deploy(one, "first")
    daemon.ended("first")
    model = two.manifest.variants["int8"].model
    real = two.blob(model).read_bytes()
    two.blob(model).write_bytes(real[:-1] + b"\0")
    try:
        cloud.deploy(two, "second")
        tampered = cloud.server.files.pop(f"/{blob_path(_sha256(real[:-1] + bytes(1)))}")
        cloud.server.files[f"/{blob_path(model.sha256)}"] = tampered
        update = daemon.ended("second")
    finally:
        two.blob(model).write_bytes(real)
    assert update.result == "rejected"
    assert "do not match the signed sha256" in update.reason
    daemon.serves(one)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_killed_in_probation_it_comes_back_with_the_old_model(
    cloud: Cloud, daemon: Daemon, one: Bundle, two: Bundle
) -> None:
    cloud.deploy(one, "first")
    daemon.ended("first")
    cloud.deploy(two, "second", probation_s=3600)
    daemon.serves(two, committed=False)
    runner = runner_of(daemon)
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    deadline = time.monotonic() + WAIT_S
    while not has_ended(runner):
        assert time.monotonic() < deadline, "the runner must not outlive the daemon"
        time.sleep(0.05)
    daemon.start()
    update = daemon.ended("second")
    assert update.result == "failed_rolled_back"
    assert "restarted unexpectedly" in update.reason
    daemon.serves(one)


def test_stopped_in_order_in_probation_it_goes_on_with_the_new_model(
    cloud: Cloud, daemon: Daemon, one: Bundle
) -> None:
    cloud.deploy(one, "first", probation_s=3600)
    daemon.serves(one, committed=False)
    assert daemon.stop() == 0
    daemon.start()
    daemon.serves(one, committed=False)


def test_a_second_daemon_is_refused(daemon: Daemon) -> None:
    daemon.until(lambda _: True)
    words = ("--config", str(daemon.directory / "agent.toml"), "--state", str(daemon.state))
    found = subprocess.run(
        [sys.executable, "-m", "edgeward_agent.cli", "run", *words],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert found.returncode == 1
    assert "Another edgeward-agent runs on" in found.stderr
