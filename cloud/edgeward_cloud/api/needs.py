"""What routes need: the parts of the cloud, and proof of who asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from edgeward_cloud.auth import unauthorised
from edgeward_cloud.commanding import Commanding
from edgeward_cloud.deployment import Deployment
from edgeward_cloud.director import Director
from edgeward_cloud.enrolment import Enrolment
from edgeward_cloud.problem import Refused
from edgeward_cloud.services import Services
from edgeward_cloud.store import devices

_operator_scheme = HTTPBearer(scheme_name="operator", description="An operator's token.", auto_error=False)
_device_scheme = HTTPBearer(
    scheme_name="device", description="An ES256 JWT by the device's key.", auto_error=False
)


@dataclass(frozen=True)
class Cloud:
    """The parts, and what is built on them."""

    parts: Services
    director: Director
    enrolment: Enrolment
    deployment: Deployment
    commanding: Commanding

    @staticmethod
    def of(parts: Services) -> Cloud:
        """Build it."""
        director = Director(parts.store, parts.registry, parts.deliver)
        return Cloud(
            parts, director, Enrolment(parts, director), Deployment(parts, director), Commanding(parts)
        )


def cloud(request: Request) -> Cloud:
    """The cloud that this application serves."""
    return cast(Cloud, request.app.state.cloud)


TheCloud = Annotated[Cloud, Depends(cloud)]
_Given = Annotated["HTTPAuthorizationCredentials | None", Depends(_operator_scheme)]
_GivenByDevice = Annotated["HTTPAuthorizationCredentials | None", Depends(_device_scheme)]


def operator(the: TheCloud, given: _Given) -> str:
    """The operator who asks.

    Raises:
        Refused: 401.
    """
    if given is None:
        raise unauthorised("An operator's token is needed.", "Send `Authorization: Bearer TOKEN`.")
    name = the.parts.operators.name_of(given.credentials)
    if name is None:
        raise unauthorised(
            "The operator's token is not known.", "Ask the cloud's administrator: edgeward-cloud token"
        )
    return name


async def device(the: TheCloud, given: _GivenByDevice) -> str:
    """The admitted device that asks.

    Raises:
        Refused: 401, 403 when it is not admitted, 429.
    """
    if given is None:
        raise unauthorised("A device's token is needed.", "Send `Authorization: Bearer JWT`.")
    claimed = the.parts.device_tokens.claimed_device(given.credentials)
    async with the.parts.store.read() as session:
        row = await devices.get(session, claimed)
    if row is None:
        raise unauthorised(f"No device {claimed} is enrolled.", "Enrol it: edgeward-agent enroll")
    the.parts.device_tokens.check(given.credentials, row.id, row.public_key_pem, the.parts.clock())
    if row.admission != "accepted":
        raise Refused(403, f"Device {row.id} is {row.admission}.", f"agent-ctl accept {row.id}")
    return row.id


async def reader(the: TheCloud, given: _GivenByDevice) -> str:
    """A device or an operator: whoever may fetch blobs.

    Raises:
        Refused: as for either.
    """
    if given is not None:
        name = the.parts.operators.name_of(given.credentials)
        if name is not None:
            return name
    return await device(the, given)


Operator = Annotated[str, Depends(operator)]
DeviceId = Annotated[str, Depends(device)]
Reader = Annotated[str, Depends(reader)]
