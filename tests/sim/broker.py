"""A real Mosquitto on loopback with mTLS and ACLs as the cloud generates them, and a cloud to talk to."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from ports import free_port

from edgeward_wire.ack import Ack, Stream
from edgeward_wire.document import Document
from edgeward_wire.topics import down, parse_topic
from sim.pki import Authority, key_pem, new_key

_ACL = """\
pattern write edgeward/v1/%u/up/#
pattern read edgeward/v1/%u/down/#
user _cloud
topic readwrite edgeward/v1/#
"""


def eventually(condition: Callable[[], object], within_s: float = 60.0) -> None:
    """Wait until it holds."""
    until = monotonic() + within_s
    pause = threading.Event()
    while not condition():
        assert monotonic() < until, "it did not come to hold"
        pause.wait(0.01)


def find_mosquitto() -> str | None:
    """Its path; Debian keeps it out of a user's PATH."""
    return shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class Broker:
    """Mosquitto in `directory`. `start` again after `stop` is a restart: same port, same retained state."""

    def __init__(
        self, directory: Path, servers: Authority, devices: Authority, *, settings: tuple[str, ...] = ()
    ) -> None:
        directory.mkdir()
        self.port = free_port()
        certificate, key = servers.write_server(directory)
        (directory / "devices.pem").write_text(devices.pem)
        (directory / "acl").write_text(_ACL)
        (directory / "acl").chmod(0o700)
        lines = (
            *([] if os.geteuid() else ["user root"]),
            f"listener {self.port} 127.0.0.1",
            f"cafile {directory}/devices.pem",
            f"certfile {certificate}",
            f"keyfile {key}",
            "require_certificate true",
            "use_identity_as_username true",
            "use_username_as_clientid true",
            "allow_anonymous false",
            f"acl_file {directory}/acl",
            "persistence true",
            f"persistence_location {directory}/",
            *settings,
        )
        self._config = directory / "mosquitto.conf"
        self._config.write_text("\n".join(lines) + "\n")
        self._log = directory / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it listens."""
        program = find_mosquitto()
        assert program is not None
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([program, "-v", "-c", str(self._config)], stdout=log, stderr=log)
        eventually(self._listens)

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def stop(self) -> None:
        """Stop it in order: it keeps what is retained."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(60)
            self._process = None


class CloudClient:
    """The cloud's side of MQTT: hears all devices, and acknowledges when it is told to."""

    def __init__(
        self, directory: Path, broker_port: int, servers: Authority, devices: Authority, *, acks: bool
    ) -> None:
        directory.mkdir()
        key = new_key()
        (directory / "key.pem").write_bytes(key_pem(key))
        (directory / "certificate.pem").write_text(devices.issue("_cloud", key.public_key(), server=False))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=servers.pem)
        context.load_cert_chain(directory / "certificate.pem", directory / "key.pem")
        self.acks = acks
        self.heard: list[MQTTMessage] = []
        self._lock = threading.Lock()
        self._subscribed = threading.Event()
        self._client = Client(
            CallbackAPIVersion.VERSION2, client_id="_cloud", protocol=MQTTProtocolVersion.MQTTv5
        )
        self._client.reconnect_delay_set(1, 1)
        self._client.tls_set_context(context)
        self._client.on_connect = lambda client, *_: client.subscribe("edgeward/v1/+/up/#", qos=1)
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = lambda client, data, message: self._hear(message)
        self._client.connect("127.0.0.1", broker_port)
        self._client.loop_start()
        assert self._subscribed.wait(60)

    def _hear(self, message: MQTTMessage) -> None:
        with self._lock:
            self.heard.append(message)
        topic = parse_topic(message.topic)
        if self.acks and topic.kind in ("telemetry", "event"):
            self.ack(topic.device, message)

    def ack(self, device: str, message: MQTTMessage) -> None:
        """Say that one is stored."""
        from json import loads

        document = loads(message.payload)
        kind: Stream = "event" if "event" in message.topic else "telemetry"
        self.tell(
            device, "ack", Ack(boot_id=document["boot_id"], stream=kind, seqs=(document["seq"],)).to_bytes()
        )

    def tell(self, device: str, kind: str, payload: bytes | Document) -> None:
        """Publish on a device's `down` topic."""
        data = payload.to_bytes() if isinstance(payload, Document) else payload
        self._client.publish(down(device, kind), data, qos=1)  # type: ignore[arg-type]

    def of(self, kind: str) -> list[bytes]:
        """The payloads of one kind, in the order in which they came."""
        with self._lock:
            return [bytes(m.payload) for m in self.heard if m.topic.endswith(f"/up/{kind}")]

    def messages(self, kind: str) -> list[MQTTMessage]:
        """The messages of one kind."""
        with self._lock:
            return [m for m in self.heard if m.topic.endswith(f"/up/{kind}")]

    def close(self) -> None:
        """Disconnect and join its thread."""
        self._client.disconnect()
        self._client.loop_stop()


class KickingBroker:
    """Speaks just enough MQTT 5 over mTLS to accept, confirm, and kick whoever publishes a poisoned payload.

    Real brokers do this to packets that they cannot bear; which ones is their secret. While `reads` is not
    set it takes nothing off the network, as at the end of a slow uplink.
    """

    def __init__(self, directory: Path, servers: Authority, poison: bytes) -> None:
        directory.mkdir()
        self._poison = poison
        self.arrived: list[bytes] = []
        self.connects = 0
        self.reads = threading.Event()
        self.reads.set()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*servers.write_server(directory))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        self._listener.settimeout(0.1)
        self.port = int(self._listener.getsockname()[1])
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        """Stop, and join its thread."""
        self._closing.set()
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                raw, _ = self._listener.accept()
            except TimeoutError:
                continue
            raw.settimeout(5)
            try:
                with self._context.wrap_socket(raw, server_side=True) as connection:
                    connection.settimeout(0.1)
                    self._talk(connection)
            except OSError:
                raw.close()

    def _talk(self, connection: ssl.SSLSocket) -> None:
        data = b""
        while not self._closing.is_set():
            if not self.reads.wait(0.1):
                continue
            try:
                came = connection.recv(65536)
            except TimeoutError:
                continue
            if not came:
                return
            data += came
            while (packet := _packet(data)) is not None:
                head, body, data = packet
                if not self._answer(connection, head, body):
                    return

    def _answer(self, connection: ssl.SSLSocket, head: int, body: bytes) -> bool:
        kind = head >> 4
        if kind == 1:
            self.connects += 1
            connection.sendall(b"\x20\x03\x00\x00\x00")
        elif kind == 8:
            connection.sendall(b"\x90\x04" + body[:2] + b"\x00\x01")
        elif kind == 12:
            connection.sendall(b"\xd0\x00")
        elif kind == 3:
            if self._poison in body:
                return False
            self.arrived.append(body)
            if head & 6:
                start = 2 + int.from_bytes(body[:2], "big")
                connection.sendall(b"\x40\x02" + body[start : start + 2])
        return kind != 14


def _packet(data: bytes) -> tuple[int, bytes, bytes] | None:
    """(first byte, body, rest) of the first whole packet."""
    length, shift = 0, 0
    for place, byte in enumerate(data[1:5], start=2):
        length |= (byte & 127) << shift
        shift += 7
        if not byte & 128:
            end = place + length
            return (data[0], data[place:end], data[end:]) if len(data) >= end else None
    return None
