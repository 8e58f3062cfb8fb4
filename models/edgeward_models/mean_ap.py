"""Mean average precision as COCO defines it. The only importer of pycocotools.

Invariants: the figures are pycocotools' own (IoU 0.50 to 0.95 in ten steps, 101 points of recall, all
sizes, at most 100 boxes a picture and class); what is resampled for an interval is its matches, by
pictures, so that a class's boxes on one picture stay together; classes of which no object is
there count for nothing.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeward_models.items import Truth
from edgeward_models.statistics import Interval, bootstrap
from edgeward_runtime.tasks.detection import Boxes
from edgeward_wire.errors import Rejected

MOST_BOXES = 100
_WORK = 1 << 28  # elements over all rounds of a bootstrap
_LEAST_ROUNDS, _MOST_ROUNDS = 50, 500
_STEPS = 10

F64 = npt.NDArray[np.float64]
Bits = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Class:
    """The matches of one class on all pictures, its boxes ordered by score."""

    pictures: npt.NDArray[np.int64]
    """(D,): the picture of each box."""
    right: Bits
    wrong: Bits
    """(10, D) each; what is matched to a crowd is neither."""
    objects: F64
    """(pictures,): how many there are to be found."""


def need_pycocotools() -> None:
    """Raises Rejected when it is not installed."""
    try:
        import pycocotools.cocoeval  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise Rejected(
            "mAP needs a library that is not installed: pycocotools.", "pip install 'edgeward[ctl,eval]'"
        ) from error


class MeanAp:
    """The figures of one model on labelled pictures."""

    def __init__(self, truths: Sequence[Sequence[Truth]], found: Sequence[Boxes]) -> None:
        """`truths` and `found`: the objects and the boxes of each picture, in pixels of that picture.

        Raises:
            Rejected: pycocotools is not installed.
            ValueError: not as many of the one as of the other, or no object at all.
        """
        if len(truths) != len(found) or not any(truths):
            raise ValueError(f"{len(truths)} pictures with objects, {len(found)} with boxes")
        need_pycocotools()
        classes = sorted({truth.class_index for objects in truths for truth in objects})
        evaluated = _evaluate(truths, found, classes)
        precision = evaluated.eval["precision"][..., 0, 0]  # (steps, recalls, classes); -1: nothing to find
        self.pictures = len(truths)
        self.by_class = {
            index: float(precision[:, :, k].mean())
            for k, index in enumerate(classes)
            if (precision[:, :, k] >= 0).all()
        }
        """Class index -> AP50-95."""
        self._classes = _classes_of(evaluated.evalImgs, len(classes), len(truths))
        self._drawn: dict[int, tuple[float, float]] = {}
        there = precision[precision >= 0]
        self.map50 = float(precision[0][precision[0] >= 0].mean()) if there.size else math.nan
        self.map50_95 = float(there.mean()) if there.size else math.nan

    def weighted(self, weights: F64) -> tuple[float, float]:
        """(mAP50, mAP50-95) as if each picture were there `weights` times; NaN when no object is left."""
        pairs = [ap for one in self._classes if (ap := _average_precision(one, weights)) is not None]
        if not pairs:
            return math.nan, math.nan
        fifty, all_steps = np.mean(pairs, axis=0)
        return float(fifty), float(all_steps)

    def interval(self, which: int, minus: MeanAp | None = None, seed: int = 0) -> Interval:
        """Of mAP50 (`which` 0) or mAP50-95 (1), over the pictures; or of how much lower than `minus` it is.

        Both models then see the same pictures each time: a drop is surer than either figure.
        """

        def statistic(drawn: F64) -> float:
            mine = self._resampled(drawn)[which]
            return mine if minus is None else minus._resampled(drawn)[which] - mine

        # Counting in whole numbers is what the bootstrap does with them: which pictures, how often.
        return bootstrap(np.arange(self.pictures), statistic, seed, self._rounds())

    def _resampled(self, drawn: F64) -> tuple[float, float]:
        key = hash(drawn.tobytes())
        if key not in self._drawn:
            counts = np.bincount(drawn.astype(np.int64), minlength=self.pictures)
            self._drawn[key] = self.weighted(counts.astype(np.float64))
        return self._drawn[key]

    def _rounds(self) -> int:
        once = _STEPS * sum(len(one.pictures) for one in self._classes) + 1
        return max(_LEAST_ROUNDS, min(_MOST_ROUNDS, _WORK // once))


def _evaluate(truths: Sequence[Sequence[Truth]], found: Sequence[Boxes], classes: Sequence[int]) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    objects = [
        {
            "image_id": k,
            "category_id": t.class_index,
            "bbox": _sides(t.box),
            "area": t.area,
            "iscrowd": t.crowd,
        }
        for k, there in enumerate(truths)
        for t in there
    ]
    boxes = [
        {"image_id": k, "category_id": index, "bbox": _sides(box), "score": score, "iscrowd": 0}
        for k, seen in enumerate(found)
        for box, score, index in zip(
            seen.corners.tolist(), seen.scores.tolist(), seen.classes.tolist(), strict=True
        )
    ]

    def dataset(entries: list[dict[str, Any]]) -> Any:
        made: Any = COCO()
        # An object of number 0 would count as not found: its matches are kept by number.
        numbered = [
            {"id": n, "area": e["bbox"][2] * e["bbox"][3], **e} for n, e in enumerate(entries, start=1)
        ]
        made.dataset = {
            "images": [{"id": k} for k in range(len(truths))],
            "categories": [{"id": index} for index in classes],
            "annotations": numbered,
        }
        made.createIndex()
        return made

    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress there, where our result goes
        evaluation: Any = COCOeval(dataset(objects), dataset(boxes), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [MOST_BOXES]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _sides(box: Sequence[float]) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def _classes_of(matches: Sequence[dict[str, Any] | None], classes: int, pictures: int) -> list[_Class]:
    """pycocotools' matches of each (class, picture), class after class -> one `_Class` each."""
    made = []
    for k in range(classes):
        there = [(i, m) for i, m in enumerate(matches[k * pictures : (k + 1) * pictures]) if m is not None]
        objects = np.zeros(pictures)
        for i, match in there:
            objects[i] = np.count_nonzero(np.asarray(match["gtIgnore"]) == 0)
        scores = _joined([np.asarray(m["dtScores"], np.float64) for _, m in there], 0)
        order = np.argsort(-scores, kind="stable")
        ignored = _joined([m["dtIgnore"].astype(bool) for _, m in there], _STEPS)[:, order]
        matched = _joined([m["dtMatches"].astype(bool) for _, m in there], _STEPS)[:, order]
        owners = _joined([np.full(len(m["dtScores"]), i) for i, m in there], 0).astype(np.int64)[order]
        made.append(_Class(owners, matched & ~ignored, ~matched & ~ignored, objects))
    return made


def _joined(parts: list[npt.NDArray[Any]], rows: int) -> npt.NDArray[Any]:
    empty = np.zeros((rows, 0), bool) if rows else np.zeros(0)
    return np.concatenate([empty, *parts], axis=-1) if parts else empty


def _average_precision(one: _Class, weights: F64) -> tuple[float, float] | None:
    """(AP50, AP50-95) of a class; None when nothing is there to be found.

    A box that counts w times moves the curve as w equal ones would: only its upper right corners count.
    """
    objects = float(one.objects @ weights)
    if not objects:
        return None
    each = weights[one.pictures]
    right, wrong = np.cumsum(one.right * each, axis=1), np.cumsum(one.wrong * each, axis=1)
    precision = right / np.maximum(right + wrong, np.finfo(np.float64).tiny)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recalls = np.linspace(0, 1, 101)
    steps = [_at(curve, found / objects, recalls) for curve, found in zip(best, right, strict=True)]
    return steps[0], float(np.mean(steps))


def _at(precision: F64, recall: F64, wanted: F64) -> float:
    """The mean precision at each recall; 0 beyond the last."""
    places = np.searchsorted(recall, wanted, side="left")
    reached = places < len(precision)
    return float(precision[places[reached]].sum() / len(wanted))
