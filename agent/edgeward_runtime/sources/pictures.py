"""A directory of pictures, or one picture, in order of name."""

from __future__ import annotations

from pathlib import Path

from edgeward_runtime import images
from edgeward_runtime.images import PICTURE_SUFFIXES, U8
from edgeward_runtime.sources.base import PictureBase
from edgeward_runtime.sources.options import SourceOptions
from edgeward_wire.errors import Unavailable

MAX_PICTURES = 100_000
_DEFAULT_FPS = 1.0


class PictureSource(PictureBase):
    """Each picture once. `retrieve` raises Rejected for one that is not readable: the next may be."""

    def __init__(self, options: SourceOptions) -> None:
        self._path = Path(options.uri)
        self._fps = (options.fps or _DEFAULT_FPS) if options.paced else None
        self._names = iter(_listed(self._path))
        self._name = ""
        self._raw = b""

    @property
    def fps(self) -> float | None:
        """None: as fast as they are taken."""
        return self._fps

    def grab(self) -> bool:
        """Reads the next file; `retrieve` decodes it."""
        for path in self._names:
            try:
                with path.open("rb") as file:
                    self._name, self._raw = path.name, file.read(images.MAX_PICTURE_BYTES + 1)
            except OSError:
                continue  # it went away since it was listed
            return True
        return False

    def retrieve(self, buffer: U8 | None) -> U8:
        del buffer  # OpenCV decodes into memory of its own
        return images.decode(self._raw, self._name)

    def rewind(self) -> None:
        self._names = iter(_listed(self._path))

    def close(self) -> None:
        self._raw = b""


def _listed(path: Path) -> list[Path]:
    try:
        if path.is_file():
            return [path]
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)
    except OSError as error:
        raise Unavailable(f"{path} cannot be listed: {error.strerror or error}.") from None
    if not found:
        raise Unavailable(
            f"{path} holds no pictures.", f"Put {', '.join(sorted(PICTURE_SUFFIXES))} files there."
        )
    return found[:MAX_PICTURES]
