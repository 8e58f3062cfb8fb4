"""Where on a frame an object stands. Pure.

An object stands where the middle of its box's lower edge is: there its feet or wheels touch the ground,
whatever the height of the camera. Invariant: the border of a zone belongs to it, so that a zone that
reaches the edge of the frame holds what stands on that edge, and two zones that touch leave no gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Point = tuple[float, float]

_NEAR = 1e-6
"""What counts as on the border, in shares of the frame: corners are float32."""


def holds(polygon: Sequence[Point], point: Point) -> bool:
    """Whether the polygon, given by its corners in order, holds the point. Crossing edges: even-odd."""
    x, y = point
    inside = False
    before = polygon[-1]
    for corner in polygon:
        if _on_edge(before, corner, point):
            return True
        (x1, y1), (x2, y2) = before, corner
        if (y1 > y) != (y2 > y) and x < x1 + (y - y1) * (x2 - x1) / (y2 - y1):
            inside = not inside
        before = corner
    return inside


def zones_at(zones: Mapping[str, Sequence[Point]], point: Point) -> tuple[str, ...]:
    """The names of the zones that hold the point, in the order in which they are given."""
    return tuple(name for name, polygon in zones.items() if holds(polygon, point))


def standing(corners: Sequence[float], width: int, height: int) -> Point:
    """The middle of the lower edge of (x1, y1, x2, y2) in pixels, as shares of a frame of that size."""
    x1, _, x2, y2 = corners
    return (x1 + x2) / 2 / max(1, width), y2 / max(1, height)


def _on_edge(a: Point, b: Point, point: Point) -> bool:
    """Whether the point is nearer than `_NEAR` to the edge from a to b."""
    (ax, ay), (bx, by), (x, y) = a, b, point
    dx, dy = bx - ax, by - ay
    length = dx * dx + dy * dy
    along = 0.0 if not length else min(1.0, max(0.0, ((x - ax) * dx + (y - ay) * dy) / length))
    away_x, away_y = x - (ax + along * dx), y - (ay + along * dy)
    return away_x * away_x + away_y * away_y <= _NEAR * _NEAR
