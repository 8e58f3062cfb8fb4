"""A sound file (WAV), read chunk by chunk: its length costs no memory."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np

from edgeward_runtime import sounds
from edgeward_runtime.images import U8
from edgeward_runtime.sounds import F32, Format
from edgeward_runtime.sources.base import SoundBase
from edgeward_runtime.sources.options import SourceOptions
from edgeward_wire.errors import EdgewardError, Rejected, Unavailable


class SoundFileSource(SoundBase):
    """Chunks of one file, in order; the last one may be shorter."""

    def __init__(self, options: SourceOptions) -> None:
        self._path = Path(options.uri)
        try:
            self._file: IO[bytes] = self._path.open("rb")
        except OSError as error:
            raise _unreadable(self._path, error) from None
        try:
            self._form = self._header()
            self._rate = self._form.rate
            self.rewind()
        except EdgewardError:
            self._file.close()
            raise
        self._raw = b""

    def _header(self) -> Format:
        try:
            head = self._file.read(sounds.MAX_WAV_HEAD)
        except OSError as error:
            raise _unreadable(self._path, error) from None
        form = sounds.stream_format(head, self._path.name)
        if form is None:
            raise Rejected(f"{self._path.name} holds no sound: it has no data.", "Copy it again.")
        return form

    def grab(self) -> bool:
        """Reads the next chunk; `retrieve` converts it."""
        wanted = min(self.chunk, self._left)
        try:
            raw = self._file.read(wanted * self._form.frame_bytes)
        except OSError as error:
            raise _unreadable(self._path, error) from None
        frames = len(raw) // self._form.frame_bytes
        self._raw = raw[: frames * self._form.frame_bytes]
        self._left -= frames
        return frames > 0

    def retrieve(self, buffer: U8 | None) -> F32:
        del buffer
        return sounds.to_mono(np.frombuffer(self._raw, np.uint8), self._form, self._path.name)

    def rewind(self) -> None:
        try:
            self._file.seek(self._form.start)
        except OSError as error:
            raise _unreadable(self._path, error) from None
        self._left = self._form.frames

    def close(self) -> None:
        self._file.close()


def _unreadable(path: Path, error: OSError) -> Unavailable:
    return Unavailable(f"{path} cannot be read: {error.strerror or error}.", "Check the path and the disk.")
