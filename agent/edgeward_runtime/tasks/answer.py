"""What a task makes of one frame's outputs."""

from __future__ import annotations

from typing import NamedTuple


class Scored(NamedTuple):
    """One class with its score in 0..1."""

    class_index: int
    label: str
    score: float


class Answer(NamedTuple):
    """The best classes, best first; never empty."""

    top: tuple[Scored, ...]
