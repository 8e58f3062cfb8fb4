"""Rollouts as operators start them: the pure decisions, between the database and the director.

Invariants: a rollout is committed, with all that it supersedes, before anything is signed; an operator's
request that is refused changes nothing.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

from sqlalchemy.ext.asyncio import AsyncSession

from edgeward_cloud import rollout
from edgeward_cloud.director import Director
from edgeward_cloud.enrolment import no_device, require_fleet
from edgeward_cloud.problem import Refused
from edgeward_cloud.rollout import DEFAULT_PROBATION_S, Rollout
from edgeward_cloud.services import Services
from edgeward_cloud.store import devices, operations, rollouts
from edgeward_cloud.store.models import DeviceRow
from edgeward_wire import api
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import ModelRef


class Deployment:
    """Starts rollouts and rollbacks."""

    def __init__(self, services: Services, director: Director) -> None:
        self._services = services
        self._director = director

    async def deploy(self, request: api.RolloutCreate, operator: str) -> Rollout:
        """Assign a released model to a fleet or a device.

        Raises:
            Refused: 404 or 409. Rejected: the model is not released. Unavailable: it could not be signed yet.
        """
        await asyncio.to_thread(self._services.registry.manifest, request.model)
        probation_s = DEFAULT_PROBATION_S if request.probation_s is None else request.probation_s
        async with self._services.store.write() as session:
            fleet = await _fleet_of(session, request.fleet, request.device)
            history = await rollouts.history(session, fleet)
            started = await self._start(
                session,
                request,
                fleet=fleet,
                history=history,
                model=request.model,
                probation_s=probation_s,
                operator=operator,
            )
        return await self._sign(started)

    async def roll_back(self, request: api.RollbackCreate, operator: str) -> Rollout:
        """Assign what the fleet or the device had committed before.

        Raises:
            Refused: 404, or 409 when there is nothing to go back to.
        """
        async with self._services.store.write() as session:
            fleet = await _fleet_of(session, request.fleet, request.device)
            history = await rollouts.history(session, fleet, request.device)
            try:
                earlier = rollout.way_back(history, fleet, request.pipeline, request.device)
            except Rejected as error:
                raise Refused(409, error.what, error.next_step) from error
            started = await self._start(
                session,
                request,
                fleet=fleet,
                history=history,
                model=earlier.model,
                probation_s=earlier.probation_s,
                operator=operator,
                restores=earlier.id,
            )
        return await self._sign(started)

    async def _start(
        self,
        session: AsyncSession,
        request: api.RolloutCreate | api.RollbackCreate,
        *,
        fleet: str,
        history: Sequence[Rollout],
        model: ModelRef,
        probation_s: float,
        operator: str,
        restores: str | None = None,
    ) -> Rollout:
        now = self._services.clock()
        accepted = [d for d in await devices.listed(session, fleet) if d.admission == "accepted"]
        try:
            chosen = rollout.members(fleet, request.device, [d.id for d in accepted])
        except Rejected as error:
            raise Refused(409, error.what, error.next_step) from error
        _require_pipeline([d for d in accepted if d.id in chosen], request.pipeline)
        started = Rollout(
            id=f"{int(now)}-{secrets.token_hex(4)}",
            fleet=fleet,
            device=request.device,
            pipeline=request.pipeline,
            model=model,
            attempt=rollout.attempt_number(history, request.pipeline, model),
            created_at=now,
            created_by=operator,
            probation_s=probation_s,
            restores=restores,
            targets=tuple(rollout.Target(device) for device in chosen),
        )
        running = {r.id: r for r in await rollouts.running(session, fleet)}
        for after in rollout.supersede(started, running.values(), now):
            await rollouts.save(session, running[after.id], after)
        await rollouts.add(session, started)
        action = "rollback" if restores else "deploy"
        what = {"model": model.path, "sha256": model.sha256, "pipeline": request.pipeline, "id": started.id}
        await operations.record(session, now, operator, action, started.scope, **what)
        return started

    async def _sign(self, started: Rollout) -> Rollout:
        revision = await self._director.sync([target.device for target in started.targets])
        async with self._services.store.write() as session:
            await rollouts.set_revision(session, started.id, revision)
            found = await rollouts.get(session, started.id)
        assert found is not None  # rollouts are never deleted
        return found


async def _fleet_of(session: AsyncSession, fleet: str | None, device: str | None) -> str:
    """The fleet that a request means.

    Raises:
        Refused: 422, not exactly one of fleet and device; 404, it is not there.
    """
    if (fleet is None) == (device is None):
        raise Refused(422, "Name a fleet or a device: exactly one of both.", "Correct the request.")
    if fleet is not None:
        await require_fleet(session, fleet)
        return fleet
    assert device is not None
    row = await devices.get(session, device)
    if row is None:
        raise no_device(device)
    return row.fleet


def _require_pipeline(chosen: Sequence[DeviceRow], pipeline: str) -> None:
    """Refuse a pipeline that no device has. A device that has not been heard of yet may have any."""
    there: set[str] = set()
    for row in chosen:
        names = (row.birth or {}).get("pipelines") or {}
        if not names or pipeline in names:
            return
        there |= set(names)
    raise Refused(
        409,
        f"No device there has a pipeline {pipeline}; they have: {', '.join(sorted(there)[:20])}.",
        "Name one of these with --pipeline, or add it to the devices' agent.toml.",
    )
