"""Detection: raw outputs of the YOLO family become boxes on the frame. Pure NumPy.

Invariants: boxes are (x1, y1, x2, y2), in pixels, x to the right and y downwards; whatever comes out is
ordered by score, highest first, and equal scores by their place in the output, so that the same output
gives the same boxes on every machine. What a tensor means is read from its shape or declared, never
guessed: where two readings fit, the caller is told to say which.

Three kinds of output are read (A anchors, C classes; coordinates in pixels of the model's input):

- `yolov8` (1, 4 + C, A): centre x, centre y, width, height, then a score for each class. YOLOv8, 9, 11, 12.
- `yolov5` (1, A, 5 + C): the same, with an objectness before the scores that multiplies them. YOLOv5, 7.
- `end-to-end` (1, N, 6): x1, y1, x2, y2, score, class; needs no suppression. YOLOv10, 26, and exports
  that have the suppression inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from edgeward_runtime.preprocess import geometry
from edgeward_wire.contract import ImageSpec
from edgeward_wire.errors import Rejected

Kind = Literal["yolov8", "yolov5", "end-to-end"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MAX_CANDIDATES = 30_000
"""Boxes that go into the suppression, the best ones; an output of 640 x 640 has 8400 or 25 200 anchors."""
MAX_OUTPUT = 1 << 26
_MAX_CLASSES = 1 << 16
_BLOCK = 64
"""Boxes that are held against one another at once, where there are many: what they suppress is left out."""
_AT_ONCE = 320
"""So few are held against one another in one go."""
_SPARSE = 8
"""Where fewer than one in so many pairs are of one class, only their overlaps are computed."""
_FAR = 1e6  # pixels; no corner of a real box is further out

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]


class Boxes(NamedTuple):
    """n boxes, best first: corners (n, 4), scores (n,) in 0..1, class indices (n,)."""

    corners: F32
    scores: F32
    classes: I64

    def take(self, which: npt.NDArray[Any]) -> Boxes:
        """Some of them, by index or mask."""
        return Boxes(self.corners[which], self.scores[which], self.classes[which])


class Settings(NamedTuple):
    """What counts as a detection."""

    score: float = 0.25
    """Least score."""
    iou: float = 0.7
    """Of two boxes of one class that overlap by more, the better one stays."""
    most: int = 300
    several_classes: bool = False
    """Whether one anchor may give a box for each class above `score` (as COCO's figures are measured), or
    only its best."""


def kind_of(shape: Sequence[int], classes: int | None, declared: Kind | None = None) -> Kind:
    """Which kind an output of this shape is, for a model of so many classes (None: not known).

    Raises:
        Rejected: it is none of them, is not what was declared, or could be several.
    """
    rank3 = tuple(shape)
    empty = rank3[1:] == (0, 6)  # end-to-end, and nothing was seen
    if len(rank3) != 3 or rank3[0] != 1 or not (empty or 0 < rank3[1] * rank3[2] <= MAX_OUTPUT):
        raise Rejected(
            f"A detector's output has the shape {_shown(shape)}; (1, 4 + classes, anchors),"
            " (1, anchors, 5 + classes) and (1, boxes, 6) are read."
        )
    fitting = kinds_of(rank3, classes)
    if declared is not None:
        if declared not in fitting:
            raise Rejected(
                f"The output of shape {_shown(shape)} is declared {declared}, but that does not fit"
                f"{'' if classes is None else f' {classes} classes'}.",
                f"What fits: {', '.join(fitting)}." if fitting else "Check the labels.",
            )
        return declared
    if len(fitting) == 1:
        return fitting[0]
    known = "an unknown number of classes" if classes is None else f"{classes} classes"
    if not fitting:
        raise Rejected(
            f"The output of shape {_shown(shape)} fits no detector of {known}.",
            "Check the labels, or that the model is exported with its boxes decoded.",
        )
    raise Rejected(
        f"The output of shape {_shown(shape)} could be {' or '.join(fitting)} with {known}.",
        f"Say which: {' or '.join(fitting)}.",
    )


def kinds_of(shape: tuple[int, ...], classes: int | None) -> list[Kind]:
    """Every kind that an output (1, rows, columns) may be."""
    return [kind for kind in KINDS if _fits(kind, shape[1], shape[2], classes)]


def _fits(kind: Kind, rows: int, columns: int, classes: int | None) -> bool:
    if kind == "end-to-end":
        return columns == 6
    channels, anchors = (rows, columns) if kind == "yolov8" else (columns, rows)
    extra = 4 if kind == "yolov8" else 5
    if classes is None:
        return extra < channels < anchors  # there are more anchors than classes
    return channels == extra + classes


def class_count(kind: Kind, shape: Sequence[int]) -> int | None:
    """How many classes an output of this kind and shape tells; None for `end-to-end`, which does not say."""
    if kind == "end-to-end":
        return None
    return shape[1] - 4 if kind == "yolov8" else shape[2] - 5


def detect(output: npt.NDArray[Any], kind: Kind, settings: Settings = Settings()) -> Boxes:  # noqa: B008 - a tuple
    """One picture's output -> its detections, in pixels of the model's input."""
    candidates = decode(output, kind, settings)
    if kind == "end-to-end":
        return candidates.take(np.arange(min(len(candidates.scores), settings.most)))
    return candidates.take(suppress(candidates, settings.iou, settings.most))


def decode(output: npt.NDArray[Any], kind: Kind, settings: Settings = Settings()) -> Boxes:  # noqa: B008
    """The candidates with at least the score asked for, best first, at most `MAX_CANDIDATES`.

    `output` has the shape that belongs to `kind`. What is not finite, or absurdly far out, is no candidate.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        return _decode(np.asarray(output, np.float32)[0], kind, settings)


def _decode(rows: F32, kind: Kind, settings: Settings) -> Boxes:
    if kind == "end-to-end":
        classes = np.where(np.isfinite(rows[:, 5]), rows[:, 5], -1)
        kept = np.flatnonzero((rows[:, 4] >= settings.score) & (classes >= 0) & (classes < _MAX_CLASSES))
        return _ordered(rows[kept, :4], rows[kept, 4], np.rint(classes[kept]).astype(np.int64))
    if kind == "yolov8" and not settings.several_classes:
        # Along the rows as they lie in memory: a third of the time of a search in each column.
        top = rows[4:].max(axis=0) if len(rows) > 4 else np.zeros(0, np.float32)
        kept = np.flatnonzero(top >= settings.score)
        return _ordered(_corners(rows[:4, kept].T), top[kept], rows[4:, kept].argmax(axis=0))
    if kind == "yolov8":
        centred, scores = rows[:4].T, rows[4:].T
    else:
        # Nothing below the objectness can pass: the product is only made of what can.
        alive = np.flatnonzero(rows[:, 4] >= settings.score)
        centred, scores = rows[alive, :4], rows[alive, 5:] * rows[alive, 4:5]
    if settings.several_classes:
        anchors, classes = np.nonzero(scores >= settings.score)
        return _ordered(_corners(centred[anchors]), scores[anchors, classes], classes.astype(np.int64))
    best = scores.argmax(axis=1) if scores.size else np.zeros(0, np.int64)
    top = scores[np.arange(len(best)), best]
    kept = np.flatnonzero(top >= settings.score)
    return _ordered(_corners(centred[kept]), top[kept], best[kept].astype(np.int64))


def _corners(centred: F32) -> F32:
    """(centre x, centre y, width, height) -> (x1, y1, x2, y2)."""
    half = centred[:, 2:] * np.float32(0.5)
    return np.concatenate([centred[:, :2] - half, centred[:, :2] + half], axis=1)


def _ordered(corners: F32, scores: F32, classes: I64) -> Boxes:
    finite = (np.abs(corners) <= _FAR).all(axis=1) & np.isfinite(scores)
    corners, scores, classes = corners[finite], scores[finite], classes[finite]
    order = np.argsort(-scores, kind="stable")[:MAX_CANDIDATES]
    return Boxes(corners[order], scores[order], classes[order])


def suppress(boxes: Boxes, iou: float, most: int) -> I64:
    """Class by class, what no better box of the same class overlaps by more than `iou`: indices, in order.

    `boxes` are best first. Two boxes without area overlap by 0.
    """
    kept: list[int] = []
    left = np.arange(len(boxes.scores))
    areas = _areas(boxes.corners)
    while left.size and len(kept) < most:
        size = left.size if left.size <= _AT_ONCE else _BLOCK
        block, left = left[:size], left[size:]
        chosen = block[_greedy(_clashes(boxes, areas, block, block, iou))][: most - len(kept)]
        kept += chosen.tolist()
        if left.size:
            left = left[~_clashes(boxes, areas, chosen, left, iou).any(axis=0)]
    return np.asarray(kept, np.int64)


def _greedy(clashes: npt.NDArray[np.bool_]) -> I64:
    """Of n boxes, best first, those that clash with none that was chosen before: (n, n) -> places."""
    free = np.ones(len(clashes), np.bool_)
    # A row holds the box itself, unless that has no area; one with nobody else suppresses nothing.
    for k in np.flatnonzero(clashes.sum(axis=1) > clashes.diagonal()).tolist():
        if free[k]:
            free[k + 1 :] &= ~clashes[k, k + 1 :]
    return np.flatnonzero(free)


def _clashes(boxes: Boxes, areas: F32, ones: I64, others: I64, iou: float) -> npt.NDArray[np.bool_]:
    """Which of `ones` are of one class with which of `others` and overlap by more: (n, m)."""
    clash = np.asarray(boxes.classes[ones][:, None] == boxes.classes[others])
    if np.count_nonzero(clash) * _SPARSE < clash.size:
        pairs = np.flatnonzero(clash)
        one, other = ones[pairs // others.size], others[pairs % others.size]
        common = _overlaps(boxes.corners[one], boxes.corners[other], areas[one], areas[other])
        clash.reshape(-1)[pairs] = common > iou
        return clash
    corners = boxes.corners[ones][:, None]
    clash &= _overlaps(corners, boxes.corners[others], areas[ones][:, None], areas[others]) > iou
    return clash


def overlaps(one: Boxes, other: Boxes) -> F32:
    """IoU of every box of `one` with every box of `other`: (n, m)."""
    areas = _areas(other.corners)
    rows = [
        _overlaps(corners, other.corners, area, areas)
        for corners, area in zip(one.corners, _areas(one.corners), strict=True)
    ]
    return np.asarray(rows, np.float32).reshape(len(one.scores), len(other.scores))


def _areas(corners: F32) -> F32:
    sides = np.maximum(corners[:, 2:] - corners[:, :2], 0)
    return np.asarray(sides[:, 0] * sides[:, 1], np.float32)


def _overlaps(one: F32, others: F32, area: npt.NDArray[Any] | np.float32, areas: F32) -> F32:
    """IoU of corners (..., 4), as they broadcast: (n, 1, 4) with (m, 4), or in pairs."""
    width = np.minimum(one[..., 2], others[..., 2]) - np.maximum(one[..., 0], others[..., 0])
    height = np.minimum(one[..., 3], others[..., 3]) - np.maximum(one[..., 1], others[..., 1])
    common = np.maximum(width, 0) * np.maximum(height, 0)
    union = area + areas - common
    return np.asarray(np.where(union > 0, common / np.where(union > 0, union, 1), 0), np.float32)


def to_frame(boxes: Boxes, spec: ImageSpec, width: int, height: int) -> Boxes:
    """From pixels of the model's input to pixels of a frame of width x height, cut at its edges.

    The inverse of what `Preprocess` does: letterbox, stretch, or shorter side and crop.
    """
    place = geometry(spec, width, height)
    # A crop takes the corner away, padding lays the frame at it.
    sign = 1 if spec.resize == "shorter_side" else -1
    shift = np.array([place.left, place.top] * 2, np.float32) * sign
    ratio = np.array([width / place.width, height / place.height] * 2, np.float32)
    limits = np.array([width, height] * 2, np.float32)
    corners = np.clip((boxes.corners + shift) * ratio, 0, limits)
    return Boxes(np.asarray(corners, np.float32), boxes.scores, boxes.classes)


def _shown(shape: Sequence[int]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"
