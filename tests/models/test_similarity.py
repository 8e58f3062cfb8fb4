"""Distances between outputs: known values, symmetries, and what is not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeward_models.similarity import cosine, energies, ratio_db, sqnr_db, sqnr_interval, top1_agreement

floats = st.floats(-1e6, 1e6, width=32)
pairs = hnp.array_shapes(max_dims=3, max_side=6).flatmap(
    lambda shape: st.tuples(
        hnp.arrays(np.float32, shape, elements=floats), hnp.arrays(np.float32, shape, elements=floats)
    )
)


@given(pairs)
def test_sqnr_is_never_nan_and_infinite_only_when_equal(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    value = sqnr_db(a, b)
    assert not math.isnan(value)
    assert (value == math.inf) == bool((a == b).all())


@given(pairs, st.floats(0.125, 8.0))
def test_sqnr_does_not_depend_on_the_unit(pair: tuple[np.ndarray, np.ndarray], unit: float) -> None:
    a, b = (x.astype(np.float64) for x in pair)
    value = sqnr_db(a, b)
    if math.isfinite(value):
        assert sqnr_db(a * unit, b * unit) == pytest.approx(value, abs=1e-6)


def test_sqnr_of_a_tenth_is_twenty_decibels() -> None:
    assert sqnr_db(np.ones(100), np.full(100, 1.1)) == pytest.approx(20.0)
    assert sqnr_db(np.zeros(3), np.ones(3)) == -math.inf
    assert sqnr_db(np.zeros(3), np.zeros(3)) == math.inf


def test_what_is_not_finite_is_infinitely_wrong() -> None:
    good, bad = np.ones((2, 3)), np.array([[1.0, np.nan, 1.0], [1.0, 1.0, 1.0]])
    assert sqnr_db(good, bad) == -math.inf
    assert cosine(bad, good) == -1.0
    assert top1_agreement(good, bad) == (1, 2)
    with pytest.raises(ValueError, match="reference"):
        sqnr_db(bad, good)


def test_other_shapes_are_never_broadcast() -> None:
    with pytest.raises(ValueError):
        sqnr_db(np.ones((1, 3)), np.ones(3))
    for other in (np.ones((2, 4)), np.ones(3), np.ones((3, 0))):
        with pytest.raises(ValueError):
            top1_agreement(np.ones((3, 0)) if other.shape == (3, 0) else np.ones((2, 3)), other)


@given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), max_size=20))
def test_agreement_counts_rows(rows: list[list[int]]) -> None:
    a = np.array(rows, np.float32).reshape(-1, 4)
    assert top1_agreement(a, a) == (len(rows), len(rows))
    hits, trials = top1_agreement(a, -a)
    assert 0 <= hits <= trials == len(rows)


def test_the_energies_of_samples_add_up_to_those_of_the_set() -> None:
    generator = np.random.default_rng(0)
    a = generator.normal(size=(12, 7))
    b = a + generator.normal(scale=0.1, size=a.shape)
    parts = [[energies(x, y)] for x, y in zip(a, b, strict=True)]
    value, (low, high) = sqnr_interval(parts)
    assert value == pytest.approx(sqnr_db(a, b))
    assert low < value < high
    assert ratio_db(1.0, 0.0) == math.inf


def test_of_several_outputs_the_worst_counts() -> None:
    large, small = (1e6, 1.0), (1.0, 0.5)
    value, _ = sqnr_interval([[large, small]] * 4)
    assert value == pytest.approx(ratio_db(*small))


def test_cosine_is_the_device_s() -> None:
    assert cosine(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 0.0
    assert cosine(np.array([2.0, 0.0]), np.array([1.0, 0.0])) == 1.0
