"""Results that people find whole or not at all, in places that were looked at before the work."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from edgeward_wire.errors import Rejected, Unavailable


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


def check_place(path: Path, *inputs: Path) -> None:
    """Whether `write_whole` could write there, before the work; what is there stays as it is.

    Raises:
        Rejected: one of `inputs` would be written over. Unavailable: nothing can be written there.
    """
    for one in inputs:
        if path.exists() and one.exists() and path.samefile(one):
            raise Rejected(f"{path} is the model itself, and would be written over.", "Choose another place.")
    home = next((parent for parent in path.absolute().parents if parent.exists()), path)
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        why = error.strerror or error
        raise Unavailable(f"{path} cannot be written: {why}.", "Choose another place.") from error
