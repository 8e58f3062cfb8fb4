"""Verified blobs on the device's disk.

Invariants: `<sha256>` exists only with the right bytes, fsynced; `<sha256>.part` is what came so far. A
broken download goes on where it stopped. A full disk is seen before it is full. Only bytes that came in one
go and are wrong are blamed on the registry: a resumed part may have been hurt by a power cut.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal

from edgeward_agent.files import sync_directory
from edgeward_agent.http import Body, Http, Token
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.identifiers import blob_path
from edgeward_wire.manifest import BlobRef

RESERVE_BYTES = 16 << 20
"""Left free on the disk for the journal and for others."""

_CHUNK = 1 << 20
_SYNC_EVERY = 16 << 20
_PROGRESS_EVERY_S = 0.25
_CONTENT_RANGE = re.compile(r"^bytes (\d+)-(\d+)/(\d+)$")
_SHA256_NAME = re.compile(r"^([0-9a-f]{64})(\.part)?$")

Progress = Callable[[int, int], None]


class BlobStore:
    """The directory `<state>/blobs`. For one thread at a time."""

    def __init__(self, directory: Path, *, reserve: int = RESERVE_BYTES) -> None:
        self._directory = directory
        self._reserve = reserve

    def path(self, sha256: str) -> Path:
        """Where the blob is, or would be."""
        return self._directory / sha256

    def has(self, ref: BlobRef) -> bool:
        """Whether the whole blob is here."""
        try:
            return self.path(ref.sha256).stat().st_size == ref.length
        except FileNotFoundError:
            return False

    def verify(self, ref: BlobRef) -> bool:
        """Hash the blob again; a wrong or unreadable one is removed and False comes back."""
        if not self.has(ref):
            return False
        try:
            with self.path(ref.sha256).open("rb") as file:
                right = _hash_of(file).hexdigest() == ref.sha256
        except OSError:  # a bad sector
            right = False
        if not right:
            self.path(ref.sha256).unlink()
        return right

    def fetch(
        self,
        ref: BlobRef,
        http: Http,
        token: Token,
        progress: Progress,
        stop: threading.Event,
    ) -> Path:
        """Fetch one blob, or go on with it. `progress(done, total)` in bytes, at most a few times a second.

        Raises:
            Unavailable: network, disk full, or `stop` was set. What came so far is kept.
            Rejected: the registry's bytes are not what the manifest says, or it does not have the blob.
        """
        if self.has(ref):
            progress(ref.length, ref.length)
            return self.path(ref.sha256)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            outcome = self._attempt(ref, http, token, progress, stop)
            if outcome == "doubtful":
                outcome = self._attempt(ref, http, token, progress, stop)
            if outcome != "right":
                raise Rejected(
                    f"The registry's bytes for {_called(ref)} do not match the signed sha256.",
                    "Publish the model again.",
                )
        except OSError as error:
            raise self._disk_fault(ref, error) from error
        return self.path(ref.sha256)

    def prune(self, keep: set[str]) -> int:
        """Remove all blobs and parts whose sha256 is not in `keep`; returns the bytes freed."""
        freed = 0
        if not self._directory.is_dir():
            return freed
        for path in self._directory.iterdir():
            name = _SHA256_NAME.match(path.name)
            if name and name[1] not in keep:
                freed += path.stat().st_size
                path.unlink()
        return freed

    def _attempt(
        self, ref: BlobRef, http: Http, token: Token, progress: Progress, stop: threading.Event
    ) -> Literal["right", "wrong", "doubtful"]:
        """Bring the part to its full length, judge it, and put it in place when it is right.

        `doubtful`: wrong, but some of the bytes were here before this attempt.
        """
        part = self._directory / f"{ref.sha256}.part"
        with part.open("a+b") as file:
            start = file.seek(0, os.SEEK_END)
            if start > ref.length:
                start = file.truncate(0)
            self._check_space(ref, ref.length - start)
            file.seek(0)
            download = _Download(ref, file, start=start, progress=progress, stop=stop)
            progress(start, ref.length)
            if start < ref.length:
                download.run(http, token)
            os.fsync(file.fileno())
        if download.digest.hexdigest() != ref.sha256:
            part.unlink()
            return "wrong" if download.whole else "doubtful"
        os.replace(part, self.path(ref.sha256))
        sync_directory(self._directory)
        progress(ref.length, ref.length)
        return "right"

    def _check_space(self, ref: BlobRef, needed: int) -> None:
        free = shutil.disk_usage(self._directory).free
        if free < needed + self._reserve:
            raise Unavailable(
                f"The disk of {self._directory} has {free / 1e6:.1f} MB free; {_called(ref)} needs "
                f"{needed / 1e6:.1f} MB, and {self._reserve / 1e6:.1f} MB stay free.",
                "Make room on that disk.",
            )

    def _disk_fault(self, ref: BlobRef, error: OSError) -> Unavailable:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            # Give the reserve back at once: the journal must be able to write. The rest is kept.
            part = self._directory / f"{ref.sha256}.part"
            if part.exists():
                os.truncate(part, max(0, part.stat().st_size - self._reserve))
            return Unavailable(
                f"The disk of {self._directory} is full; {_called(ref)} waits.", "Make room on that disk."
            )
        return Unavailable(f"The disk of {self._directory} fails: {error.strerror}.", "Check that disk.")


class _Download:
    """One request's worth of one blob, appended to a part."""

    def __init__(
        self,
        ref: BlobRef,
        file: IO[bytes],
        *,
        start: int,
        progress: Progress,
        stop: threading.Event,
    ) -> None:
        self._ref = ref
        self._file = file
        self.digest = _hash_of(file)
        self._done = start
        self.whole = start == 0
        """All bytes came in this download."""
        self._progress = progress
        self._stop = stop

    def run(self, http: Http, token: Token) -> None:
        """Raises Unavailable when the body ends early, Rejected when it does not fit the signed length."""
        path = f"/{blob_path(self._ref.sha256)}"
        with http.stream(path, offset=self._done, token=token, stop=self._stop) as body:
            if self._accept(body):
                self._copy(body)
        if self._done < self._ref.length:
            raise Unavailable(
                f"The download of {_called(self._ref)} broke off at {self._done} of {self._ref.length} bytes."
            )

    def _accept(self, body: Body) -> bool:
        """Look at status and headers. A server that ignores Range sends all: start over in it."""
        status = body.status
        if status == 200:
            self._restart()
            return True
        if status == 206:
            found = _CONTENT_RANGE.match(body.headers.get("content-range", ""))
            if found and (int(found[1]), int(found[3])) == (self._done, self._ref.length):
                return True
            raise Rejected(
                f"The registry answers for {_called(self._ref)} with a range that was not asked for."
            )
        if status == 416:  # what is in the part cannot be right
            self._restart()
            return False
        if status in (404, 410):
            raise Rejected(
                f"The registry does not have {_called(self._ref)} (status {status}).",
                "Publish the model again.",
            )
        if status in (401, 403):
            raise Unavailable(
                f"The registry does not let this device have {_called(self._ref)} (status {status}).",
                "Check the device's admission, and its clock.",
            )
        raise Unavailable(f"The registry answered with status {status} for {_called(self._ref)}.")

    def _restart(self) -> None:
        self._file.truncate(0)
        self.digest = hashlib.sha256()
        self._done = 0
        self.whole = True

    def _copy(self, body: Body) -> None:
        told, synced = time.monotonic(), self._done
        try:
            for chunk in body.chunks:
                if self._done + len(chunk) > self._ref.length:
                    self._restart()
                    raise Rejected(f"The registry sends more than the signed length of {_called(self._ref)}.")
                self._file.write(chunk)
                self.digest.update(chunk)
                self._done += len(chunk)
                if self._done - synced >= _SYNC_EVERY:
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    synced = self._done
                if time.monotonic() - told >= _PROGRESS_EVERY_S:
                    told = time.monotonic()
                    self._progress(self._done, self._ref.length)
        finally:
            self._file.flush()


def _hash_of(file: IO[bytes]) -> hashlib._Hash:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest


def _called(ref: BlobRef) -> str:
    return f"{ref.name} ({ref.sha256[:12]}…)" if ref.name else f"blob {ref.sha256[:12]}…"
