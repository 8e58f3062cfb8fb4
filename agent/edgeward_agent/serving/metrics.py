"""Counters of local serving as Prometheus' text. For any thread."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper ends of the latencies' buckets, in seconds."""


class Metrics:
    """What was asked, and how long it took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._codes: dict[tuple[str, int], int] = {}
        self._buckets: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def count(self, route: str, code: int, took_s: float) -> None:
        """One request is over."""
        with self._lock:
            self._codes[route, code] = self._codes.get((route, code), 0) + 1
            self._buckets.setdefault(route, [0] * (len(BOUNDS) + 1))[bisect_left(BOUNDS, took_s)] += 1
            self._sums[route] = self._sums.get(route, 0.0) + took_s

    def text(self, gauges: Mapping[str, Mapping[str, float]]) -> str:
        """Everything, with the gauges: {name: {labels: value}}."""
        with self._lock:
            codes, sums = dict(self._codes), dict(self._sums)
            buckets = {route: list(counts) for route, counts in self._buckets.items()}
        lines = [
            "# HELP edgeward_serving_requests_total Requests by route and status.",
            "# TYPE edgeward_serving_requests_total counter",
        ]
        lines += [
            f'edgeward_serving_requests_total{{route="{route}",code="{code}"}} {count}'
            for (route, code), count in sorted(codes.items())
        ]
        lines += [
            "# HELP edgeward_serving_request_seconds From the request's last byte of header to the answer.",
            "# TYPE edgeward_serving_request_seconds histogram",
        ]
        for route, counts in sorted(buckets.items()):
            total = 0
            for bound, count in zip([*map(str, BOUNDS), "+Inf"], counts, strict=True):
                total += count
                lines.append(
                    f'edgeward_serving_request_seconds_bucket{{route="{route}",le="{bound}"}} {total}'
                )
            lines.append(f'edgeward_serving_request_seconds_sum{{route="{route}"}} {sums[route]:.6f}')
            lines.append(f'edgeward_serving_request_seconds_count{{route="{route}"}} {total}')
        for name, values in gauges.items():
            lines.append(f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}")
            lines += [f"{name}{{{labels}}} {value:g}" for labels, value in values.items()]
        return "\n".join(lines) + "\n"
