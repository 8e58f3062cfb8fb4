"""Writing files so that a power cut leaves the old bytes or the new ones, and never half of either.

Also whether one is there, for a person who may not be allowed to know.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from edgeward_wire.errors import Rejected


def replace_file(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write, fsync, rename over `path`, fsync the directory. Raises OSError and then leaves `path` alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    try:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames and removals in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_there(path: Path) -> bool:
    """Like `Path.exists`, for a path that a person named or did not choose the owner of.

    Raises:
        Rejected: it cannot be looked at, where `exists` raises what no person should read.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError as error:
        raise Rejected(
            f"{path} cannot be looked at: {error.strerror}.", "Run it as the agent's user, e.g. with sudo."
        ) from error
    except OSError as error:
        raise Rejected(f"{path} cannot be looked at: {error.strerror}.", "Name another one.") from error
    return True
