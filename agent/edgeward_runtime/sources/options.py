"""What the local configuration says about one source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SlotPolicy = Literal["latest", "every"]


@dataclass(frozen=True)
class SourceOptions:
    """One source. `uri`: a number or /dev/video* (V4L2), a video file, a picture, a directory of pictures."""

    name: str
    uri: str
    slot: SlotPolicy | None = None
    realtime: bool = False
    """Play a file at its own frame rate (or `fps`), as a camera would."""
    loop: bool = False
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    """Asked of a camera; the pace of a file that is played in real time."""

    @property
    def device(self) -> str | None:
        """The path of the V4L2 device that `uri` means, if it means one."""
        if self.uri.isdecimal():
            return f"/dev/video{int(self.uri)}"
        return self.uri if self.uri.startswith("/dev/video") else None

    @property
    def policy(self) -> SlotPolicy:
        """`latest` for live and paced sources, `every` for files, unless the configuration says so."""
        return self.slot or ("latest" if self.device or self.realtime else "every")

    @property
    def paced(self) -> bool:
        """Whether frames wait for their time. An unpaced file in a `latest` slot would only eat a core."""
        return self.device is None and (self.realtime or self.slot == "latest")
