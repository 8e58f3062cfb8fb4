"""Enrolment tokens. Only hashes come in here."""

from __future__ import annotations

from sqlalchemy import delete, update
from sqlalchemy.ext.asyncio import AsyncSession

from edgeward_cloud.store.models import EnrolTokenRow

KEEP_S = 30 * 86_400.0
"""How long a token that has ended is remembered, so that its user is told why it does not work."""


async def add(session: AsyncSession, row: EnrolTokenRow) -> None:
    """Remember a new token."""
    session.add(row)
    await session.flush()


async def get(session: AsyncSession, sha256: str) -> EnrolTokenRow | None:
    """A token by its hash."""
    return await session.get(EnrolTokenRow, sha256)


async def take_use(session: AsyncSession, sha256: str) -> bool:
    """Use it once; False when no use was left."""
    statement = (
        update(EnrolTokenRow)
        .where(EnrolTokenRow.sha256 == sha256, EnrolTokenRow.uses_left > 0)
        .values(uses_left=EnrolTokenRow.uses_left - 1)
        .returning(EnrolTokenRow.uses_left)
        .execution_options(synchronize_session=False)
    )
    return (await session.execute(statement)).first() is not None


async def prune(session: AsyncSession, now: float) -> None:
    """Forget tokens that ended long ago."""
    await session.execute(delete(EnrolTokenRow).where(EnrolTokenRow.expires_at < now - KEEP_S))
