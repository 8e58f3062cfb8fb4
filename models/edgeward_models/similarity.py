"""How far one model's outputs are from another's: SQNR, cosine, agreement of the first answer.

Invariants: nothing here is NaN; what is not finite in the compared outputs counts as infinitely wrong,
never as a skipped element; arrays of other shapes are an error, never broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeward_models.statistics import Interval
from edgeward_runtime import parity

Array = npt.NDArray[Any]

_ROUNDS = 1000


def energies(reference: Array, other: Array) -> tuple[float, float]:
    """(signal, noise): the sums of squares of `reference` and of the difference, before any logarithm.

    Sums of several samples may be added: the SQNR of a set is that of its summed energies, which weighs
    each sample by its signal as one long vector would.

    Raises:
        ValueError: other shapes, or a reference that is not finite.
    """
    a, b = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    if not np.isfinite(a).all():
        raise ValueError("the reference is not finite")
    signal = float(np.square(a).sum())
    if not np.isfinite(b).all():
        return signal, math.inf
    return signal, float(np.square(a - b).sum())


def ratio_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise): inf without noise, -inf without signal."""
    if not noise:
        return math.inf
    if not signal or math.isinf(noise):
        return -math.inf
    return 10.0 * (math.log10(signal) - math.log10(noise))


def sqnr_db(reference: Array, other: Array) -> float:
    """Signal to quantisation noise in dB: inf when equal, -inf when `other` is not finite.

    Raises:
        ValueError: other shapes, or a reference that is not finite.
    """
    return ratio_db(*energies(reference, other))


def sqnr_interval(parts: Sequence[Sequence[tuple[float, float]]], seed: int = 0) -> tuple[float, Interval]:
    """The SQNR in dB of a set, and its bootstrap interval over the samples.

    `parts[k]` has the `energies` of every output of sample k; the worst output counts, so that one of
    large numbers does not hide another.
    """
    rows = np.asarray(parts, np.float64)
    if rows.ndim != 3 or not rows.size or rows.shape[2] != 2:
        raise ValueError("an interval needs the energies of at least one output of one sample")
    figure = _worst(rows.sum(axis=0))
    count = len(rows)
    # How often each sample is drawn, for all rounds at once; 0 x infinity must stay nothing.
    often = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), _ROUNDS)
    finite = np.where(np.isfinite(rows), rows, 0.0).reshape(count, -1)
    endless = (often @ ~np.isfinite(rows).reshape(count, -1)) > 0
    sums = np.where(endless, math.inf, often @ finite).reshape(_ROUNDS, -1, 2)
    drawn = np.sort([_worst(one) for one in sums])
    low, high = drawn[math.floor(0.025 * (_ROUNDS - 1))], drawn[math.ceil(0.975 * (_ROUNDS - 1))]
    return figure, Interval(min(float(low), figure), max(float(high), figure))


def _worst(sums: npt.NDArray[np.float64]) -> float:
    return min(ratio_db(float(signal), float(noise)) for signal, noise in sums)


def cosine(mine: Array, reference: Array) -> float:
    """Of two arrays as vectors; -1 where `mine` is not finite, 1 where both are zero."""
    return parity.cosine(mine, reference)


def top1_agreement(reference_rows: Array, other_rows: Array) -> tuple[int, int]:
    """(hits, trials): in how many rows of scores (n, classes) both have the largest in the same place.

    A row that is not finite never agrees.

    Raises:
        ValueError: not two arrays of the same shape (n, classes) with at least one class.
    """
    a, b = np.asarray(reference_rows), np.asarray(other_rows)
    if a.shape != b.shape or a.ndim != 2 or not a.shape[1]:
        raise ValueError(f"scores must be two arrays (n, classes), not {a.shape} and {b.shape}")
    finite = np.isfinite(b).all(axis=1) & np.isfinite(a).all(axis=1)
    same = a.argmax(axis=1) == b.argmax(axis=1)
    return int((same & finite).sum()), len(a)
