"""Which of several candidates nothing else beats: more accurate and faster at once. Pure.

Invariants: no member of a front is dominated by anything; whatever is not dominated is a member; equal
points stand or fall together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Point(NamedTuple):
    """What a candidate is worth, and what it costs."""

    accuracy: float
    """More is better: SQNR in dB, or a share."""
    latency: float
    """Less is better: any unit, the same for all."""


def dominates(a: Point, b: Point) -> bool:
    """Whether `a` is at least as good in both, and better in one."""
    return a.accuracy >= b.accuracy and a.latency <= b.latency and a != b


def front(points: Sequence[Point]) -> list[int]:
    """The indices of all points that no other dominates, the fastest first. A NaN is never a member."""
    known = [k for k, point in enumerate(points) if not any(map(math.isnan, point))]
    found: list[int] = []
    best = Point(-math.inf, math.inf)
    for k in sorted(known, key=lambda k: (points[k].latency, -points[k].accuracy, k)):
        if points[k].accuracy > best.accuracy or points[k] == best or not found:
            best = points[k]
            found.append(k)
    return found
