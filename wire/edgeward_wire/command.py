"""`down/cmd/{n}` and `up/response/{n}`: one thing that an operator wants of one device, and how it went.

A command is no authority. It names a model by path and digest; the device believes only the registry's
signatures. It is meant for one run of the agent (`boot_id`) and has a number that only grows, so that a
copy of it does nothing twice, and nothing after a restart.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgeward_wire.document import Open
from edgeward_wire.identifiers import BootId, Key, Reason, ShortText, UnixTime
from edgeward_wire.manifest import ModelRef
from edgeward_wire.verdict import Verdict

MAX_COMMAND_BYTES = 8 << 10
MAX_RESPONSE_BYTES = 96 << 10
MAX_LIFE_S = 3600.0
MAX_SECONDS = 3600.0
SECONDS = 900.0
_SHORT = 160
"""Of a reason, where the whole response would be too long."""

CommandState = Literal["accepted", "running", "done", "refused", "failed", "expired"]
FINAL: frozenset[CommandState] = frozenset({"done", "refused", "failed", "expired"})
Phase = Literal["verifying", "downloading", "waiting", "measuring"]

Number = Annotated[int, Field(ge=1, lt=10**15)]
"""A command's: per device, and only growing."""


class Bench(Open):
    """Measure every plan of a released model. Nothing is switched; what serves goes on serving."""

    kind: Literal["bench"] = "bench"
    model: ModelRef
    threads: int | None = Field(default=None, ge=1, le=1024)
    """None: the device's own budget."""
    seconds: float = Field(default=SECONDS, ge=5, le=MAX_SECONDS)
    """From acceptance to the end, download and waiting included."""


class Command(Open):
    """What the cloud asks for. `what` is the place for later kinds."""

    schema_: Literal["edgeward.command/1"] = Field(default="edgeward.command/1", alias="schema")
    n: Number
    boot_id: BootId
    """The run of the agent that it is meant for; any other refuses it."""
    issued_at: UnixTime
    expires_at: UnixTime
    """When it is too late to begin."""
    what: Bench

    @model_validator(mode="after")
    def _bounded(self) -> Command:
        if not 0 < self.expires_at - self.issued_at <= MAX_LIFE_S:
            raise ValueError(f"must expire within {MAX_LIFE_S:g} s of its issue")
        return self


class MachineFacts(Open):
    """What a measurement was made on: numbers without it say nothing."""

    arch: Key
    cores: int = Field(ge=1, le=4096)
    memory_mb: float = Field(ge=0)
    cpu: ShortText = ""
    board: ShortText = ""
    os: ShortText = ""
    isa: tuple[Key, ...] = Field(default=(), max_length=64)
    power_mode: ShortText = ""
    temperature_before_c: float | None = None
    """The hottest zone, where there is a sensor."""
    temperature_after_c: float | None = None
    threads: int = Field(default=1, ge=1, le=1024)
    """The budget that the plans were made for."""
    beside: tuple[ShortText, ...] = Field(default=(), max_length=16)
    """What the device went on serving meanwhile."""
    agent: ShortText = ""


class CommandResponse(Open):
    """How far a command is. A final state comes once and does not change."""

    schema_: Literal["edgeward.response/1"] = Field(default="edgeward.response/1", alias="schema")
    n: Number
    boot_id: BootId
    time: UnixTime = 0
    state: CommandState
    phase: Phase | None = None
    progress: float = Field(default=0, ge=0, le=1)
    """Within the phase."""
    detail: ShortText = ""
    reason: Reason = ""
    """Why it was refused, failed or expired; why no plan passed."""
    verdict: Verdict | None = None
    """Every plan with its numbers, when it is done."""
    machine: MachineFacts | None = None
    took_s: float = Field(default=0, ge=0)

    @property
    def final(self) -> bool:
        """Whether nothing more comes."""
        return self.state in FINAL


def fitted(response: CommandResponse) -> CommandResponse:
    """The same within `MAX_RESPONSE_BYTES`: reasons of plans are cut first, then the last plans go."""
    verdict = response.verdict
    if verdict is None or len(response.to_bytes()) <= MAX_RESPONSE_BYTES:
        return response
    plans = tuple(o.model_copy(update={"reason": o.reason[:_SHORT]}) for o in verdict.plans)
    while True:
        shorter = verdict.model_copy(update={"plans": plans})
        response = response.model_copy(update={"verdict": shorter})
        if not plans or len(response.to_bytes()) <= MAX_RESPONSE_BYTES:
            return response
        plans = plans[: len(plans) * 3 // 4]
