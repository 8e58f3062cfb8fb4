"""WAV over a pipe: `pipe:PATH` of a FIFO that another program writes into, or `pipe:-` for standard input.

A recorder does not know how long it will record, so the length in the header may be missing. When the
writer goes, the source goes with it, and comes back with the next one. Invariant: one that only pauses (a
recorder that leaves silence out) is never hung up on, since its header comes once; the pipe holds what it
writes while nobody reads.
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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
_PIPE_BYTES = 1 << 20
"""Half a minute of one channel at 16 kHz; what any user may ask for."""


class _Paused(Unavailable):
    """Nothing came for a while, and whoever writes is still there."""


class _Stream:
    """What one writer writes, from its header on."""

    def __init__(self, path: str) -> None:
        self.what = "Standard input" if path == _STDIN else path
        self._fd = _opened(path)
        self._read = bytearray()
        self.ended = False
        self.left = 0
        """Frames that are still to come, by the header."""
        self._form: Format | None = None

    def form(self, deadline: float) -> Format:
        """What the header says. Raises Rejected, Unavailable."""
        while self._form is None:
            form = sounds.stream_format(bytes(self._read), self.what)
            if form is not None:
                del self._read[: form.start]
                self._form, self.left = form, form.frames
            elif len(self._read) > sounds.MAX_WAV_HEAD or not self._more(deadline):
                raise Unavailable(
                    f"{self.what} ended before any sound came.", "Check the program that writes."
                )
        return self._form

    def take(self, frames: int, deadline: float) -> bytes:
        """So many frames, fewer at the end, none after it. Raises Unavailable."""
        size = self.form(deadline).frame_bytes
        wanted = min(frames, self.left) * size
        while len(self._read) < wanted and not self.ended:
            self.ended = not self._more(deadline)
        took = min(wanted, len(self._read))
        took -= took % size
        raw = bytes(self._read[:took])
        del self._read[:took]
        self.left -= took // size
        return raw

    def _more(self, deadline: float) -> bool:
        """Read on; False at the end."""
        waiter = select.poll()
        waiter.register(self._fd, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not waiter.poll(left * 1e3):
                raise _Paused(f"Nobody writes into {self.what}.", "Start the program that records.")
            try:
                raw = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                continue
            except OSError as error:
                raise Unavailable(f"{self.what} cannot be read: {error.strerror}.") from None
            self._read += raw
            return bool(raw)

    def is_at(self, path: str) -> bool:
        """Whether this is still what the path names."""
        try:
            return path == _STDIN or os.path.samestat(os.stat(path), os.fstat(self._fd))
        except OSError:
            return False

    def close(self) -> None:
        if self._fd > 0:
            os.close(self._fd)
        self._fd = -1


_paused: dict[str, _Stream] = {}
"""By path: their headers have been read, and no other will come."""


class PipeSource(SoundBase):
    """Chunks as they come. At the end of standard input there is nothing more; a FIFO is Unavailable then."""

    def __init__(self, options: SourceOptions) -> None:
        self._path = options.uri.removeprefix("pipe:")
        self._stream: _Stream | None = _resumed(self._path) or _Stream(self._path)
        self._what, self._raw = self._stream.what, b""
        with self._kept_in_a_pause() as stream:
            self._form = stream.form(time.monotonic() + OPEN_S)
        self._rate = self._form.rate

    @contextmanager
    def _kept_in_a_pause(self) -> Iterator[_Stream]:
        """What is opened next goes on with a stream that only pauses; one that fails is closed."""
        stream = self._stream
        assert stream is not None
        try:
            yield stream
        except _Paused:
            _paused[self._path], self._stream = stream, None
            raise
        except BaseException:
            self.close()
            raise

    def grab(self) -> bool:
        """Reads until a chunk is there; `retrieve` converts it."""
        with self._kept_in_a_pause() as stream:
            self._raw = stream.take(self.chunk, time.monotonic() + READ_S)
            if not self._raw and self._path != _STDIN:
                raise Unavailable(f"Whoever wrote into {stream.what} has ended.", "Start it again.")
        return bool(self._raw)

    def retrieve(self, buffer: U8 | None) -> F32:
        del buffer
        return sounds.to_mono(np.frombuffer(self._raw, np.uint8), self._form, self._what)

    def rewind(self) -> None:
        """A pipe has no beginning to go back to."""

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None


def _resumed(path: str) -> _Stream | None:
    """The stream that paused, unless another pipe has its name by now."""
    stream = _paused.pop(path, None)
    if stream is not None and not stream.is_at(path):
        stream.close()
        return None
    return stream


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
    with suppress(OSError):  # it is only room for a pause of ours
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return fd
