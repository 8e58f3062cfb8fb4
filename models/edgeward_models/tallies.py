"""Answers held against labels, sample by sample: what a model got right, and FP32 beside it.

Invariant: both models are judged on the same samples, so that their difference is paired.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy.typing as npt

from edgeward_models import metrics
from edgeward_models.evaluation import Row
from edgeward_models.items import Item, Truth
from edgeward_models.mean_ap import MeanAp
from edgeward_models.metrics import ClassScore, Confusion, Figure
from edgeward_runtime.tasks.detection import Boxes
from edgeward_wire.contract import Task
from edgeward_wire.errors import Rejected


class Tally(Protocol):
    """The labelled side of an evaluation."""

    def add(self, item: Item, answer: Any, reference: Any) -> None:
        """One sample: the model's answer, and FP32's or None."""
        ...

    def rows(self, seed: int) -> list[Row]:
        """The figures."""
        ...

    def classes(self) -> tuple[ClassScore, ...]:
        """Class by class."""
        ...

    def confused(self) -> tuple[Confusion, ...]:
        """The pairs that are most often confused."""
        ...

    def class_ap(self) -> dict[int, float]:
        """AP50-95 of each class."""
        ...


def tally(task: Task) -> Tally:
    """For a task that labels say something about."""
    return BoxTally() if task == "detection" else ClassTally()


class ClassTally:
    """Scores (classes,) against a class."""

    def __init__(self) -> None:
        self._labels: list[int] = []
        self._mine = _Ranked()
        self._theirs = _Ranked()
        self._several = False

    def add(self, item: Item, answer: npt.NDArray[Any], reference: npt.NDArray[Any] | None) -> None:
        """Raises Rejected when the model has no such class."""
        if item.label >= len(answer):
            raise Rejected(
                f"{item.name} is of class {item.label}, but the model gives {len(answer)} scores.",
                "Are the labels those of this model?",
            )
        self._labels.append(item.label)
        self._several = len(answer) > metrics.TOP
        self._mine.add(answer, item.label)
        if reference is not None:
            self._theirs.add(reference, item.label)

    def rows(self, seed: int) -> list[Row]:
        """top-1, top-5 where there are more classes than five, macro F1."""
        rows = [self._share("top1", "top-1", 1)]
        if self._several:
            rows.append(self._share("top5", "top-5", metrics.TOP))
        theirs = self._theirs.first
        rows.append(
            Row(
                "macro_f1",
                "macro F1",
                "share",
                metrics.macro_f1(self._labels, self._mine.first, seed),
                metrics.macro_f1(self._labels, theirs, seed) if theirs else None,
                metrics.f1_drop(self._labels, theirs, self._mine.first, seed) if theirs else None,
            )
        )
        return rows

    def _share(self, name: str, title: str, within: int) -> Row:
        mine = [rank < within for rank in self._mine.ranks]
        theirs = [rank < within for rank in self._theirs.ranks]
        if not theirs:
            return Row(name, title, "share", metrics.share(mine))
        drop = metrics.share_drop(theirs, mine)
        return Row(name, title, "share", metrics.share(mine), metrics.share(theirs), drop)

    def classes(self) -> tuple[ClassScore, ...]:
        """Those that occur."""
        return tuple(metrics.class_scores(self._labels, self._mine.first))

    def confused(self) -> tuple[Confusion, ...]:
        """The ten most frequent pairs."""
        return tuple(metrics.confusions(self._labels, self._mine.first))

    def class_ap(self) -> dict[int, float]:
        """No boxes here."""
        return {}


class _Ranked:
    """What one model answered."""

    def __init__(self) -> None:
        self.ranks: list[int] = []
        self.first: list[int] = []

    def add(self, scores: npt.NDArray[Any], label: int) -> None:
        self.ranks.append(metrics.rank_of(scores, label))
        self.first.append(int(scores.argmax()))


class BoxTally:
    """Boxes against the objects on a picture."""

    def __init__(self) -> None:
        self._truths: list[tuple[Truth, ...]] = []
        self._mine: list[Boxes] = []
        self._theirs: list[Boxes] = []
        self._ap: MeanAp | None = None

    def add(self, item: Item, answer: Boxes, reference: Boxes | None) -> None:
        """Boxes are kept, at most 300 a picture."""
        self._truths.append(item.truths)
        self._mine.append(answer)
        if reference is not None:
            self._theirs.append(reference)

    def rows(self, seed: int) -> list[Row]:
        """mAP50 and mAP50-95."""
        mine = self._made()
        theirs = MeanAp(self._truths, self._theirs) if self._theirs else None
        return [
            Row(
                name,
                title,
                "share",
                _figure(mine, which, None, seed),
                _figure(theirs, which, None, seed) if theirs else None,
                _figure(mine, which, theirs, seed) if theirs else None,
            )
            for which, (name, title) in enumerate((("map50", "mAP50"), ("map50_95", "mAP50-95")))
        ]

    def _made(self) -> MeanAp:
        if self._ap is None:
            if not any(not truth.crowd for truths in self._truths for truth in truths):
                raise Rejected(
                    f"There is no object on the {len(self._truths)} pictures that were drawn.",
                    "Take more of them: --count.",
                )
            self._ap = MeanAp(self._truths, self._mine)
        return self._ap

    def classes(self) -> tuple[ClassScore, ...]:
        """Their boxes are judged by precision and recall at once: see `class_ap`."""
        return ()

    def confused(self) -> tuple[Confusion, ...]:
        """A box of another class is a box too many, not a confusion."""
        return ()

    def class_ap(self) -> dict[int, float]:
        """Of the classes that are there."""
        return dict(self._made().by_class)


def _figure(mine: MeanAp, which: int, minus: MeanAp | None, seed: int) -> Figure:
    values = [(one.map50, one.map50_95)[which] for one in (mine, minus) if one is not None]
    value = values[0] if minus is None else values[1] - values[0]
    return Figure(value, mine.interval(which, minus, seed), mine.pictures)
