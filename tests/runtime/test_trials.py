"""Runs in turn, and what is read off them."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from edgeward_runtime.trials import in_turn, quantile


@given(st.integers(1, 6))
def test_everyone_goes_first_and_last_equally_often(count: int) -> None:
    orders = [in_turn(range(count), k) for k in range(2 * count)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    for place in range(count):
        assert set(Counter(order[place] for order in orders).values()) == {2}


@given(st.integers(2, 6))
def test_nobody_always_follows_the_same_one(count: int) -> None:
    before: Counter[tuple[int, int]] = Counter()
    for k in range(2 * count):
        order = in_turn(range(count), k)
        before.update(pairwise(order))
    for a, b in list(before):
        assert abs(before[a, b] - before[b, a]) <= 1


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_quantile(times: list[float], q: float) -> None:
    value = quantile(times, q)
    assert value in times
    assert sum(t <= value for t in times) >= q * len(times)
    below = [t for t in times if t < value]
    assert len(below) < q * len(times) or not below
