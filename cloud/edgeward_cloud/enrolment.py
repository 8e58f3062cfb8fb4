"""How a device becomes one of ours: token, key, admission, certificate.

Invariants: a device's id belongs to the first key that enrolled with it, until an operator rejects the
device, and nothing that the rejected one ran or was to run passes to the next key; the same key asking again
gets its certificate again and uses nothing up; what is wrong with a token is told only to who holds it. An
admitted device has a signed assignment before it has its certificate.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from typing import cast

from sqlalchemy.ext.asyncio import AsyncSession

from edgeward_cloud import access, rollout
from edgeward_cloud.director import Director
from edgeward_cloud.operators import token_digest
from edgeward_cloud.pki import Issued, csr_public_key_pem
from edgeward_cloud.problem import Refused
from edgeward_cloud.services import Services
from edgeward_cloud.store import devices, fleets, operations, rollouts, tokens
from edgeward_cloud.store.models import DeviceRow, EnrolTokenRow
from edgeward_wire.api import TokenCreate, TokenCreated
from edgeward_wire.enrolment import Admission, EnrolmentString, EnrolRequest, EnrolResponse

PENDING_RETRY_S = 10.0
_NEW_TOKEN = "Ask an operator for a new one: agent-ctl enroll-token"


def judge(token: EnrolTokenRow | None, now: float) -> EnrolTokenRow:
    """The token, if it may still be used.

    Raises:
        Refused: 403, unknown, expired or used up.
    """
    if token is None:
        raise Refused(403, "The enrolment token is not known.", _NEW_TOKEN)
    if token.expires_at <= now:
        raise Refused(403, "The enrolment token has expired.", _NEW_TOKEN)
    if token.uses_left < 1:
        raise Refused(403, "The enrolment token is used up.", _NEW_TOKEN)
    return token


class Enrolment:
    """Enrolment, admission and renewal."""

    def __init__(self, services: Services, director: Director) -> None:
        self._services = services
        self._director = director

    async def new_token(self, request: TokenCreate, operator: str) -> TokenCreated:
        """Make an enrolment string; only its hash stays here.

        Raises:
            Refused: 404, there is no such fleet.
        """
        now, token = self._services.clock(), secrets.token_urlsafe(32)
        expires_at = now + request.ttl_s
        async with self._services.store.write() as session:
            await require_fleet(session, request.fleet)
            await tokens.prune(session, now)
            row = EnrolTokenRow(
                sha256=token_digest(token),
                fleet=request.fleet,
                uses_left=request.uses,
                expires_at=expires_at,
                preauthorised=request.preauthorised,
                created_at=now,
                created_by=operator,
            )
            await tokens.add(session, row)
            detail = request.model_dump(exclude={"fleet"})
            await operations.record(session, now, operator, "enroll-token", request.fleet, **detail)
        string = EnrolmentString(
            url=self._services.settings.url,
            ca_sha256=self._services.pki.server_ca_sha256,
            root_sha256=self._services.registry.root_sha256,
            token=token,
        )
        return TokenCreated(
            enrolment=string.encode(), fleet=request.fleet, uses=request.uses, expires_at=expires_at
        )

    async def enrol(self, request: EnrolRequest) -> EnrolResponse:
        """Admit a device, or say that it must wait.

        Raises:
            Rejected: the CSR is not valid. Refused: 403 or 409, says why.
        """
        key_pem = csr_public_key_pem(request.csr_pem)
        async with self._services.store.read() as session:
            row = await devices.get(session, request.device)
        if row is None or row.public_key_pem != key_pem:
            row = await self._register(request, key_pem)
        if row.admission == "rejected":
            raise Refused(
                403,
                f"Device {row.id} was rejected by an operator.",
                f"Ask for it to be accepted: agent-ctl accept {row.id}",
            )
        if row.admission == "pending":
            return self._response(row, None)
        await self._director.sync([row.id])
        return self._response(row, await self._certificate(row, request.csr_pem))

    async def renew(self, device: str, csr_pem: str) -> EnrolResponse:
        """A new certificate for an admitted device that has proven who it is.

        Raises:
            Refused: 409, the request is for another key than the device's.
        """
        async with self._services.store.read() as session:
            row = await devices.get(session, device)
        if row is None or row.public_key_pem != csr_public_key_pem(csr_pem):
            raise Refused(409, f"Device {device} is enrolled with another key.", "Enrol it anew.")
        return self._response(row, await self._issue(row, csr_pem))

    async def admit(self, device: str, admission: Admission, operator: str) -> None:
        """Accept or reject a device; a rejected one loses its certificates at once, and for good.

        Raises:
            Refused: 404, there is no such device.
        """
        now = self._services.clock()
        async with self._services.store.write() as session:
            row = await devices.get(session, device)
            if row is None:
                raise no_device(device)
            row.admission = admission
            await operations.record(session, now, operator, admission, device)
            if admission == "accepted":
                await _join(session, row)
            else:
                await _expel(session, row, now)
        await access.apply(self._services)
        if admission == "accepted":
            await self._director.sync([device])

    async def _register(self, request: EnrolRequest, key_pem: str) -> DeviceRow:
        """A new device, or a new key for one that was rejected: needs a good token, and uses it."""
        now, digest = self._services.clock(), token_digest(request.token)
        async with self._services.store.write() as session:
            token = judge(await tokens.get(session, digest), now)
            row = await devices.get(session, request.device)
            if row is not None and row.public_key_pem == key_pem:
                return row  # two requests of one device at the same moment
            if row is not None and row.admission != "rejected":
                raise Refused(
                    409,
                    f"There is another device with the id {row.id} already.",
                    f"Choose another id, or give this one up first: agent-ctl reject {row.id}",
                )
            await tokens.take_use(session, digest)
            anew = row is not None
            row = row or DeviceRow(id=request.device, revision=0, online=False)
            row.fleet = token.fleet
            row.admission = "accepted" if token.preauthorised else "pending"
            row.public_key_pem = key_pem
            row.key_fingerprint = hashlib.sha256(key_pem.encode()).hexdigest()
            row.certificate_pem, row.certificate_expires_at = None, None
            row.enrolled_at, row.birth, row.reported, row.boot_id = now, None, None, None
            session.add(row)
            await session.flush()
            if anew:
                await rollouts.retire(session, row.id)
            if row.admission == "accepted":
                await _join(session, row)
            await operations.record(session, now, f"token by {token.created_by}", "enrol", row.id)
        if anew:
            await access.apply(self._services)
        return row

    async def _certificate(self, row: DeviceRow, csr_pem: str) -> str:
        """The certificate that the device has, while it is young; else a new one."""
        half = self._services.settings.certificates.device_days * 86_400 / 2
        fresh = row.certificate_expires_at is not None and (
            row.certificate_expires_at - self._services.clock() > half
        )
        if row.certificate_pem is not None and fresh:
            return row.certificate_pem
        return await self._issue(row, csr_pem)

    async def _issue(self, row: DeviceRow, csr_pem: str) -> str:
        now = self._services.clock()
        days = self._services.settings.certificates.device_days
        issued: Issued = await asyncio.to_thread(
            self._services.pki.issue_device_certificate, csr_pem, row.id, days, now=now
        )
        async with self._services.store.write() as session:
            await operations.prune_certificates(session, now)
            await operations.add_certificate(session, issued.serial, row.id, issued.not_after)
            fields = {
                "certificate_pem": issued.certificate_pem,
                "certificate_expires_at": issued.not_after,
            }
            await devices.change(session, row.id, fields)
        return issued.certificate_pem

    def _response(self, row: DeviceRow, certificate_pem: str | None) -> EnrolResponse:
        return EnrolResponse(
            admission=cast(Admission, row.admission),
            device=row.id,
            fleet=row.fleet,
            retry_after_s=PENDING_RETRY_S,
            certificate_pem=certificate_pem,
            broker=self._services.settings.broker_address,
            server_time=self._services.clock(),
        )


async def _join(session: AsyncSession, row: DeviceRow) -> None:
    """Give a newly admitted device what its fleet runs."""
    for joined in rollout.for_newcomer(await rollouts.history(session, row.fleet)):
        await rollouts.add_target(session, joined, row.id)


async def _expel(session: AsyncSession, row: DeviceRow, now: float) -> None:
    row.online, row.certificate_pem = False, None  # that it had one stays: see `device_view`
    await operations.revoke(session, row.id, now)
    for before in await rollouts.running(session, row.fleet):
        await rollouts.save(session, before, rollout.leave(before, row.id, now))


async def require_fleet(session: AsyncSession, name: str) -> None:
    """Raises Refused (404) naming the fleets that there are."""
    if await fleets.exists(session, name):
        return
    names = [known for known, _, _ in await fleets.counts(session)]
    there = f"There are: {', '.join(names[:20])}." if names else "There is none yet."
    raise Refused(404, f"There is no fleet {name}. {there}", f"Make it: agent-ctl fleets create {name}")


def no_device(device: str) -> Refused:
    """404 for a device."""
    return Refused(404, f"There is no device {device}.", "See which there are: agent-ctl devices")
