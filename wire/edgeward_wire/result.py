"""What the model saw: throttled, QoS 0, for people who watch.

Which part is filled depends on the task: `top` for classes (of a picture or of sound), `boxes`, `areas`,
`speech`, or `values`. Additive within `edgeward.result/1`: a reader of the first release finds `top` as ever.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edgeward_wire.document import Open
from edgeward_wire.identifiers import Key, ModelName, PipelineName, ShortText, SourceName, UnixTime, Version

MAX_BOXES = 300
MAX_AREAS = 64
MAX_VALUES = 16

Why = Literal["interval", "change", "every"]
"""What made a device send it: time was up, what it says is new, or it sends all."""


class Seen(Open):
    """One class with its score."""

    label: ShortText
    index: int = Field(ge=0)
    score: float = Field(ge=0, le=1)


class Box(Seen):
    """One object. Corners as shares of the frame's width and height: 0, 0 is its upper left corner."""

    x1: float = Field(ge=0, le=1)
    y1: float = Field(ge=0, le=1)
    x2: float = Field(ge=0, le=1)
    y2: float = Field(ge=0, le=1)
    zones: tuple[Key, ...] = Field(default=(), max_length=16)
    """The zones of its source that hold the middle of its lower edge."""


class Area(Open):
    """How much of the frame one class covers."""

    label: ShortText
    index: int = Field(ge=0)
    share: float = Field(ge=0, le=1)


class Speech(Open):
    """Whether somebody speaks."""

    active: bool
    score: float = Field(ge=0, le=1)
    since: UnixTime
    """When it began, or ended."""


class Values(Open):
    """One output as it came: its shape, and its first numbers."""

    name: Key
    shape: tuple[int, ...] = Field(max_length=8)
    first: tuple[float, ...] = Field(max_length=MAX_VALUES)


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
    task: Key = "classification"
    why: Why = "interval"
    top: tuple[Seen, ...] = Field(default=(), max_length=10)
    boxes: tuple[Box, ...] = Field(default=(), max_length=MAX_BOXES)
    areas: tuple[Area, ...] = Field(default=(), max_length=MAX_AREAS)
    speech: Speech | None = None
    values: tuple[Values, ...] = Field(default=(), max_length=32)


def headline(result: ResultMessage) -> str:
    """What was seen, in a few words."""
    if result.speech is not None:
        speech = result.speech
        lasting = max(0.0, result.time - speech.since)
        return f"{'speech' if speech.active else 'silence'} {speech.score:.2f} for {lasting:.1f} s"
    if result.top:
        return f"{result.top[0].label} {result.top[0].score:.2f}"
    if result.areas:
        return ", ".join(f"{area.label} {100 * area.share:.0f} %" for area in result.areas[:3])
    if result.values:
        return ", ".join(f"{one.name} {one.shape}" for one in result.values[:4])
    counts: dict[str, int] = {}
    for box in result.boxes:
        counts[box.label] = counts.get(box.label, 0) + 1
    return ", ".join(f"{count} {label}" for label, count in counts.items()) or "nothing"
