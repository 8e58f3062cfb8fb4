"""Turning and cutting pictures as a source's options say, at the cost of what remains only.

Pure. A cut is a view of the picture; a turn copies the cut into memory that is used again.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeward_runtime import images
from edgeward_runtime.images import U8
from edgeward_runtime.sources.options import Crop, Rotation

Box = tuple[int, int, int, int]
"""(x1, y1, x2, y2) in pixels; x2 and y2 are the first beyond."""


@dataclass(frozen=True)
class Framing:
    """`crop` is of the turned picture."""

    rotate: Rotation = 0
    crop: Crop | None = None

    @property
    def copies(self) -> bool:
        """Whether `turn` needs memory of its own."""
        return self.rotate != 0

    def cut(self, picture: U8) -> U8:
        """The part that remains, not yet turned: a view."""
        if self.crop is None:
            return picture
        x1, y1, x2, y2 = untwisted(self.crop, self.rotate, picture.shape[1], picture.shape[0])
        return picture[y1:y2, x1:x2]

    def turn(self, cut: U8, buffer: U8 | None) -> U8:
        """Turned clockwise, into `buffer` if it fits; without a turn, the view as it is."""
        return images.rotate(cut, self.rotate, buffer) if self.rotate else cut


def untwisted(crop: Crop, rotate: Rotation, width: int, height: int) -> Box:
    """Where in the picture (`width` x `height`) the crop of its turned self is. At least one pixel."""
    x1, y1, x2, y2 = crop
    # A point (x, y) of the picture is at (1-y, x) after 90 degrees, (1-x, 1-y) after 180, (y, 1-x) after 270.
    if rotate == 90:
        x1, y1, x2, y2 = y1, 1 - x2, y2, 1 - x1
    elif rotate == 180:
        x1, y1, x2, y2 = 1 - x2, 1 - y2, 1 - x1, 1 - y1
    elif rotate == 270:
        x1, y1, x2, y2 = 1 - y2, x1, 1 - y1, x2
    left, top = min(round(x1 * width), width - 1), min(round(y1 * height), height - 1)
    return left, top, max(round(x2 * width), left + 1), max(round(y2 * height), top + 1)
