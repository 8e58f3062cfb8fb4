"""Mosquitto as a supervised child (skeleton)."""

from __future__ import annotations

from collections.abc import Iterable

from edgeward_cloud.settings import Settings


class Broker:
    """Supervised Mosquitto. All methods may be called from any thread."""

    def __init__(self, settings: Settings) -> None:
        raise NotImplementedError

    def start(self, viewers: Iterable[str] = (), revoked: Iterable[str] = ()) -> None:
        """Start it and wait until it accepts connections; Unavailable when it does not (says why)."""
        raise NotImplementedError

    def apply(self, viewers: Iterable[str], revoked: Iterable[str]) -> None:
        """Rewrite the ACL (user names `_viewer-x`; device ids); make Mosquitto read it and the CRL again."""
        raise NotImplementedError

    @property
    def alive(self) -> bool:
        """Whether Mosquitto runs at this moment."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stop it. Idempotent."""
        raise NotImplementedError
