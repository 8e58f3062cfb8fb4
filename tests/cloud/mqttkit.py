"""A device's end of MQTT with a real certificate, and a broker to talk to."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from conftest import missing
from edgeward_cloud.broker import Broker
from edgeward_cloud.pki import Pki, new_csr
from edgeward_cloud.settings import Settings
from edgeward_wire import topics
from edgeward_wire.ack import Ack
from edgeward_wire.command import CommandResponse
from edgeward_wire.document import Document

PATIENCE_S = 60.0


def need_mosquitto() -> None:
    if shutil.which("mosquitto") is None and shutil.which("mosquitto", path="/usr/sbin") is None:
        missing("mosquitto")


@contextmanager
def broker_running(settings: Settings) -> Iterator[Broker]:
    need_mosquitto()
    broker = Broker(settings)
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


async def until(condition: Callable[[], Awaitable[Any]] | Callable[[], Any], what: str) -> Any:
    """Wait until a condition holds; what it returned."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(f"waited in vain for {what}")


@dataclass
class MqttDevice:
    """Connects as itself and keeps what it is told."""

    settings: Settings
    id: str
    home: Path
    certificate_pem: str = ""
    key_pem: str = ""
    acks: list[Ack] = field(default_factory=list)
    refreshes: list[bytes] = field(default_factory=list)
    commands: list[paho.MQTTMessage] = field(default_factory=list)

    def __post_init__(self) -> None:
        pki = Pki(self.settings.pki)
        if not self.certificate_pem:
            self.key_pem, csr = new_csr()
            self.certificate_pem = pki.issue_device_certificate(csr, self.id, 1).certificate_pem
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "key.pem").write_text(self.key_pem)
        (self.home / "certificate.pem").write_text(self.certificate_pem)
        self._up = threading.Event()
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id=self.id, protocol=paho.MQTTv5)
        tls = ssl.create_default_context(cafile=str(pki.server_ca))
        tls.load_cert_chain(self.home / "certificate.pem", self.home / "key.pem")
        client.tls_set_context(tls)
        client.on_connect = lambda c, *_: c.subscribe(topics.all_down(self.id), qos=1)
        client.on_subscribe = lambda *_: self._up.set()
        client.on_message = self._on_message
        client.reconnect_delay_set(1, 1)
        self.client = client

    def _on_message(self, _: Any, __: Any, message: paho.MQTTMessage) -> None:
        if topics.parse_topic(message.topic).kind == "ack":
            self.acks.append(Ack.model_validate_json(message.payload))
        elif topics.parse_topic(message.topic).kind == topics.COMMAND:
            self.commands.append(message)
        else:
            self.refreshes.append(bytes(message.payload))

    def __enter__(self) -> MqttDevice:
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 120
        address = self.settings.broker_connect
        self.client.connect(address.host, address.port, 30, properties=properties)
        self.client.loop_start()
        assert self._up.wait(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def send(self, kind: topics.Up, document: Document | bytes) -> None:
        """Publish, and wait until the broker has it."""
        raw = document if isinstance(document, bytes) else document.to_bytes()
        retained = kind in topics.RETAINED
        info = self.client.publish(topics.up(self.id, kind), raw, qos=topics.qos(kind), retain=retained)
        info.wait_for_publish(PATIENCE_S)
        assert info.is_published()

    def answer(self, response: CommandResponse, of: str = "") -> None:
        """Answer a command, maybe one `of` another device."""
        topic = topics.response(of or self.id, response.n)
        self.client.publish(topic, response.to_bytes(), qos=1).wait_for_publish(PATIENCE_S)

    def acked(self, stream: str = "telemetry") -> set[int]:
        """The seqs that the cloud says it has stored."""
        return {seq for ack in self.acks if ack.stream == stream for seq in ack.seqs}
