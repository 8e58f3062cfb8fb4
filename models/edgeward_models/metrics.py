"""How good answers are, and how sure that is: shares, F1, confusions, and drops between two models. Pure.

Invariants: a figure never comes without its interval (95 %) and the number of samples; two models are
compared on the same samples, pair by pair; no interval is a point only because few samples were seen
(where all answers agree, a share's interval still has a width).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeward_models.statistics import Z95, Interval, bootstrap, wilson

TOP = 5
MOST_NEEDED = 10_000_000
"""Nobody has more samples."""
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number."""

    value: float
    interval: Interval
    count: int
    """Samples that it stands on."""


@dataclass(frozen=True, slots=True)
class ClassScore:
    """How one class fared."""

    index: int
    precision: float
    recall: float
    f1: float
    support: int
    """Samples of this class."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """Samples of class `label` that were taken for `predicted`."""

    label: int
    predicted: int
    count: int


def rank_of(scores: npt.NDArray[Any], label: int) -> int:
    """The place of a class among scores (classes,), from 0; of equal scores the lower index comes first."""
    mine = scores[label]
    return int((scores > mine).sum() + (scores[:label] == mine).sum())


def share(hits: Sequence[bool] | npt.NDArray[np.bool_]) -> Figure:
    """How many of them are true. Raises ValueError without any."""
    trials = len(hits)
    if not trials:
        raise ValueError("a share of nothing")
    successes = int(np.count_nonzero(hits))
    return Figure(successes / trials, wilson(successes, trials), trials)


def average(values: Sequence[float], seed: int = 0) -> Figure:
    """The mean of numbers in 0..1: a share where they are all 0 or 1, else with a bootstrap interval."""
    rows = np.asarray(values, np.float64)
    if np.isin(rows, (0.0, 1.0)).all():
        return share(rows.astype(bool))
    return Figure(float(rows.mean()), bootstrap(rows, seed=seed), len(rows))


def class_scores(labels: Sequence[int], predicted: Sequence[int]) -> list[ClassScore]:
    """Every class that occurs in either, in order. Without a prediction precision is 0, as F1 is."""
    classes, right, made, there = _counts(np.asarray(labels), np.asarray(predicted))
    return [
        ClassScore(
            int(index),
            float(r / m) if m else 0.0,
            float(r / t) if t else 0.0,
            float(2 * r / (m + t)),
            int(t),
        )
        for index, r, m, t in zip(classes, right, made, there, strict=True)
    ]


def macro_f1(labels: Sequence[int], predicted: Sequence[int], seed: int = 0) -> Figure:
    """The mean of the classes' F1, with a bootstrap interval over the samples."""
    rows = np.stack([np.asarray(labels), np.asarray(predicted)], axis=1)
    return Figure(_macro(rows), bootstrap(rows, _macro, seed, _rounds(len(rows))), len(rows))


def confusions(labels: Sequence[int], predicted: Sequence[int], most: int = 10) -> list[Confusion]:
    """The pairs of classes that are most often taken one for the other, most often first."""
    pairs = Counter((a, b) for a, b in zip(labels, predicted, strict=True) if a != b)
    ordered = sorted(pairs.items(), key=lambda entry: (-entry[1], entry[0]))
    return [Confusion(label, other, count) for (label, other), count in ordered[:most]]


def share_drop(reference: Sequence[bool], mine: Sequence[bool]) -> Figure:
    """By how much a share of the same samples is lower than the reference's.

    The interval is Bonett and Price's for paired shares (British Journal of Mathematical and Statistical
    Psychology 65, 2012): one more sample is counted on either side, so that it keeps a width when the
    two never differ. Raises ValueError for other lengths, or nothing.
    """
    a, b = np.asarray(reference, bool), np.asarray(mine, bool)
    if a.shape != b.shape or not a.size:
        raise ValueError("a drop needs two equally long series")
    lost, won, n = int((a & ~b).sum()), int((~a & b).sum()), len(a)
    drop = (lost - won) / n
    p, q = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    half = Z95 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    low, high = max(-1.0, p - q - half), min(1.0, p - q + half)
    return Figure(drop, Interval(min(low, drop), max(high, drop)), n)


def f1_drop(labels: Sequence[int], reference: Sequence[int], mine: Sequence[int], seed: int = 0) -> Figure:
    """By how much macro F1 on the same samples is lower than the reference's."""
    rows = np.stack([np.asarray(labels), np.asarray(reference), np.asarray(mine)], axis=1)

    def drop(drawn: F64) -> float:
        return _macro(drawn[:, [0, 1]]) - _macro(drawn[:, [0, 2]])

    return Figure(drop(rows.astype(np.float64)), bootstrap(rows, drop, seed, _rounds(len(rows))), len(rows))


def needed(figure: Figure, gate: float) -> int | None:
    """About how many samples would end this figure's interval before the gate, if the figure stayed.

    Widths shrink with the square root of the count. None where the figure is (nearly) on the gate itself.
    """
    gap = abs(gate - figure.value)
    low, high = figure.interval
    half = high - figure.value if gate > figure.value else figure.value - low
    if half <= 0 or gap <= half * math.sqrt(figure.count / MOST_NEEDED):
        return None
    return math.ceil(figure.count * (half / gap) ** 2)


def _rounds(samples: int) -> int:
    return max(100, min(1000, (1 << 24) // max(samples, 1)))


def _macro(rows: npt.NDArray[Any]) -> float:
    _, right, made, there = _counts(rows[:, 0], rows[:, 1])
    return float(np.mean(2 * right / (made + there)))


def _counts(labels: npt.NDArray[Any], predicted: npt.NDArray[Any]) -> tuple[I64, F64, F64, F64]:
    """(classes, right, predicted as such, there) for each class that occurs in either."""
    classes, where = np.unique(np.concatenate([labels, predicted]).astype(np.int64), return_inverse=True)
    a, b = where[: len(labels)], where[len(labels) :]
    size = len(classes)
    right = np.bincount(a[a == b], minlength=size).astype(np.float64)
    return (
        classes,
        right,
        np.bincount(b, minlength=size).astype(np.float64),
        np.bincount(a, minlength=size).astype(np.float64),
    )
