"""From rows and decisions to the types that cross the wire."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from edgeward_cloud.commanding import standing
from edgeward_cloud.rollout import Rollout, Target
from edgeward_cloud.store.models import CommandRow, DeviceRow
from edgeward_wire import api
from edgeward_wire.command import CommandResponse
from edgeward_wire.document import Document, faults
from edgeward_wire.enrolment import Admission
from edgeward_wire.manifest import ModelRef
from edgeward_wire.reported import Reported
from edgeward_wire.result import ResultMessage
from edgeward_wire.status import Birth

D = TypeVar("D", bound=Document)
_log = logging.getLogger(__name__)


def device_view(row: DeviceRow, results: tuple[ResultMessage, ...]) -> api.Device:
    """A device as operators see it."""
    return api.Device(
        id=row.id,
        fleet=row.fleet,
        admission=cast(Admission, row.admission),
        online=row.online,
        last_seen=row.last_seen,
        certificate_expires_at=row.certificate_expires_at,
        certificate_revoked=row.certificate_pem is None and row.certificate_expires_at is not None,
        birth=document(Birth, row.birth),
        reported=document(Reported, row.reported),
        results=results,
    )


def rollout_view(rollout: Rollout, online: Collection[str], blocked: Mapping[str, str]) -> api.Rollout:
    """A rollout as operators see it. One for a single device names no fleet.

    `blocked`: why a device cannot follow the registry; the reason of one that has not taken the rollout up.
    """
    targets = (
        api.TargetProgress(
            device=t.device,
            online=t.device in online,
            state=t.state,
            result=t.result,
            reason=t.reason or (blocked.get(t.device, "") if _waits(t) else ""),
            progress=t.progress,
            detail=t.detail,
            numbers=dict(t.numbers),
            variant=t.variant,
            provider=t.provider,
        )
        for t in rollout.targets
    )
    return api.Rollout(
        id=rollout.id,
        fleet=None if rollout.device else rollout.fleet,
        pipeline=rollout.pipeline,
        model=rollout.model,
        state=rollout.state,
        created_at=rollout.created_at,
        created_by=rollout.created_by,
        revision=rollout.revision,
        probation_s=rollout.probation_s,
        targets=tuple(targets),
    )


def command_view(row: CommandRow, *, online: bool, now: float) -> api.CommandStatus:
    """A command as operators see it."""
    state, reason = standing(row, now)
    return api.CommandStatus(
        device=row.device,
        n=row.n,
        kind=row.kind,
        model=ModelRef(path=row.model_path, sha256=row.model_sha256),
        state=state,
        reason=reason,
        issued_at=row.issued_at,
        expires_at=row.expires_at,
        created_by=row.created_by,
        online=online,
        response=document(CommandResponse, row.response),
    )


def _waits(target: Target) -> bool:
    return target.result is None and target.state == "pending"


def document(kind: type[D], stored: dict[str, Any] | None) -> D | None:
    """A stored document. One that an older cloud stored and this one does not understand is left out."""
    if stored is None:
        return None
    try:
        return kind.model_validate(stored)
    except ValidationError as error:
        _log.warning("A stored %s is not understood: %s", kind.__name__, faults(error))
        return None
