"""Devices: what they are, whether they are admitted, what happened on them, and their certificates."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from edgeward_cloud.api.needs import DeviceId, Operator, TheCloud
from edgeward_cloud.api.views import device_view, document
from edgeward_cloud.enrolment import no_device, require_fleet
from edgeward_cloud.store import devices, streams
from edgeward_wire import api
from edgeward_wire.enrolment import EnrolResponse, RenewRequest
from edgeward_wire.event import Event
from edgeward_wire.identifiers import FleetName

router = APIRouter(prefix="/v1", tags=["devices"])


@router.get("/devices")
async def listed(the: TheCloud, _: Operator, fleet: FleetName | None = None) -> list[api.Device]:
    """All devices, or a fleet's."""
    async with the.parts.store.read() as session:
        if fleet is not None:
            await require_fleet(session, fleet)
        rows = await devices.listed(session, fleet)
    return [device_view(row, the.parts.results(row.id)) for row in rows]


@router.get("/devices/{device}")
async def one(the: TheCloud, device: str, _: Operator) -> api.Device:
    """One device."""
    async with the.parts.store.read() as session:
        row = await devices.get(session, device)
    if row is None:
        raise no_device(device)
    return device_view(row, the.parts.results(row.id))


@router.post("/devices/{device}/admission")
async def admit(the: TheCloud, device: str, request: api.AdmissionChange, operator: Operator) -> api.Device:
    """Accept or reject a device."""
    await the.enrolment.admit(device, request.admission, operator)
    return await one(the, device, operator)


@router.get("/devices/{device}/log")
async def log(
    the: TheCloud, device: str, _: Operator, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> list[api.LogEntry]:
    """A device's events, newest first."""
    async with the.parts.store.read() as session:
        if await devices.get(session, device) is None:
            raise no_device(device)
        rows = await streams.events(session, device, limit)
    entries = ((row.received_at, document(Event, row.body)) for row in rows)
    return [api.LogEntry(received_at=at, event=event) for at, event in entries if event is not None]


@router.post("/device/certificate")
async def renew(the: TheCloud, request: RenewRequest, device: DeviceId) -> EnrolResponse:
    """A new certificate for the device that asks, for the key that it enrolled with."""
    return await the.enrolment.renew(device, request.csr_pem)
