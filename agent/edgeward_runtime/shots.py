"""Copies of frames for those who want to see what a source sees, taken only when somebody asks.

Invariants: the inference thread copies a frame at most once for all who wait for it, and encodes nothing;
who asks waits on a thread of its own. What was copied last is kept: a source that stands still can be
looked at, and says how old its picture is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from edgeward_runtime import images
from edgeward_runtime.images import U8
from edgeward_runtime.slots import Frame
from edgeward_wire.errors import Rejected, Unavailable

R = TypeVar("R")


@dataclass(frozen=True)
class Shot(Generic[R]):
    """A frame, and what was seen in it. `at` is monotonic."""

    image: U8 | None
    """(height, width, 3), BGR, nobody else's; None for sound."""
    result: R
    at: float

    def jpeg(self, max_side: int, quality: int = 80) -> tuple[bytes, int, int]:
        """Encoded, at most `max_side` pixels wide and high: (bytes, width, height); nothing for sound."""
        if self.image is None:
            return b"", 0, 0
        height, width = self.image.shape[:2]
        scale = min(1.0, max_side / max(height, width))
        image = self.image
        if scale < 1:
            width, height = max(1, round(width * scale)), max(1, round(height * scale))
            image = images.resize(image, width, height, "area", np.empty((height, width, 3), np.uint8))
        return images.encode_jpeg(image, quality), width, height


class Shots(Generic[R]):
    """The newest copies, one a source."""

    def __init__(self, names: Sequence[str]) -> None:
        self._at = {name: index for index, name in enumerate(names)}
        self._wanted = [False] * len(names)
        self._kept: list[Shot[R] | None] = [None] * len(names)
        self._came = threading.Condition()

    def wanted(self, source: int) -> bool:
        """Whether somebody waits for a frame of this source. For the inference thread: takes no lock."""
        return self._wanted[source]

    def give(self, frame: Frame, result: R) -> None:
        """Copy a frame that is wanted. For the inference thread."""
        image = frame.data.copy() if frame.rate is None else None
        with self._came:
            self._wanted[frame.source] = False
            self._kept[frame.source] = Shot(image, result, time.monotonic())
            self._came.notify_all()

    def ask(self, name: str, wait_s: float) -> Shot[R]:
        """The next frame of a source, or after `wait_s` the last that was copied. For any thread.

        Raises:
            Rejected: there is no such source.
            Unavailable: no frame came.
        """
        source = self._at.get(name)
        if source is None:
            raise Rejected(f"There is no source {name[:64]!r}.", f"It has {', '.join(sorted(self._at))}.")
        with self._came:
            before = self._kept[source]
            self._wanted[source] = True
            self._came.wait_for(lambda: not self._wanted[source] or self._kept[source] is not before, wait_s)
            shot = self._kept[source]
        if shot is None:
            raise Unavailable(f"No frame of {name} came within {wait_s:g} s.", "Is the source up?")
        return shot
