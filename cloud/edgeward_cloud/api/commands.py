"""Commands to one device: give one, and see how it goes."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query

from edgeward_cloud.api.needs import Operator, TheCloud
from edgeward_cloud.api.views import command_view
from edgeward_cloud.enrolment import no_device
from edgeward_cloud.problem import Refused
from edgeward_cloud.store import commands, devices
from edgeward_wire import api

router = APIRouter(prefix="/v1/devices/{device}/commands", tags=["commands"])


@router.post("", status_code=201)
async def send(
    the: TheCloud, device: str, request: api.CommandCreate, operator: Operator
) -> api.CommandStatus:
    """Have a device that is online do something once."""
    row = await the.commanding.send(device, request, operator)
    return command_view(row, online=True, now=the.parts.clock())


@router.get("")
async def listed(
    the: TheCloud, device: str, _: Operator, limit: Annotated[int, Query(ge=1, le=50)] = 10
) -> list[api.CommandStatus]:
    """A device's commands, newest first."""
    async with the.parts.store.read() as session:
        asked = await devices.get(session, device)
        if asked is None:
            raise no_device(device)
        rows = await commands.newest(session, device, limit)
    return [command_view(row, online=asked.online, now=the.parts.clock()) for row in rows]


@router.get("/{n}")
async def one(
    the: TheCloud, device: str, n: Annotated[int, Path(ge=1, lt=10**15)], _: Operator
) -> api.CommandStatus:
    """One command, with what the device last said of it."""
    async with the.parts.store.read() as session:
        asked = await devices.get(session, device)
        if asked is None:
            raise no_device(device)
        row = await commands.get(session, device, n)
    if row is None:
        raise Refused(404, f"Device {device} has no command {n}.", f"See GET /v1/devices/{device}/commands.")
    return command_view(row, online=asked.online, now=the.parts.clock())
