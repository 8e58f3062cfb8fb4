"""Sources: where frames and sound come from. One file is one kind; one row below makes it known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgeward_runtime.images import PICTURE_SUFFIXES
from edgeward_runtime.sounds import SOUND_SUFFIXES
from edgeward_runtime.sources.address import shown
from edgeward_runtime.sources.base import Source
from edgeward_runtime.sources.gstreamer import GstreamerSource
from edgeward_runtime.sources.microphone import MicrophoneSource
from edgeward_runtime.sources.mjpeg import open_http
from edgeward_runtime.sources.options import SourceOptions
from edgeward_runtime.sources.pictures import PictureSource
from edgeward_runtime.sources.pipe import PipeSource
from edgeward_runtime.sources.rtsp import RtspSource
from edgeward_runtime.sources.sound_file import SoundFileSource
from edgeward_runtime.sources.v4l2 import V4l2Source
from edgeward_runtime.sources.video import VideoSource
from edgeward_wire.errors import Rejected, Unavailable

SOURCES: dict[str, Callable[[SourceOptions], Source]] = {
    "v4l2": V4l2Source,
    "rtsp": RtspSource,
    "http": open_http,
    "gstreamer": GstreamerSource,
    "microphone": MicrophoneSource,
    "pipe": PipeSource,
    "pictures": PictureSource,
    "sound": SoundFileSource,
    "video": VideoSource,
}
_BY_BEGINNING = {
    "rtsp://": "rtsp",
    "rtsps://": "rtsp",
    "http://": "http",
    "https://": "http",
    "mic:": "microphone",
    "pipe:": "pipe",
}


def kind_of(options: SourceOptions) -> str:
    """The row of SOURCES for what `uri` means, or what is there now.

    Raises:
        Unavailable: nothing is there, or it may not be looked at. Rejected: it can mean nothing.
    """
    uri = options.uri
    _check_text(uri)
    if options.device is not None:
        return "v4l2"
    for beginning, kind in _BY_BEGINNING.items():
        if uri.lower().startswith(beginning):
            return kind
    if "!" in uri:
        return "gstreamer"
    if "://" in uri:
        raise Rejected(
            f"{shown(uri)} is of a kind that nothing here reads.", "Use rtsp:// or http://, or a pipeline."
        )
    try:
        return _kind_of_path(Path(uri))
    except OSError as error:
        raise Unavailable(
            f"{uri} cannot be looked at: {error.strerror or error}.", "Check the path, and who may read it."
        ) from None


def _check_text(uri: str) -> None:
    """OpenCV ends the process over text that is not UTF-8, no path holds a zero, and none is empty."""
    try:
        odd = not uri or b"\0" in uri.encode()
    except UnicodeEncodeError:
        odd = True
    if odd:
        raise Rejected(f"{shown(uri)[:80]!a} is no address.", "Name a path or address in plain UTF-8 text.")


def _kind_of_path(path: Path) -> str:
    """Raises Unavailable, OSError."""
    if path.is_dir() or (path.is_file() and path.suffix.lower() in PICTURE_SUFFIXES):
        return "pictures"
    if path.is_file():
        return "sound" if path.suffix.lower() in SOUND_SUFFIXES else "video"
    if path.is_char_device():
        return "v4l2"
    raise Unavailable(f"{path} is not there.", "Name a camera, a stream, a file or a directory of pictures.")


def open_source(options: SourceOptions) -> Source:
    """Open it. Raises Unavailable with the reason: trying again later may help. Rejected: it cannot."""
    return SOURCES[kind_of(options)](options)
