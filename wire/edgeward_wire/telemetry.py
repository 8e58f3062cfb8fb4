"""Telemetry windows: what one source of one pipeline did in a stretch of time.

(device, boot_id, stream, seq) makes inserts idempotent. When a device's spool is full it merges its
oldest windows: such a window carries the first and the last seq that it stands for.
Latencies are measured on the monotonic clock; `start` is the wall clock at the window's end minus its
duration, and `clock` says whether that could be trusted.
Invariant: thousands of windows add up to valid figures, whatever each of them says: one counts far less
than `Count` holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgeward_wire.document import Open
from edgeward_wire.histogram import Histogram, merge
from edgeward_wire.identifiers import (
    BootId,
    Count,
    Key,
    PipelineName,
    ShortText,
    SourceName,
    UnixTime,
    VariantName,
)
from edgeward_wire.manifest import ModelRef

Stage = Literal["capture", "decode", "preprocess", "inference", "postprocess", "end_to_end"]
STAGES: tuple[Stage, ...] = ("capture", "decode", "preprocess", "inference", "postprocess", "end_to_end")
MAX_LABELS = 16
MAX_WINDOW_BYTES = 64 << 10
SHORTEST_S = 1e-3
"""A shorter window is none: it stays open."""

MAX_WINDOW_COUNT = 1 << 39
MAX_WINDOW_SUM_MS = 1e15
WindowCount = Annotated[int, Field(ge=0, le=MAX_WINDOW_COUNT)]


class Measures(Open):
    """What the runner counted for one source of one pipeline in one window."""

    pipeline: PipelineName
    source: SourceName
    model: ModelRef
    variant: VariantName
    provider: Key
    start: UnixTime
    duration_s: float = Field(ge=SHORTEST_S, le=1e7)
    frames: WindowCount
    dropped: WindowCount = 0
    """Frames that the slot replaced before inference took them."""
    errors: WindowCount = 0
    stages: dict[Stage, Histogram] = Field(default_factory=dict)
    labels: dict[ShortText, WindowCount] = Field(default_factory=dict, max_length=MAX_LABELS)
    """How often each of the most frequent top results came."""
    temperature_c: float | None = None
    """The device's hottest zone when the window closed; of merged windows, the hottest of them."""
    throttled: bool | None = None
    """Whether the device was slowed down when the window closed; of merged windows, any of them."""

    @model_validator(mode="after")
    def _of_one_window(self) -> Measures:
        # Here and not in `Histogram`: one that merges many windows may hold more.
        for stage, histogram in self.stages.items():
            if histogram.count > MAX_WINDOW_COUNT or histogram.sum > MAX_WINDOW_SUM_MS:
                raise ValueError(f"{stage} counts more than a window can")
        return self

    @property
    def fps(self) -> float:
        """Frames through inference per second."""
        return self.frames / self.duration_s


class Window(Measures):
    """`Measures` with their place in the device's stream."""

    schema_: Literal["edgeward.telemetry/1"] = Field(default="edgeward.telemetry/1", alias="schema")
    boot_id: BootId
    seq: Count
    """The last seq that this window stands for."""
    first_seq: Count
    clock: Literal["trusted", "untrusted"] = "trusted"

    @model_validator(mode="after")
    def _ordered(self) -> Window:
        if self.first_seq > self.seq:
            raise ValueError("first_seq is above seq")
        return self


def same_series(a: Measures, b: Measures) -> bool:
    """Whether two windows may be merged: same pipeline, source, model, variant and provider."""
    return (a.pipeline, a.source, a.model, a.variant, a.provider) == (
        b.pipeline,
        b.source,
        b.model,
        b.variant,
        b.provider,
    )


def coarser(windows: Sequence[Window]) -> Window:
    """One window for several of the same series and boot; nothing but resolution in time is lost."""
    first, last = windows[0], windows[-1]
    labels: dict[str, int] = {}
    for window in windows:
        for label, n in window.labels.items():
            labels[label] = labels.get(label, 0) + n
    kept = sorted(labels.items(), key=lambda item: -item[1])[:MAX_LABELS]
    stages = {stage: merge(w.stages[stage] for w in windows if stage in w.stages) for stage in STAGES}
    return first.model_copy(
        update={
            "seq": last.seq,
            "duration_s": sum(w.duration_s for w in windows),
            "frames": sum(w.frames for w in windows),
            "dropped": sum(w.dropped for w in windows),
            "errors": sum(w.errors for w in windows),
            "stages": {stage: h for stage, h in stages.items() if h.count},
            "labels": dict(kept),
            "temperature_c": max(
                (w.temperature_c for w in windows if w.temperature_c is not None), default=None
            ),
            "throttled": any(known)
            if (known := [w.throttled for w in windows if w.throttled is not None])
            else None,
            "clock": "untrusted" if any(w.clock == "untrusted" for w in windows) else "trusted",
        }
    )
