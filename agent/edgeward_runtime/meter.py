"""Counts what one model does for each source, and closes it into windows.

One meter belongs to one model on one plan: a window never mixes two. The inference thread records, any
thread may close. Labels are bounded: past `_MAX_LABELS` different ones, new ones are not counted.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeward_wire.histogram import Histogram, Recorder
from edgeward_wire.manifest import ModelRef
from edgeward_wire.telemetry import MAX_LABELS, SHORTEST_S, STAGES, Measures, Stage
from edgeward_wire.verdict import Plan

_MAX_LABELS = 1024


@dataclass(frozen=True)
class Series:
    """What all windows of a meter have in common."""

    pipeline: str
    sources: tuple[str, ...]
    model: ModelRef
    plan: Plan


class _Count:
    """One source's window in the making."""

    def __init__(self) -> None:
        self.stages: dict[Stage, Recorder] = {stage: Recorder() for stage in STAGES}
        self.labels: dict[str, int] = {}
        self.frames = 0
        self.errors = 0


class Meter:
    """The windows of one model."""

    def __init__(self, series: Series, now: float) -> None:
        """`now` is monotonic, in seconds."""
        self._series = series
        self._since = now
        self._lock = threading.Lock()
        self._counts = [_Count() for _ in series.sources]

    def record(self, source: int, stages: Mapping[Stage, float], labels: Sequence[str]) -> None:
        """One frame: milliseconds of each stage, and what is counted of its answer."""
        count = self._counts[source]
        with self._lock:
            count.frames += 1
            for stage, took in stages.items():
                count.stages[stage].record(took)
            for label in labels:
                if label in count.labels or len(count.labels) < _MAX_LABELS:
                    count.labels[label] = count.labels.get(label, 0) + 1

    def record_error(self, source: int) -> None:
        """One frame that failed."""
        with self._lock:
            self._counts[source].errors += 1

    def close(self, now: float, wall: float, dropped: Sequence[int]) -> tuple[Measures, ...]:
        """Each source's window since the last one; empty if no time has passed. `wall`: Unix seconds."""
        with self._lock:
            duration = now - self._since
            if duration < SHORTEST_S:
                return ()
            self._since = now
            return tuple(
                self._measures(name, count, lost, duration, wall)
                for name, count, lost in zip(self._series.sources, self._counts, dropped, strict=True)
            )

    def _measures(self, name: str, count: _Count, dropped: int, duration: float, wall: float) -> Measures:
        series = self._series
        stages: dict[Stage, Histogram] = {}
        for stage, recorder in count.stages.items():
            taken = recorder.take()
            if taken.count:
                stages[stage] = taken
        most = sorted(count.labels.items(), key=lambda item: (-item[1], item[0]))[:MAX_LABELS]
        measures = Measures(
            pipeline=series.pipeline,
            source=name,
            model=series.model,
            variant=series.plan.variant,
            provider=series.plan.provider,
            start=max(0.0, wall - duration),
            duration_s=duration,
            frames=count.frames,
            dropped=dropped,
            errors=count.errors,
            stages=stages,
            labels=dict(most),
        )
        count.labels, count.frames, count.errors = {}, 0, 0
        return measures
