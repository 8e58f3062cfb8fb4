"""How sure a figure is: intervals at 95 %.

Invariants: the same numbers give the same interval (resampling is seeded); an interval always holds the
figure that it is about, and never leaves the range that such figures have. Samples that depend on one
another (crops of the same few pictures, frames of one film) make every interval too narrow: say so
where one is printed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Z95 = 1.959963984540054
MAX_ROUNDS = 10_000
MAX_ELEMENTS = 1 << 26

Values = Sequence[float] | npt.NDArray[Any]
Statistic = Callable[[npt.NDArray[np.float64]], float]


class Interval(NamedTuple):
    """What a figure lies in with 95 % confidence."""

    low: float
    high: float


def mean(values: npt.NDArray[np.float64]) -> float:
    """Of all elements."""
    return float(np.mean(values))


def median(values: npt.NDArray[np.float64]) -> float:
    """Of all elements."""
    return float(np.median(values))


def wilson(successes: int, trials: int) -> Interval:
    """Wilson's score interval of a share; (0, 1) without trials.

    Holds its level for small counts and at 0 and 100 %, where the normal approximation gives a point.
    (E. B. Wilson, JASA 22, 1927.)

    Raises:
        ValueError: not 0 <= successes <= trials.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials")
    if not trials:
        return Interval(0.0, 1.0)
    share, z2 = successes / trials, Z95 * Z95
    centre = share + z2 / (2 * trials)
    spread = Z95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    whole = 1 + z2 / trials
    # Rounding must not push the ends past the figure itself.
    return Interval(
        max(0.0, min(share, (centre - spread) / whole)), min(1.0, max(share, (centre + spread) / whole))
    )


def bootstrap(values: Values, statistic: Statistic = mean, seed: int = 0, rounds: int = 1000) -> Interval:
    """The percentile bootstrap interval of `statistic` over `values`.

    `values` has shape (n,) or (n, ...): rows are drawn again with replacement, so that a statistic of
    several columns (a ratio of sums) stays paired. A statistic may be infinite; NaN is left out.

    Raises:
        ValueError: no values, or more work than is bounded.
    """
    rows = np.asarray(values, np.float64)
    if not rows.ndim or not len(rows):
        raise ValueError("an interval needs at least one value")
    if not 1 <= rounds <= MAX_ROUNDS or rows.size > MAX_ELEMENTS:
        raise ValueError(f"{rounds} rounds over {rows.size} numbers")
    figure = statistic(rows)
    generator = np.random.default_rng(seed)
    drawn = np.array([statistic(rows[generator.integers(0, len(rows), len(rows))]) for _ in range(rounds)])
    known = np.sort(drawn[~np.isnan(drawn)])
    if not len(known):
        return Interval(figure, figure)
    # Order statistics, not interpolation: between -inf and a number there is nothing to interpolate.
    low = float(known[math.floor(0.025 * (len(known) - 1))])
    high = float(known[math.ceil(0.975 * (len(known) - 1))])
    return Interval(min(low, figure), max(high, figure))


def paired_ratio(mine: Sequence[float], reference: Sequence[float], seed: int = 0) -> tuple[float, Interval]:
    """The median of mine[k] / reference[k], and its interval; below 1 is less (faster).

    Pairing takes out what slows both alike: it is steady to half a percent where a lone median is not.

    Raises:
        ValueError: other lengths, nothing to compare, or a reference that is not above 0.
    """
    a, b = np.asarray(mine, np.float64), np.asarray(reference, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not a.size or not (b > 0).all():
        raise ValueError("a paired ratio needs two equally long series, the reference above 0")
    ratios = a / b
    return median(ratios), bootstrap(ratios, median, seed)
