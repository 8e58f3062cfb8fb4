"""The distribution of one tensor's values, grown as they come, and the ranges that it proposes. Pure.

Invariant: adding the same values in the same batches gives the same counts; adding never loses a count.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 4096
"""On each side of zero; a power of two. At least half of them hold the largest value."""
_CODES = 256
_CANDIDATES = 128
_NOTHING = 1e-30

Range = tuple[float, float]
Counts = npt.NDArray[np.int64]


class Histogram:
    """`BINS` bins on each side of zero, whose width is a power of two.

    Twice the width is two bins in one, so that what was counted stays right however far values reach. What
    is zero has its own count: every range holds a code for zero, which says nothing about where to cut.
    """

    def __init__(self) -> None:
        self.width = 0.0
        """Of a bin; 0 before the first value that is not zero."""
        self.zeros = 0
        self.counts: Counts = np.zeros(2 * BINS, np.int64)
        """Of values from (k - BINS) * width on, up to the next bin; without the zeros."""

    def add(self, values: npt.NDArray[Any]) -> None:
        """Count finite values."""
        flat = np.asarray(values, np.float64).reshape(-1)
        rest = flat[np.abs(flat) > _NOTHING]
        self.zeros += flat.size - rest.size
        if not rest.size:
            return
        self._widen(float(np.abs(rest).max()))
        places = np.floor(rest / self.width).astype(np.int64) + BINS
        self.counts += np.bincount(places, minlength=2 * BINS)

    def _widen(self, largest: float) -> None:
        """Until the largest value has a bin."""
        width = math.ldexp(2.0 / BINS, math.frexp(largest)[1] - 1)  # frexp: largest < 2 ** exponent
        while 0 < self.width < width:
            below, above = self.counts.reshape(2, BINS // 2, 2).sum(axis=2)
            nothing = np.zeros(BINS // 2, np.int64)
            self.counts = np.concatenate([nothing, below, above, nothing])
            self.width *= 2
        self.width = max(self.width, width)

    def percentile(self, percent: float) -> Range:
        """The narrowest range of whole bins that leaves out at most (100 - percent) / 2 % on each side."""
        if not self.width:
            return 0.0, 0.0
        counts = self.counts.copy()
        counts[BINS] += self.zeros
        total = int(counts.sum())
        out = total * (100.0 - percent) / 200.0
        running = np.cumsum(counts)
        first = int(np.searchsorted(running, out, side="right"))
        last = int(np.searchsorted(running, total - out, side="left"))
        return min(0.0, (first - BINS) * self.width), max(0.0, (last + 1 - BINS) * self.width)

    def entropy(self) -> Range:
        """The range around zero whose codes lose least, by Kullback-Leibler divergence (after TensorRT's).

        Its amount is the same on both sides; a tensor of one sign has all codes on that side.
        """
        if not self.width:
            return 0.0, 0.0
        below, above = self.counts[:BINS][::-1], self.counts[BINS:]
        codes = _CODES // 2 if below.any() and above.any() else _CODES
        amounts = below + above
        used = int(np.flatnonzero(amounts).max()) + 1
        step = max(1, (used - codes) // _CANDIDATES)
        candidates = [*range(min(codes, used), used, step), used]
        best = min(candidates, key=lambda bins: (divergence(amounts, bins, codes), -bins))
        return -best * self.width, best * self.width


def divergence(amounts: Counts, bins: int, codes: int) -> float:
    """Kullback-Leibler divergence of what `codes` levels over the first `bins` bins make of a distribution.

    The reference has all that lies beyond in its last bin; each level is spread evenly over those of its bins
    that hold anything, so that a cut that gathers much in one bin, or levels that are too wide, both cost.
    """
    kept = amounts[:bins].astype(np.float64)
    reference = kept.copy()
    reference[-1] += amounts[bins:].sum()
    level = (np.arange(bins) * codes) // bins
    filled = reference > 0
    sums = np.bincount(level, kept, minlength=codes)
    spread = np.bincount(level, filled, minlength=codes)
    coarse = np.where(filled, sums[level] / np.maximum(spread[level], 1), 0.0)
    if not coarse.sum():
        return math.inf
    p, q = reference[filled] / reference.sum(), coarse[filled] / coarse.sum()
    return float((p * np.log(p / np.maximum(q, 1e-9))).sum())
