"""Figures from stored windows: a row a series, and a row for all devices of the same model and plan.

Invariant: percentiles are those of merged histograms, never averages of percentiles. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from edgeward_cloud.store.models import WindowRow
from edgeward_wire.api import Telemetry, figures
from edgeward_wire.histogram import Histogram, merge
from edgeward_wire.manifest import ModelRef
from edgeward_wire.telemetry import MAX_LABELS, STAGES

DEFAULT_SINCE_S = 600.0
MAX_WINDOWS = 20_000
"""Merging so many takes about a second of one core."""


def series_rows(windows: Iterable[WindowRow]) -> list[Telemetry]:
    """One row for each (device, pipeline, source, model, variant, provider)."""
    groups: dict[tuple[str, ...], list[WindowRow]] = {}
    for w in windows:
        groups.setdefault((w.device, w.pipeline, w.source, *_plan(w)), []).append(w)
    return [_row(group, device=key[0], source=key[2]) for key, group in sorted(groups.items())]


def merged_rows(windows: Iterable[WindowRow]) -> list[Telemetry]:
    """One row for each (pipeline, model, variant, provider), over all devices and sources."""
    groups: dict[tuple[str, ...], list[WindowRow]] = {}
    for w in windows:
        groups.setdefault((w.pipeline, *_plan(w)), []).append(w)
    return [_row(group, device=None, source=None) for _, group in sorted(groups.items())]


def _plan(window: WindowRow) -> tuple[str, ...]:
    return (window.model_path, window.model_sha256, window.variant, window.provider)


def _row(windows: Sequence[WindowRow], *, device: str | None, source: str | None) -> Telemetry:
    one = windows[0]
    frames = sum(w.frames for w in windows)
    duration_s = sum(w.duration_s for w in windows)
    stages = {stage: [_histogram(w.stages[stage]) for w in windows if stage in w.stages] for stage in STAGES}
    return Telemetry(
        device=device,
        pipeline=one.pipeline,
        source=source,
        model=ModelRef(path=one.model_path, sha256=one.model_sha256),
        variant=one.variant,
        provider=one.provider,
        windows=len(windows),
        frames=frames,
        dropped=sum(w.dropped for w in windows),
        errors=sum(w.errors for w in windows),
        fps=round(frames / duration_s, 3) if duration_s else 0.0,
        last=max(w.ended_at for w in windows),
        stages={stage: figures(merge(found)) for stage, found in stages.items() if found},
        labels=_labels(windows),
    )


def _histogram(stored: dict[str, Any]) -> Histogram:
    # It was valid when it was stored; to check it again costs more than to merge it.
    return Histogram.model_construct(**stored)


def _labels(windows: Iterable[WindowRow]) -> dict[str, int]:
    total: dict[str, int] = {}
    for window in windows:
        for label, n in window.labels.items():
            total[label] = total.get(label, 0) + n
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0]))[:MAX_LABELS])
