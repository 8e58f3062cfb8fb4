"""Devices: rows by id, and the few ways in which they change."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from edgeward_cloud.store.models import DeviceRow


async def get(session: AsyncSession, device: str) -> DeviceRow | None:
    """A device's row, attached to the session: in a write transaction, setting a field changes it."""
    return await session.get(DeviceRow, device)


async def listed(session: AsyncSession, fleet: str | None = None) -> list[DeviceRow]:
    """All devices, or a fleet's, by id."""
    query = select(DeviceRow).order_by(DeviceRow.id)
    if fleet is not None:
        query = query.where(DeviceRow.fleet == fleet)
    return list((await session.scalars(query)).all())


async def ids(session: AsyncSession, *, fleet: str | None = None, admission: str = "accepted") -> list[str]:
    """Ids of the devices of one admission, by id."""
    query = select(DeviceRow.id).where(DeviceRow.admission == admission).order_by(DeviceRow.id)
    if fleet is not None:
        query = query.where(DeviceRow.fleet == fleet)
    return list((await session.scalars(query)).all())


async def known(session: AsyncSession, devices: Collection[str]) -> dict[str, str | None]:
    """Those of the devices that are accepted, each with its present boot_id: nobody else is listened to."""
    query = select(DeviceRow.id, DeviceRow.boot_id)
    query = query.where(DeviceRow.id.in_(devices), DeviceRow.admission == "accepted")
    return {row.id: row.boot_id for row in (await session.execute(query)).all()}


async def by_ids(session: AsyncSession, devices: Collection[str]) -> list[DeviceRow]:
    """The rows of those devices that there are, by id."""
    query = select(DeviceRow).where(DeviceRow.id.in_(devices)).order_by(DeviceRow.id)
    return list((await session.scalars(query)).all())


async def change(session: AsyncSession, device: str, values: dict[str, Any]) -> None:
    """Set fields of one device."""
    await session.execute(update(DeviceRow).where(DeviceRow.id == device).values(values))


async def online(session: AsyncSession, devices: Collection[str]) -> set[str]:
    """Those of the devices that are online."""
    query = select(DeviceRow.id).where(DeviceRow.id.in_(devices), DeviceRow.online)
    return set((await session.scalars(query)).all())


async def registry_faults(session: AsyncSession, devices: Collection[str]) -> dict[str, str]:
    """Why those of the devices that are online cannot follow the registry now; absent where they can."""
    fault = DeviceRow.reported["registry"].as_string()
    query = select(DeviceRow.id, fault).where(DeviceRow.id.in_(devices), DeviceRow.online, fault != "")
    return {device: str(why) for device, why in (await session.execute(query)).all()}


async def all_offline(session: AsyncSession) -> None:
    """Nobody is known to be online: the broker has lost its memory, and devices will say so anew."""
    await session.execute(update(DeviceRow).values(online=False))
