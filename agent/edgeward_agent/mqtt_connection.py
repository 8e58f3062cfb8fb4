"""One connection to the broker, from TCP to the last packet. Only importer of paho.

Invariants: it belongs to one thread, and after `open` it reads and writes in `turn` alone. Each connection
has a paho client of its own, so that paho keeps nothing of ours. No callback raises into paho: what the
receiver raised comes out of `turn`. What the broker would kick us for, as longer than it takes, is not sent.
"""

from __future__ import annotations

import logging
import select
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edgeward_agent.identity import Identity
from edgeward_agent.reporting import Direct
from edgeward_agent.segments import Outgoing
from edgeward_wire.command import CommandResponse
from edgeward_wire.status import Status
from edgeward_wire.topics import MAX_PAYLOAD_BYTES, RESPONSE, RETAINED, Up, correlation, qos, response, up

_KEEPALIVE_S = 30
_SESSION_EXPIRY_S = 120
_WILL_DELAY_S = 30
_CONNECT_S = 10.0
_UNSENT_BYTES = 64 << 10
"""What the kernel keeps of ours beyond what is on its way: a ping waits behind it."""
_OVERHEAD = 128
"""Bytes of a PUBLISH beside topic and payload, at most."""

_log = logging.getLogger(__name__)


class Alarm:
    """Wakes a thread that waits for sockets."""

    def __init__(self) -> None:
        self._out, self._in = socket.socketpair()
        self._out.setblocking(False)
        self._in.setblocking(False)

    def ring(self) -> None:
        """From any thread."""
        with suppress(OSError):  # it rings already, or is closed
            self._in.send(b"!")

    def fileno(self) -> int:
        """Readable while it rings."""
        return self._out.fileno()

    def hush(self) -> None:
        """Until it is rung again."""
        with suppress(BlockingIOError):
            self._out.recv(4096)

    def close(self) -> None:
        """It wakes nobody any more."""
        self._out.close()
        self._in.close()


class Connection:
    """One paho client for one connection, driven by `turn`.

    `receive` gets topic and payload of what comes, `confirmed` each spooled message that the broker took.
    """

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
        sock = self._client.socket()
        if isinstance(sock, ssl.SSLSocket):
            with suppress(OSError):  # a kernel without it keeps some megabytes
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)

    def turn(self, alarm: Alarm | None, *, wait_s: float) -> bool:
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

    @property
    def behind(self) -> bool:
        """Whether something is queued and not written yet: paho's queue has no bound of its own."""
        return self._client.want_write()

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
