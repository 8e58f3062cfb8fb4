"""What the HTTP routes may use: one value, made by the composition root and by tests alike."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from edgeward_cloud.auth import DeviceTokens, Operators
from edgeward_cloud.broker import Broker
from edgeward_cloud.pki import Pki
from edgeward_cloud.registry import Registry
from edgeward_cloud.settings import Settings
from edgeward_cloud.store.database import Store
from edgeward_wire.document import Document
from edgeward_wire.result import ResultMessage
from edgeward_wire.topics import Told

Deliver = Callable[[Sequence[tuple[str, Told, Document]]], Awaitable[bool]]
Results = Callable[[str], tuple[ResultMessage, ...]]


async def _undelivered(_: Sequence[tuple[str, Told, Document]]) -> bool:
    return False


def _no_results(_: str) -> tuple[ResultMessage, ...]:
    return ()


@dataclass(frozen=True)
class Services:
    """The parts of the cloud. Without a broker nothing is delivered, and devices poll."""

    settings: Settings
    store: Store
    registry: Registry
    pki: Pki
    operators: Operators
    clock: Callable[[], float]
    broker: Broker | None = None
    """Our own Mosquitto; None with somebody else's broker."""
    deliver: Deliver = _undelivered
    results: Results = _no_results
    ingest_fault: Callable[[], str | None] = lambda: None
    """Why nothing of what devices send can be stored now."""
    device_tokens: DeviceTokens = field(default_factory=DeviceTokens)

    def faults(self) -> str:
        """What keeps the cloud from its work although it answers; empty when nothing does."""
        broker = f"The broker is away: {self.broker.fault}." if self.broker and self.broker.fault else ""
        ingest = self.ingest_fault()
        return " ".join(filter(None, (broker, f"Nothing can be stored: {ingest}" if ingest else "")))
