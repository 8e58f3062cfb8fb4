"""Commands as operators give them: who may be asked, how a command stands, and its way to the broker.

Invariants: a device has one open command at a time; its numbers only grow, also after a backup was restored;
a command is stored before it is sent, and one that the broker did not take is failed, not forgotten. It is
meant for the run of the agent that is online now. Whoever steals the cloud can have released models measured,
and nothing more.
"""

from __future__ import annotations

import asyncio
from typing import cast

from sqlalchemy.ext.asyncio import AsyncSession

from edgeward_cloud.enrolment import no_device
from edgeward_cloud.problem import Refused
from edgeward_cloud.services import Services
from edgeward_cloud.store import commands, devices, operations
from edgeward_cloud.store.models import CommandRow, DeviceRow
from edgeward_wire import api
from edgeward_wire.api import Standing
from edgeward_wire.command import FINAL, Bench, Command
from edgeward_wire.errors import Unavailable
from edgeward_wire.manifest import ModelRef

LIFE_S = 120.0
"""A device that is online takes a command at once; its clock may be off by less than this."""
GRACE_S = 60.0
"""For an answer that is on its way."""


def next_number(last: int, now: float) -> int:
    """As all our online versions: max(previous + 1, Unix seconds)."""
    return max(last + 1, int(now))


def standing(row: CommandRow, now: float) -> tuple[Standing, str]:
    """(state, reason) of a command now: silence ends it, too. Pure."""
    state = cast(Standing, row.state)
    if state in FINAL:
        return state, row.reason
    if state == "sent" and now > row.expires_at + GRACE_S:
        return "expired", "The device never answered it."
    if now <= row.expires_at + row.seconds + GRACE_S:
        return state, row.reason
    return "failed", "The device never said how it ended."


class Commanding:
    """Sends commands."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def send(self, device: str, request: api.CommandCreate, operator: str) -> CommandRow:
        """Ask a device for something.

        Raises:
            Refused: 404, or 409 when it cannot be asked now. Rejected: the model is not released.
            Unavailable: the broker did not take it.
        """
        await asyncio.to_thread(self._services.registry.manifest, request.model)
        async with self._services.store.write() as session:
            row = await self._add(session, device, request, operator)
        command = Command(
            n=row.n,
            boot_id=row.boot_id,
            issued_at=row.issued_at,
            expires_at=row.expires_at,
            what=Bench(model=request.model, threads=request.threads, seconds=request.seconds),
        )
        if await self._services.deliver([(device, "cmd", command)]):
            return row
        why = "The broker did not take the command."
        async with self._services.store.write() as session:
            await commands.give_up(session, device, why, n=row.n)
        raise Unavailable(why, "Is the broker running? Try again when `agent-ctl devices` shows it online.")

    async def _add(
        self, session: AsyncSession, device: str, request: api.CommandCreate, operator: str
    ) -> CommandRow:
        now = self._services.clock()
        asked = await devices.get(session, device)
        if asked is None:
            raise no_device(device)
        boot_id = _reachable(asked)
        for earlier in await commands.newest(session, device, commands.KEEP):
            if standing(earlier, now)[0] not in FINAL:
                raise Refused(
                    409,
                    f"Device {device} is at another command: {earlier.kind} of {_title(earlier)},"
                    f" by {earlier.created_by}.",
                    "Wait for its end; one runs at a time.",
                )
        row = CommandRow(
            device=device,
            n=next_number(await commands.last_number(session, device), now),
            boot_id=boot_id,
            kind=request.kind,
            model_path=request.model.path,
            model_sha256=request.model.sha256,
            seconds=request.seconds,
            state="sent",
            reason="",
            issued_at=now,
            expires_at=now + LIFE_S,
            created_by=operator[:200],
        )
        await commands.add(session, row)
        what = {"kind": request.kind, "n": row.n, "model": row.model_path, "sha256": row.model_sha256}
        await operations.record(session, now, operator, "command", f"device {device}", **what)
        return row


def _reachable(row: DeviceRow) -> str:
    """The run of the agent that can be asked.

    Raises:
        Refused: 409, it is not admitted or not online.
    """
    if row.admission != "accepted":
        raise Refused(409, f"Device {row.id} is {row.admission}.", f"Accept it: agent-ctl accept {row.id}")
    if not row.online or row.boot_id is None:
        raise Refused(
            409,
            f"Device {row.id} is offline: commands are not kept for later.",
            "Try again when `agent-ctl devices` shows it online.",
        )
    return row.boot_id


def _title(row: CommandRow) -> str:
    model = ModelRef(path=row.model_path, sha256=row.model_sha256)
    return f"{model.name} {model.version}"
