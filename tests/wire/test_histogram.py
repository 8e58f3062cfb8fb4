"""Exponential histograms: merging is exact, and percentiles are within a bucket of the true ones."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from edgeward_wire.histogram import SCALE, Histogram, Recorder, bucket_index, merge

values = st.lists(st.floats(min_value=0.001, max_value=1e6), min_size=1, max_size=200)
BUCKET = 2 ** (2**-SCALE)


def recorded(numbers: list[float]) -> Histogram:
    recorder = Recorder()
    for number in numbers:
        recorder.record(number)
    return recorder.take()


@given(values)
def test_a_percentile_is_within_one_bucket_of_the_true_one(numbers: list[float]) -> None:
    histogram = recorded(numbers)
    for q in (0.0, 0.5, 0.9, 0.99, 1.0):
        true = sorted(numbers)[max(1, math.ceil(q * len(numbers))) - 1]
        assert true / BUCKET <= histogram.percentile(q) <= true * BUCKET


@given(values, values, values)
def test_merging_is_what_recording_all_would_have_been(
    a: list[float], b: list[float], c: list[float]
) -> None:
    together = recorded(a + b + c)
    merged = merge([merge([recorded(a), recorded(b)]), recorded(c)])
    assert (merged.buckets, merged.offset, merged.count) == (
        together.buckets,
        together.offset,
        together.count,
    )
    assert (merged.min, merged.max) == (together.min, together.max)
    assert merged.sum == pytest.approx(together.sum)


@given(st.floats(min_value=0.001, max_value=1e6))
def test_a_value_lies_in_its_bucket(value: float) -> None:
    index = bucket_index(value)
    assert BUCKET**index * (1 - 1e-9) <= value <= BUCKET ** (index + 1) * (1 + 1e-9)


@given(values)
def test_it_survives_the_wire(numbers: list[float]) -> None:
    histogram = recorded(numbers)
    assert Histogram.model_validate_json(histogram.to_bytes()) == histogram


def test_a_30_second_window_of_latencies_is_small() -> None:
    """About 170 bytes a stage, as the design says: 300 frames around 20 ms, spread by 10 %."""
    histogram = recorded([20 * (1 + 0.1 * math.sin(k)) for k in range(300)])
    assert len(histogram.to_bytes()) < 250


def test_taking_starts_afresh_and_zero_is_counted() -> None:
    recorder = Recorder()
    recorder.record(0.0)
    recorder.record(-1.0)
    first = recorder.take()
    assert (first.count, first.zero, first.percentile(0.99)) == (2, 2, 0.0)
    assert recorder.take() == Histogram()


def test_counts_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValidationError, match="sum of the buckets"):
        Histogram(count=3, buckets=(1, 1), max=1)


def test_extremes_stay_in_range() -> None:
    histogram = recorded([1e-9, 1e12])
    assert histogram.count == 2
    assert histogram.percentile(1.0) <= histogram.max
