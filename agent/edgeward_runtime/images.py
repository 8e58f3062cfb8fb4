"""The only importer of cv2: pictures decoded, resized and recoloured, and frames read.

Pictures are uint8 arrays (height, width, 3) in BGR, as OpenCV reads them. OpenCV's faults leave this
module as `Rejected` (the picture's fault) or `Unavailable` (the device's).
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from edgeward_wire.errors import Rejected, Unavailable

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
Interpolation = Literal["nearest", "linear", "cubic", "area"]

MAX_PICTURE_BYTES = 64 << 20
MAX_SIDE = 16384
MAX_STREAM_SIDE = 8192
"""Of what comes over the network or from a device: a header of a few bytes can claim any size."""
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
_INTERPOLATIONS: dict[str, int] = {
    "nearest": cv2.INTER_NEAREST,
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
}


_FFMPEG: dict[str, str] = {
    # It prints a line for each attempt, for ever. We say once what is wrong.
    "OPENCV_FFMPEG_LOGLEVEL": "-8",
    # Otherwise one camera that does not answer keeps every other source from opening.
    "OPENCV_FFMPEG_IS_THREAD_SAFE": "1",
}
_AUTHORITIES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
"""Where systems keep them in one file, which is all that FFmpeg takes."""
_SILENT = 0
_TURNS: dict[int, int] = {
    90: cv2.ROTATE_90_CLOCKWISE,
    180: cv2.ROTATE_180,
    270: cv2.ROTATE_90_COUNTERCLOCKWISE,
}


def be_light() -> None:
    """Keep OpenCV on the calling threads and quiet: the cores belong to inference.

    Called once, at start-up: it sets what OpenCV reads from the environment, where nobody else has.
    """
    for name, value in (*_FFMPEG.items(), ("OPENCV_FFMPEG_CAPTURE_OPTIONS", _stream_options())):
        os.environ.setdefault(name, value)
    cv2.setNumThreads(1)
    # 4.x has it at its top, where 5 has it in `utils.logging`.
    set_level: Callable[[int], object] | None = getattr(cv2, "setLogLevel", None)
    (set_level or cv2.utils.logging.setLogLevel)(_SILENT)


def _stream_options() -> str:
    """What FFmpeg is told of every stream."""
    # UDP loses packets on the first busy link; sound that a camera sends as well is not asked for.
    said = "rtsp_transport;tcp|allowed_media_types;video|tls_verify;1"
    known = (ssl.get_default_verify_paths().cafile or "", *_AUTHORITIES)
    trusted = next((path for path in known if os.path.isfile(path) and not {";", "|"} & set(path)), "")
    return f"{said}|ca_file;{trusted}" if trusted else said


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


def check_jpeg(raw: bytes, name: str = "picture") -> None:
    """Look at a JPEG's header before any memory is taken for it. Raises Rejected: none, or too large."""
    size = jpeg_size(raw)
    if size is None:
        raise Rejected(f"{name} sends something that is not a JPEG picture.", "Check the address.")
    if not 0 < max(size) <= MAX_STREAM_SIDE or min(size) == 0:
        raise Rejected(
            f"{name} sends a picture of {size[0]} x {size[1]}; a side has 1 to {MAX_STREAM_SIDE} pixels."
        )


def jpeg_size(raw: bytes) -> tuple[int, int] | None:
    """(width, height) as a JPEG's header has it; None when it is no JPEG."""
    if raw[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(raw) and raw[at] == 0xFF:
        kind, length = raw[at + 1], int.from_bytes(raw[at + 2 : at + 4], "big")
        if kind == 0xFF:  # a filler
            at += 1
        elif kind in (0x00, 0x01) or 0xD0 <= kind <= 0xD9:
            return None  # these have no length: read as if they had, another header could be shown to us
        elif 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # a frame's header, of whatever coding
            return int.from_bytes(raw[at + 7 : at + 9], "big"), int.from_bytes(raw[at + 5 : at + 7], "big")
        else:
            at += 2 + max(length, 2)
    return None


def encode_jpeg(picture: U8, quality: int = 90) -> bytes:
    """A BGR picture as JPEG."""
    ok, raw = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not ok:
        raise Rejected("The picture could not be encoded.")
    return bytes(raw)


def encode_png(picture: U8) -> bytes:
    """A BGR picture as PNG."""
    ok, raw = cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 6])
    if not ok:
        raise Rejected("The picture could not be encoded.")
    return bytes(raw)


def resize(picture: U8, width: int, height: int, how: Interpolation, out: U8) -> U8:
    """Resize into `out`, which may be a view with gaps between its rows.

    With a `whole_odd_ratio` it may have four bytes a pixel: that goes faster, and the fourth means nothing.
    """
    if ratio := whole_odd_ratio(picture.shape, width, height, how):
        _pick(picture, ratio, out)
    else:
        cv2.resize(picture, (width, height), dst=out, interpolation=_INTERPOLATIONS[how])
    return out


def whole_odd_ratio(shape: tuple[int, ...], width: int, height: int, how: Interpolation) -> int | None:
    """How many times smaller, if it is 3 (1080p for a model of 640), 5 or 7 in both directions: linear
    interpolation reads exactly the pixels in the middle then, and takes more than twice as long to do so."""
    return next((k for k in (3, 5, 7) if how == "linear" and shape[:2] == (k * height, k * width)), None)


def _pick(picture: U8, ratio: int, out: U8) -> None:
    """Every `ratio`-th pixel of every `ratio`-th row, from the middle of the first."""
    half, part = ratio // 2, 1 / ratio
    if out.shape[2] != 4:
        cv2.resize(picture[half:, half:], None, dst=out, fx=part, fy=part, interpolation=cv2.INTER_NEAREST)
        return
    if picture.strides[1:] != (3, 1):  # mirrored, say; a crop, with gaps between its rows only, is not copied
        picture = np.ascontiguousarray(picture)
    # As numbers of four bytes, the last of which is the next pixel's: NumPy moves those in one step.
    steps = (ratio * picture.strides[0], ratio * 3, 1)
    pixels = as_strided(picture[half:, half:], out.shape, steps, writeable=False)
    np.copyto(out.view(np.uint32), pixels.view(np.uint32))


def rotate(picture: U8, degrees: int, out: U8 | None) -> U8:
    """Turned clockwise by 90, 180 or 270 degrees, into `out` if it fits, else in an array of its own."""
    return np.asarray(cv2.rotate(picture, _TURNS[degrees], out), np.uint8)


def to_gray(picture: U8, out: U8) -> U8:
    """BGR -> (height, width)."""
    cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY, dst=out)
    return out


def to_rgb(picture: U8, out: U8) -> U8:
    """BGR -> RGB."""
    cv2.cvtColor(picture, cv2.COLOR_BGR2RGB, dst=out)
    return out


def split(picture: U8, planes: list[U8]) -> None:
    """As many planes (height, width) as a pixel has bytes: blue, green, red, and the fourth if any."""
    cv2.split(picture, planes)


def scale(plane: U8, factor: float, out: F32) -> None:
    """out = plane * factor; a pixel of the plane is written meanwhile, and put back.

    `normalize` is what converts and scales in one pass, over the largest value: one pixel is made 255, so
    that this is known. NumPy takes two passes, and twice as long.
    """
    first = plane[0, 0]
    plane[0, 0] = 255
    cv2.normalize(plane, out, 255.0 * factor, 0.0, cv2.NORM_INF, cv2.CV_32F)
    plane[0, 0] = first
    out[0, 0] = first * np.float32(factor)


def look_up(picture: U8, table: F32, out: F32) -> None:
    """out = table[picture]; a table (1, 256, 3) holds one column a channel."""
    cv2.LUT(picture, table, dst=out)


def has_gstreamer() -> bool:
    """Whether this build of OpenCV can run GStreamer pipelines."""
    return bool(cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER))


class Reader:
    """Frames of a video file, stream or device, one after the other. Not for several threads."""

    def __init__(self, capture: Any, what: str) -> None:
        self._capture = capture
        self._what = what

    @classmethod
    def of_file(cls, path: Path) -> Reader:
        """Open a video file. Raises Unavailable."""
        # One decoding thread: more of them hold more frames, and take the cores of inference.
        for settings in (_one_thread(), []):
            capture = cv2.VideoCapture(str(path), cv2.CAP_ANY, settings)
            if capture.isOpened():
                return cls(capture, path.name)
        raise Unavailable(f"{path.name} cannot be opened as a video.", "Check that OpenCV reads its codec.")

    @classmethod
    def of_device(
        cls, device: str, width: int | None, height: int | None, fps: float | None, fourcc: str | None = None
    ) -> Reader:
        """Open a V4L2 device by its path. Raises Unavailable."""
        capture = cv2.VideoCapture(device, cv2.CAP_V4L2)
        if not capture.isOpened():
            raise Unavailable(f"{device} cannot be opened.", "Is it in use, and a camera?")
        wishes = (
            # The format first: it decides which sizes and rates there are.
            (cv2.CAP_PROP_FOURCC, None if fourcc is None else int.from_bytes(fourcc.encode(), "little")),
            (cv2.CAP_PROP_FRAME_WIDTH, width),
            (cv2.CAP_PROP_FRAME_HEIGHT, height),
            (cv2.CAP_PROP_FPS, fps),
        )
        for key, value in wishes:
            if value is not None:
                capture.set(key, value)
        return cls(capture, device)

    @classmethod
    def of_stream(cls, uri: str, shown: str, open_s: float, read_s: float) -> Reader:
        """Open a stream with FFmpeg; `shown` is its address without secrets. Raises Unavailable, Rejected."""
        capture = cv2.VideoCapture(uri, cv2.CAP_FFMPEG, [*_limits(open_s, read_s), *_one_thread()])
        if capture.isOpened():
            return cls(capture, shown)._of_sane_size()
        raise Unavailable(f"{shown} cannot be opened as a stream.", "Check that OpenCV reads its codec.")

    @classmethod
    def of_pipeline(cls, pipeline: str, shown: str, open_s: float, read_s: float) -> Reader:
        """Run a GStreamer pipeline. Raises Unavailable, Rejected."""
        for settings in (_limits(open_s, read_s), []):  # older builds know no limits
            capture = cv2.VideoCapture(pipeline, cv2.CAP_GSTREAMER, settings)
            if capture.isOpened():
                return cls(capture, shown)._of_sane_size()
        raise Unavailable(f"{shown} does not start.", "Run it with gst-launch-1.0 to see why.")

    def _of_sane_size(self) -> Reader:
        size = [int(self._capture.get(key)) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)]
        if max(size) > MAX_STREAM_SIDE:
            self.close()
            raise Rejected(
                f"{self._what} has frames of {size[0]} x {size[1]};"
                f" a side has at most {MAX_STREAM_SIDE} pixels."
            )
        return self

    @property
    def fps(self) -> float | None:
        """Frames per second as the file or driver claims, if that can be true."""
        claimed = float(self._capture.get(cv2.CAP_PROP_FPS))
        return claimed if 0 < claimed <= 1000 else None

    @property
    def frames(self) -> int:
        """How many there are from the first to the last, as the file claims; 0: it does not say."""
        claimed = float(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        return int(claimed) if 0 < claimed < 1 << 40 else 0

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


def _one_thread() -> list[int]:
    return [cv2.CAP_PROP_N_THREADS, 1] if hasattr(cv2, "CAP_PROP_N_THREADS") else []


def _limits(open_s: float, read_s: float) -> list[int]:
    keys = (cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, cv2.CAP_PROP_READ_TIMEOUT_MSEC)
    return [keys[0], int(open_s * 1e3), keys[1], int(read_s * 1e3)]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
