"""The immutable blob store: `<dir>/sha256/<hex>`.

Invariants: what lies under a name had that sha256 and was on the disk before it got its name. It never
changes, unless the disk has damaged it: then a sound upload takes its place. An upload that ends early leaves
nothing behind but a temporary file, which `clean` removes.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from edgeward_cloud.files import disk_fault, sync_directory
from edgeward_wire.errors import Rejected
from edgeward_wire.identifiers import SHA256_PATTERN
from edgeward_wire.manifest import MAX_BLOB_BYTES

STALE_S = 24 * 3600.0
_READ = 1 << 20
_SHA256 = re.compile(SHA256_PATTERN)
_log = logging.getLogger(__name__)


class BlobStore:
    """Blobs by their sha256. Safe for any number of threads and processes."""

    def __init__(self, directory: Path, *, max_bytes: int = MAX_BLOB_BYTES) -> None:
        self._named = directory / "sha256"
        self._temporary = directory / "incoming"
        self._max_bytes = max_bytes
        for each in (self._named, self._temporary):
            each.mkdir(mode=0o755, parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Where a blob lies, or would.

        Raises:
            Rejected: that is no sha256.
        """
        if not _SHA256.fullmatch(sha256):
            raise Rejected(f"Not a sha256 in hexadecimal: {sha256[:80]!r}.")
        return self._named / sha256

    def length(self, sha256: str) -> int | None:
        """A blob's length in bytes; None when it is not here."""
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def sound(self, sha256: str) -> bool:
        """Whether a blob is here and still has its sha256. Reads all of it."""
        return _is_sound(self.path(sha256))

    def writer(self, sha256: str, length: int | None = None) -> BlobWriter:
        """Start an upload. `length` is what the sender declared, if it did.

        Raises:
            Rejected: it is too long. Unavailable: the disk refuses.
        """
        return BlobWriter(self.path(sha256), self._temporary, length, self._max_bytes)

    def put(self, sha256: str, chunks: Iterable[bytes], length: int | None = None) -> bool:
        """Store a blob; False when it was there already. Raises as `BlobWriter` does."""
        if self.sound(sha256):
            return False
        with self.writer(sha256, length) as writer:
            for chunk in chunks:
                writer.write(chunk)
            return writer.commit()

    def clean(self, now: float | None = None) -> int:
        """Remove uploads that nobody has written to for a day; how many there were."""
        before = (time.time() if now is None else now) - STALE_S
        removed = 0
        for file in self._temporary.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process cleans as well
                if file.stat().st_mtime < before:
                    file.unlink()
                    removed += 1
        return removed


class BlobWriter:
    """One upload. Leaving the `with` without `commit` throws it away."""

    def __init__(self, final: Path, temporary: Path, length: int | None, max_bytes: int) -> None:
        self._final = final
        self._declared = length
        self._limit = max_bytes if length is None else length
        if self._limit > max_bytes:
            raise Rejected(f"A blob of {length} bytes is too long: at most {max_bytes} are stored.")
        self._digest = hashlib.sha256()
        self._length = 0
        try:
            self._fd, name = tempfile.mkstemp(dir=temporary, prefix=f"{final.name[:16]}-")
        except OSError as error:
            raise disk_fault(final, error) from error
        self._path = Path(name)

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        self._path.unlink(missing_ok=True)

    def write(self, chunk: bytes) -> None:
        """Take the next bytes.

        Raises:
            Rejected: more than declared or allowed. Unavailable: the disk is full.
        """
        self._length += len(chunk)
        if self._length > self._limit:
            raise Rejected(f"Blob {self._final.name} is longer than {self._limit} bytes.")
        self._digest.update(chunk)
        view = memoryview(chunk)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise disk_fault(self._final, error) from error

    def commit(self) -> bool:
        """Verify, make durable, and give the blob its name; False when a sound one has it already.

        Raises:
            Rejected: its length or sha256 is not the one declared. Unavailable: the disk is full.
        """
        if self._declared is not None and self._length != self._declared:
            raise Rejected(f"Blob {self._final.name} has {self._length} bytes, not {self._declared}.")
        found = self._digest.hexdigest()
        if found != self._final.name:
            raise Rejected(f"Blob {self._final.name} has sha256 {found}.", "Upload the right file.")
        try:
            os.fchmod(self._fd, 0o444)
            os.fsync(self._fd)
            if not self._take_name():
                return False
            sync_directory(self._final.parent)
        except OSError as error:
            raise disk_fault(self._final, error) from error
        return True

    def _take_name(self) -> bool:
        try:
            os.link(self._path, self._final)  # unlike a rename, never replaces what is there
        except FileExistsError:
            if _is_sound(self._final):
                return False
            _log.warning("Blob %s was damaged on the disk; the upload replaces it.", self._final.name)
            os.replace(self._path, self._final)
        return True


def _is_sound(path: Path) -> bool:
    """Whether a file is there whose sha256 is its name. One that cannot be read is not."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_READ):
                digest.update(chunk)
    except OSError:
        return False
    return digest.hexdigest() == path.name
