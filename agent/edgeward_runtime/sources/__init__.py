"""Sources: where frames come from. One file is one kind; one row below makes it known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgeward_runtime.images import PICTURE_SUFFIXES
from edgeward_runtime.sources.base import Source
from edgeward_runtime.sources.options import SourceOptions
from edgeward_runtime.sources.pictures import PictureSource
from edgeward_runtime.sources.v4l2 import V4l2Source
from edgeward_runtime.sources.video import VideoSource
from edgeward_wire.errors import Unavailable

SOURCES: dict[str, Callable[[SourceOptions], Source]] = {
    "v4l2": V4l2Source,
    "pictures": PictureSource,
    "video": VideoSource,
}


def kind_of(options: SourceOptions) -> str:
    """The row of SOURCES for what is at `uri` now. Raises Unavailable when nothing is."""
    if options.device is not None:
        return "v4l2"
    path = Path(options.uri)
    if path.is_dir() or (path.is_file() and path.suffix.lower() in PICTURE_SUFFIXES):
        return "pictures"
    if path.is_file():
        return "video"
    raise Unavailable(
        f"{options.uri} is not there.", "Name a camera, a video file or a directory of pictures."
    )


def open_source(options: SourceOptions) -> Source:
    """Open it. Raises Unavailable with the reason: trying again later may help."""
    return SOURCES[kind_of(options)](options)
