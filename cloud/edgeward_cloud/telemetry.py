"""Figures from stored windows: a row a series, and a row for all devices of the same model and plan.

Invariant: percentiles are those of merged histograms, never averages of percentiles. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeward_cloud.store.models import WindowRow
from edgeward_wire.api import Telemetry, figures
from edgeward_wire.histogram import Histogram, merge
from edgeward_wire.manifest import ModelRef
from edgeward_wire.telemetry import MAX_LABELS, STAGES, Stage

DEFAULT_SINCE_S = 600.0
MAX_WINDOWS = 10_000
"""Merging so many takes about a second of one core."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a row is of. Without a device and a source: of all of them."""

    device: str | None
    pipeline: str
    source: str | None
    model: ModelRef
    variant: str
    provider: str

    @property
    def order(self) -> tuple[str, ...]:
        """Rows are listed by it."""
        named = (self.device or "", self.pipeline, self.source or "", self.model.path, self.model.sha256)
        return (*named, self.variant, self.provider)

    def of_all(self) -> Place:
        """The row that merges this one with those of other devices and sources."""
        return Place(None, self.pipeline, None, self.model, self.variant, self.provider)


@dataclass(frozen=True, slots=True)
class Sums:
    """Windows added up."""

    windows: int
    frames: int
    dropped: int
    errors: int
    duration_s: float
    last: float
    stages: Mapping[Stage, Histogram]
    labels: Mapping[str, int]


def series(windows: Iterable[WindowRow]) -> dict[Place, Sums]:
    """The sums of each series, in order."""
    groups: dict[tuple[str, ...], list[WindowRow]] = {}
    for w in windows:
        plan = (w.model_path, w.model_sha256, w.variant, w.provider)
        groups.setdefault((w.device, w.pipeline, w.source, *plan), []).append(w)
    found = {_place(group[0]): _add_up(group) for group in groups.values()}
    return dict(sorted(found.items(), key=lambda item: item[0].order))


def merged(found: Mapping[Place, Sums]) -> dict[Place, Sums]:
    """The sums over all devices and sources of the same pipeline, model and plan, in order."""
    groups: dict[Place, list[Sums]] = {}
    for place, sums in found.items():
        groups.setdefault(place.of_all(), []).append(sums)
    together = {place: _combine(group) for place, group in groups.items()}
    return dict(sorted(together.items(), key=lambda item: item[0].order))


def row(place: Place, sums: Sums) -> Telemetry:
    """As it crosses the wire."""
    return Telemetry(
        device=place.device,
        pipeline=place.pipeline,
        source=place.source,
        model=place.model,
        variant=place.variant,
        provider=place.provider,
        windows=sums.windows,
        frames=sums.frames,
        dropped=sums.dropped,
        errors=sums.errors,
        fps=round(sums.frames / sums.duration_s, 3) if sums.duration_s else 0.0,
        last=sums.last,
        stages={stage: figures(histogram) for stage, histogram in sums.stages.items()},
        labels=dict(sorted(sums.labels.items(), key=lambda item: (-item[1], item[0]))[:MAX_LABELS]),
    )


def _place(window: WindowRow) -> Place:
    model = ModelRef(path=window.model_path, sha256=window.model_sha256)
    return Place(window.device, window.pipeline, window.source, model, window.variant, window.provider)


def _add_up(windows: Sequence[WindowRow]) -> Sums:
    return Sums(
        windows=len(windows),
        frames=sum(w.frames for w in windows),
        dropped=sum(w.dropped for w in windows),
        errors=sum(w.errors for w in windows),
        duration_s=sum(w.duration_s for w in windows),
        last=max(w.ended_at for w in windows),
        stages=_merge_stages([{k: _histogram(h) for k, h in w.stages.items()} for w in windows]),
        labels=_count(w.labels for w in windows),
    )


def _combine(parts: Sequence[Sums]) -> Sums:
    return Sums(
        windows=sum(p.windows for p in parts),
        frames=sum(p.frames for p in parts),
        dropped=sum(p.dropped for p in parts),
        errors=sum(p.errors for p in parts),
        duration_s=sum(p.duration_s for p in parts),
        last=max(p.last for p in parts),
        stages=_merge_stages([p.stages for p in parts]),
        labels=_count(p.labels for p in parts),
    )


def _merge_stages(parts: Sequence[Mapping[Any, Histogram]]) -> dict[Stage, Histogram]:
    merged_stages: dict[Stage, Histogram] = {}
    for stage in STAGES:
        if found := [part[stage] for part in parts if stage in part]:
            merged_stages[stage] = merge(found)
    return merged_stages


def _histogram(stored: dict[str, Any]) -> Histogram:
    # It was valid when it was stored; to check it again costs more than to merge it.
    return Histogram.model_construct(**stored)


def _count(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for label, n in part.items():
            total[label] = total.get(label, 0) + n
    return total
