"""The desired state of one device, signed by the director as `devices/<id>.json`.

The cloud computes who is in which wave; a device only follows its own document. Remote `config` never
changes sources, pipelines' GStreamer strings, bind addresses or trust anchors: those are local files.
A pipeline without a row goes on serving what it has.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edgeward_wire.document import Signed
from edgeward_wire.identifiers import DeviceId, FleetName, Key, PipelineName, Revision, ShortText
from edgeward_wire.manifest import ModelRef

MAX_ASSIGNMENT_BYTES = 64 << 10


class PipelineAssignment(Signed):
    """What one pipeline should run. A new `attempt` overrides the denylist for the same model."""

    model: ModelRef
    rollout: Key
    attempt: int = Field(default=1, ge=1, le=1 << 31)
    probation_s: float = Field(default=300, ge=0, le=86_400)


class RemoteConfig(Signed):
    """The settings that the cloud may change; absent means the device's own."""

    telemetry_window_s: float | None = Field(default=None, ge=1, le=3600)
    poll_interval_s: float | None = Field(default=None, ge=1, le=86_400)
    result_interval_s: float | None = Field(default=None, ge=0.1, le=3600)


class Assignment(Signed):
    """The desired state of one device. `revision` only grows."""

    schema_: Literal["edgeward.assignment/1"] = Field(default="edgeward.assignment/1", alias="schema")
    device: DeviceId
    fleet: FleetName
    labels: dict[Key, ShortText] = Field(default_factory=dict, max_length=64)
    revision: Revision
    pipelines: dict[PipelineName, PipelineAssignment] = Field(default_factory=dict, max_length=16)
    config: RemoteConfig = RemoteConfig()
