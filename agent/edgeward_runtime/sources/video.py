"""A video file."""

from __future__ import annotations

from pathlib import Path

from edgeward_runtime.images import U8, Reader
from edgeward_runtime.sources.base import PictureBase
from edgeward_runtime.sources.options import SourceOptions


class VideoSource(PictureBase):
    """Frames of one file, in order."""

    def __init__(self, options: SourceOptions) -> None:
        self._path = Path(options.uri)
        self._reader = Reader.of_file(self._path)

    @property
    def fps(self) -> float | None:
        return self._reader.fps

    def grab(self) -> bool:
        return self._reader.grab()

    def retrieve(self, buffer: U8 | None) -> U8:
        return self._reader.retrieve(buffer)

    def rewind(self) -> None:
        if not self._reader.rewind():  # a container without an index
            self._reader.close()
            self._reader = Reader.of_file(self._path)

    def close(self) -> None:
        self._reader.close()
