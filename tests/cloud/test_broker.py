"""The generated configuration under the real Mosquitto, asked by real MQTT clients over mutual TLS."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from cloud.kit import make_cloud
from conftest import missing
from edgeward_cloud import broker as module
from edgeward_cloud.broker import Broker, render
from edgeward_cloud.pki import Pki, TlsFiles, new_csr
from edgeward_cloud.settings import BrokerSettings, Settings
from edgeward_wire import topics
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.identifiers import DEVICE_PATTERN

WAIT_S = 60.0
NOT_AUTHORISED = 0x87
NOBODY_LISTENS = 0x10


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return make_cloud(tmp_path_factory.mktemp("broker") / "cloud")


@pytest.fixture
def broker(settings: Settings) -> Iterator[Broker]:
    if shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        missing("mosquitto")
    broker = Broker(settings)
    broker.start(viewers=["_viewer-grafana"])
    yield broker
    broker.stop()


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.02)


class Peer:
    """An MQTT 5 client with a certificate. Everything that it waits for has a bound."""

    def __init__(
        self, settings: Settings, name: str, *, client_id: str | None = None, files: TlsFiles | None = None
    ) -> None:
        pki = Pki(settings.pki)
        self.files = files or issue(pki, name)
        self.name = name
        self.messages: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self._answers: queue.Queue[tuple[str, int]] = queue.Queue()
        self.disconnects = 0
        self.client = paho.Client(CallbackAPIVersion.VERSION2, client_id or name, protocol=paho.MQTTv5)
        context = ssl.create_default_context(cafile=str(pki.server_ca))
        if self.files.certificate.exists():
            context.load_cert_chain(self.files.certificate, self.files.key)
        self.client.tls_set_context(context)
        self.client.on_connect = lambda _c, _u, _f, code, _p: self._answers.put(("connect", code.value))
        self.client.on_subscribe = lambda _c, _u, _m, codes, _p: self._answers.put(("sub", codes[0].value))
        self.client.on_publish = lambda _c, _u, _m, code, _p: self._answers.put(("publish", code.value))
        self.client.on_message = lambda _c, _u, m: self.messages.put((m.topic, m.payload))
        self.client.on_disconnect = self._on_disconnect
        self._address = ("127.0.0.1", settings.broker.port)

    def _on_disconnect(self, *_: object) -> None:
        self.disconnects += 1

    def __enter__(self) -> Peer:
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 0
        self.client.connect(*self._address, keepalive=30, clean_start=True, properties=properties)
        self.client.loop_start()
        assert self._answer("connect") == 0
        return self

    def __exit__(self, *_: object) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def _answer(self, kind: str) -> int:
        while True:
            what, code = self._answers.get(timeout=WAIT_S)
            if what == kind:
                return code

    def subscribe(self, topic: str) -> None:
        self.client.subscribe(topic, qos=1)
        self._answer("sub")

    def publish(self, topic: str, payload: bytes = b"x") -> bool:
        """Whether the broker took it; if not, because it may not be."""
        self.client.publish(topic, payload, qos=1)
        code = self._answer("publish")
        assert code in (0, NOBODY_LISTENS, NOT_AUTHORISED)
        return code != NOT_AUTHORISED

    def next(self) -> tuple[str, bytes]:
        return self.messages.get(timeout=WAIT_S)


def issue(pki: Pki, name: str) -> TlsFiles:
    key, csr = new_csr()
    directory = Path(tempfile.mkdtemp(dir=pki.directory))
    files = TlsFiles(directory / "c.pem", directory / "c.key")
    files.certificate.write_text(pki.issue_device_certificate(csr, name, 1).certificate_pem)
    files.key.write_text(key)
    return files


def nobody(directory: Path) -> TlsFiles:
    return TlsFiles(directory / "none.pem", directory / "none.key")


# --- who may do what


def test_a_device_publishes_below_its_own_up_and_nowhere_else(settings: Settings, broker: Broker) -> None:
    files = Pki(settings.pki).cloud_client
    with Peer(settings, "_cloud", files=files) as cloud, Peer(settings, "edge-01") as device:
        cloud.subscribe("edgeward/v1/#")
        for topic in (
            "edgeward/v1/edge-02/up/status",
            "edgeward/v1/edge-01/down/refresh",
            "edgeward/v1/edge-01",
            "edgeward/v1/_cloud/up/x",
            "edgeward/v1/edge-01/up/x",
            "edgeward/v1/edge-01/up/status/x",
            "edgeward/v1/edge-01/up/response",
            "edgeward/v1/edge-01/up/response/7/x",
            "elsewhere/edge-01/up/status",
        ):
            assert not device.publish(topic), topic
        assert device.publish("edgeward/v1/edge-01/up/event", b"mine")
        assert cloud.next() == ("edgeward/v1/edge-01/up/event", b"mine"), "and nothing before it"
        for topic in (*(topics.up("edge-01", kind) for kind in topics.UP), topics.response("edge-01", 7)):
            assert device.publish(topic), topic
            assert cloud.next()[0] == topic


def test_a_device_hears_its_own_down_and_nothing_else(settings: Settings, broker: Broker) -> None:
    files = Pki(settings.pki).cloud_client
    with Peer(settings, "_cloud", files=files) as cloud, Peer(settings, "edge-01") as device:
        device.subscribe("#")  # Mosquitto 2.0 grants it, and delivers only what may be read
        device.subscribe("edgeward/v1/edge-02/#")
        for topic in ("edgeward/v1/edge-02/down/refresh", "edgeward/v1/edge-02/up/status", "edgeward/v1/x"):
            assert cloud.publish(topic)
        assert cloud.publish("edgeward/v1/edge-01/down/refresh", b"look")
        assert device.next() == ("edgeward/v1/edge-01/down/refresh", b"look")


def test_a_viewer_reads_and_never_writes(settings: Settings, broker: Broker) -> None:
    with Peer(settings, "_viewer-grafana") as viewer, Peer(settings, "edge-01") as device:
        viewer.subscribe("edgeward/v1/+/up/#")
        for topic in (
            "edgeward/v1/edge-01/up/status",
            "edgeward/v1/edge-01/down/refresh",
            "edgeward/v1/_viewer-grafana/up/status",
        ):
            assert not viewer.publish(topic)
        assert device.publish("edgeward/v1/edge-01/up/metrics", b"{}")
        assert viewer.next() == ("edgeward/v1/edge-01/up/metrics", b"{}")


def test_a_viewer_that_nobody_listed_reads_nothing(settings: Settings, broker: Broker) -> None:
    with Peer(settings, "_viewer-new") as viewer, Peer(settings, "edge-01") as device:
        viewer.subscribe("edgeward/v1/+/up/#")
        device.publish("edgeward/v1/edge-01/up/metrics", b"before")
        broker.apply(["_viewer-grafana", "_viewer-new"], [])

        def heard() -> bool:
            device.publish("edgeward/v1/edge-01/up/metrics", b"after")
            return not viewer.messages.empty()

        eventually(heard, "the new list to hold")
        assert viewer.next()[1] == b"after"


def test_nobody_connects_as_another(settings: Settings, broker: Broker) -> None:
    with Peer(settings, "edge-02") as victim, Peer(settings, "edge-01", client_id="edge-02") as thief:
        assert not thief.publish("edgeward/v1/edge-02/up/status")
        assert thief.publish("edgeward/v1/edge-01/up/status")
        assert victim.publish("edgeward/v1/edge-02/up/status")
        assert victim.disconnects == 0, "another certificate with its client id did not kick it off"
        with Peer(settings, "edge-02") as second:
            assert second.publish("edgeward/v1/edge-02/up/status")
            eventually(lambda: victim.disconnects > 0, "the same certificate to take over")


def test_no_certificate_of_ours_no_connection(settings: Settings, broker: Broker, tmp_path: Path) -> None:
    stranger = issue(Pki.create(tmp_path / "other", ["x"]), "edge-01")
    server = Pki(settings.pki).server
    for files in (nobody(tmp_path), stranger, server):
        with pytest.raises((ssl.SSLError, OSError, queue.Empty)):
            refused(Peer(settings, "edge-01", files=files))


def refused(peer: Peer) -> None:
    """Raises once the broker has hung up. In TLS 1.3 the client learns of it only after its handshake."""
    peer.client.connect(*peer._address, keepalive=30)
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if peer.client.loop(timeout=0.1) != paho.MQTT_ERR_SUCCESS:
            raise ConnectionRefusedError
        assert not peer.client.is_connected()
    raise AssertionError("neither taken nor refused")


def test_a_revoked_device_is_cut_off(settings: Settings, broker: Broker) -> None:
    pki = Pki(settings.pki)
    key, csr = new_csr()
    issued = pki.issue_device_certificate(csr, "edge-09", 1)
    files = issue(pki, "edge-09")
    files.certificate.write_text(issued.certificate_pem)
    files.key.write_text(key)
    with Peer(settings, "_cloud", files=pki.cloud_client) as cloud:
        cloud.subscribe("edgeward/v1/#")
        with Peer(settings, "edge-09", files=files) as device:
            assert device.publish("edgeward/v1/edge-09/up/status", b"before")
            assert cloud.next()[1] == b"before"
            pki.write_crl([issued.serial])
            broker.apply(["_viewer-grafana"], ["edge-09"])
            topic = "edgeward/v1/edge-09/up/status"
            eventually(lambda: not device.publish(topic, b"after"), "the ACL to hold")
        with pytest.raises((ssl.SSLError, OSError)):
            refused(Peer(settings, "edge-09", files=files))
        with Peer(settings, "edge-01") as other:
            assert other.publish("edgeward/v1/edge-01/up/status", b"other")
    pki.write_crl([])
    broker.apply(["_viewer-grafana"], [])


def test_a_message_beyond_the_bound_is_refused(settings: Settings, broker: Broker) -> None:
    with Peer(settings, "edge-01") as device:
        device.client.publish("edgeward/v1/edge-01/up/event", b"x" * (module.MAX_PACKET_BYTES + 1), qos=1)
        eventually(lambda: device.disconnects > 0, "the broker to hang up")


def test_all_that_devices_retain_is_bounded(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device may choose the numbers of its answers: the bound of the whole broker ends that."""
    if shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        missing("mosquitto")
    monkeypatch.setattr(module, "MEMORY_BYTES", 8 << 20)
    broker = Broker(settings)
    broker.start()
    try:
        with Peer(settings, "edge-01") as device:
            for n in range(1, 200):
                topic = topics.response("edge-01", n)
                device.client.publish(topic, b"x" * module.MAX_PAYLOAD_BYTES, qos=1, retain=True)
            eventually(lambda: device.disconnects > 0, "the broker to hang up")
        assert broker.alive
    finally:
        broker.stop()
        (settings.mosquitto / "mosquitto.db").unlink(missing_ok=True)


# --- the child


def test_a_broker_that_dies_is_started_again(settings: Settings, broker: Broker) -> None:
    first = broker.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    eventually(lambda: broker.alive and broker.pid != first, "another Mosquitto")

    def connects() -> bool:
        with contextlib.suppress(OSError), Peer(settings, "edge-01") as device:
            return device.publish("edgeward/v1/edge-01/up/status")
        return False

    eventually(connects, "the new one to take us")


def test_new_lists_do_not_end_a_broker_that_is_still_starting(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it has a handler for SIGHUP, the signal is its end. Here it takes a second to get there."""
    real = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")
    if real is None:
        missing("mosquitto")
    slow = tmp_path / "mosquitto"
    slow.write_text(f'#!/bin/sh\n[ "$1" = -h ] || sleep 1\nexec {real} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    broker = Broker(settings)
    broker.start()
    try:
        first = broker.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        eventually(lambda: broker.alive and broker.pid != first, "another Mosquitto")
        second = broker.pid
        broker.apply([], ["edge-01"])
        with Peer(settings, "edge-01") as device:
            topic = "edgeward/v1/edge-01/up/status"
            eventually(lambda: not device.publish(topic), "the ACL to hold")
        assert broker.pid == second
    finally:
        broker.stop()


def test_a_broker_that_cannot_be_started_is_tried_again_and_says_so(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when there are no processes left: the thread that watches over it must not end of that."""
    assert (broker.alive, broker.fault) == (True, "")
    first, configured = broker.pid, broker._program
    assert first is not None
    assert configured is not None
    broker._program = replace(configured, path="/nowhere/mosquitto")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")  # without setpriv, which would start
        os.kill(first, signal.SIGKILL)
        eventually(lambda: "cannot be started" in broker.fault, "the fault")
    broker._program = configured
    eventually(lambda: broker.alive, "another Mosquitto")
    assert broker.fault == ""


def test_stop_is_final_and_may_be_called_again(settings: Settings, broker: Broker) -> None:
    assert broker.alive
    broker.stop()
    broker.stop()
    assert not broker.alive
    assert broker.pid is None
    with pytest.raises(OSError):  # refused, reset: the kernel's choice
        socket.create_connection(("127.0.0.1", settings.broker.port), timeout=1)
    broker.start()
    assert broker.alive


def test_the_broker_keeps_retained_messages_over_a_restart(settings: Settings, broker: Broker) -> None:
    with Peer(settings, "edge-01") as device:
        device.client.publish("edgeward/v1/edge-01/up/birth", b"{}", qos=1, retain=True)
        assert device.publish("edgeward/v1/edge-01/up/event")
    broker.stop()
    broker.start(viewers=["_viewer-grafana"])
    with Peer(settings, "_viewer-grafana") as viewer:
        viewer.subscribe("edgeward/v1/+/up/birth")
        assert viewer.next() == ("edgeward/v1/edge-01/up/birth", b"{}")


def test_a_port_that_is_taken_is_named(settings: Settings, broker: Broker) -> None:
    with pytest.raises(Unavailable, match=f"127.0.0.1:{settings.broker.port}: it is taken"):
        Broker(settings).start()


def test_an_address_that_is_not_ours_is_named(tmp_path: Path) -> None:
    settings = make_cloud(tmp_path / "cloud")
    elsewhere = settings.broker.model_copy(update={"bind": "192.0.2.1"})
    with pytest.raises(Unavailable, match=r"192\.0\.2\.1"):
        Broker(settings.model_copy(update={"broker": elsewhere})).start()


def test_a_broken_start_says_what_mosquitto_said(tmp_path: Path) -> None:
    settings = make_cloud(tmp_path / "cloud")
    Pki(settings.pki).broker.key.write_text("no key")
    with pytest.raises(Unavailable, match=r"did not start: .*key"):
        Broker(settings).start()


def test_no_mosquitto_says_how_to_get_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module, "_SBIN", str(tmp_path))
    with pytest.raises(Unavailable, match="is missing") as caught:
        Broker(settings).start()
    assert "apt install mosquitto" in caught.value.next_step


@pytest.mark.parametrize(
    ("says", "error"), [("mosquitto version 1.6.9", "2.0 or newer"), ("hello", "which version")]
)
def test_an_old_mosquitto_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, error: str
) -> None:
    program = tmp_path / "mosquitto"
    program.write_text(f"#!/bin/sh\necho '{says}'\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(Rejected, match=error):
        module.find_program()


def test_the_broker_dies_with_a_cloud_that_is_killed(settings: Settings) -> None:
    if shutil.which("setpriv") is None:
        missing("setpriv")
    code = (
        "import sys, time\n"
        "from edgeward_cloud.broker import Broker\n"
        "from edgeward_cloud.settings import Settings\n"
        "broker = Broker(Settings.load(sys.argv[1])); broker.start(); print(broker.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(settings.dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as cloud:
        assert cloud.stdout is not None
        pid = int(cloud.stdout.readline())
        cloud.kill()

    def gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    eventually(gone, "Mosquitto to end")


def test_an_ordinary_user_can_run_it() -> None:
    """As root Mosquitto is told to stay root; anyone else runs it as they are."""
    if os.geteuid() != 0:
        pytest.skip("run by an ordinary user, as all of these tests are here")
    if shutil.which("setpriv") is None:
        missing("setpriv")
    with tempfile.TemporaryDirectory(prefix="edgeward-") as name:
        home = Path(name)
        settings = make_cloud(home / "cloud")
        for file, text in render(settings).items():
            (settings.mosquitto / file).write_text(text)
        for path in (home, *home.rglob("*")):
            os.chown(path, 65534, 65534)
        program = module.find_program().path
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", program]
        child = subprocess.Popen([*command, "-c", str(settings.mosquitto / "mosquitto.conf")])
        try:
            eventually(lambda: module._accepts("127.0.0.1", settings.broker.port), "Mosquitto as nobody")
            assert Path(f"/proc/{child.pid}").stat().st_uid == 65534
            with Peer(settings, "edge-01") as device:
                assert device.publish("edgeward/v1/edge-01/up/status")
        finally:
            child.terminate()
            child.wait(60)


# --- the files


def test_it_listens_on_loopback_unless_told_otherwise(tmp_path: Path) -> None:
    text = render(Settings(dir=tmp_path))["mosquitto.conf"]
    assert "listener 8883 127.0.0.1\n" in text
    told = Settings(dir=tmp_path, broker=BrokerSettings(bind="::", port=9))
    assert "listener 9 ::\n" in render(told)["mosquitto.conf"]
    for line in (
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",
        "allow_anonymous false",
        f"memory_limit {1 << 30}",
    ):
        assert f"{line}\n" in text


def test_newer_versions_get_their_acl_through_the_plugin(tmp_path: Path) -> None:
    settings = Settings(dir=tmp_path)
    old, new = render(settings), render(settings, acl_plugin=Path("/usr/lib/mosquitto_acl_file.so"))
    assert f"acl_file {tmp_path}/mosquitto/acl\n" in old["mosquitto.conf"]
    assert "plugin" not in old["mosquitto.conf"]
    assert "global_plugin /usr/lib/mosquitto_acl_file.so\n" in new["mosquitto.conf"]
    assert f"plugin_opt_acl_file {tmp_path}/mosquitto/acl\n" in new["mosquitto.conf"]
    assert not re.search("^acl_file", new["mosquitto.conf"], re.MULTILINE)
    assert old["acl"] == new["acl"]


def test_the_plugin_is_found_beside_its_program(tmp_path: Path) -> None:
    program = tmp_path / "usr/sbin/mosquitto"
    plugin = tmp_path / "usr/lib/x86_64-linux-gnu/mosquitto_acl_file.so"
    for path in (program, plugin):
        path.parent.mkdir(parents=True)
    program.write_text("")
    assert module._acl_plugin(program) is None
    plugin.write_text("")
    assert module._acl_plugin(program) == plugin


@given(name=st.text(max_size=70) | st.from_regex(DEVICE_PATTERN))
def test_no_name_writes_a_line_of_its_own(name: str) -> None:
    settings = Settings(dir=Path("/nowhere"))
    fine = re.fullmatch(DEVICE_PATTERN, name) is not None
    for lists in ({"revoked": [name]}, {"viewers": [f"_viewer-{name}"]}, {"revoked": [f"_viewer-{name}"]}):
        if fine:
            lines = render(settings, **lists)["acl"].splitlines()
            assert sum(line.startswith("user ") for line in lines) == 2
        else:
            with pytest.raises(Rejected):
                render(settings, **lists)
    with pytest.raises(Rejected):
        render(settings, viewers=[name])
