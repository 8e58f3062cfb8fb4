"""Figures from stored windows: a row a series, and a row for all devices of the same model and plan.

Invariants: percentiles are those of merged histograms, never averages of percentiles; what one device stored
cannot take the figures of the others away. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from edgeward_cloud.store.models import WindowRow
from edgeward_wire.api import Telemetry, figures
from edgeward_wire.histogram import Histogram, merge
from edgeward_wire.manifest import ModelRef
from edgeward_wire.telemetry import MAX_LABELS, STAGES, Stage

DEFAULT_SINCE_S = 600.0
MAX_WINDOWS = 10_000
"""Merging so many takes about a second of one core."""

P = TypeVar("P")


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


@dataclass(frozen=True, slots=True)
class Figures:
    """The rows of what adds up, in order; and what does not: it was stored before the wire had its bounds."""

    rows: tuple[Telemetry, ...]
    broken: tuple[Place, ...]


def add_up(windows: Iterable[WindowRow], merged: bool | None = None) -> Figures:
    """A row a series, then the rows over all devices and sources; `merged`: only these, or only the others.

    A series that makes no valid row is in none that is merged either: it would take the others with it.
    """
    found, single, broken = _each(_series(windows), _add_up)
    groups: dict[Place, list[Sums]] = {}
    for place, sums in found.items():
        groups.setdefault(place.of_all(), []).append(sums)
    _, together, broken_too = _each(groups, _combine)
    rows = (*(single if merged is not True else ()), *(together if merged is not False else ()))
    return Figures(rows, (*broken, *broken_too))


def _each(
    groups: Mapping[Place, Sequence[P]], add: Callable[[Sequence[P]], Sums]
) -> tuple[dict[Place, Sums], list[Telemetry], list[Place]]:
    """The sums and the row of each group, in order, and those that have none."""
    found: dict[Place, Sums] = {}
    rows: list[Telemetry] = []
    broken: list[Place] = []
    for place, parts in sorted(groups.items(), key=lambda item: item[0].order):
        if (made := _one(place, parts, add)) is None:
            broken.append(place)
        else:
            found[place], made_row = made
            rows.append(made_row)
    return found, rows, broken


def _one(
    place: Place, parts: Sequence[P], add: Callable[[Sequence[P]], Sums]
) -> tuple[Sums, Telemetry] | None:
    try:
        sums = add(parts)
        return sums, row(place, sums)
    except ValidationError:
        return None


def _series(windows: Iterable[WindowRow]) -> dict[Place, list[WindowRow]]:
    groups: dict[tuple[str, ...], list[WindowRow]] = {}
    for w in windows:
        plan = (w.model_path, w.model_sha256, w.variant, w.provider)
        groups.setdefault((w.device, w.pipeline, w.source, *plan), []).append(w)
    return {_place(group[0]): group for group in groups.values()}


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
