"""What the outputs of one run say, task by task, and how far two models say the same.

Invariant: agreement is 0..1 for each sample, and means the same in every report: the first class is the same
(classification, voice activity), the boxes that both found as a share of all that either found
(detection), the pixels of the same class (segmentation), outputs alike to a cosine of `ALIKE` (the rest).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgeward_models.items import Sample
from edgeward_models.similarity import cosine
from edgeward_runtime.tasks.detection import Boxes, Kind, Settings, detect, kind_of, overlaps, to_frame
from edgeward_wire.contract import Contract, OutputPort
from edgeward_wire.errors import Rejected

Array = npt.NDArray[Any]
Outputs = Mapping[str, Array]

ALIKE = 0.99
CLASSIFYING = frozenset({"classification", "audio-classification", "vad"})
MAP_SETTINGS = Settings(score=0.001, iou=0.7, most=300, several_classes=True)
"""As detectors' published figures are measured."""
AGREEMENT_SCORE = 0.25
_SAME_BOX = 0.5


class Reading(Protocol):
    """How the outputs of one task are read."""

    title: str
    """Of the agreement."""

    def read(self, outputs: Outputs, sample: Sample) -> Any:
        """Raises Rejected when the outputs are not those of such a task."""
        ...

    def agree(self, reference: Any, mine: Any) -> float | None:
        """0..1; None where there is nothing to agree on."""
        ...


def reading(contract: Contract, classes: int | None, kind: Kind | None, *, labelled: bool) -> Reading:
    """How this contract's outputs are read. `classes` and `kind` are for detectors."""
    if contract.task in CLASSIFYING:
        return Classes(contract)
    if contract.task == "detection":
        return Detections(contract, classes, kind, MAP_SETTINGS if labelled else Settings(AGREEMENT_SCORE))
    return Pixels(contract) if contract.task == "segmentation" else Tensors(contract)


def first_class(port: OutputPort, raw: Array) -> int:
    """The class that scores say; a single number is the score of the second of two."""
    row = np.asarray(raw).reshape(-1)
    if row.size != 1:
        return int(row.argmax())
    return int(row[0] > (0.0 if port.activation == "sigmoid" else 0.5))


class Classes:
    """One row of scores. A single number is the score of the second of two classes."""

    title = "top-1 agreement with FP32"

    def __init__(self, contract: Contract) -> None:
        self._port = scores_of(contract)

    def read(self, outputs: Outputs, sample: Sample) -> Array:
        """(classes,)."""
        raw = np.asarray(outputs[self._port.name])
        row = raw.reshape(-1).astype(np.float64)
        if raw.ndim > 1 and raw.shape[-1] != row.size:
            raise Rejected(
                f"Output {self._port.name} has the shape {raw.shape}, not one row of scores.",
                "Is it a classification? Say what it is with --task.",
            )
        if row.size != 1:
            return row
        return np.array([-row[0], row[0]]) if self._port.activation == "sigmoid" else np.array([0.5, row[0]])

    def agree(self, reference: Array, mine: Array) -> float:
        """1 where both have the same first class."""
        return float(reference.argmax() == mine.argmax())


class Detections:
    """Boxes: on the frame where its size is known, else on the model's input."""

    title = "boxes found by both"

    def __init__(self, contract: Contract, classes: int | None, kind: Kind | None, how: Settings) -> None:
        found = [port for port in contract.results if len(port.shape) == 3]
        if len(found) != 1:
            raise Rejected(
                f"A detector has one output of three dimensions; this model has {len(found)}.",
                "Export it with its boxes decoded, as one tensor.",
            )
        self._port, self._classes, self._how = found[0], classes, how
        self._kind: Kind | None = kind or found[0].boxes
        self._image = contract.source.image

    @property
    def key(self) -> str:
        """What its answers depend on besides the contract and the output."""
        return f"{self._classes} {self._kind} {self._how}"

    def kind(self, shape: Sequence[int]) -> Kind:
        """What an output of this shape holds. Raises Rejected where that is not known."""
        return kind_of(shape, self._classes, self._kind)

    def found(self, outputs: Outputs) -> Boxes:
        """On the model's input, best first, at most 300."""
        raw = outputs[self._port.name]
        return detect(raw, self.kind(raw.shape), self._how)

    def cut(self, name: str, value: Array) -> list[Array]:
        """An output in parts that are compared apart: boxes of hundreds of pixels would hide scores in 0..1.

        The class numbers of an end-to-end output are left out: no distance lies between two of them.
        """
        if name != self._port.name:
            return [value]
        kind = self.kind(value.shape)
        if kind == "yolov8":
            return [value[:, :4], value[:, 4:]]
        return [value[..., :4], value[..., 4:5] if kind == "end-to-end" else value[..., 4:]]

    def read(self, outputs: Outputs, sample: Sample) -> Boxes:
        """Best first, at most 300."""
        boxes = self.found(outputs)
        if sample.size is None or self._image is None:
            return boxes
        return to_frame(boxes, self._image, *sample.size)

    def agree(self, reference: Boxes, mine: Boxes) -> float | None:
        """2 · pairs / all boxes; a pair has one class and overlaps by half, each box in one pair only."""
        a, b = (boxes.take(boxes.scores >= AGREEMENT_SCORE) for boxes in (reference, mine))
        total = len(a.scores) + len(b.scores)
        if not total:
            return None
        table = overlaps(a, b) * (a.classes[:, None] == b.classes[None, :])
        pairs = 0
        for row in table:  # the surest box chooses first
            best = int(row.argmax()) if row.size else 0
            if row.size and row[best] >= _SAME_BOX:
                pairs += 1
                table[:, best] = 0
        return 2 * pairs / total


class Pixels:
    """A class for each pixel: (1, classes, height, width)."""

    title = "pixels of the same class"

    def __init__(self, contract: Contract) -> None:
        self._port = scores_of(contract)

    def read(self, outputs: Outputs, sample: Sample) -> Array:
        """(height, width) class indices."""
        raw = np.asarray(outputs[self._port.name])
        if raw.ndim != 4:
            raise Rejected(
                f"Output {self._port.name} has the shape {raw.shape}, not (1, classes, height, width)."
            )
        least = 0.0 if self._port.activation == "sigmoid" else 0.5  # as the device reads one channel
        return np.asarray(raw[0].argmax(axis=0) if raw.shape[1] > 1 else raw[0, 0] >= least)

    def agree(self, reference: Array, mine: Array) -> float:
        """The share of pixels."""
        return float((reference == mine).mean())


class Tensors:
    """Numbers of which nothing is known."""

    title = f"outputs alike (cosine {ALIKE})"

    def __init__(self, contract: Contract) -> None:
        self._names = [port.name for port in contract.results]

    def read(self, outputs: Outputs, sample: Sample) -> list[Array]:
        """The results as they are."""
        return [np.asarray(outputs[name]) for name in self._names]

    def agree(self, reference: list[Array], mine: list[Array]) -> float:
        """1 where every output is alike."""
        return float(all(cosine(b, a) >= ALIKE for a, b in zip(reference, mine, strict=True)))


def scores_of(contract: Contract) -> OutputPort:
    """The output that holds the scores. Raises Rejected when there is none."""
    port = contract.scores
    if port is None:
        raise Rejected("The contract has no result to read.")
    return port
