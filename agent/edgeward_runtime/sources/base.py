"""What every source does. A source never makes a frame up, nor fills a gap in sound."""

from __future__ import annotations

from typing import Any, Protocol

import numpy.typing as npt

from edgeward_runtime.images import U8

CHUNK_S = 0.1
"""How much sound a chunk holds, about."""


class Source(Protocol):
    """Opened by its constructor, used by one thread. Every method may raise Unavailable.

    Pictures and sound differ in `rate`: None, or the samples a second of what `retrieve` gives.
    """

    @property
    def rate(self) -> int | None:
        """Of sound, in samples a second; None: pictures."""
        ...

    @property
    def fps(self) -> float | None:
        """The rate that it claims: frames, or chunks of sound, a second."""
        ...

    @property
    def lost_s(self) -> float:
        """Sound that is missing before the chunk that was fetched, in seconds."""
        ...

    @property
    def recorded(self) -> bool:
        """Whether it is a film though its address is a stream's: played at its own pace, and it ends."""
        ...

    def grab(self) -> bool:
        """Fetch the next frame; False at the end of a file. A camera that gives nothing is Unavailable."""
        ...

    def retrieve(self, buffer: U8 | None) -> npt.NDArray[Any]:
        """The fetched frame as BGR, written into `buffer` if it fits, else in an array of its own.

        Of sound: (n,) float32 in -1..1, mono; the buffer is not used.
        """
        ...

    def rewind(self) -> None:
        """Back to the first frame of a file."""

    def close(self) -> None:
        """Let go of the file or device. Never raises."""


class PictureBase:
    """What sources of pictures have in common: no sound."""

    rate: int | None = None
    lost_s: float = 0.0
    recorded: bool = False


class SoundBase:
    """What sources of sound have in common; `_rate` is set by the constructor."""

    _rate: int
    lost_s: float = 0.0
    recorded: bool = False

    @property
    def rate(self) -> int | None:
        return self._rate

    @property
    def fps(self) -> float | None:
        return self._rate / self.chunk

    @property
    def chunk(self) -> int:
        """Samples of one chunk."""
        return max(1, round(self._rate * CHUNK_S))
