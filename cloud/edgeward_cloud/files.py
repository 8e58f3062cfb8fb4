"""Files that survive a power cut, and the lock that keeps writers single.

Invariants: a file that `write_atomic` names holds either its old bytes or all of its new ones, also
after a crash; when it returns, the new ones are on the disk. Readers need no lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeward_wire.errors import Rejected, Unavailable

PRIVATE = 0o600
PUBLIC = 0o644
TEMPORARY = ".tmp"
"""How the name of a file ends that a crash may have left behind."""


def write_atomic(path: Path, data: bytes, *, mode: int = PUBLIC) -> None:
    """Write `data` to `path`: temporary file, fsync, rename, fsync of the directory.

    Raises:
        Unavailable: the disk is full or refuses to be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{TEMPORARY}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        try:
            os.fchmod(descriptor, mode)
            _write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_fault(path, error) from error


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bounded(path: Path, limit: int) -> bytes:
    """All of a file of at most `limit` bytes.

    Raises:
        Rejected: it is longer. FileNotFoundError: it is not there.
    """
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise Rejected(f"{path} is longer than {limit} bytes.")
    return data


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold a lock file: one writer among all threads and processes. Waits as long as it takes."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE)
    try:
        # flock, not lockf: it belongs to the open file, so that it also holds between threads.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def disk_fault(path: Path, error: OSError) -> Unavailable:
    """What to tell a person about a write that failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unavailable(f"The disk that holds {path} is full.", "Free some space and try again.")
    return Unavailable(
        f"Cannot write {path}: {error.strerror or error}.", "Check the directory's owner and mode."
    )


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
