"""Which answers are told."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from edgeward_runtime.telling import LEAST_APART_S, Telling

answers = st.lists(st.tuples(st.floats(0, 0.5), st.lists(st.sampled_from("abc"), max_size=2)), max_size=50)


@given(answers)
def test_interval_tells_the_first_and_one_an_interval(steps: list[tuple[float, list[str]]]) -> None:
    telling, now, told = Telling("interval"), 100.0, []
    for step, labels in steps:
        now += step
        if telling.why(labels, now, 1.0) is not None:
            told.append(now)
    assert all(b - a >= 1.0 for a, b in pairwise(told))
    assert len(told) >= min(1, len(steps))


@given(answers)
def test_change_tells_what_is_new_and_an_interval_of_what_is_not(
    steps: list[tuple[float, list[str]]],
) -> None:
    telling, now, last, last_at = Telling("change"), 100.0, None, 0.0
    for step, labels in steps:
        now += step
        why = telling.why(labels, now, 1.0)
        due, new = now - last_at >= 1.0, set(labels) != last
        assert (why is not None) == (due or (new and now - last_at >= LEAST_APART_S))
        if why is not None:
            last, last_at = set(labels), now


def test_a_change_is_called_one_however_late_it_comes() -> None:
    telling = Telling("change")
    told = [
        telling.why(labels, now, 1.0) for now, labels in ((1, "a"), (3, "b"), (3.5, "b"), (5, "b"), (6, ""))
    ]
    assert told == ["interval", "change", None, "interval", "change"]


def test_every_tells_all_but_a_flood() -> None:
    telling = Telling("every")
    assert [telling.why([], now, 9.0) for now in (1.0, 1.001, 1.03, 1.06)] == [
        "every",
        None,
        "every",
        "every",
    ]
