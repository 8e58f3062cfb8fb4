"""The metrics topic: one flat JSON object of numbers, for other people's dashboards.

Keys are `<pipeline>_<source>_<figure>`, with underscores for dashes, and the device's own.
"""

from __future__ import annotations

from collections.abc import Iterable

from edgeward_wire.telemetry import Measures
from edgeward_wire.vitals import Vitals


def flat_metrics(windows: Iterable[Measures], vitals: Vitals | None = None) -> dict[str, float]:
    """Frames per second, drops, errors, p50/p99 of each stage (ms), and what the device's sensors say."""
    flat: dict[str, float] = device_metrics(vitals) if vitals is not None else {}
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


def device_metrics(vitals: Vitals) -> dict[str, float]:
    """`temp_<zone>_c`, `power_<rail>_mw`, `cpu_load`, ...: only what the device knows."""
    flat = {f"temp_{zone}_c": round(celsius, 1) for zone, celsius in vitals.temperatures_c.items()}
    flat |= {f"power_{rail}_mw": round(power) for rail, power in vitals.power_mw.items()}
    alone = {
        "temp_c": vitals.temperature_c,
        "throttled": None if vitals.throttled is None else int(vitals.throttled),
        "power_mw": vitals.board_mw,
        "cpu_load": vitals.cpu_load,
        "gpu_load": vitals.gpu_load,
        "mem_available_mb": vitals.memory_available_mb,
        "mem_total_mb": vitals.memory_total_mb,
    }
    return flat | {name: round(value, 3) for name, value in alone.items() if value is not None}
