"""Where the features of a fitted scikit-learn estimator lie, as far as it still knows. Pure: duck typing on
what fitting left behind, no scikit-learn here.

A file that is tried with values far outside of what the estimator was fitted on proves little: every row
would end in the same leaf of a tree, or saturate the same sigmoid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
_MARGIN = 0.1
_DEVIATIONS = 2.0
_POINTS = ("support_vectors_", "_fit_X", "cluster_centers_", "means_")
"""Attributes that hold points of the feature space, one a row."""
_MOST_TREES = 200
_SIZES = (1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Range:
    """The lowest and the highest value of each feature; -1 and 1 where nothing is known."""

    low: F64
    high: F64
    known: bool

    def draw(self, count: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """(count, features), uniform in the range and a little beyond; of several sizes if none is known."""
        margin = _MARGIN * (self.high - self.low)
        rows = rng.uniform(self.low - margin, self.high + margin, (count, len(self.low)))
        return np.asarray(rows if self.known else rows * rng.choice(_SIZES, (count, 1)), np.float32)


def range_of(estimator: Any, count: int) -> Range:
    """What is known of the `count` features that an estimator takes."""
    found = _known(estimator, count)
    if found is None:
        return Range(np.full(count, -1.0), np.full(count, 1.0), known=False)
    low, high = (np.nan_to_num(np.asarray(a, np.float64), posinf=1e9, neginf=-1e9) for a in found)
    flat = high <= low
    return Range(np.where(flat, low - 1, low), np.where(flat, high + 1, high), known=True)


_Bounds = tuple[F64, F64]


def _known(estimator: Any, count: int) -> _Bounds | None:
    if hasattr(estimator, "steps"):  # a Pipeline: its first step that does something meets the features
        inner = next(
            (step for _, step in estimator.steps if step is not None and step != "passthrough"), None
        )
        return _known(inner, count)
    if hasattr(estimator, "transformers_"):
        return _by_columns(estimator, count)
    for bounds in (_scaled(estimator), _split(estimator, count), _pointed(estimator)):
        if bounds is not None and bounds[0].shape == bounds[1].shape == (count,):
            return bounds
    return None


def _scaled(estimator: Any) -> _Bounds | None:
    """Scalers know the centre and the spread of each feature."""
    if _has(estimator, "data_min_", "data_max_"):
        return np.asarray(estimator.data_min_, np.float64), np.asarray(estimator.data_max_, np.float64)
    for centre, spread in (("mean_", "scale_"), ("center_", "scale_")):
        if _has(estimator, centre, spread):
            middle = np.asarray(getattr(estimator, centre), np.float64)
            around = _DEVIATIONS * np.asarray(getattr(estimator, spread), np.float64)
            return middle - around, middle + around
    if _has(estimator, "theta_", "var_"):  # naive Bayes: a mean and a variance for each class
        around = _DEVIATIONS * np.sqrt(np.asarray(estimator.var_, np.float64))
        return (estimator.theta_ - around).min(axis=0), (estimator.theta_ + around).max(axis=0)
    return None


def _split(estimator: Any, count: int) -> _Bounds | None:
    """Trees know where they split each feature."""
    several = getattr(estimator, "estimators_", None)
    trees = [estimator] if hasattr(estimator, "tree_") else list(np.ravel(np.asarray(several, object)))
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    for one in trees[:_MOST_TREES]:
        tree = getattr(one, "tree_", None)
        if tree is None:
            return None
        inner = tree.feature >= 0
        np.minimum.at(low, tree.feature[inner], tree.threshold[inner])
        np.maximum.at(high, tree.feature[inner], tree.threshold[inner])
    if not np.isfinite(low).any():
        return None
    unused = ~np.isfinite(low)
    return np.where(unused, -1.0, low - 0.5), np.where(unused, 1.0, high + 0.5)


def _pointed(estimator: Any) -> _Bounds | None:
    for name in _POINTS:
        points = getattr(estimator, name, None)
        if isinstance(points, np.ndarray) and points.ndim == 2 and len(points):
            return points.min(axis=0).astype(np.float64), points.max(axis=0).astype(np.float64)
    return None


def _by_columns(estimator: Any, count: int) -> _Bounds | None:
    low, high, known = np.full(count, -1.0), np.full(count, 1.0), False
    names = [str(name) for name in getattr(estimator, "feature_names_in_", ())]
    for _, inner, columns in estimator.transformers_:
        where = _positions(columns, names, count)
        found = _known(inner, len(where)) if not isinstance(inner, str) else None
        if found is not None:
            low[where], high[where], known = found[0], found[1], True
    return (low, high) if known else None


def _positions(columns: Any, names: Sequence[str], count: int) -> list[int]:
    """The features that a column selection stands for; none where it cannot be told."""
    if isinstance(columns, slice):
        numbers = all(part is None or isinstance(part, int) for part in (columns.start, columns.stop))
        return list(range(count))[columns] if numbers else []
    single = isinstance(columns, (str, int, np.integer))
    chosen = [columns] if single else list(np.ravel(np.asarray(columns, object)))
    if chosen and all(isinstance(one, (bool, np.bool_)) for one in chosen):
        return [k for k, one in enumerate(chosen) if one]
    found = [names.index(one) if isinstance(one, str) and one in names else one for one in chosen]
    return [int(one) for one in found if isinstance(one, (int, np.integer)) and -count <= one < count]


def _has(estimator: Any, *names: str) -> bool:
    return all(isinstance(getattr(estimator, name, None), np.ndarray) for name in names)
