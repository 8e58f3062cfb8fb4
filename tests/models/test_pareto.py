"""The Pareto front against its definition."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from edgeward_models.pareto import Point, dominates, front

coarse = st.integers(0, 5).map(float)  # many ties
points = st.lists(st.builds(Point, coarse, coarse) | st.builds(Point, st.floats(), st.floats()), max_size=25)


@given(points)
def test_a_front_is_exactly_what_nothing_dominates(found: list[Point]) -> None:
    known = [k for k, point in enumerate(found) if not any(map(math.isnan, point))]
    expected = {k for k in known if not any(dominates(found[other], found[k]) for other in known)}
    members = front(found)
    assert len(members) == len(set(members))
    assert set(members) == expected


@given(points)
def test_a_front_is_ordered_from_the_fastest_to_the_most_accurate(found: list[Point]) -> None:
    members = [found[k] for k in front(found)]
    assert [p.latency for p in members] == sorted(p.latency for p in members)
    assert [p.accuracy for p in members] == sorted(p.accuracy for p in members)


def test_small_fronts() -> None:
    assert front([]) == []
    assert front([Point(math.nan, 1.0)]) == []
    assert front([Point(1.0, 2.0), Point(1.0, 2.0)]) == [0, 1]
    assert front([Point(10.0, 1.0), Point(20.0, 2.0), Point(9.0, 1.5)]) == [0, 1]
