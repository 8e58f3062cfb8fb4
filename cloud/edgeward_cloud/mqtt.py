"""The cloud's end of MQTT. The only importer of paho in the cloud.

Invariants: a message of QoS 1 is acknowledged to the broker only when `acknowledge` says so, and only on
the connection that it came by; so what was not stored is delivered again. The receive maximum bounds how many
are under way. The session outlives the cloud (clean start off, a week's expiry): what devices send while
the cloud is away waits at the broker. Each connection has a client of its own, because paho's state after
a broken one cannot be trusted. Callbacks of paho's thread only put things into the inbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edgeward_cloud.pki import CLOUD, Pki
from edgeward_wire import topics
from edgeward_wire.command import Command
from edgeward_wire.document import Document
from edgeward_wire.enrolment import BrokerAddress

RECEIVE_MAXIMUM = 500
SESSION_EXPIRY_S = 7 * 86_400
DOWN_EXPIRY_S = 300
KEEPALIVE_S = 30
CONNECT_TIMEOUT_S = 10.0
MAX_IN_FLIGHT = 20
DELIVERY_TIMEOUT_S = 20.0
BACKOFF_S = (0.5, 30.0)
STEADY_S = 30.0
"""A connection that lasted this long was a good one: the next attempt comes soon."""

_SURE_LIMIT = 4 * RECEIVE_MAXIMUM
_LOSSY_LIMIT = 2000
_SUBSCRIBED: tuple[topics.Up, ...] = ("status", "birth", "reported", "telemetry", "event", "result")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Message:
    """What came from a device, or `SESSION_LOST`'s empty topic."""

    topic: str
    payload: bytes
    retained: bool = False
    mid: int = 0
    qos: int = 0
    connection: _Connection | None = None


SESSION_LOST = Message("", b"")
"""The broker knew nothing of us: only retained messages that follow are true."""


class Inbox:
    """What paho's thread hands to the event loop: all of QoS 1, and the newest of QoS 0."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._sure: deque[Message] = deque()
        self._lossy: deque[Message] = deque(maxlen=_LOSSY_LIMIT)
        self._filled = asyncio.Event()

    def put(self, message: Message) -> bool:
        """Any thread. False: it is full, because the broker ignores our receive maximum."""
        with self._lock:
            if len(self._sure) >= _SURE_LIMIT:
                return False
            wake = not self._sure and not self._lossy
            (self._lossy if message.topic and message.qos == 0 else self._sure).append(message)
        if wake:
            self._loop.call_soon_threadsafe(self._filled.set)
        return True

    async def wait(self) -> None:
        """Until there is something."""
        await self._filled.wait()

    def wake(self) -> None:
        """End a `wait` although there is nothing."""
        self._filled.set()

    def take(self, limit: int) -> list[Message]:
        """Everything that is there, at most `limit` of QoS 1, in order of arrival within each QoS."""
        with self._lock:
            taken = [self._sure.popleft() for _ in range(min(limit, len(self._sure)))]
            taken += self._lossy
            self._lossy.clear()
            if not self._sure:
                self._filled.clear()
        return taken


class Link:
    """Keeps one connection to the broker for as long as `run` runs."""

    def __init__(self, address: BrokerAddress, pki: Pki, inbox: Inbox, client_id: str = CLOUD) -> None:
        self._address = address
        self._client_id = client_id
        self._inbox = inbox
        self._tls = ssl.create_default_context(cafile=str(pki.server_ca))
        self._tls.load_cert_chain(str(pki.cloud_client.certificate), str(pki.cloud_client.key))
        self._current: _Connection | None = None
        self._complained = False

    @property
    def connected(self) -> bool:
        """Whether the broker has taken us and our subscriptions."""
        return self._current is not None and self._current.up.is_set()

    async def until_connected(self, timeout_s: float) -> bool:
        """Wait for it; False when it took too long."""
        end = time.monotonic() + timeout_s
        while not self.connected and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return self.connected

    async def run(self) -> None:
        """Connect, and connect again, until cancelled."""
        low, high = BACKOFF_S
        failures = 0
        while True:
            connection = _Connection(self._client_id, self._address, self._tls, self._inbox)
            self._current = connection
            try:
                reason = await connection.serve()
            finally:
                self._current = None
                connection.close()
            failures = 0 if connection.lasted_s >= STEADY_S else failures + 1
            self._say_away(connection, reason)
            # Full jitter, also after a kick past CONNACK: a broker that restarts meets no herd.
            await asyncio.sleep(random.uniform(0, min(high, low * 2**failures)))

    def _say_away(self, connection: _Connection, reason: str) -> None:
        if connection.lasted_s or not self._complained:
            where = f"{self._address.host}:{self._address.port}"
            _log.warning("The broker at %s is away: %s. Trying again.", where, reason)
        self._complained = True

    async def deliver(self, downs: Sequence[tuple[str, topics.Told, Document]]) -> bool:
        """Publish to devices and wait until the broker has them all; False when it did not take them."""
        connection = self._current
        if not downs:
            return True
        return connection is not None and await connection.deliver(downs)

    @staticmethod
    def acknowledge(messages: Iterable[Message]) -> None:
        """Tell the broker that these are stored. Those of a connection that is gone will come again."""
        for message in messages:
            if message.connection is not None and message.qos:
                message.connection.acknowledge(message.mid)


class _Connection:
    """One connection, from CONNECT to its end."""

    def __init__(self, client_id: str, address: BrokerAddress, tls: ssl.SSLContext, inbox: Inbox) -> None:
        self._client_id = client_id
        self._address = address
        self._inbox = inbox
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._reason = "its thread ended"
        self._since: float | None = None
        self.up = threading.Event()
        self._client = client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=paho.MQTTv5,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.tls_set_context(tls)
        # paho ignores the broker's receive maximum, and is thrown out for it: stay below any default.
        client.max_inflight_messages_set(MAX_IN_FLIGHT)
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message

    @property
    def lasted_s(self) -> float:
        """Seconds since CONNACK."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    async def serve(self) -> str:
        """Connect and stay until the connection ends; why it did."""
        try:
            await asyncio.to_thread(self._connect)
        except (OSError, ValueError) as error:
            return str(error) or type(error).__name__
        self._client.loop_start()
        while not self._ended.is_set() and self._thread_runs():
            # paho's thread can die without telling: look at it.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ended.wait(), timeout=5)
        return self._reason

    def _connect(self) -> None:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = SESSION_EXPIRY_S
        properties.ReceiveMaximum = RECEIVE_MAXIMUM
        properties.MaximumPacketSize = topics.MAX_PAYLOAD_BYTES + 4096
        self._client.connect(
            self._address.host,
            self._address.port,
            keepalive=KEEPALIVE_S,
            clean_start=False,
            properties=properties,
        )

    def _thread_runs(self) -> bool:
        name = f"paho-mqtt-client-{self._client_id}"
        return any(thread.name == name for thread in threading.enumerate())

    def close(self) -> None:
        """End it; paho's thread is gone afterwards."""
        self.up.clear()
        self._client.disconnect()
        self._client.loop_stop()

    def acknowledge(self, mid: int) -> None:
        """PUBACK one message, if the connection still stands."""
        if self.up.is_set():
            self._client.ack(mid, 1)

    async def deliver(self, downs: Sequence[tuple[str, topics.Told, Document]]) -> bool:
        """Publish, and wait until the broker has them. A broker that does not take them is left."""
        if not self.up.is_set():
            return False
        delivered = await asyncio.to_thread(self._deliver, downs)
        if not delivered:
            self._client.disconnect()
        return delivered

    def _deliver(self, downs: Sequence[tuple[str, topics.Told, Document]]) -> bool:
        end = time.monotonic() + DELIVERY_TIMEOUT_S
        sent = [self._publish(device, kind, document) for device, kind, document in downs]
        for info in sent:
            if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
                return False
            while not info.is_published():
                if not self.up.is_set() or time.monotonic() > end:
                    return False
                info.wait_for_publish(0.2)
        return True

    def _publish(self, device: str, kind: topics.Told, document: Document) -> paho.MQTTMessageInfo:
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.MessageExpiryInterval = DOWN_EXPIRY_S
        if isinstance(document, Command):
            topic = topics.command(device, document.n)
            properties.MessageExpiryInterval = max(1, round(document.expires_at - document.issued_at))
            properties.ResponseTopic = topics.response(device, document.n)
            properties.CorrelationData = topics.correlation(document.boot_id, document.n)
        else:
            assert kind != topics.COMMAND
            topic = topics.down(device, kind)
        return self._client.publish(topic, document.to_bytes(), qos=1, properties=properties)

    # --- paho's thread from here on: nothing may raise

    def _on_connect(
        self,
        client: paho.Client,
        _: Any,
        flags: paho.ConnectFlags,
        code: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if code.is_failure:
            self._reason = f"it refused us ({code})"
            client.disconnect()
            return
        if not flags.session_present:
            self._inbox.put(SESSION_LOST)
        wanted = [(topics.all_up(kind), SubscribeOptions(qos=topics.qos(kind))) for kind in _SUBSCRIBED]
        # As published: to see which are retained, and not our own that clear them.
        answers = SubscribeOptions(qos=1, noLocal=True, retainAsPublished=True)
        client.subscribe([*wanted, (topics.all_responses(), answers)])

    def _on_subscribe(
        self, client: paho.Client, _: Any, __: int, codes: list[ReasonCode], ___: Properties | None
    ) -> None:
        refused = [str(code) for code in codes if code.is_failure]
        if refused:
            self._reason = f"it refused our subscriptions ({refused[0]})"
            client.disconnect()
            return
        self._since = time.monotonic()
        self.up.set()
        _log.info("Connected to the broker at %s:%d.", self._address.host, self._address.port)

    def _on_disconnect(
        self, _: paho.Client, __: Any, ___: paho.DisconnectFlags, code: ReasonCode, ____: Properties | None
    ) -> None:
        if self.up.is_set() or code.is_failure:
            self._reason = str(code)
        self.up.clear()
        self._loop.call_soon_threadsafe(self._ended.set)

    def _on_message(self, client: paho.Client, _: Any, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = "\ufffd"
        if message.retain and message.payload and topics.is_response(topic):
            # No agent retains one, and the broker would keep as many as a device has numbers.
            client.publish(topic, b"", qos=0, retain=True)
        taken = self._inbox.put(
            Message(topic, bytes(message.payload), message.retain, message.mid, message.qos, self)
        )
        if not taken:
            self._reason = "it sends more than we said that we take"
            client.disconnect()
