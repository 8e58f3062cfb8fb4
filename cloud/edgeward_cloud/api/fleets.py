"""Who asks, fleets, and enrolment tokens."""

from __future__ import annotations

from fastapi import APIRouter

from edgeward_cloud.api.needs import Operator, TheCloud
from edgeward_cloud.problem import Refused
from edgeward_cloud.store import fleets, operations, rollouts
from edgeward_wire import __version__, api

router = APIRouter(prefix="/v1", tags=["fleets"])


@router.get("/whoami")
async def whoami(the: TheCloud, operator: Operator) -> api.WhoAmI:
    """Who the cloud takes you for."""
    return api.WhoAmI(operator=operator, cloud=__version__, server_time=the.parts.clock())


@router.get("/fleets")
async def listed(the: TheCloud, _: Operator) -> list[api.Fleet]:
    """All fleets."""
    async with the.parts.store.read() as session:
        counts = await fleets.counts(session)
        newest = await rollouts.of_fleets(session)
    assigned = {name: {r.pipeline: r.model for r in newest if r.fleet == name} for name, _, _ in counts}
    return [
        api.Fleet(name=name, devices=devices, online=online, assigned=assigned[name])
        for name, devices, online in counts
    ]


@router.post("/fleets", status_code=201)
async def create(the: TheCloud, request: api.FleetCreate, operator: Operator) -> api.Fleet:
    """Make a fleet."""
    now = the.parts.clock()
    async with the.parts.store.write() as session:
        if not await fleets.create(session, request.name, now):
            raise Refused(409, f"There is a fleet {request.name} already.", "Use it, or choose another name.")
        await operations.record(session, now, operator, "fleet", request.name)
    return api.Fleet(name=request.name)


@router.post("/enroll-tokens", status_code=201)
async def enrol_token(the: TheCloud, request: api.TokenCreate, operator: Operator) -> api.TokenCreated:
    """An enrolment string for devices of a fleet. It is shown this once."""
    return await the.enrolment.new_token(request, operator)
