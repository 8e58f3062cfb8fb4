"""What every source of frames does. A source never makes a frame up."""

from __future__ import annotations

from typing import Protocol

from edgeward_runtime.images import U8


class Source(Protocol):
    """Opened by its constructor, used by one thread. Every method may raise Unavailable."""

    @property
    def fps(self) -> float | None:
        """The rate that it claims, in frames per second."""
        ...

    def grab(self) -> bool:
        """Fetch the next frame; False at the end of a file. A camera that gives nothing is Unavailable."""
        ...

    def retrieve(self, buffer: U8 | None) -> U8:
        """The fetched frame as BGR, written into `buffer` if it fits, else in an array of its own."""
        ...

    def rewind(self) -> None:
        """Back to the first frame of a file."""

    def close(self) -> None:
        """Let go of the file or device."""
