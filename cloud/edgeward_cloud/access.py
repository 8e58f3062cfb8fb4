"""Who the broker hears: brings its ACL and the CRL in line with the database."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from edgeward_cloud.pki import Pki
from edgeward_cloud.services import Services
from edgeward_cloud.store import operations
from edgeward_cloud.store.database import Store


@dataclass(frozen=True, slots=True)
class Lists:
    """Whom the broker must know beside the accepted devices; each list is whole."""

    viewers: list[str]
    revoked: list[str]


async def prepare(store: Store, pki: Pki, now: float) -> Lists:
    """Write the CRL; the lists for the ACL. Before a broker starts: it then never serves with older ones.

    Raises:
        Unavailable: the disk or the database refuses.
    """
    async with store.read() as session:
        serials = await operations.revoked_serials(session)
        viewers = await operations.viewer_usernames(session)
        revoked = await operations.revoked_devices(session)
    await asyncio.to_thread(pki.write_crl, serials, now=now)
    return Lists(viewers, revoked)


async def apply(services: Services) -> None:
    """Write the CRL and, when the broker is ours, make it obey.

    Raises:
        Unavailable: the disk or the broker refuses; the database keeps the truth, so that a restart mends it.
    """
    lists = await prepare(services.store, services.pki, services.clock())
    if services.broker is not None:
        await asyncio.to_thread(services.broker.apply, lists.viewers, lists.revoked)
