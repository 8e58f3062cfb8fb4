"""Makes a camera's view from photographs: a slow pan across each, as a video file.

Every frame is cut from a real picture; nothing is drawn. The file appears under its name when it is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]
VIEW = 0.92  # of the largest cut-out with the camera's shape: room to pan, and the subject stays in it
MARGIN = 0.3  # of the way, left out at both ends, where a subject would be cut off


def pan(picture: Frame, width: int, height: int, frames: int, *, backwards: bool) -> Iterator[Frame]:
    """`frames` cut-outs of the picture, from one end to the other, scaled to width x height."""
    rows, columns = picture.shape[:2]
    unit = VIEW * min(columns / width, rows / height)
    w, h = round(width * unit), round(height * unit)
    for k in range(frames):
        share = MARGIN + (1 - 2 * MARGIN) * k / max(1, frames - 1)
        share = 1 - share if backwards else share
        x, y = round(share * (columns - w)), round((rows - h) / 2)
        cut = picture[y : y + h, x : x + w]
        yield cv2.resize(cut, (width, height), interpolation=cv2.INTER_AREA if unit > 1 else cv2.INTER_CUBIC)


def make_video(
    out: Path,
    pictures: Sequence[Path],
    *,
    width: int = 640,
    height: int = 480,
    fps: float = 10,
    seconds_each: float = 4,
    backwards: bool = False,
) -> None:
    """Write a Motion-JPEG video that pans across each picture in turn."""
    part = out.with_suffix(".part.avi")
    writer = cv2.VideoWriter(str(part), cv2.VideoWriter.fourcc(*"MJPG"), fps, (width, height))
    if not writer.isOpened():
        raise RuntimeError(f"OpenCV cannot write {part}")
    try:
        for path in pictures:
            picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
            if picture is None:
                raise RuntimeError(f"OpenCV cannot read {path}")
            for frame in pan(picture, width, height, round(fps * seconds_each), backwards=backwards):
                writer.write(frame)
    finally:
        writer.release()
    part.replace(out)
