"""What a device says of itself in retained messages: status (also its will) and birth."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edgeward_wire.document import Open
from edgeward_wire.identifiers import BootId, DeviceId, Key, PipelineName, ShortText, SourceName, UnixTime


class Status(Open):
    """`online` on every connect, `offline` as the will and on an orderly stop."""

    schema_: Literal["edgeward.status/1"] = Field(default="edgeward.status/1", alias="schema")
    state: Literal["online", "offline"]
    boot_id: BootId


class Birth(Open):
    """Who this device is: hardware, versions, and the sources of its pipelines."""

    schema_: Literal["edgeward.birth/1"] = Field(default="edgeward.birth/1", alias="schema")
    device: DeviceId
    boot_id: BootId
    time: UnixTime
    agent: ShortText
    """The agent's version."""
    arch: Key
    cores: int = Field(ge=1, le=4096)
    memory_mb: float = Field(ge=0)
    os: ShortText = ""
    board: ShortText = ""
    isa: tuple[Key, ...] = Field(default=(), max_length=64)
    runtime: dict[Key, ShortText] = Field(default_factory=dict, max_length=32)
    """Installed distributions that matter: onnxruntime, numpy, opencv."""
    power_mode: ShortText = ""
    """What decides clocks: `nvpmodel 15W`, `cpufreq performance`."""
    pipelines: dict[PipelineName, tuple[SourceName, ...]] = Field(default_factory=dict, max_length=16)
