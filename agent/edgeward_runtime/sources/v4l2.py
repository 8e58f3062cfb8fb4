"""A camera behind Video4Linux."""

from __future__ import annotations

import os

from edgeward_runtime.images import U8, Reader
from edgeward_runtime.sources.base import PictureBase
from edgeward_runtime.sources.options import SourceOptions
from edgeward_wire.errors import Unavailable


class V4l2Source(PictureBase):
    """Frames of one device as they come."""

    def __init__(self, options: SourceOptions) -> None:
        device = options.device or options.uri
        if not os.path.exists(device):
            raise Unavailable(f"{device} is not there.", "Plug the camera in; `ls /dev/video*` lists them.")
        if not os.access(device, os.R_OK | os.W_OK):
            raise Unavailable(f"{device} may not be opened.", "Add the user to the group `video`.")
        self._reader = Reader.of_device(device, options.width, options.height, options.fps, options.format)
        self._device = device

    @property
    def fps(self) -> float | None:
        return self._reader.fps

    def grab(self) -> bool:
        if not self._reader.grab():
            raise Unavailable(f"{self._device} stopped delivering.", "Check the camera and its cable.")
        return True

    def retrieve(self, buffer: U8 | None) -> U8:
        return self._reader.retrieve(buffer)

    def rewind(self) -> None:
        """A camera has no first frame: `grab` never says that it ended."""

    def close(self) -> None:
        self._reader.close()
