"""OpenTelemetry exponential histograms at one fixed scale, so that merging is integer addition.

Bucket i holds values in (base**i, base**(i+1)] with base = 2**(2**-SCALE) (OpenTelemetry data model,
"Exponential Histogram"). At scale 5 a bucket is 2.2 % wide, so a percentile is off by at most 1.1 %.
Values are milliseconds. Because the scale never changes, the percentile of merged histograms is the
true percentile of the fleet, and never an average of percentiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from pydantic import Field, model_validator

from edgeward_wire.document import Open
from edgeward_wire.identifiers import Count

SCALE = 5
_PER_OCTAVE = 1 << SCALE
_MIN_INDEX = -10 * _PER_OCTAVE  # about 1 µs
_MAX_INDEX = 22 * _PER_OCTAVE  # about 70 minutes
_MAX_BUCKETS = _MAX_INDEX - _MIN_INDEX + 1
_MAX_VALUE = 1e15
_MAX_SUM = 1e24
"""Far from where sums of sums become infinite. See `telemetry.Measures` for what one window may hold."""


def bucket_index(value: float) -> int:
    """The bucket of a positive value; what is out of range goes to the nearest one."""
    index = math.ceil(math.log2(value) * _PER_OCTAVE) - 1
    return min(max(index, _MIN_INDEX), _MAX_INDEX)


class Histogram(Open):
    """A frozen histogram: `buckets[k]` counts the values of bucket `offset + k`."""

    scale: Literal[5] = 5
    count: Count = 0
    sum: float = Field(default=0.0, ge=0, le=_MAX_SUM)
    min: float = Field(default=0.0, ge=0, le=_MAX_VALUE)
    max: float = Field(default=0.0, ge=0, le=_MAX_VALUE)
    zero: Count = 0
    offset: int = Field(default=0, ge=_MIN_INDEX, le=_MAX_INDEX)
    buckets: tuple[Count, ...] = Field(default=(), max_length=_MAX_BUCKETS)

    @model_validator(mode="after")
    def _adds_up(self) -> Histogram:
        if self.zero + sum(self.buckets) != self.count:
            raise ValueError("count is not the sum of the buckets")
        if self.offset + len(self.buckets) - 1 > _MAX_INDEX:
            raise ValueError("buckets go past the range")
        return self

    def percentile(self, q: float) -> float:
        """The q-quantile, 0 <= q <= 1, as its bucket's middle, kept within [min, max]; 0.0 when empty."""
        if self.count == 0:
            return 0.0
        rank = max(1, math.ceil(q * self.count))
        seen = self.zero
        if seen >= rank:
            return 0.0
        for k, n in enumerate(self.buckets):
            seen += n
            if seen >= rank:
                middle: float = 2.0 ** ((self.offset + k + 0.5) / _PER_OCTAVE)
                return min(max(middle, self.min), self.max)
        return self.max

    @property
    def mean(self) -> float:
        """The mean, 0.0 when empty."""
        return self.sum / self.count if self.count else 0.0


class Recorder:
    """A histogram being filled by one thread. `take` hands it over and starts afresh."""

    __slots__ = ("_counts", "_max", "_min", "_sum", "_zero")

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._counts: dict[int, int] = {}
        self._zero = 0
        self._sum = 0.0
        self._min = math.inf
        self._max = 0.0

    def record(self, value: float) -> None:
        """Count one value in milliseconds; what is not above 0 counts as zero."""
        if value <= 0:
            value = 0.0
            self._zero += 1
        else:
            index = bucket_index(value)
            self._counts[index] = self._counts.get(index, 0) + 1
        self._sum += value
        self._min = min(self._min, value)
        self._max = max(self._max, value)

    def take(self) -> Histogram:
        """The histogram so far; the recorder is empty afterwards."""
        taken = _build(self._counts, self._zero, self._sum, self._min, self._max)
        self._clear()
        return taken


def merge(histograms: Iterable[Histogram]) -> Histogram:
    """One histogram of all values of all of them."""
    counts: dict[int, int] = {}
    zero, total, low, high = 0, 0.0, math.inf, 0.0
    for h in histograms:
        if not h.count:
            continue
        for k, n in enumerate(h.buckets):
            if n:
                counts[h.offset + k] = counts.get(h.offset + k, 0) + n
        zero, total = zero + h.zero, total + h.sum
        low, high = min(low, h.min), max(high, h.max)
    return _build(counts, zero, total, low, high)


def _build(counts: dict[int, int], zero: int, total: float, low: float, high: float) -> Histogram:
    count = zero + sum(counts.values())
    if not count:
        return Histogram()
    first = min(counts, default=0)
    last = max(counts, default=first - 1)
    return Histogram(
        count=count,
        sum=total,
        min=low,
        max=high,
        zero=zero,
        offset=first,
        buckets=tuple(counts.get(i, 0) for i in range(first, last + 1)),
    )
