"""The metrics topic: one flat JSON object of numbers, for other people's dashboards.

Keys are `<pipeline>_<source>_<figure>`; a dash in a name becomes an underscore.
"""

from __future__ import annotations

from collections.abc import Iterable

from edgeward_wire.telemetry import Measures


def flat_metrics(windows: Iterable[Measures]) -> dict[str, float]:
    """Frames per second, drops, errors, and p50/p99 of each stage (ms), all plain numbers."""
    flat: dict[str, float] = {}
    for window in windows:
        prefix = f"{window.pipeline}_{window.source}".replace("-", "_")
        flat[f"{prefix}_fps"] = round(window.fps, 3)
        flat[f"{prefix}_frames"] = window.frames
        flat[f"{prefix}_dropped"] = window.dropped
        flat[f"{prefix}_errors"] = window.errors
        for stage, histogram in window.stages.items():
            flat[f"{prefix}_{stage}_p50_ms"] = round(histogram.percentile(0.50), 3)
            flat[f"{prefix}_{stage}_p99_ms"] = round(histogram.percentile(0.99), 3)
    return flat
