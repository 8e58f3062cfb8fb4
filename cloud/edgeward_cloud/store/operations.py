"""What operators did (audit), and the certificates and viewers that follow from it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from edgeward_cloud.store.models import AuditRow, CertificateRow, DeviceRow, ViewerRow


async def record(
    session: AsyncSession, now: float, operator: str, action: str, subject: str, **detail: Any
) -> None:
    """Add an audit row; it commits with the change that it is about."""
    session.add(
        AuditRow(at=now, operator=operator[:200], action=action, subject=subject[:200], detail=detail)
    )


async def audit(session: AsyncSession, limit: int) -> list[AuditRow]:
    """The newest audit rows."""
    query = select(AuditRow).order_by(AuditRow.number.desc()).limit(limit)
    return list((await session.scalars(query)).all())


async def add_certificate(session: AsyncSession, serial: str, subject: str, expires_at: float) -> None:
    """Remember a certificate that was issued."""
    session.add(CertificateRow(serial=serial, subject=subject, expires_at=expires_at))


async def revoke(session: AsyncSession, subject: str, now: float) -> None:
    """Mark all certificates of a subject as revoked."""
    await session.execute(
        update(CertificateRow)
        .where(CertificateRow.subject == subject, CertificateRow.revoked_at.is_(None))
        .values(revoked_at=now)
    )


async def prune_certificates(session: AsyncSession, now: float) -> None:
    """Forget certificates that have expired by themselves."""
    await session.execute(delete(CertificateRow).where(CertificateRow.expires_at < now))


async def revoked_serials(session: AsyncSession) -> list[str]:
    """Serials for the CRL."""
    query = select(CertificateRow.serial).where(CertificateRow.revoked_at.is_not(None))
    return list((await session.scalars(query)).all())


async def revoked_devices(session: AsyncSession) -> list[str]:
    """Devices that the broker must not hear."""
    query = select(DeviceRow.id).where(DeviceRow.admission == "rejected").order_by(DeviceRow.id)
    return list((await session.scalars(query)).all())


async def put_viewer(session: AsyncSession, row: ViewerRow) -> None:
    """Add a viewer, or give it a new certificate."""
    await session.merge(row)


async def viewer_usernames(session: AsyncSession) -> list[str]:
    """Full MQTT user names of all viewers."""
    return list((await session.scalars(select(ViewerRow.username).order_by(ViewerRow.username))).all())
