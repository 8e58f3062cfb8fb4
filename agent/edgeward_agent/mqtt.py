"""The link to the broker. Only importer of paho.

Invariants: one thread owns the paho client, and each connection has a new one, so that paho keeps nothing
of ours: durability is the spool's. Reconnects wait with full jitter, also after a kick past CONNACK. No
callback raises into paho. What the broker would kick us for is not sent. MQTT is never authority: it only
says "look again".
"""

from __future__ import annotations

import logging
import random
import select
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any, Literal

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edgeward_agent.identity import Identity
from edgeward_agent.segments import Key, Outgoing
from edgeward_agent.spool import Spool
from edgeward_wire.ack import Ack, Refresh
from edgeward_wire.command import CommandResponse
from edgeward_wire.document import parse
from edgeward_wire.errors import Rejected
from edgeward_wire.status import Status
from edgeward_wire.topics import (
    COMMAND,
    MAX_PAYLOAD_BYTES,
    RESPONSE,
    RETAINED,
    Up,
    all_down,
    correlation,
    parse_topic,
    qos,
    response,
    up,
)

Direct = Literal["birth", "reported", "metrics", "result"]

IN_FLIGHT = 64
"""Spooled messages under way at most, until the cloud has stored them."""

STRIKES = 3
"""A message that was on its way at so many disconnects is set aside."""

RESEND_S = 60.0
"""When nothing was acknowledged for so long, all that is under way is sent again; the wait then doubles."""

_RESEND_MOST_S = 960.0

_KEEPALIVE_S = 30
_SESSION_EXPIRY_S = 120
_WILL_DELAY_S = 30
_CONNECT_S = 10.0
_STEADY_S = 30.0
"""A connection that lasted so long begins the backoff anew."""

_BACKOFF_FIRST_S = 1.0
_BACKOFF_MOST_S = 60.0
_QUEUE_MOST = 100
_TURN_S = 5.0
_OVERHEAD = 128
"""Bytes of a PUBLISH beside topic and payload, at most."""

_log = logging.getLogger(__name__)


def backoff(attempt: int, draw: Callable[[float, float], float] = random.uniform) -> float:
    """Seconds to wait before reconnect number `attempt` (from 0): full jitter below a doubling bound."""
    return draw(0.0, min(_BACKOFF_MOST_S, _BACKOFF_FIRST_S * 2 ** min(attempt, 16)))


class Link:
    """The device's connection to the broker. Publishes `status` by itself (online, will, offline).

    The hooks are called on the link's thread and must return at once: put something on a queue.
    `on_connected` comes after each connect: publish `birth` and `reported` again. `failed` gets what a hook
    or the link itself raised that is a bug: stop the daemon.
    """

    def __init__(
        self,
        identity: Identity,
        boot_id: str,
        spool: Spool,
        *,
        on_refresh: Callable[[Refresh], None],
        on_connected: Callable[[], None],
        failed: Callable[[BaseException], None],
        on_disconnected: Callable[[str], None] = lambda reason: None,
        on_command: Callable[[int, bytes], None] = lambda number, payload: None,
    ) -> None:
        self._identity = identity
        self._boot_id = boot_id
        self._spool = spool
        self.on_refresh = on_refresh
        self.on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._on_command = on_command
        self._failed = failed
        self._stopping = threading.Event()
        self._alarm = _Alarm()
        self._queue: deque[tuple[Direct, bytes] | CommandResponse] = deque(maxlen=_QUEUE_MOST)
        self._connected = False
        self._under_way: set[Key] = set()
        """Spooled messages that went out on this connection and are not stored yet."""
        self._strikes: dict[Key, int] = {}
        self._trouble = ""
        """Why there is no connection, once it has been told."""
        self._thread = threading.Thread(target=self._run, name="mqtt", daemon=True)

    def start(self) -> None:
        """Start the thread; it connects for as long as it takes."""
        self._thread.start()

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us and is still there."""
        return self._connected

    def publish(self, kind: Direct, payload: bytes) -> bool:
        """Publish now, from any thread; False when not connected, or when it is too long (logged)."""
        if len(payload) > MAX_PAYLOAD_BYTES:
            _log.error("%s has %d bytes; at most %d are sent.", kind, len(payload), MAX_PAYLOAD_BYTES)
            return False
        if not self.connected:
            return False
        self._queue.append((kind, payload))
        self._alarm.ring()
        return True

    def respond(self, answer: CommandResponse) -> bool:
        """Answer a command now, from any thread; False when not connected."""
        if not self.connected:
            return False
        self._queue.append(answer)
        self._alarm.ring()
        return True

    def wake(self) -> None:
        """Something was appended to the spool: send it now. From any thread."""
        self._alarm.ring()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Say `offline`, disconnect, join the thread, and leave the rest to the spool."""
        self._stopping.set()
        self._alarm.ring()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._alarm.close()

    # --- the link's thread

    def _run(self) -> None:
        attempt = 0
        try:
            while not self._stopping.is_set():
                began = monotonic()
                self._tell(self._once())
                attempt = 0 if monotonic() - began >= _STEADY_S else attempt + 1
                self._stopping.wait(backoff(attempt))
        except Exception as error:  # noqa: BLE001  # this thread's supervisor: the daemon stops with it
            self._failed(error)

    def _once(self) -> str:
        """One connection from beginning to end; returns why it ended."""
        connection = _Connection(self._identity, self._boot_id, self._receive, self._confirmed)
        try:
            connection.open()
            self._serve(connection)
        except (OSError, Rejected) as error:  # ssl's errors are OSErrors
            return f"{connection.address}: {error}"
        finally:
            was_connected, self._connected = self._connected, False
            connection.close()
            self._under_way.clear()
            if was_connected:
                self._strike(connection)
                self._spool.on_disconnect()
        return f"{connection.address}: {connection.reason}"

    def _tell(self, reason: str) -> None:
        if reason == self._trouble or self._stopping.is_set():
            return
        self._trouble = reason
        _log.warning("No connection to the broker at %s.", reason)
        self._on_disconnected(reason)

    def _serve(self, connection: _Connection) -> None:
        patience = RESEND_S
        resend_at = monotonic() + patience
        while connection.turn(self._alarm, wait_s=min(_TURN_S, max(resend_at - monotonic(), 0.0))):
            if self._stopping.is_set():
                self._say_goodbye(connection)
                return
            if not connection.accepted:
                continue
            if not self._connected:
                self._greet(connection)
            while self._queue:
                connection.send(self._queue.popleft())
            if connection.take_news() or not self._under_way:
                patience = RESEND_S
                resend_at = monotonic() + patience
            elif monotonic() >= resend_at:
                self._spool.rewind()
                self._under_way.clear()
                patience = min(patience * 2, _RESEND_MOST_S)
                resend_at = monotonic() + patience
            self._pump(connection)

    def _greet(self, connection: _Connection) -> None:
        _log.info("Connected to the broker at %s.", connection.address)
        self._trouble = ""
        self._queue.clear()
        self._spool.on_connect()
        connection.subscribe(all_down(self._identity.device))
        connection.publish("status", Status(state="online", boot_id=self._boot_id).to_bytes())
        self._connected = True
        self.on_connected()

    def _say_goodbye(self, connection: _Connection) -> None:
        """`offline`, as the will would have said it; a matter of two seconds at most."""
        if connection.accepted:
            connection.publish("status", Status(state="offline", boot_id=self._boot_id).to_bytes())
            connection.disconnect(within_s=2.0)

    def _pump(self, connection: _Connection) -> None:
        """Send what the spool has, as far as the broker and the bound on flight allow.

        While some message is under suspicion, each goes alone, so that only the guilty one is struck again.
        """
        while True:
            room = min(IN_FLIGHT - len(self._under_way), connection.room())
            if self._strikes:
                room = min(room, 1 - connection.unconfirmed())
            if room <= 0:
                return
            batch = self._spool.next_batch(room)
            if not batch:
                if not connection.unconfirmed():
                    self._strikes.clear()  # those under suspicion are no longer in the spool
                return
            for message in batch:
                if connection.publish(message.stream, message.payload, message):
                    self._under_way.add(message.key)
                else:
                    self._spool.quarantine(message)

    def _strike(self, connection: _Connection) -> None:
        """Remember what was on its way when the connection ended, unless we ended it."""
        if self._stopping.is_set():
            return
        for message in connection.on_the_way():
            strikes = self._strikes.get(message.key, 0) + 1
            self._strikes[message.key] = strikes
            if strikes >= STRIKES:
                self._spool.quarantine(message)
                del self._strikes[message.key]

    def _confirmed(self, message: Outgoing) -> None:
        self._strikes.pop(message.key, None)

    def _receive(self, topic: str, payload: bytes) -> None:
        try:
            place = parse_topic(topic)
            kind = place.kind
            if kind == COMMAND and place.number is not None:
                self._on_command(place.number, payload)
            elif kind == "refresh":
                self.on_refresh(parse(Refresh, payload, limit=MAX_PAYLOAD_BYTES))
            elif kind == "ack":
                ack = parse(Ack, payload, limit=MAX_PAYLOAD_BYTES)
                self._spool.acked(ack)
                for seq in ack.seqs:
                    self._under_way.discard((ack.boot_id, ack.stream, seq))
                    self._strikes.pop((ack.boot_id, ack.stream, seq), None)
        except Rejected as error:
            _log.warning("A message on %.200s is ignored: %s", topic, error.what)


class _Alarm:
    """Wakes a thread that waits for sockets."""

    def __init__(self) -> None:
        self._out, self._in = socket.socketpair()
        self._out.setblocking(False)
        self._in.setblocking(False)

    def ring(self) -> None:
        with suppress(OSError):  # it rings already, or is closed
            self._in.send(b"!")

    def fileno(self) -> int:
        return self._out.fileno()

    def hush(self) -> None:
        with suppress(BlockingIOError):
            self._out.recv(4096)

    def close(self) -> None:
        self._out.close()
        self._in.close()


class _Connection:
    """One paho client for one connection, driven by `turn`. Belongs to one thread."""

    def __init__(
        self,
        identity: Identity,
        boot_id: str,
        receive: Callable[[str, bytes], None],
        confirmed: Callable[[Outgoing], None],
    ) -> None:
        self._identity = identity
        self._receive = receive
        self._confirmed = confirmed
        self.address = f"{identity.broker.host}:{identity.broker.port}"
        self.accepted = False
        self.reason = "the broker ended the connection before it accepted this device: is it still admitted?"
        self._unconfirmed: dict[int, Outgoing | None] = {}
        self._news = False
        self._error: Exception | None = None
        self._receive_maximum = 20
        self._packet_maximum = MAX_PAYLOAD_BYTES + 1024
        self._accept_by = 0.0
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=identity.device,
            protocol=MQTTProtocolVersion.MQTTv5,
            reconnect_on_failure=False,
        )
        client.connect_timeout = _CONNECT_S
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_socket_register_write = lambda *_: None  # writing is `turn`'s business alone
        later = _properties(PacketTypes.WILLMESSAGE, WillDelayInterval=_WILL_DELAY_S)
        will = Status(state="offline", boot_id=boot_id).to_bytes()
        client.will_set(up(identity.device, "status"), will, qos=1, retain=True, properties=later)
        self._client = client

    def open(self) -> None:
        """TCP and TLS. Raises OSError or Rejected."""
        self._client.tls_set_context(self._identity.client_context())
        wishes = _properties(
            PacketTypes.CONNECT,
            SessionExpiryInterval=_SESSION_EXPIRY_S,
            MaximumPacketSize=MAX_PAYLOAD_BYTES + 1024,
        )
        broker = self._identity.broker
        self._accept_by = monotonic() + 2 * _CONNECT_S
        self._client.connect(broker.host, broker.port, _KEEPALIVE_S, clean_start=False, properties=wishes)

    def turn(self, alarm: _Alarm | None, *, wait_s: float) -> bool:
        """Wait for the socket or the alarm and do what is due; False when the connection has ended."""
        sock = self._client.socket()
        if sock is None:
            return False
        if not self.accepted and monotonic() > self._accept_by:
            self.reason = "the broker does not answer"
            return False
        buffered = isinstance(sock, ssl.SSLSocket) and sock.pending() > 0
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN | (select.POLLOUT if self._client.want_write() else 0))
        if alarm is not None:
            poll.register(alarm.fileno(), select.POLLIN)
        ready = dict(poll.poll(0 if buffered else int(wait_s * 1000)))
        if alarm is not None and alarm.fileno() in ready:
            alarm.hush()
        if buffered or ready.get(sock.fileno(), 0) & ~select.POLLOUT:
            self._client.loop_read()
        if self._client.want_write():
            self._client.loop_write()
        self._client.loop_misc()
        if self._error is not None:
            raise self._error
        return self._client.socket() is not None

    def subscribe(self, topic: str) -> None:
        """Ask for a topic at QoS 1."""
        self._client.subscribe(topic, qos=1)

    def send(self, what: tuple[Direct, bytes] | CommandResponse) -> None:
        """Queue one of what is not spooled."""
        if isinstance(what, CommandResponse):
            self._answer(what)
        else:
            self.publish(*what)

    def publish(self, kind: Up, payload: bytes, message: Outgoing | None = None) -> bool:
        """Queue one message; False when the broker would end the connection over its length."""
        topic = up(self._identity.device, kind)
        if not self._bearable(kind, topic, payload):
            return False
        info = self._client.publish(topic, payload, qos=qos(kind), retain=kind in RETAINED)
        if qos(kind):
            self._unconfirmed[info.mid] = message
        return True

    def _answer(self, answer: CommandResponse) -> None:
        topic, payload = response(self._identity.device, answer.n), answer.to_bytes()
        if self._bearable(RESPONSE, topic, payload):
            properties = _properties(PacketTypes.PUBLISH)
            properties.CorrelationData = correlation(answer.boot_id, answer.n)
            info = self._client.publish(topic, payload, qos=1, properties=properties)
            self._unconfirmed[info.mid] = None

    def _bearable(self, kind: str, topic: str, payload: bytes) -> bool:
        if len(payload) + len(topic) + _OVERHEAD <= self._packet_maximum:
            return True
        _log.error("%s has %d bytes, the broker takes %d.", kind, len(payload), self._packet_maximum)
        return False

    def room(self) -> int:
        """How many more QoS 1 messages the broker takes now."""
        return self._receive_maximum - len(self._unconfirmed)

    def unconfirmed(self) -> int:
        """How many spooled messages the broker has not confirmed."""
        return len(self.on_the_way())

    def on_the_way(self) -> list[Outgoing]:
        """Spooled messages that the broker has not confirmed."""
        return [m for m in self._unconfirmed.values() if m is not None]

    def take_news(self) -> bool:
        """Whether anything came from the cloud since the last call."""
        news, self._news = self._news, False
        return news

    def disconnect(self, *, within_s: float) -> None:
        """Wait for confirmations, say DISCONNECT, and see it out."""
        until = monotonic() + within_s
        while self._unconfirmed and monotonic() < until and self.turn(None, wait_s=0.1):
            pass
        self._client.disconnect()
        while monotonic() < until + 1.0 and self.turn(None, wait_s=0.1):
            pass

    def close(self) -> None:
        """Close the socket, if it is open, and let go of the client."""
        sock = self._client.socket()
        if sock is not None:
            sock.close()
        self._client.on_connect = self._client.on_disconnect = None
        self._client.on_message = self._client.on_publish = None

    # --- paho's callbacks: none of them raises

    def _on_connect(
        self, client: Client, data: Any, flags: ConnectFlags, code: ReasonCode, properties: Properties | None
    ) -> None:
        if code.is_failure:
            self.reason = f"the broker refuses this device: {code}"
            return
        self.accepted = True
        self.reason = "the connection broke"
        self._receive_maximum = min(self._receive_maximum, getattr(properties, "ReceiveMaximum", 65_535))
        self._packet_maximum = min(self._packet_maximum, getattr(properties, "MaximumPacketSize", 1 << 28))

    def _on_disconnect(
        self,
        client: Client,
        data: Any,
        flags: DisconnectFlags,
        code: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if flags.is_disconnect_packet_from_server:
            self.reason = f"the broker ended the connection: {code}"

    def _on_publish(
        self, client: Client, data: Any, mid: int, code: ReasonCode, properties: Properties | None
    ) -> None:
        message = self._unconfirmed.pop(mid, None)
        if message is not None:
            self._confirmed(message)
            if code.is_failure:
                _log.warning("The broker refuses %s %d: %s.", message.stream, message.seq, code)

    def _on_message(self, client: Client, data: Any, message: MQTTMessage) -> None:
        self._news = True
        try:
            self._receive(message.topic, bytes(message.payload))
        except Exception as error:  # noqa: BLE001  # carried past paho's frames, and raised again in `turn`
            self._error = error


def _properties(packet: int, **values: int) -> Properties:
    properties = Properties(packet)  # type: ignore[no-untyped-call]  # paho's
    for name, value in values.items():
        setattr(properties, name, value)
    return properties
