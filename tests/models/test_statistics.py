"""Intervals hold their figure, keep to their range, repeat, and cover what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_models.statistics import bootstrap, mean, median, paired_ratio, wilson

shares = st.integers(0, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)


@given(shares)
def test_wilson_holds_the_share_within_0_and_1(share: tuple[int, int]) -> None:
    hits, trials = share
    low, high = wilson(hits, trials)
    assert 0.0 <= low <= high <= 1.0
    if trials:
        assert low <= hits / trials <= high


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [(0, 0, 0.0, 1.0), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (847, 900, 0.9238, 0.9546)],
)
def test_wilson_against_published_values(hits: int, trials: int, low: float, high: float) -> None:
    assert wilson(hits, trials) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("hits", "trials"), [(-1, 3), (4, 3), (1, 0)])
def test_wilson_refuses_what_is_no_share(hits: int, trials: int) -> None:
    with pytest.raises(ValueError):
        wilson(hits, trials)


@given(numbers, st.integers(0, 5))
def test_a_bootstrap_interval_repeats_and_holds_the_figure(values: list[float], seed: int) -> None:
    once, again = (bootstrap(values, seed=seed, rounds=50) for _ in range(2))
    assert once == again
    assert once.low <= mean(np.array(values)) <= once.high
    assert min(values) - 1e-6 <= once.low
    assert once.high <= max(values) + 1e-6


def test_a_bootstrap_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(4)
    covered = 0
    for k in range(100):
        low, high = bootstrap(generator.normal(3.0, 1.0, 60), seed=k, rounds=200)
        covered += low <= 3.0 <= high
    assert 87 <= covered <= 100


def test_a_statistic_of_several_columns_stays_paired() -> None:
    rows = np.array([[2.0 * k, k] for k in range(1, 40)])
    low, high = bootstrap(rows, lambda drawn: float(drawn[:, 0].sum() / drawn[:, 1].sum()))
    assert (low, high) == pytest.approx((2.0, 2.0))


def test_an_infinite_statistic_is_kept_and_nan_is_left_out() -> None:
    low, high = bootstrap([1.0, math.inf], max, rounds=50)
    assert high == math.inf
    assert low == 1.0
    assert bootstrap([1.0, math.nan, 2.0], lambda drawn: float(drawn.sum()), rounds=200).low >= 3.0


@pytest.mark.parametrize(("values", "rounds"), [([], 10), ([1.0], 0), ([1.0], 1_000_000)])
def test_what_cannot_be_resampled_is_refused(values: list[float], rounds: int) -> None:
    with pytest.raises(ValueError):
        bootstrap(values, rounds=rounds)


def test_a_paired_ratio_is_steady_where_both_are_slowed_alike() -> None:
    generator = np.random.default_rng(1)
    weather = generator.uniform(1.0, 3.0, 60)
    ratio, (low, high) = paired_ratio(0.5 * weather, weather)
    assert ratio == pytest.approx(0.5)
    assert (low, high) == pytest.approx((0.5, 0.5))
    assert median(0.5 * weather) / 2.0 != pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(("mine", "reference"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0])])
def test_series_that_are_no_pairs_are_refused(mine: list[float], reference: list[float]) -> None:
    with pytest.raises(ValueError):
        paired_ratio(mine, reference)
