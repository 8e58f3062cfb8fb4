"""Semantic segmentation: scores for each pixel, or its class already -> who covers how much of the frame.

Read are scores (1, classes, h, w), or (1, h, w, classes) of a model whose pictures are nhwc; one channel
(1, 1, h, w) is one class and the rest; whole numbers (1, h, w), (1, 1, h, w) or (h, w) are classes. The mask
stays at the model's resolution: scaling it up to the frame would cost more than inference saves, and who
draws it can do that. What the letterbox padded is cut off, so that shares are shares of the frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeward_runtime.preprocess import geometry
from edgeward_runtime.sessions import Port, RunFailed
from edgeward_runtime.sources.options import Rules
from edgeward_runtime.tasks.answer import Covered, Segmented
from edgeward_runtime.tasks.view import View, label_of, place_of
from edgeward_wire.contract import Contract, ImageSpec
from edgeward_wire.errors import Rejected

MAX_CLASSES = 4096
BACKGROUND = "background"
Mask = npt.NDArray[np.uint16]


class Segmentation:
    """Reads the contract's first result of floats; of whole numbers when there is none."""

    def __init__(self, contract: Contract, outputs: Sequence[Port], labels: Sequence[str]) -> None:
        """Raises Rejected when the outputs, the contract and the labels do not fit one another."""
        image = contract.source.image
        if image is None:
            raise Rejected("A segmentation takes a picture, and this model's contract has none.")
        maps = [
            port
            for port in contract.results
            if len(port.shape) in (3, 4) or (len(port.shape) == 2 and not port.dtype.startswith("float"))
        ]
        first = next((port for port in maps if port.dtype.startswith("float")), maps[0] if maps else None)
        if first is None:
            raise Rejected(
                "A segmentation has an output (1, classes, height, width), or one of classes (1, height,"
                " width); this model has none."
            )
        self._at, port = place_of(first, outputs)
        self._image: ImageSpec = image
        self._scores = port.dtype.startswith("float") and len(port.shape) == 4
        self._least = 0.0 if port.activation == "sigmoid" else 0.5
        self._labels = (BACKGROUND, *labels) if len(labels) == 1 else tuple(labels)
        shape = outputs[self._at].shape
        channels = shape[3 if image.layout == "nhwc" else 1] if self._scores else None
        if isinstance(channels, int) and labels and max(channels, 2) != len(self._labels):
            raise Rejected(f"The model has {channels} classes, but there are {len(labels)} labels.")

    def __call__(self, outputs: Sequence[npt.NDArray[Any]], view: View) -> Segmented:
        """Raises RunFailed when the result has another form, or is not finite."""
        mask = self._seen(self._mask(outputs[self._at]), view)
        return Segmented(self._areas(mask, view.rules), mask)

    def _mask(self, raw: npt.NDArray[Any]) -> Mask:
        """(h, w) of class indices."""
        if not self._scores:
            flat = raw.reshape(raw.shape[-2:]) if raw.ndim >= 2 and raw.size == _area(raw) else None
            if flat is None or not flat.size or not 0 <= float(flat.min()) <= float(flat.max()) < MAX_CLASSES:
                raise RunFailed(f"The result of shape {raw.shape} is no map of classes.")
            classes = np.asarray(flat, np.uint16)
            if not np.array_equal(classes, flat):
                raise RunFailed(
                    f"The result of shape {raw.shape} holds numbers that are not whole, and so no classes:"
                    " scores have a channel for each class, (1, classes, height, width)."
                )
            return classes
        if raw.ndim != 4 or raw.shape[0] != 1 or not raw.size:
            raise RunFailed(f"The result has the shape {raw.shape}, not (1, classes, height, width).")
        scores = np.moveaxis(raw[0], 2, 0) if self._image.layout == "nhwc" else raw[0]
        return best_class(np.asarray(scores, np.float32), self._least)

    def _seen(self, mask: Mask, view: View) -> Mask:
        """The part of the mask that shows the frame."""
        if self._image.resize != "letterbox" or not view.width:
            return mask
        place = geometry(self._image, view.width, view.height)
        across, down = mask.shape[1] / self._image.width, mask.shape[0] / self._image.height
        left, top = int(place.left * across), int(place.top * down)
        right = max(left + 1, round((place.left + place.width) * across))
        bottom = max(top + 1, round((place.top + place.height) * down))
        return mask[top:bottom, left:right]

    def _areas(self, mask: Mask, rules: Rules) -> tuple[Covered, ...]:
        """Largest first; a threshold is the least share that counts."""
        counts = np.bincount(mask.reshape(-1))
        areas = []
        for k in np.flatnonzero(counts):
            label, share = label_of(self._labels, int(k)), float(counts[k]) / mask.size
            if rules.wanted(label) and share >= rules.threshold(label, 0.0):
                areas.append(Covered(int(k), label, share))
        return tuple(sorted(areas, key=lambda area: (-area.share, area.class_index)))


def best_class(scores: npt.NDArray[np.float32], least: float) -> Mask:
    """(classes, h, w) -> (h, w); of one class, 1 where it is above `least`. Raises RunFailed for NaN.

    Equal scores go to the first class, as with argmax, which takes five times as long on this layout.
    """
    best, mask = scores[0].copy(), np.zeros(scores.shape[1:], np.uint16)
    if len(scores) == 1:
        mask[best > least] = 1
    for k in range(1, len(scores)):
        np.copyto(mask, np.uint16(k), where=scores[k] > best)
        np.maximum(best, scores[k], out=best)
    if not np.isfinite(best).all():
        raise RunFailed("The result is not finite.")
    return mask


def _area(raw: npt.NDArray[Any]) -> int:
    return int(raw.shape[-1]) * int(raw.shape[-2])
