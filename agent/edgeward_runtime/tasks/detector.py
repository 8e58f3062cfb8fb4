"""Detection as a task: the objects on a frame that its source's rules ask for, and the zones they are in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeward_runtime.sessions import Port, RunFailed
from edgeward_runtime.sources.options import ANY, Rules
from edgeward_runtime.tasks.answer import Detected, Found
from edgeward_runtime.tasks.detection import (
    Boxes,
    Kind,
    Settings,
    decode,
    kind_of,
    kinds_of,
    suppress,
    to_frame,
)
from edgeward_runtime.tasks.view import View, label_of, place_of
from edgeward_runtime.tasks.zones import standing, zones_at
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected

DEFAULT = Settings()
_MANY = 8400
"""Stands for a side that is free: only the boxes are, and there are more of them than of anything else."""


class Detection:
    """Reads the contract's one result of three dimensions; its kind is declared, or told by its shape."""

    def __init__(self, contract: Contract, outputs: Sequence[Port], labels: Sequence[str]) -> None:
        """Raises Rejected when the outputs, the contract and the labels do not fit one another."""
        found = [port for port in contract.results if len(port.shape) == 3]
        if len(found) != 1:
            raise Rejected(
                f"A detector has one output of three dimensions; this model has {len(found)}.",
                "Export it with its boxes decoded, as one tensor.",
            )
        if contract.source.image is None:
            raise Rejected("A detector takes a picture, and this model's contract has none.")
        self._at, port = place_of(found[0], outputs)
        self._image = contract.source.image
        self._labels = tuple(labels)
        self._classes = len(labels) or None
        self._declared: Kind | None = port.boxes
        self._kinds: dict[tuple[int, ...], Kind] = {}
        shape = outputs[self._at].shape
        fixed = tuple(side for side in shape if isinstance(side, int))
        if fixed == shape:
            self._kind_of(fixed)
        elif self._declared is None:
            # By the sides that are fixed: how many boxes one frame has decides nothing.
            typical = (1, *(side if isinstance(side, int) else _MANY for side in shape[1:]))
            fitting = kinds_of(typical, self._classes)
            self._declared = fitting[0] if len(fitting) == 1 else None

    def __call__(self, outputs: Sequence[npt.NDArray[Any]], view: View) -> Detected:
        """Best first. Raises RunFailed when the output is not that of the declared detector."""
        raw = outputs[self._at]
        try:
            kind = self._kind_of(raw.shape)
        except Rejected as error:
            raise RunFailed(error.what) from error
        boxes = self._wanted(raw, kind, view.rules)
        on_frame = to_frame(boxes, self._image, view.width, view.height)
        return Detected(tuple(self._found(on_frame, view)), (view.width, view.height))

    def _kind_of(self, shape: tuple[int, ...]) -> Kind:
        kind = self._kinds.get(shape)
        if kind is None:
            kind = kind_of(shape, self._classes, self._declared)
            if len(self._kinds) < 16:  # a graph of free sizes has a few of them
                self._kinds[shape] = kind
        return kind

    def _wanted(self, raw: npt.NDArray[Any], kind: Kind, rules: Rules) -> Boxes:
        """In pixels of the model's input. What the rules leave out cannot suppress what they ask for."""
        score, single = _least(rules)
        boxes = decode(raw, kind, DEFAULT._replace(score=score))
        if not single or rules.classes:
            names = {int(k): label_of(self._labels, int(k)) for k in np.unique(boxes.classes)}
            least = {
                k: rules.threshold(name, DEFAULT.score) if rules.wanted(name) else np.inf
                for k, name in names.items()
            }
            boxes = boxes.take(boxes.scores >= np.array([least[int(k)] for k in boxes.classes], np.float32))
        if kind == "end-to-end":
            return boxes.take(np.arange(min(len(boxes.scores), DEFAULT.most)))
        return boxes.take(suppress(boxes, DEFAULT.iou, DEFAULT.most))

    def _found(self, boxes: Boxes, view: View) -> list[Found]:
        zones = view.rules.zones
        # Three lists at once cost a twentieth of what numbers taken one by one do.
        corners, scores, classes = boxes.corners.tolist(), boxes.scores.tolist(), boxes.classes.tolist()
        names = {index: label_of(self._labels, index) for index in set(classes)}
        found = [
            Found(index, names[index], score, (x1, y1, x2, y2))
            for (x1, y1, x2, y2), score, index in zip(corners, scores, classes, strict=True)
        ]
        if not zones:
            return found
        size = view.width, view.height
        return [one._replace(zones=zones_at(zones, standing(one.corners, *size))) for one in found]


def _least(rules: Rules) -> tuple[float, bool]:
    """The lowest score that any label needs, and whether it is the same for all."""
    least = min((rules.thresholds.get(ANY, DEFAULT.score), *rules.thresholds.values()))
    return least, not rules.thresholds.keys() - {ANY}
