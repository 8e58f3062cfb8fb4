"""Events: what happened on a device, once, in order; spooled until the cloud has stored them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from edgeward_wire.document import Open
from edgeward_wire.identifiers import BootId, Count, PipelineName, Reason, ShortText, UnixTime
from edgeward_wire.reported import State, Update

MAX_EVENT_BYTES = 64 << 10


class StateChanged(Open):
    """A pipeline's update entered a state."""

    kind: Literal["state"] = "state"
    pipeline: PipelineName
    state: State
    update: Update


class Finished(Open):
    """An update ended; `update.result`, `reason`, `numbers` and `verdict` say how."""

    kind: Literal["finished"] = "finished"
    pipeline: PipelineName
    update: Update


class Fault(Open):
    """Something stopped working, or works again (`recovered`)."""

    kind: Literal["fault"] = "fault"
    subject: ShortText
    """What: source:NAME, runner:PIPELINE, registry, spool, disk, throttling."""
    recovered: bool = False
    detail: Reason = ""


Happening = Annotated[StateChanged | Finished | Fault, Field(discriminator="kind")]


class Event(Open):
    """One happening in the device's event stream."""

    schema_: Literal["edgeward.event/1"] = Field(default="edgeward.event/1", alias="schema")
    boot_id: BootId
    seq: Count
    time: UnixTime
    what: Happening
