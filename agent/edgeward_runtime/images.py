"""The only importer of cv2: pictures decoded, resized and recoloured, and frames read.

Pictures are uint8 arrays (height, width, 3) in BGR, as OpenCV reads them. OpenCV's faults leave this
module as `Rejected` (the picture's fault) or `Unavailable` (the device's).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from edgeward_wire.errors import Rejected, Unavailable

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
Interpolation = Literal["nearest", "linear", "cubic", "area"]

MAX_PICTURE_BYTES = 64 << 20
MAX_SIDE = 16384
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
_INTERPOLATIONS: dict[str, int] = {
    "nearest": cv2.INTER_NEAREST,
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
}


def be_light() -> None:
    """Keep OpenCV on the calling threads and quiet: the cores belong to inference."""
    cv2.setNumThreads(1)
    logging = getattr(cv2.utils, "logging", None)
    if logging is not None:  # a build without it says more on stderr, and works
        logging.setLogLevel(logging.LOG_LEVEL_SILENT)


def version() -> str:
    """OpenCV's version."""
    return str(cv2.__version__)


def decode(raw: bytes | U8, name: str = "picture") -> U8:
    """An encoded picture as BGR. Raises Rejected when it is none, or too large."""
    if not 0 < len(raw) <= MAX_PICTURE_BYTES:
        raise Rejected(f"{name} has {len(raw)} bytes; a picture has 1 to {MAX_PICTURE_BYTES}.")
    try:
        picture = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise Rejected(f"{name} is not a picture that OpenCV reads: {_line(error)}.") from None
    if picture is None or max(picture.shape) > MAX_SIDE:
        raise Rejected(f"{name} is not a picture that OpenCV reads.", "Use JPEG or PNG.")
    return np.asarray(picture, np.uint8)


def encode_png(picture: U8) -> bytes:
    """A BGR picture as PNG."""
    ok, raw = cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 6])
    if not ok:
        raise Rejected("The picture could not be encoded.")
    return bytes(raw)


def resize(picture: U8, width: int, height: int, how: Interpolation, out: U8) -> U8:
    """Resize into `out`, which may be a view with gaps between its rows."""
    cv2.resize(picture, (width, height), dst=out, interpolation=_INTERPOLATIONS[how])
    return out


def to_gray(picture: U8, out: U8) -> U8:
    """BGR -> (height, width)."""
    cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY, dst=out)
    return out


def to_rgb(picture: U8, out: U8) -> U8:
    """BGR -> RGB."""
    cv2.cvtColor(picture, cv2.COLOR_BGR2RGB, dst=out)
    return out


def split(picture: U8, planes: list[U8]) -> None:
    """BGR -> three planes (height, width): blue, green, red."""
    cv2.split(picture, planes)


def look_up(picture: U8, table: F32, out: F32) -> None:
    """out = table[picture]; a table (1, 256, 3) holds one column a channel."""
    cv2.LUT(picture, table, dst=out)


class Reader:
    """Frames of a video file or a V4L2 device, one after the other. Not for several threads."""

    def __init__(self, capture: Any, what: str) -> None:
        self._capture = capture
        self._what = what

    @classmethod
    def of_file(cls, path: Path) -> Reader:
        """Open a video file. Raises Unavailable."""
        # One decoding thread: more of them hold more frames, and take the cores of inference.
        for settings in ([cv2.CAP_PROP_N_THREADS, 1] if hasattr(cv2, "CAP_PROP_N_THREADS") else [], []):
            capture = cv2.VideoCapture(str(path), cv2.CAP_ANY, settings)
            if capture.isOpened():
                return cls(capture, path.name)
        raise Unavailable(f"{path.name} cannot be opened as a video.", "Check that OpenCV reads its codec.")

    @classmethod
    def of_device(cls, device: str, width: int | None, height: int | None, fps: float | None) -> Reader:
        """Open a V4L2 device by its path. Raises Unavailable."""
        capture = cv2.VideoCapture(device, cv2.CAP_V4L2)
        if not capture.isOpened():
            raise Unavailable(f"{device} cannot be opened.", "Is it in use, and a camera?")
        wishes = (
            (cv2.CAP_PROP_FRAME_WIDTH, width),
            (cv2.CAP_PROP_FRAME_HEIGHT, height),
            (cv2.CAP_PROP_FPS, fps),
        )
        for key, value in wishes:
            if value is not None:
                capture.set(key, value)
        return cls(capture, device)

    @property
    def fps(self) -> float | None:
        """Frames per second as the file or driver claims, if that can be true."""
        claimed = float(self._capture.get(cv2.CAP_PROP_FPS))
        return claimed if 0 < claimed <= 1000 else None

    def grab(self) -> bool:
        """Fetch the next frame; False at the end, or when the device gives none."""
        return bool(self._capture.grab())

    def retrieve(self, buffer: U8 | None) -> U8:
        """Decode the frame that `grab` fetched, into `buffer` if it fits. Raises Unavailable."""
        try:
            ok, picture = self._capture.retrieve(buffer)
        except cv2.error as error:
            raise Unavailable(f"{self._what}: a frame could not be decoded: {_line(error)}.") from None
        if not ok or picture is None:
            raise Unavailable(f"{self._what}: a frame could not be decoded.")
        if picture.ndim == 2:
            picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR)
        return np.asarray(picture, np.uint8)

    def rewind(self) -> bool:
        """Back to the first frame, if the file can."""
        return bool(self._capture.set(cv2.CAP_PROP_POS_FRAMES, 0))

    def close(self) -> None:
        """Let the file or device go."""
        self._capture.release()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
