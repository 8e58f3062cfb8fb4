"""Anti-rollback floors: what this device has seen and will not go below again. Outside the metadata cache.

Invariants: the file is replaced atomically and fsynced. A floor of a TUF role belongs to the set of key
ids that signed it and lapses when root gives the role other keys; root's own floor never lapses. Only
authenticated times are kept. While the file is damaged, nothing is accepted and nothing is overwritten.
Safe to share between threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class Floors:
    """`<state>/floors.json`. Make one per process and share it."""

    def __init__(self, path: Path) -> None:
        raise NotImplementedError

    @property
    def damaged(self) -> str:
        """Empty, or why the file cannot be read: then `Registry.check` refuses every update."""
        raise NotImplementedError

    @property
    def last_authenticated_time(self) -> float:
        """Unix seconds, 0 when none is known."""
        raise NotImplementedError

    def version(self, role: str, keys: Iterable[str]) -> int:
        """The lowest version of `role` that may still be accepted from this set of key ids; 0 for any."""
        raise NotImplementedError

    def raise_version(self, role: str, keys: Iterable[str], version: int) -> None:
        """Remember a verified version; in memory until `save`."""
        raise NotImplementedError

    def raise_time(self, at: float, keys: Iterable[str]) -> None:
        """Remember an authenticated time (Unix seconds) by the timestamp role's keys; in memory until `save`."""
        raise NotImplementedError

    def security(self, model: str) -> int:
        """The security epoch below which no update of this model is accepted."""
        raise NotImplementedError

    def raise_security(self, model: str, epoch: int) -> None:
        """A model with this epoch was committed. Saved at once.

        Raises:
            Unavailable: the disk does not take it.
        """
        raise NotImplementedError

    def save(self) -> None:
        """Write what changed, atomically and fsynced; nothing when nothing changed.

        Raises:
            Unavailable: the disk does not take it.
        """
        raise NotImplementedError
