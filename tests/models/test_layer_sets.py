"""Sets of layers: the most sensitive, with and without gaps, in the graph's order."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from edgeward_models.layer_sets import closed, density, in_order, noise, runs, sets


@dataclass(frozen=True)
class Layer:
    name: str
    macs_share: float = 0.1
    sqnr_db: float = 30.0


def layers(*decibels: float) -> list[Layer]:
    return [Layer(f"n{k}", 0.1, db) for k, db in enumerate(decibels)]


NAMES = [layer.name for layer in layers(*[30.0] * 12)]
chosen = st.lists(st.sampled_from(NAMES), unique=True)


def test_small_gaps_are_closed_and_wide_ones_stay() -> None:
    ten = layers(*[30.0] * 10)
    assert closed(ten, ["n1", "n4", "n9"]) == ["n0", "n1", "n2", "n3", "n4", "n9"]
    assert closed(ten, []) == []


@given(chosen)
def test_closing_only_adds_and_is_done_at_once(names: list[str]) -> None:
    twelve = layers(*[30.0] * 12)
    once = closed(twelve, names)
    assert set(names) <= set(once)
    assert once == in_order(twelve, once)
    assert closed(twelve, once) == once


@given(chosen)
def test_runs_are_the_set_in_unbroken_parts(names: list[str]) -> None:
    twelve = layers(*[30.0] * 12)
    parts = runs(twelve, names)
    assert [layer.name for part in parts for layer in part] == in_order(twelve, names)
    last = -2
    for part in parts:
        places = [NAMES.index(layer.name) for layer in part]
        assert places == list(range(places[0], places[0] + len(part)))
        assert places[0] > last + 1
        last = places[-1]


def test_sensitivity_and_work_give_two_orders() -> None:
    heavy, light = Layer("heavy", 0.9, 20.0), Layer("light", 0.01, 22.0)
    assert noise(heavy) > noise(light)
    assert density(heavy) < density(light)
    assert ["heavy"] in sets([heavy, light], 1)


@given(st.lists(st.floats(-400, 400), min_size=1, max_size=12), st.integers(1, 12))
def test_sets_are_distinct_and_of_known_layers(decibels: list[float], count: int) -> None:
    some = layers(*decibels)
    found = sets(some, count)
    assert 1 <= len(found) <= 4
    assert len({tuple(one) for one in found}) == len(found)
    for one in found:
        assert min(count, len(some)) <= len(one)
        assert one == in_order(some, one)
