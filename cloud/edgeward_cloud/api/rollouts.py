"""Rollouts and rollbacks."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from edgeward_cloud.api.needs import Cloud, Operator, TheCloud
from edgeward_cloud.api.views import rollout_view
from edgeward_cloud.enrolment import require_fleet
from edgeward_cloud.problem import Refused
from edgeward_cloud.rollout import Rollout
from edgeward_cloud.store import devices, rollouts
from edgeward_wire import api
from edgeward_wire.identifiers import FleetName

router = APIRouter(prefix="/v1", tags=["rollouts"])


@router.post("/rollouts", status_code=201)
async def deploy(the: TheCloud, request: api.RolloutCreate, operator: Operator) -> api.Rollout:
    """Assign a released model to a fleet or to one device."""
    return await _view(the, await the.deployment.deploy(request, operator))


@router.post("/rollbacks", status_code=201)
async def roll_back(the: TheCloud, request: api.RollbackCreate, operator: Operator) -> api.Rollout:
    """Assign what the fleet or the device had committed before."""
    return await _view(the, await the.deployment.roll_back(request, operator))


@router.get("/rollouts")
async def listed(
    the: TheCloud,
    _: Operator,
    fleet: FleetName | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 20,
) -> list[api.Rollout]:
    """Rollouts, newest first."""
    async with the.parts.store.read() as session:
        if fleet is not None:
            await require_fleet(session, fleet)
        found = await rollouts.newest(session, limit, fleet)
        concerned = {t.device for r in found for t in r.targets}
        online = await devices.online(session, concerned)
        blocked = await devices.registry_faults(session, concerned)
    return [rollout_view(r, online, blocked) for r in found]


@router.get("/rollouts/{rollout}")
async def one(the: TheCloud, rollout: str, _: Operator) -> api.Rollout:
    """One rollout with each device's progress."""
    async with the.parts.store.read() as session:
        found = await rollouts.get(session, rollout)
    if found is None:
        raise Refused(404, f"There is no rollout {rollout[:80]}.", "See GET /v1/rollouts.")
    return await _view(the, found)


async def _view(the: Cloud, rollout: Rollout) -> api.Rollout:
    async with the.parts.store.read() as session:
        concerned = {t.device for t in rollout.targets}
        online = await devices.online(session, concerned)
        blocked = await devices.registry_faults(session, concerned)
    return rollout_view(rollout, online, blocked)
