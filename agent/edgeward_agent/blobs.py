"""Verified blobs on the device's disk.

Invariants: `<sha256>` exists only with the right bytes, fsynced; `<sha256>.part` is what came so far. A
broken download goes on where it stopped. A full disk is seen before it is full.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from edgeward_agent.http import Http, Token
from edgeward_wire.manifest import BlobRef


class BlobStore:
    """The directory `<state>/blobs`. For one thread at a time."""

    def __init__(self, directory: Path) -> None:
        raise NotImplementedError

    def path(self, sha256: str) -> Path:
        """Where the blob is, or would be."""
        raise NotImplementedError

    def has(self, ref: BlobRef) -> bool:
        """Whether the whole blob is here."""
        raise NotImplementedError

    def verify(self, ref: BlobRef) -> bool:
        """Hash the blob again; a wrong one is removed and False comes back."""
        raise NotImplementedError

    def fetch(
        self,
        ref: BlobRef,
        http: Http,
        token: Token,
        progress: Callable[[int, int], None],
        stop: threading.Event,
    ) -> Path:
        """Fetch one blob, or go on with it. `progress(done, total)` in bytes, at most a few times a second.

        Raises:
            Unavailable: network, disk full, or `stop` was set. What came so far is kept.
            Rejected: the registry's bytes are not what the manifest says, or it does not have the blob.
        """
        raise NotImplementedError

    def prune(self, keep: set[str]) -> int:
        """Remove all blobs and parts whose sha256 is not in `keep`; returns the bytes freed."""
        raise NotImplementedError
