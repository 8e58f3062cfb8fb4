"""WAV over a pipe: `pipe:PATH` of a FIFO that another program writes into, or `pipe:-` for standard input.

A recorder does not know how long it will record, so the length in the header may be missing. When the
writer goes, the source goes with it, and comes back with the next one.
"""

from __future__ import annotations

import os
import select
import stat
import time

import numpy as np

from edgeward_runtime import sounds
from edgeward_runtime.images import U8
from edgeward_runtime.sounds import F32, Format
from edgeward_runtime.sources.base import SoundBase
from edgeward_runtime.sources.options import SourceOptions
from edgeward_wire.errors import Rejected, Unavailable

OPEN_S = 10.0
READ_S = 10.0
_STDIN = "-"


class PipeSource(SoundBase):
    """Chunks as they come. At the end of standard input there is nothing more; a FIFO is Unavailable then."""

    def __init__(self, options: SourceOptions) -> None:
        self._path = options.uri.removeprefix("pipe:")
        self._what = "Standard input" if self._path == _STDIN else self._path
        self._fd = _opened(self._path)
        self._read = bytearray()
        self._ended = False
        try:
            self._form = self._header()
        except (Rejected, Unavailable):
            self.close()
            raise
        self._rate, self._left = self._form.rate, self._form.frames
        self._raw = b""

    def _header(self) -> Format:
        deadline = time.monotonic() + OPEN_S
        while (form := sounds.stream_format(bytes(self._read), self._what)) is None:
            if len(self._read) > sounds.MAX_WAV_HEAD or not self._more(deadline):
                raise Unavailable(
                    f"{self._what} ended before any sound came.", "Check the program that writes."
                )
        del self._read[: form.start]
        return form

    def _more(self, deadline: float) -> bool:
        """Read on; False at the end."""
        waiter = select.poll()
        waiter.register(self._fd, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not waiter.poll(left * 1e3):
                raise Unavailable(f"Nobody writes into {self._what}.", "Start the program that records.")
            try:
                raw = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                continue
            except OSError as error:
                raise Unavailable(f"{self._what} cannot be read: {error.strerror}.") from None
            self._read += raw
            return bool(raw)

    def grab(self) -> bool:
        """Reads until a chunk is there; `retrieve` converts it."""
        deadline = time.monotonic() + READ_S
        wanted = min(self.chunk, self._left) * self._form.frame_bytes
        while len(self._read) < wanted and not self._ended:
            self._ended = not self._more(deadline)
        took = min(wanted, len(self._read))
        took -= took % self._form.frame_bytes
        if not took and self._path != _STDIN:
            raise Unavailable(f"Whoever wrote into {self._what} has ended.", "Start it again.")
        self._raw = bytes(self._read[:took])
        del self._read[:took]
        self._left -= took // self._form.frame_bytes
        return took > 0

    def retrieve(self, buffer: U8 | None) -> F32:
        del buffer
        return sounds.to_mono(np.frombuffer(self._raw, np.uint8), self._form, self._what)

    def rewind(self) -> None:
        """A pipe has no beginning to go back to."""

    def close(self) -> None:
        if self._path != _STDIN and self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def _opened(path: str) -> int:
    """A descriptor to read from. Raises Unavailable, Rejected."""
    if path == _STDIN:
        return 0
    try:
        # Without O_NONBLOCK this would wait, for ever, for somebody who writes.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Unavailable(f"{path} is not there.", f"Make it: mkfifo {path}") from None
    except OSError as error:
        raise Unavailable(f"{path} cannot be opened: {error.strerror}.") from None
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.close(fd)
        raise Rejected(
            f"{path} is not a pipe.", "Name a sound file without `pipe:`, or make one with mkfifo."
        )
    return fd
