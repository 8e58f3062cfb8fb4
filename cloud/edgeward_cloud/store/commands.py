"""Commands to devices: rows by (device, n), and how answers change them.

Invariants: a final state never changes; an answer counts only for the run of the agent that was asked; a
device has at most `KEEP` rows, the newest.
"""

from __future__ import annotations

from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from edgeward_cloud.store.models import CommandRow
from edgeward_wire.command import FINAL, CommandResponse

KEEP = 50


async def last_number(session: AsyncSession, device: str) -> int:
    """The largest number that a device was ever sent, as far as is remembered; 0 for none."""
    query = select(func.max(CommandRow.n)).where(CommandRow.device == device)
    return int((await session.scalar(query)) or 0)


async def add(session: AsyncSession, row: CommandRow) -> None:
    """Remember a new command, and forget the oldest of its device."""
    session.add(row)
    await session.flush()
    kept = (
        select(CommandRow.n).where(CommandRow.device == row.device).order_by(CommandRow.n.desc()).limit(KEEP)
    )
    numbers = (await session.scalars(kept)).all()
    await session.execute(
        delete(CommandRow).where(CommandRow.device == row.device, CommandRow.n < numbers[-1])
    )


async def get(session: AsyncSession, device: str, n: int) -> CommandRow | None:
    """One command."""
    return await session.get(CommandRow, (device, n))


async def newest(session: AsyncSession, device: str, limit: int) -> list[CommandRow]:
    """A device's commands, newest first."""
    query = select(CommandRow).where(CommandRow.device == device).order_by(CommandRow.n.desc()).limit(limit)
    return list((await session.scalars(query)).all())


async def answer(session: AsyncSession, device: str, response: CommandResponse) -> None:
    """What a device says of a command; nothing where it has no such command, or said its last word."""
    await session.execute(
        update(CommandRow)
        .where(
            CommandRow.device == device,
            CommandRow.n == response.n,
            CommandRow.boot_id == response.boot_id,
            CommandRow.state.not_in(FINAL),
        )
        .values(
            state=response.state,
            reason=response.reason,
            response=response.model_dump(mode="json", exclude_none=True),
        )
    )


async def give_up(session: AsyncSession, device: str, reason: str, *, but: str = "", n: int = 0) -> None:
    """Mark a device's open commands as failed: all but those of one boot_id, or one by its number."""
    where = [CommandRow.device == device, CommandRow.state.not_in(FINAL), CommandRow.boot_id != but]
    if n:
        where.append(CommandRow.n == n)
    await session.execute(update(CommandRow).where(*where).values(state="failed", reason=reason))
