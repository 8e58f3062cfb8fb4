"""The link to the broker. Only importer of paho.

Invariants: one thread owns the paho client, and each connection has a new one, so that paho keeps nothing
of ours: durability is the spool's. Reconnects wait with full jitter, also after a kick past CONNACK. No
callback raises into paho. MQTT is never authority: it only says "look again".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from edgeward_agent.identity import Identity
from edgeward_agent.spool import Spool
from edgeward_wire.ack import Refresh

Direct = Literal["birth", "reported", "metrics", "result"]


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
    ) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Start the thread; it connects for as long as it takes."""
        raise NotImplementedError

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us and is still there."""
        raise NotImplementedError

    def publish(self, kind: Direct, payload: bytes) -> bool:
        """Publish now, from any thread; False when not connected, or when it is too long (logged)."""
        raise NotImplementedError

    def wake(self) -> None:
        """Something was appended to the spool: send it now. From any thread."""
        raise NotImplementedError

    def stop(self, timeout_s: float = 5.0) -> None:
        """Say `offline`, disconnect, join the thread, and leave the rest to the spool."""
        raise NotImplementedError
