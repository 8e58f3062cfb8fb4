"""Who the broker hears: brings its ACL and the CRL in line with the database."""

from __future__ import annotations

import asyncio

from edgeward_cloud.services import Services
from edgeward_cloud.store import operations


async def apply(services: Services) -> None:
    """Write the CRL and, when the broker is ours, make it obey.

    Raises:
        Unavailable: the disk or the broker refuses; the database keeps the truth, so that a restart mends it.
    """
    async with services.store.read() as session:
        serials = await operations.revoked_serials(session)
        viewers = await operations.viewer_usernames(session)
        revoked = await operations.revoked_devices(session)
    now = services.clock()
    await asyncio.to_thread(services.pki.write_crl, serials, now=now)
    if services.broker is not None:
        await asyncio.to_thread(services.broker.apply, viewers, revoked)
