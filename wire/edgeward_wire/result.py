"""What the model saw: throttled, QoS 0, for people who watch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edgeward_wire.document import Open
from edgeward_wire.identifiers import ModelName, PipelineName, ShortText, SourceName, UnixTime, Version


class Seen(Open):
    """One class with its score."""

    label: ShortText
    index: int = Field(ge=0)
    score: float = Field(ge=0, le=1)


class ResultMessage(Open):
    """The newest result of one source."""

    schema_: Literal["edgeward.result/1"] = Field(default="edgeward.result/1", alias="schema")
    pipeline: PipelineName
    source: SourceName
    time: UnixTime
    model: ModelName
    version: Version
    latency_ms: float = Field(ge=0)
    """Capture to result."""
    top: tuple[Seen, ...] = Field(max_length=10)
