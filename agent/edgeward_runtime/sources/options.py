"""What the local configuration says about one source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

SlotPolicy = Literal["latest", "every"]
Why = Literal["interval", "change", "every"]
Rotation = Literal[0, 90, 180, 270]
Polygon = tuple[tuple[float, float], ...]
Crop = tuple[float, float, float, float]

ANY = "*"
_MAX_DIGITS = 4
"""Of a camera's number."""
_FILES = ("/dev/shm/", "/dev/fd/")
"""What below /dev is no device."""


@dataclass(frozen=True)
class Rules:
    """What of a source's answers counts."""

    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Least score by label; `*` for every other. A task has a default of its own."""
    classes: frozenset[str] = frozenset()
    """Only these labels; empty: all."""
    zones: Mapping[str, Polygon] = field(default_factory=dict)
    """Areas by name: corners (x, y) as shares of the frame, 0, 0 at its upper left."""

    def threshold(self, label: str, default: float) -> float:
        """The least score at which `label` counts."""
        return self.thresholds.get(label, self.thresholds.get(ANY, default))

    def wanted(self, label: str) -> bool:
        """Whether the label is asked for at all."""
        return not self.classes or label in self.classes


@dataclass(frozen=True)
class SourceOptions:
    """One source.

    `uri`: a number or a path below /dev (V4L2), rtsp://, http(s):// (MJPEG), a GStreamer pipeline
    (`... ! appsink`), a video file, a picture, a directory of pictures, a sound file, `mic:` or `mic:NAME`,
    `pipe:PATH` (WAV).
    """

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
    format: str | None = None
    """Asked of a camera: the FOURCC of its pictures on the wire."""
    rotate: Rotation = 0
    """Degrees clockwise."""
    crop: Crop | None = None
    """(x1, y1, x2, y2) as shares of the frame, after it was turned."""
    rules: Rules = field(default_factory=Rules)
    results: Why = "interval"

    @property
    def device(self) -> str | None:
        """The path of the V4L2 device that `uri` means, if it means one; it need not be there now."""
        if self.uri.isdecimal() and len(self.uri) <= _MAX_DIGITS:
            return f"/dev/video{int(self.uri)}"
        return self.uri if self.uri.startswith("/dev/") and not self.uri.startswith(_FILES) else None

    @property
    def live(self) -> bool:
        """Whether it delivers at its own pace: a camera, a stream, a microphone, a pipe."""
        return (
            self.device is not None
            or "://" in self.uri
            or "!" in self.uri
            or self.uri.startswith(("mic:", "pipe:"))
        )

    @property
    def policy(self) -> SlotPolicy:
        """`latest` for live and paced sources, `every` for files, unless the configuration says so."""
        return self.slot or ("latest" if self.live or self.realtime else "every")

    @property
    def paced(self) -> bool:
        """Whether frames wait for their time. An unpaced file in a `latest` slot would only eat a core."""
        return not self.live and (self.realtime or self.slot == "latest")
