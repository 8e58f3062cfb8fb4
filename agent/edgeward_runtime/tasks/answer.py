"""What a task makes of one run's outputs: one small type a kind of answer.

`labels()` is what telemetry counts, each at most once a frame; `signs` tells one answer from the next.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy.typing as npt


class Scored(NamedTuple):
    """One class with its score in 0..1."""

    class_index: int
    label: str
    score: float


class Classified(NamedTuple):
    """The best classes that the source's rules ask for, best first."""

    top: tuple[Scored, ...]
    best: float = 0.0
    """The score of the best class of all, 0..1, whatever the rules ask for."""

    def labels(self) -> tuple[str, ...]:
        return (self.top[0].label,) if self.top else ()


class Found(NamedTuple):
    """One object: corners (x1, y1, x2, y2) in pixels of the frame, and the zones that it stands in."""

    class_index: int
    label: str
    score: float
    corners: tuple[float, float, float, float]
    zones: tuple[str, ...] = ()


class Detected(NamedTuple):
    """Objects on a frame of (width, height), best first; there may be none."""

    boxes: tuple[Found, ...]
    size: tuple[int, int]

    def labels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(box.label for box in self.boxes))


class Covered(NamedTuple):
    """One class and the share of the frame, 0..1, that it covers."""

    class_index: int
    label: str
    share: float


class Segmented(NamedTuple):
    """The classes on a frame, largest first, and each pixel's class.

    The mask (h, w) spans the part of the frame that the model sees, at the model's resolution: all of it,
    but where the contract crops.
    """

    areas: tuple[Covered, ...]
    mask: npt.NDArray[Any]

    def labels(self) -> tuple[str, ...]:
        return tuple(area.label for area in self.areas[:1])


class Spoken(NamedTuple):
    """Whether somebody speaks, how sure that is (0..1), and for how many seconds it has been so."""

    active: bool
    score: float
    for_s: float

    def labels(self) -> tuple[str, ...]:
        return ("speech" if self.active else "silence",)


class Raw(NamedTuple):
    """The outputs as they came: (name, array)."""

    outputs: tuple[tuple[str, npt.NDArray[Any]], ...]

    def labels(self) -> tuple[str, ...]:
        return ()


def signs(answer: Answer) -> tuple[tuple[str, ...], ...]:
    """What changes when there is news: the labels, and of objects where they stand."""
    if isinstance(answer, Detected):
        return tuple((box.label, *box.zones) for box in answer.boxes)
    return tuple((label,) for label in answer.labels())


Answer = Classified | Detected | Segmented | Spoken | Raw
