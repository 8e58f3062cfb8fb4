"""`edgeward-cloud up` as a process: HTTPS, enrolment, mutual TLS to the broker, and nothing lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ports import until_free

from cloud.apikit import DeviceKit
from cloud.kit import Operator, key_service, make_cloud, make_manifest, ref_of
from cloud.mqttkit import PATIENCE_S, MqttDevice, need_mosquitto
from cloud.test_store import BOOT, window
from edgeward_cloud import server
from edgeward_cloud.notify import Notifier
from edgeward_cloud.operators import new_token
from edgeward_cloud.pki import Pki
from edgeward_cloud.registry import Registry
from edgeward_cloud.server import _Parts
from edgeward_cloud.settings import Settings
from edgeward_wire.enrolment import EnrolmentString, EnrolResponse
from edgeward_wire.errors import EdgewardError, Rejected
from edgeward_wire.status import Status


class Up:
    """A running cloud."""

    def __init__(self, settings: Settings, **environment: str) -> None:
        self.settings = settings
        command = [sys.executable, "-m", "edgeward_cloud.cli", "up", "--dir", str(settings.dir)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.errors += self.process.stderr

    def ready(self) -> str:
        """The one line that it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(40)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@contextlib.contextmanager
def up(settings: Settings, **environment: str) -> Iterator[Up]:
    """A cloud that serves; it must stop in order when it is told to."""
    one = Up(settings, **environment)
    try:
        line = one.ready()
        assert settings.url in line, "".join(one.errors)
        yield one
    finally:
        if one.process.poll() is None:
            code = one.stop()
            assert code == 0, "".join(one.errors)
        elif not one.process.stdout.closed:  # type: ignore[union-attr]
            one.wait()
    assert "Traceback" not in "".join(one.errors)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    need_mosquitto()
    return make_cloud(tmp_path / "cloud")


def client(settings: Settings) -> httpx.Client:
    """An operator over TLS, with the cloud's CA as the only anchor."""
    tls = ssl.create_default_context(cafile=str(Pki(settings.pki).server_ca))
    token = new_token(settings.operators_file, "ann")
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.Client(base_url=settings.url, verify=tls, headers=headers, timeout=60)


def waited(condition: Any, what: str) -> Any:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited in vain for {what}")


def test_the_whole_way_and_a_restart_that_loses_nothing(settings: Settings, tmp_path: Path) -> None:
    kit = DeviceKit("d1")
    with up(settings) as cloud, client(settings) as http:
        assert http.post("/v1/fleets", json={"name": "edge"}).status_code == 201
        made = http.post("/v1/enroll-tokens", json={"fleet": "edge"}).json()
        string = EnrolmentString.decode(made["enrolment"])
        answer = http.post("/v1/enroll", json=kit.request(string.token))
        enrolled = EnrolResponse.model_validate(answer.json())
        assert enrolled.certificate_pem
        assert enrolled.broker == settings.broker_address
        device = MqttDevice(settings, "d1", tmp_path / "d1", enrolled.certificate_pem, kit.key_pem)
        with device:
            device.send("status", Status(state="online", boot_id=BOOT))
            for seq in range(20):
                device.send("telemetry", window(seq, start=time.time() - 60 + seq))
            waited(lambda: device.acked() == set(range(20)), "acks")
            rows = http.get("/v1/telemetry?fleet=edge").json()
            assert [(row["device"], row["windows"]) for row in rows] == [("d1", 20), (None, 20)]
            _deploys(http, settings, device)
        # Its Date is the one header of that name: a device sets its clock by it.
        refused = http.get(f"/blobs/sha256/{'0' * 64}", headers={"Authorization": "Bearer x"})
        assert (refused.status_code, len(refused.headers.get_list("date"))) == (401, 1)
        assert cloud.stop(signal.SIGKILL) == -signal.SIGKILL
    until_free(settings.broker.port)  # Mosquitto ends with it, but not at once
    device = MqttDevice(settings, "d1", tmp_path / "d1", enrolled.certificate_pem, kit.key_pem)
    with up(settings), client(settings) as http, device:
        device.send("telemetry", window(20, start=time.time() - 30))
        waited(lambda: device.acked() == {20}, "the ack")
        [row] = http.get("/v1/telemetry?device=d1&merged=false").json()
        assert row["windows"] == 21
        assert http.get("/v1/rollouts").json()[0]["targets"][0]["device"] == "d1"


def _deploys(http: httpx.Client, settings: Settings, device: MqttDevice) -> None:
    registry = Registry(settings)
    manifest = make_manifest(registry.blobs)
    Operator(settings).publish(registry, manifest)
    body = {"fleet": "edge", "model": ref_of(manifest).model_dump()}
    assert http.post("/v1/rollouts", json=body).status_code == 201
    waited(lambda: device.refreshes, "the refresh")
    signed = registry.assignment("d1")
    assert signed is not None
    assert signed.pipelines["main"].model == ref_of(manifest)


def test_a_rejected_device_is_thrown_out_and_a_viewer_let_in(settings: Settings, tmp_path: Path) -> None:
    kits = {name: DeviceKit(name) for name in ("d1", "viewer")}
    with up(settings), client(settings) as http:
        http.post("/v1/fleets", json={"name": "edge"})
        made = http.post("/v1/enroll-tokens", json={"fleet": "edge"}).json()
        token = EnrolmentString.decode(made["enrolment"]).token
        enrolled = http.post("/v1/enroll", json=kits["d1"].request(token)).json()
        d1 = MqttDevice(settings, "d1", tmp_path / "d1", enrolled["certificate_pem"], kits["d1"].key_pem)
        with d1:
            d1.send("telemetry", window(1))
            waited(lambda: d1.acked() == {1}, "the ack")
            assert http.post("/v1/devices/d1/admission", json={"admission": "rejected"}).status_code == 200
            ask = {"name": "grafana", "csr_pem": kits["viewer"].csr_pem}
            viewer = http.post("/v1/mqtt-certificates", json=ask).json()
        # The broker reads its revocation list when it comes round to the signal.
        said = waited(lambda: _tls_refusal(settings, tmp_path / "d1"), "the refusal")
        assert "revoked" in said
        ours = MqttDevice(
            settings, viewer["username"], tmp_path / "v", viewer["certificate_pem"], kits["viewer"].key_pem
        )
        seen: list[str] = []
        ours.client.on_connect = lambda c, *_: c.subscribe("edgeward/v1/+/up/#", qos=1)
        ours.client.on_message = lambda _, __, m: seen.append(m.topic)
        with ours, MqttDevice(settings, "d2", tmp_path / "d2") as d2:
            waited(lambda: d2.send("metrics", b"{}") or seen, "what devices publish")
            assert set(seen) == {"edgeward/v1/d2/up/metrics"}


def test_a_device_that_is_accepted_again_comes_back(settings: Settings, tmp_path: Path) -> None:
    kit = DeviceKit("d1")

    def seen() -> dict[str, Any]:
        found: dict[str, Any] = http.get("/v1/devices/d1").json()
        return found

    def admit(admission: str) -> None:
        path = "/v1/devices/d1/admission"
        assert http.post(path, json={"admission": admission}).status_code == 200

    with up(settings), client(settings) as http:
        http.post("/v1/fleets", json={"name": "edge"})
        made = http.post("/v1/enroll-tokens", json={"fleet": "edge"}).json()
        token = EnrolmentString.decode(made["enrolment"]).token
        enrolled = http.post("/v1/enroll", json=kit.request(token)).json()
        d1 = MqttDevice(settings, "d1", tmp_path / "d1", enrolled["certificate_pem"], kit.key_pem)
        with d1:
            d1.send("status", Status(state="online", boot_id=BOOT))
            waited(lambda: seen()["online"], "it to be online")
            admit("rejected")
            assert not seen()["online"]
            admit("accepted")
            assert seen()["certificate_revoked"]
            waited(lambda: d1.send("telemetry", window(1)) or seen()["online"], "it to be online again")
        # Another connection needs another certificate, and gets one by the device's key.
        assert "revoked" in waited(lambda: _tls_refusal(settings, tmp_path / "d1"), "the refusal")
        answer = http.post("/v1/device/certificate", json={"csr_pem": kit.csr_pem}, headers=kit.headers())
        renewed = MqttDevice(settings, "d1", tmp_path / "new", answer.json()["certificate_pem"], kit.key_pem)
        with renewed:
            renewed.send("telemetry", window(2))
            waited(lambda: 2 in renewed.acked(), "the ack")
        assert not seen()["certificate_revoked"]


def _tls_refusal(settings: Settings, home: Path) -> str:
    """What the broker's TLS says to a client certificate; empty when it lets it in."""
    tls = ssl.create_default_context(cafile=str(Pki(settings.pki).server_ca))
    tls.load_cert_chain(home / "certificate.pem", home / "key.pem")
    address = (settings.broker_connect.host, settings.broker_connect.port)
    with (
        socket.create_connection(address, PATIENCE_S) as plain,
        tls.wrap_socket(plain, server_hostname=address[0]) as wrapped,
    ):
        wrapped.settimeout(1.0)  # it waits for us to speak, if it lets us in
        try:
            wrapped.recv(1)
        except ssl.SSLError as error:
            return str(error)
        except TimeoutError:
            pass
    return ""


def test_the_first_failure_is_one_line_with_what_to_do(settings: Settings) -> None:
    with socket.create_server((settings.http.host, settings.http.port)):
        one = Up(settings)
        assert one.ready() == ""
        assert one.wait() == 1
    error, following = [line for line in one.errors if line.startswith(("error:", "next:"))]
    assert f"port {settings.http.port}" in error
    assert "cloud.toml" in following
    assert "Traceback" not in "".join(one.errors)


def test_a_broker_that_cannot_start_ends_the_cloud(settings: Settings) -> None:
    with socket.create_server((settings.broker.bind, settings.broker.port)):
        one = Up(settings)
        assert one.ready() == ""
        assert one.wait() == 1
    assert any(line.startswith("error: The broker cannot listen") for line in one.errors)


def test_a_missing_certificate_is_named(settings: Settings) -> None:
    (settings.pki / "server.key").unlink()
    one = Up(settings)
    assert one.ready() == ""
    assert one.wait() == 1
    assert any(line.startswith("error:") and "server.key" in line for line in one.errors)


def test_an_external_broker_may_be_away(settings: Settings) -> None:
    broker = settings.broker.model_copy(update={"managed": False})
    external = settings.model_copy(update={"broker": broker})
    external.save()
    with up(external) as cloud, client(external) as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert cloud.stop() == 0
    assert any("is away" in line for line in cloud.errors)


def test_health_says_that_its_own_broker_is_gone(settings: Settings) -> None:
    with up(settings), client(settings) as http:
        assert http.get("/health").json() == {"status": "ok"}
        (settings.mosquitto / "mosquitto.conf").write_text("nonsense\n")  # it ends at once, again and again
        [pid] = _mosquittos(settings)
        os.kill(pid, signal.SIGKILL)
        answer = waited(lambda: (a := http.get("/health")).status_code == 503 and a, "503")
        assert "broker is away: Mosquitto ended" in answer.json()["detail"]
        assert http.get("/v1/whoami").status_code == 200, "all else goes on"


def _mosquittos(settings: Settings) -> list[int]:
    wanted = str(settings.mosquitto / "mosquitto.conf").encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if wanted in words and words[0].endswith(b"mosquitto"):
                found.append(int(path.parent.name))
    return found


def test_systemd_hears_ready_and_the_watchdog_and_stopping(settings: Settings, tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(PATIENCE_S)
        environment = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "300000"}
        with up(settings, **environment) as cloud:
            heard = [manager.recv(4096).decode() for _ in range(3)]
            assert sum(text.startswith("READY=1\nSTATUS=") for text in heard) == 1
            assert "WATCHDOG=1" in heard
            cloud.stop()
        manager.settimeout(0.1)
        with contextlib.suppress(TimeoutError):
            while True:
                heard.append(manager.recv(4096).decode())
        assert "STOPPING=1" in heard[3:]


def test_without_systemd_nothing_is_said() -> None:
    quiet = Notifier({})
    quiet.ready("x")
    assert quiet.watchdog_s is None
    assert Notifier({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "1"}).watchdog_s is None
    assert Notifier({"WATCHDOG_USEC": "2000000"}).watchdog_s == 2.0
    Notifier({"NOTIFY_SOCKET": "@nobody-listens-here"}).alive()


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.01)


@pytest.mark.anyio
@pytest.mark.parametrize("fault", ["the key service", "the lock"])
async def test_re_signing_waits_for_what_is_away_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    monkeypatch.setattr(server, "RESIGN_AGAIN_S", 0.05, raising=False)
    settings = make_cloud(tmp_path / "cloud")
    begun = (settings.metadata / "timestamp.json").read_bytes()
    with key_service(settings, "timestamp") as (elsewhere, service):
        registry = Registry(elsewhere, clock=lambda: time.time() + 5 * 86_400)
        lock = settings.metadata.parent / ".lock"
        lock.unlink(missing_ok=True)
        if fault == "the lock":
            lock.mkdir()  # not to be opened for writing, also not by root
        else:
            service.away = True
        task = asyncio.create_task(server._resign(registry))
        try:
            await until(lambda: caplog.text.count("cannot be signed") > 1 or task.done())
            assert not task.done(), "it ended, and the cloud with it"
            service.away = False
            if fault == "the lock":
                lock.rmdir()
            timestamp = settings.metadata / "timestamp.json"
            await until(lambda: timestamp.read_bytes() != begun or task.done())
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.mark.anyio
async def test_re_signing_a_damaged_registry_is_not_tried_again(tmp_path: Path) -> None:
    settings = make_cloud(tmp_path / "cloud")
    registry = Registry(settings)
    (settings.metadata / "timestamp.json").unlink()
    with pytest.raises(Rejected):
        await server._resign(registry)


@pytest.mark.anyio
async def test_the_first_part_to_fail_stops_the_cloud_with_its_reason() -> None:
    async def mistaken() -> None:
        raise ValueError("seven is not eight")

    async def refused() -> None:
        raise Rejected("The key is gone.", "Restore it.")

    async def ended() -> None:
        return

    for work, says in (
        (mistaken, "ingest failed: ValueError: seven"),
        (refused, "key is gone"),
        (ended, "by itself"),
    ):
        parts = _Parts(asyncio.Event())
        parts.start("watchdog", asyncio.sleep(3600))
        parts.start("ingest", work())
        with pytest.raises(EdgewardError, match=says):
            await parts.first_to_end()
        await parts.stop()
    stop = asyncio.Event()
    stop.set()
    await _Parts(stop).first_to_end()
