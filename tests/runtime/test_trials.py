"""Runs in turn, and what is read off them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_runtime.trials import PAUSE_S, Patience, Rounds, Trial, in_turn, quantile, time_steadily
from edgeward_wire.verdict import Plan

ROUNDS = Rounds(goal_s=1.0, least=1, most=9)


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


class Machine:
    """On which two trials take, the first time, the second and so on, these milliseconds a run."""

    def __init__(self, *medians: tuple[float, float]) -> None:
        self.trials = [Trial(Plan(provider="CPUExecutionProvider", variant="fp32")) for _ in range(2)]
        self._left = list(medians)
        self.done = 0
        self.patience = Patience()
        self.paused: list[float] = []

    def steadily(self) -> float:
        return time_steadily(self.trials, ROUNDS, self.patience, timing=self._time, pause=self.paused.append)

    def _time(self, trials: Sequence[Trial], rounds: Rounds) -> float:
        assert rounds is ROUNDS
        for trial, ms in zip(trials, self._left.pop(0), strict=True):
            trial.times = [ms - 0.1, ms, ms + 5.0]
        self.done += 1
        return self.done / 10

    @property
    def medians(self) -> list[float | None]:
        return [trial.p50_ms for trial in self.trials]


def test_one_timing_is_enough_where_nobody_is_slower_than_before() -> None:
    machine = Machine((3.0, 5.0), (3.5, 4.9))
    assert (machine.steadily(), machine.steadily()) == (0.1, 0.2)
    assert machine.medians == [3.5, 4.9]
    assert machine.paused == []
    assert [trial.calm_ms for trial in machine.trials] == [3.0, 4.9]


@pytest.mark.parametrize("slow", [(5.0, 5.0), (3.0, 7.0)])
def test_where_one_is_slowed_down_they_run_again(slow: tuple[float, float]) -> None:
    machine = Machine((3.0, 5.0), slow, slow, (3.2, 5.1))
    machine.steadily()
    assert machine.steadily() == 0.4
    assert machine.medians == [3.2, 5.1]
    assert machine.paused == [PAUSE_S, PAUSE_S]


def test_a_machine_that_stays_slower_is_taken_as_it_is() -> None:
    machine = Machine((3.0, 5.0), (9.0, 9.5), (8.0, 9.0), (8.5, 9.0), (9.5, 9.0), (8.1, 9.1))
    machine.steadily()
    assert machine.steadily() == 0.3  # the least slowed one of four
    assert machine.medians == [8.0, 9.0]
    assert machine.steadily() == 0.6  # and from now on nothing is in the way
    assert len(machine.paused) == 3


def test_what_is_faster_than_it_was_seen_to_be_shows_that_the_timing_before_was_slowed_down() -> None:
    """Of two tries, that one counts in which they were near their best, whichever came first."""
    machine = Machine((3.0, 5.0), (4.0, 5.0), (3.1, 4.0))
    machine.steadily()
    assert machine.steadily() == 0.3
    assert [trial.calm_ms for trial in machine.trials] == [3.0, 4.0]


def test_patience_ends() -> None:
    machine = Machine((3.0, 5.0), (9.0, 9.0), (3.0, 5.0), (9.0, 9.0), (8.0, 9.0), (9.0, 9.0))
    machine.patience.left = 2
    assert [machine.steadily() for _ in range(4)] == [0.1, 0.3, 0.5, 0.6]
    assert machine.patience.left == 0
    assert len(machine.paused) == 2
