"""The devices' streams: telemetry windows and events.

Invariant: an insert that comes twice leaves one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from edgeward_cloud.store.database import insert_new, table_of
from edgeward_cloud.store.models import DeviceRow, EventRow, WindowRow

KEEP_WINDOWS_S = 14 * 86_400.0
KEEP_EVENTS_S = 365 * 86_400.0


async def add_windows(session: AsyncSession, rows: Iterable[Mapping[str, Any]]) -> None:
    """Store windows (columns of `WindowRow`)."""
    await insert_new(session, table_of(WindowRow), rows)


async def add_events(session: AsyncSession, rows: Iterable[Mapping[str, Any]]) -> None:
    """Store events (columns of `EventRow`)."""
    await insert_new(session, table_of(EventRow), rows)


async def windows(
    session: AsyncSession, since: float, limit: int, *, fleet: str | None = None, device: str | None = None
) -> list[WindowRow]:
    """Windows that ended after `since` (Unix seconds), newest first, at most `limit`."""
    query = select(WindowRow).where(WindowRow.ended_at > since)
    if device is not None:
        query = query.where(WindowRow.device == device)
    if fleet is not None:
        query = query.join(DeviceRow, DeviceRow.id == WindowRow.device).where(DeviceRow.fleet == fleet)
    query = query.order_by(WindowRow.ended_at.desc(), WindowRow.number.desc()).limit(limit)
    return list((await session.scalars(query)).all())


async def events(session: AsyncSession, device: str, limit: int) -> list[EventRow]:
    """A device's events, newest first."""
    query = select(EventRow).where(EventRow.device == device).order_by(EventRow.number.desc()).limit(limit)
    return list((await session.scalars(query)).all())


async def prune(session: AsyncSession, now: float) -> None:
    """Forget what is older than it is kept."""
    await session.execute(delete(WindowRow).where(WindowRow.ended_at < now - KEEP_WINDOWS_S))
    await session.execute(delete(EventRow).where(EventRow.received_at < now - KEEP_EVENTS_S))
