"""Rollouts: between the tables and the plain values that `edgeward_cloud.rollout` decides on.

Invariant: what is loaded carries only the targets that were asked for; `save` writes only what changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from typing import Any, cast

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from edgeward_cloud.rollout import Rollout, Target
from edgeward_cloud.store.database import insert_new, table_of
from edgeward_cloud.store.models import DeviceRow, RolloutRow, RolloutTargetRow
from edgeward_wire.api import RolloutState
from edgeward_wire.manifest import ModelRef
from edgeward_wire.reported import Result, State


async def add(session: AsyncSession, rollout: Rollout) -> None:
    """Store a new rollout with its targets."""
    session.add(RolloutRow(**_columns(rollout)))
    await session.flush()
    await insert_new(
        session, table_of(RolloutTargetRow), [_target_columns(rollout, t) for t in rollout.targets]
    )


async def add_target(session: AsyncSession, rollout: Rollout, device: str) -> None:
    """Let a device join, unless it is a target already; what former hardware did there gives way."""
    target = Target(device)
    await session.execute(
        delete(RolloutTargetRow).where(
            RolloutTargetRow.rollout == rollout.id, RolloutTargetRow.device == device, RolloutTargetRow.former
        )
    )
    await insert_new(session, table_of(RolloutTargetRow), [_target_columns(rollout, target)])


async def retire(session: AsyncSession, device: str) -> None:
    """Other hardware takes this id: what the old one was to run, and how it went, is history from now on."""
    await session.execute(
        update(RolloutTargetRow).where(RolloutTargetRow.device == device).values(former=True)
    )


async def save(session: AsyncSession, before: Rollout, after: Rollout) -> None:
    """Write the differences between two states of one rollout."""
    if _columns(before) != _columns(after):
        await session.execute(update(RolloutRow).where(RolloutRow.id == after.id).values(_columns(after)))
    old = {t.device: t for t in before.targets}
    for target in after.targets:
        if old.get(target.device) != target:
            await session.execute(
                update(RolloutTargetRow)
                .where(RolloutTargetRow.rollout == after.id, RolloutTargetRow.device == target.device)
                .values(_target_columns(after, target))
            )


async def set_revision(session: AsyncSession, rollout: str, revision: int) -> None:
    """Remember the revision under which a rollout was signed."""
    await session.execute(update(RolloutRow).where(RolloutRow.id == rollout).values(revision=revision))


async def get(session: AsyncSession, rollout: str) -> Rollout | None:
    """A rollout with all its targets."""
    found = await _with_targets(session, [RolloutRow.id == rollout], limit=1)
    return found[0] if found else None


async def newest(session: AsyncSession, limit: int, fleet: str | None = None) -> list[Rollout]:
    """Rollouts with all their targets, newest first."""
    return await _with_targets(session, [] if fleet is None else [RolloutRow.fleet == fleet], limit=limit)


async def running(session: AsyncSession, fleet: str | None = None) -> list[Rollout]:
    """All that run, with all their targets, oldest first."""
    where: list[ColumnElement[bool]] = [RolloutRow.state == "running"]
    if fleet is not None:
        where.append(RolloutRow.fleet == fleet)
    return list(reversed(await _with_targets(session, where)))


async def touched(session: AsyncSession, ids: Collection[str]) -> list[Rollout]:
    """The rollouts of these ids, with all their targets."""
    return await _with_targets(session, [RolloutRow.id.in_(ids)])


async def history(session: AsyncSession, fleet: str, device: str | None = None) -> list[Rollout]:
    """A fleet's rollouts, oldest first, for decisions.

    With a device: its own rows as targets. Without: one target that succeeded, where there is any; that one
    may be former hardware, for a model does not cease to be good when a device is replaced.
    """
    query = select(RolloutRow).where(RolloutRow.fleet == fleet).order_by(RolloutRow.number)
    rows = (await session.scalars(query)).all()
    if device is not None:
        mine = (RolloutTargetRow.device == device) & ~RolloutTargetRow.former
        chosen = select(RolloutTargetRow).where(mine)
    else:
        one = (
            select(RolloutTargetRow.rollout, func.min(RolloutTargetRow.device).label("device"))
            .where(RolloutTargetRow.result == "succeeded")
            .group_by(RolloutTargetRow.rollout)
            .subquery()
        )
        same = (RolloutTargetRow.rollout == one.c.rollout) & (RolloutTargetRow.device == one.c.device)
        chosen = select(RolloutTargetRow).join(one, same)
    return _assemble(rows, (await session.scalars(chosen)).all())


async def assigned(session: AsyncSession, devices: Collection[str]) -> list[Rollout]:
    """The newest rollout of each device and pipeline, oldest first, with those devices as targets.

    Only of the fleet that a device is in: numbers count over all fleets.
    """
    last = (
        select(RolloutTargetRow.device, func.max(RolloutRow.number).label("number"))
        .join(RolloutRow, RolloutRow.id == RolloutTargetRow.rollout)
        .join(DeviceRow, (DeviceRow.id == RolloutTargetRow.device) & (DeviceRow.fleet == RolloutRow.fleet))
        .where(RolloutTargetRow.device.in_(devices), ~RolloutTargetRow.former, RolloutRow.state != "canceled")
        .group_by(RolloutTargetRow.device, RolloutRow.pipeline)
        .subquery()
    )
    query = (
        select(RolloutRow, RolloutTargetRow)
        .join(last, last.c.number == RolloutRow.number)
        .join(
            RolloutTargetRow,
            (RolloutTargetRow.rollout == RolloutRow.id) & (RolloutTargetRow.device == last.c.device),
        )
        .order_by(RolloutRow.number)
    )
    pairs = (await session.execute(query)).all()
    rows = {row.id: row for row, _ in pairs}
    return _assemble(list(rows.values()), [target for _, target in pairs])


async def of_fleets(session: AsyncSession) -> list[Rollout]:
    """The newest fleet rollout of each fleet and pipeline, without targets."""
    last = (
        select(func.max(RolloutRow.number))
        .where(RolloutRow.device.is_(None), RolloutRow.state != "canceled")
        .group_by(RolloutRow.fleet, RolloutRow.pipeline)
    )
    rows = (await session.scalars(select(RolloutRow).where(RolloutRow.number.in_(last)))).all()
    return [_rollout(row, ()) for row in rows]


async def _with_targets(
    session: AsyncSession, where: Sequence[ColumnElement[bool]], limit: int | None = None
) -> list[Rollout]:
    query = select(RolloutRow).where(*where).order_by(RolloutRow.number.desc()).limit(limit)
    rows = (await session.scalars(query)).all()
    ids = [row.id for row in rows]
    targets = select(RolloutTargetRow).where(RolloutTargetRow.rollout.in_(ids))
    return _assemble(rows, (await session.scalars(targets.order_by(RolloutTargetRow.device))).all())


def _assemble(rows: Sequence[RolloutRow], targets: Iterable[RolloutTargetRow]) -> list[Rollout]:
    by_rollout: dict[str, list[Target]] = {row.id: [] for row in rows}
    for target in targets:
        if target.rollout in by_rollout:
            by_rollout[target.rollout].append(_target(target))
    return [_rollout(row, by_rollout[row.id]) for row in rows]


def _rollout(row: RolloutRow, targets: Iterable[Target]) -> Rollout:
    return Rollout(
        id=row.id,
        fleet=row.fleet,
        device=row.device,
        pipeline=row.pipeline,
        model=ModelRef(path=row.model_path, sha256=row.model_sha256),
        attempt=row.attempt,
        probation_s=row.probation_s,
        restores=row.restores,
        state=cast(RolloutState, row.state),
        revision=row.revision,
        created_at=row.created_at,
        created_by=row.created_by,
        finished_at=row.finished_at,
        targets=tuple(targets),
    )


def _target(row: RolloutTargetRow) -> Target:
    return Target(
        device=row.device,
        state=cast(State, row.state),
        result=cast("Result | None", row.result),
        reason=row.reason,
        progress=row.progress,
        detail=row.detail,
        numbers=row.numbers,
        variant=row.variant,
        provider=row.provider,
        former=row.former,
    )


def _columns(rollout: Rollout) -> dict[str, Any]:
    return {
        "id": rollout.id,
        "fleet": rollout.fleet,
        "device": rollout.device,
        "pipeline": rollout.pipeline,
        "model_path": rollout.model.path,
        "model_sha256": rollout.model.sha256,
        "attempt": rollout.attempt,
        "probation_s": rollout.probation_s,
        "restores": rollout.restores,
        "state": rollout.state,
        "revision": rollout.revision,
        "created_at": rollout.created_at,
        "created_by": rollout.created_by,
        "finished_at": rollout.finished_at,
    }


def _target_columns(rollout: Rollout, target: Target) -> dict[str, Any]:
    return {"rollout": rollout.id, **asdict(target)}
