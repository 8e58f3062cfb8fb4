"""Fleets."""

from __future__ import annotations

from sqlalchemy import case, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from edgeward_cloud.store.database import insert_new, table_of
from edgeward_cloud.store.models import DeviceRow, FleetRow


async def create(session: AsyncSession, name: str, now: float) -> bool:
    """Make a fleet; False when there is one of that name."""
    if await exists(session, name):
        return False
    await insert_new(session, table_of(FleetRow), [{"name": name, "created_at": now}])
    return True


async def exists(session: AsyncSession, name: str) -> bool:
    """Whether there is such a fleet."""
    return await session.get(FleetRow, name) is not None


async def counts(session: AsyncSession) -> list[tuple[str, int, int]]:
    """(name, devices, online) of every fleet, by name; rejected devices are not counted."""
    counted = (DeviceRow.fleet == FleetRow.name) & (DeviceRow.admission != "rejected")
    online = func.coalesce(func.sum(case((DeviceRow.online, 1), else_=0)), 0)
    query = (
        select(FleetRow.name, func.count(DeviceRow.id), online)
        .outerjoin(DeviceRow, counted)
        .group_by(FleetRow.name)
        .order_by(FleetRow.name)
    )
    return [(name, devices, up) for name, devices, up in (await session.execute(query)).all()]
