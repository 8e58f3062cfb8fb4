"""A GStreamer pipeline that ends in `appsink`: how the CSI cameras of a Jetson are read.

Only where OpenCV was built with GStreamer: JetPack's and Debian's are, pip's is not.
"""

from __future__ import annotations

from edgeward_runtime import images
from edgeward_runtime.images import U8, Reader
from edgeward_runtime.sources.address import shown
from edgeward_runtime.sources.base import PictureBase
from edgeward_runtime.sources.options import SourceOptions
from edgeward_wire.errors import Rejected, Unavailable

OPEN_S = 15.0
READ_S = 10.0


class GstreamerSource(PictureBase):
    """Frames as the pipeline gives them. The pipeline turns them into BGR (`videoconvert`)."""

    def __init__(self, options: SourceOptions) -> None:
        if not options.uri.rpartition("!")[2].split()[:1] == ["appsink"]:
            raise Rejected(
                "The GStreamer pipeline does not end in appsink.",
                "End it with `! videoconvert ! video/x-raw,format=BGR ! appsink drop=true max-buffers=1`.",
            )
        if not images.has_gstreamer():
            raise Unavailable(
                "OpenCV was built without GStreamer here.",
                "Use the system's OpenCV (python3-opencv; JetPack brings one), in a venv with"
                " --system-site-packages.",
            )
        self._what = f"The pipeline `{shown(options.uri)[:60]} …`"
        self._reader = Reader.of_pipeline(options.uri, self._what, OPEN_S, READ_S)

    @property
    def fps(self) -> float | None:
        return self._reader.fps

    def grab(self) -> bool:
        if not self._reader.grab():
            raise Unavailable(f"{self._what} stopped delivering.", "Run it with gst-launch-1.0 to see why.")
        return True

    def retrieve(self, buffer: U8 | None) -> U8:
        return self._reader.retrieve(buffer)

    def rewind(self) -> None:
        """A pipeline has no first frame: `grab` never says that it ended."""

    def close(self) -> None:
        self._reader.close()
