"""Zones: where an object stands, and whether a polygon holds that."""

from __future__ import annotations

import math

from hypothesis import assume, given
from hypothesis import strategies as st

from edgeward_runtime.tasks.zones import holds, standing, zones_at

shares = st.floats(0, 1)
points = st.tuples(shares, shares)
Polygon = list[tuple[float, float]]

LEFT: Polygon = [(0, 0), (0.5, 0), (0.5, 1), (0, 1)]
RIGHT: Polygon = [(0.5, 0), (1, 0), (1, 1), (0.5, 1)]
HORSESHOE: Polygon = [(0, 0), (1, 0), (1, 1), (0.6, 1), (0.6, 0.4), (0.4, 0.4), (0.4, 1), (0, 1)]


@given(points, points, points, points)
def test_a_triangle_holds_what_lies_on_the_same_side_of_its_edges(
    a: tuple[float, float], b: tuple[float, float], c: tuple[float, float], point: tuple[float, float]
) -> None:
    def side(p: tuple[float, float], q: tuple[float, float]) -> float:
        return (q[0] - p[0]) * (point[1] - p[1]) - (q[1] - p[1]) * (point[0] - p[0])

    edges = [(a, b), (b, c), (c, a)]
    assume(all(math.dist(p, q) > 1e-2 for p, q in edges))
    sides = [side(p, q) / math.dist(p, q) for p, q in edges]
    assume(all(abs(one) > 1e-4 for one in sides))  # not beside a border
    assert holds([a, b, c], point) == (len({one > 0 for one in sides}) == 1)


@given(st.lists(points, min_size=3, max_size=12), points, st.integers(0, 11))
def test_neither_the_first_corner_nor_the_direction_matters(
    polygon: Polygon, point: tuple[float, float], start: int
) -> None:
    turned = polygon[start % len(polygon) :] + polygon[: start % len(polygon)]
    assert holds(polygon, point) == holds(turned, point) == holds(polygon[::-1], point)


@given(st.lists(points, min_size=3, max_size=12), shares, st.integers(0, 11))
def test_the_border_belongs_to_it(polygon: Polygon, along: float, start: int) -> None:
    (ax, ay), (bx, by) = polygon[start % len(polygon)], polygon[(start + 1) % len(polygon)]
    assert holds(polygon, (ax + along * (bx - ax), ay + along * (by - ay)))


@given(points)
def test_two_zones_that_touch_leave_no_gap(point: tuple[float, float]) -> None:
    assert zones_at({"left": LEFT, "right": RIGHT}, point)


def test_a_zone_need_not_be_convex() -> None:
    assert not holds(HORSESHOE, (0.5, 0.9))
    assert holds(HORSESHOE, (0.5, 0.2))
    assert holds(HORSESHOE, (0.8, 0.9))


@given(points, st.integers(1, 4000), st.integers(1, 4000))
def test_an_object_stands_at_the_middle_of_its_lower_edge(
    point: tuple[float, float], width: int, height: int
) -> None:
    x, y = point[0] * width, point[1] * height
    found = standing((x - 7, y - 30, x + 7, y), width, height)
    assert math.dist(found, point) < 1e-6
    assert standing((0, 0, width, height), width, height) == (0.5, 1.0)
