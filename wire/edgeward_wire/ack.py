"""`down/ack`: the cloud has stored a stream up to `seq`. Stored, not merely at the broker."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edgeward_wire.document import Open
from edgeward_wire.identifiers import BootId, Count

Stream = Literal["telemetry", "event"]


class Ack(Open):
    """All of (boot_id, stream) up to and including each listed seq may be forgotten by the device."""

    schema_: Literal["edgeward.ack/1"] = Field(default="edgeward.ack/1", alias="schema")
    boot_id: BootId
    stream: Stream
    seqs: tuple[Count, ...] = Field(min_length=1, max_length=1000)
    """The seqs that were stored, each by its message's `seq`."""


class Refresh(Open):
    """`down/refresh`: look at the registry again. Never authority, only a hint."""

    schema_: Literal["edgeward.refresh/1"] = Field(default="edgeward.refresh/1", alias="schema")
    revision: Count = 0
