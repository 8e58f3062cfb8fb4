"""Results that people find whole or not at all."""

from __future__ import annotations

import contextlib
from pathlib import Path

from edgeward_wire.errors import Unavailable


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and move it there; text is UTF-8. Raises Unavailable."""
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # it may never have been there
            beside.unlink()
        why = error.strerror or error
        raise Unavailable(f"{path} cannot be written: {why}.", "Choose another place.") from error
