"""Signs what each device should run, after the database has said what that is.

Invariants: the database is the truth and the signed assignments follow it: `sync` brings any set of devices
in line and may be repeated, so that a crash between the two is mended at the next start. One sync at a
time. Signing works in a thread: it waits for the disk.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from edgeward_cloud import rollout
from edgeward_cloud.registry import Registry
from edgeward_cloud.services import Deliver
from edgeward_cloud.store import devices, rollouts
from edgeward_cloud.store.database import Store
from edgeward_cloud.store.models import DeviceRow
from edgeward_wire.ack import Refresh
from edgeward_wire.assignment import Assignment
from edgeward_wire.errors import EdgewardError

_BATCH = 500
_log = logging.getLogger(__name__)


class Director:
    """The one caller of `Registry.assign`."""

    def __init__(self, store: Store, registry: Registry, deliver: Deliver) -> None:
        self._store = store
        self._registry = registry
        self._deliver = deliver
        self._lock = asyncio.Lock()

    async def sync(self, ids: Sequence[str]) -> int:
        """Sign what changed for these devices and tell them; the newest revision among them all.

        Raises:
            Unavailable: the disk refuses. Nothing is lost: the next sync does it.
        """
        newest = 0
        for start in range(0, len(ids), _BATCH):
            async with self._lock:
                revision, changed = await self._sign(ids[start : start + _BATCH])
            newest = max(newest, revision)
            # Only a hint: a device that does not get it polls.
            await self._deliver([(a.device, "refresh", Refresh(revision=a.revision)) for a in changed])
        return newest

    async def sync_all(self) -> None:
        """The same for every accepted device; what cannot be done now is left to the next time."""
        try:
            async with self._store.read() as session:
                ids = await devices.ids(session)
            await self.sync(ids)
        except EdgewardError as error:
            _log.error("Assignments could not be brought up to date: %s", error)

    async def _sign(self, ids: Sequence[str]) -> tuple[int, list[Assignment]]:
        async with self._store.read() as session:
            rows = [row for row in await devices.by_ids(session, ids) if row.admission == "accepted"]
            history = await rollouts.assigned(session, [row.id for row in rows])
        wanted = [_assignment(row, history) for row in rows]
        signed = await asyncio.to_thread(self._registry.assign, wanted) if wanted else []
        known = {row.id: row.revision for row in rows}
        changed = [a for a in signed if a.revision != known[a.device]]
        if changed:
            async with self._store.write() as session:
                for assignment in changed:
                    await devices.change(session, assignment.device, {"revision": assignment.revision})
        return max((a.revision for a in signed), default=0), changed


def _assignment(row: DeviceRow, history: Sequence[rollout.Rollout]) -> Assignment:
    return Assignment(
        device=row.id, fleet=row.fleet, revision=row.revision, pipelines=rollout.desired(row.id, history)
    )
