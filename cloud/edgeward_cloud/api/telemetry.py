"""Telemetry figures, and certificates for other people's dashboards."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated

from fastapi import APIRouter, Query, Response

from edgeward_cloud import access, telemetry
from edgeward_cloud.api.needs import Operator, TheCloud
from edgeward_cloud.enrolment import no_device, require_fleet
from edgeward_cloud.store import devices, operations, streams
from edgeward_cloud.store.models import ViewerRow, WindowRow
from edgeward_cloud.telemetry import DEFAULT_SINCE_S, MAX_WINDOWS
from edgeward_wire import api
from edgeward_wire.identifiers import DeviceId, FleetName

router = APIRouter(prefix="/v1", tags=["telemetry"])
_log = logging.getLogger(__name__)


@router.get("/telemetry")
async def figures(
    *,
    the: TheCloud,
    response: Response,
    _: Operator,
    fleet: FleetName | None = None,
    device: DeviceId | None = None,
    since: Annotated[float | None, Query(ge=0, le=1e11)] = None,
    merged: bool | None = None,
) -> list[api.Telemetry]:
    """Latencies since a Unix time (default: the last ten minutes): a row a series, then merged ones.

    `merged=true` gives only the merged rows, `false` only the others. At most 10 000 windows are merged, the
    newest; the header `Edgeward-Since` says from when on they are complete.
    """
    start = the.parts.clock() - DEFAULT_SINCE_S if since is None else since
    async with the.parts.store.read() as session:
        if fleet is not None:
            await require_fleet(session, fleet)
        if device is not None and await devices.get(session, device) is None:
            raise no_device(device)
        rows = await streams.windows(session, start, MAX_WINDOWS, fleet=fleet, device=device)
    complete_from = start if len(rows) < MAX_WINDOWS else rows[-1].ended_at
    response.headers[api.REACHES_BACK_TO] = f"{complete_from:.3f}"
    return await asyncio.to_thread(_figures, rows, merged)


def _figures(windows: Sequence[WindowRow], merged: bool | None) -> list[api.Telemetry]:
    found = telemetry.add_up(windows, merged)
    for place in found.broken:
        _tell_once(place)
    return list(found.rows)


@lru_cache(maxsize=256)  # `watch` asks every few seconds: what was told of lately is not told again
def _tell_once(place: telemetry.Place) -> None:
    _log.warning(
        "Telemetry of %s, pipeline %s, model %s, does not add up, and is left out until it is forgotten.",
        place.device or "all devices together",
        place.pipeline,
        place.model.path,
    )


@router.post("/mqtt-certificates", status_code=201)
async def viewer(
    the: TheCloud, request: api.ViewerCertificate, operator: Operator
) -> api.ViewerCertificateIssued:
    """A client certificate `_viewer-<name>`: reads what devices publish, writes nothing."""
    parts = the.parts
    now, days = parts.clock(), parts.settings.certificates.viewer_days
    issued = await asyncio.to_thread(
        parts.pki.issue_viewer_certificate, request.csr_pem, request.name, days, now=now
    )
    async with parts.store.write() as session:
        row = ViewerRow(
            name=request.name,
            username=issued.subject,
            expires_at=issued.not_after,
            created_at=now,
            created_by=operator,
        )
        await operations.put_viewer(session, row)
        await operations.add_certificate(session, issued.serial, issued.subject, issued.not_after)
        await operations.record(session, now, operator, "mqtt-certificate", issued.subject)
    await access.apply(parts)
    return api.ViewerCertificateIssued(
        username=issued.subject,
        certificate_pem=issued.certificate_pem,
        server_ca_pem=parts.pki.server_ca_pem,
        host=parts.settings.broker_address.host,
        port=parts.settings.broker_address.port,
        expires_at=issued.not_after,
    )
