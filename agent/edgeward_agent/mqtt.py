"""The link to the broker: when to connect, what to send, and what to do with what comes.

Invariants: one thread owns the connection, and each is a new one. Durability is the spool's: what was under
way at a disconnect is sent again. While the socket takes nothing, what waits does so here, within bounds;
then retained documents go first, then answers, the spool, and results. Reconnects wait with full jitter, also
after a kick past CONNACK. A message that we are kicked for again and again is set aside. MQTT is never
authority: it only says "look again".
"""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic

from edgeward_agent.identity import Identity
from edgeward_agent.mqtt_connection import Alarm, Connection
from edgeward_agent.reporting import Direct
from edgeward_agent.segments import Key, Outgoing
from edgeward_agent.spool import Spool
from edgeward_wire.ack import Ack, Refresh
from edgeward_wire.command import CommandResponse
from edgeward_wire.document import parse
from edgeward_wire.errors import Rejected
from edgeward_wire.status import Status
from edgeward_wire.topics import COMMAND, MAX_PAYLOAD_BYTES, all_down, parse_topic

IN_FLIGHT = 64
"""Spooled messages under way at most, until the cloud has stored them."""

STRIKES = 3
"""A message that was on its way at so many disconnects is set aside."""

RESEND_S = 60.0
"""When nothing was acknowledged for so long, all that is under way is sent again; the wait then doubles."""

_RESEND_MOST_S = 960.0

PULSE_S = 180.0
"""The thread makes progress more often than this: a connect, a turn, and a pause are bounded below it."""

_STEADY_S = 30.0
"""A connection that lasted so long begins the backoff anew."""

_BACKOFF_FIRST_S = 1.0
_BACKOFF_MOST_S = 60.0
_QUEUE_MOST = 100
_TURN_S = 5.0
_DOCUMENTS: tuple[Direct, ...] = ("birth", "reported")
"""In the order in which they are told."""

_log = logging.getLogger(__name__)


def backoff(attempt: int, draw: Callable[[float, float], float] = random.uniform) -> float:
    """Seconds to wait before reconnect number `attempt` (from 0): full jitter below a doubling bound."""
    return draw(0.0, min(_BACKOFF_MOST_S, _BACKOFF_FIRST_S * 2 ** min(attempt, 16)))


class _Waiting:
    """What is not spooled, until the connection takes it. Filled from any thread, emptied on the link's.

    Of a retained document only the newest counts. What passes cannot push out what stays.
    """

    def __init__(self) -> None:
        self._documents: dict[Direct, bytes] = {}
        self._answers: deque[CommandResponse] = deque(maxlen=_QUEUE_MOST)
        self._passing: deque[tuple[Direct, bytes]] = deque(maxlen=_QUEUE_MOST)

    def add(self, kind: Direct, payload: bytes) -> None:
        if kind in _DOCUMENTS:
            self._documents[kind] = payload
        else:
            self._passing.append((kind, payload))

    def answer(self, answer: CommandResponse) -> None:
        self._answers.append(answer)

    def urgent(self) -> tuple[Direct, bytes] | CommandResponse | None:
        """The next that must not wait behind anything."""
        for kind in _DOCUMENTS:
            payload = self._documents.pop(kind, None)
            if payload is not None:
                return kind, payload
        return self._answers.popleft() if self._answers else None

    def passing(self) -> tuple[Direct, bytes] | None:
        """The next of what goes when there is nothing else to send."""
        return self._passing.popleft() if self._passing else None

    def clear(self) -> None:
        self._documents.clear()
        self._answers.clear()
        self._passing.clear()


class Link:
    """The device's connection to the broker. Publishes `status` by itself (online, will, offline).

    The hooks are called on the link's thread and must return at once: put something on a queue.
    `on_connected` comes after each connect: publish `birth` and `reported` again. `on_refused` comes when a
    broker that was reached did not take this device. `failed` gets what a hook or the link itself raised that
    is a bug: stop the daemon.
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
        on_refused: Callable[[], None] = lambda: None,
        on_command: Callable[[int, bytes], None] = lambda number, payload: None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._identity = identity
        self._boot_id = boot_id
        self._spool = spool
        self.on_refresh = on_refresh
        self.on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._on_refused = on_refused
        self._on_command = on_command
        self._failed = failed
        self._beat = beat
        self._stopping = threading.Event()
        self._alarm = Alarm()
        self._waiting = _Waiting()
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

    @property
    def trouble(self) -> str:
        """Why there is no connection; empty while there is one, and before the first attempt has failed."""
        return self._trouble

    def publish(self, kind: Direct, payload: bytes) -> bool:
        """Publish soon, from any thread; False when not connected, or when it is too long (logged).

        A newer retained document replaces one that waits; of the rest the oldest go when too many wait.
        """
        if len(payload) > MAX_PAYLOAD_BYTES:
            _log.error("%s has %d bytes; at most %d are sent.", kind, len(payload), MAX_PAYLOAD_BYTES)
            return False
        if not self.connected:
            return False
        self._waiting.add(kind, payload)
        self._alarm.ring()
        return True

    def respond(self, answer: CommandResponse) -> bool:
        """Answer a command now, from any thread; False when not connected."""
        if not self.connected:
            return False
        self._waiting.answer(answer)
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
                self._beat()
                self._tell(self._once())
                attempt = 0 if monotonic() - began >= _STEADY_S else attempt + 1
                self._beat()
                self._stopping.wait(backoff(attempt))
        except Exception as error:  # noqa: BLE001  # this thread's supervisor: the daemon stops with it
            self._failed(error)

    def _once(self) -> str:
        """One connection from beginning to end; returns why it ended."""
        connection = Connection(self._identity, self._boot_id, self._receive, self._confirmed)
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
        if not (connection.accepted or self._stopping.is_set()):
            self._on_refused()
        return f"{connection.address}: {connection.reason}"

    def _tell(self, reason: str) -> None:
        if reason == self._trouble or self._stopping.is_set():
            return
        self._trouble = reason
        _log.warning("No connection to the broker at %s.", reason)
        self._on_disconnected(reason)

    def _serve(self, connection: Connection) -> None:
        patience = RESEND_S
        resend_at = monotonic() + patience
        while connection.turn(self._alarm, wait_s=min(_TURN_S, max(resend_at - monotonic(), 0.0))):
            self._beat()
            if self._stopping.is_set():
                self._say_goodbye(connection)
                return
            if not connection.accepted:
                continue
            if not self._connected:
                self._greet(connection)
            if connection.take_news() or not self._under_way:
                patience = RESEND_S
                resend_at = monotonic() + patience
            elif monotonic() >= resend_at:
                self._spool.rewind()
                self._under_way.clear()
                patience = min(patience * 2, _RESEND_MOST_S)
                resend_at = monotonic() + patience
            self._send(connection)

    def _send(self, connection: Connection) -> None:
        """Hand over what waits, only while all that was handed over is on its way.

        The connection would keep it without a bound, and its own ping behind it: a broker that hears none for
        too long is given up, and so again on the next connection.
        """
        while not connection.behind and (urgent := self._waiting.urgent()) is not None:
            connection.send(urgent)
        if not connection.behind:
            self._pump(connection)
        while not connection.behind and (passing := self._waiting.passing()) is not None:
            connection.send(passing)

    def _greet(self, connection: Connection) -> None:
        _log.info("Connected to the broker at %s.", connection.address)
        self._trouble = ""
        self._waiting.clear()
        self._spool.on_connect()
        connection.subscribe(all_down(self._identity.device))
        connection.publish("status", Status(state="online", boot_id=self._boot_id).to_bytes())
        self._connected = True
        self.on_connected()

    def _say_goodbye(self, connection: Connection) -> None:
        """`offline`, as the will would have said it; a matter of two seconds at most."""
        if connection.accepted:
            connection.publish("status", Status(state="offline", boot_id=self._boot_id).to_bytes())
            connection.disconnect(within_s=2.0)

    def _pump(self, connection: Connection) -> None:
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

    def _strike(self, connection: Connection) -> None:
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
