"""What this device is told to run, verified. Only importer of tuf.

Invariants: nothing leaves here that its signature chain, its floors and trusted time do not allow. Expired
metadata stops updates and never inference. Trusted time is the system clock, but at least the last
authenticated time and BUILD_TIME; only authenticated times are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgeward_agent.floors import Floors
from edgeward_agent.http import Http
from edgeward_agent.identity import Identity
from edgeward_wire.assignment import Assignment
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import Manifest, ModelRef


@dataclass(frozen=True, slots=True)
class VerifiedManifest:
    """A manifest that a release key has signed, and its very bytes."""

    ref: ModelRef
    manifest: Manifest
    raw: bytes


@dataclass(frozen=True, slots=True)
class Desired:
    """What this device should run. Each pipeline of the assignment is in `manifests` or in `refused`."""

    assignment: Assignment
    assignment_raw: bytes
    manifests: dict[str, VerifiedManifest]
    refused: dict[str, Rejected | Unavailable]
    """Unavailable: its manifest cannot be fetched or checked now (network, expired `models`); ask again."""


class Registry:
    """The registry as this device sees it. For one thread."""

    def __init__(
        self, identity: Identity, http: Http, state: Path, floors: Floors, clock: Callable[[], float]
    ) -> None:
        raise NotImplementedError

    def check(self) -> Desired | None:
        """Look once; None when nothing is assigned to this device yet. The floors are fsynced on return.

        Raises:
            Unavailable: network, disk, or expired metadata (the text says whose, since when, who must act).
            Rejected: a signature, a rollback, a wrong document.
        """
        raise NotImplementedError

    def trusted_time(self) -> float:
        """Unix seconds."""
        raise NotImplementedError

    def prune_manifests(self, keep: set[str]) -> None:
        """Forget verified manifests whose sha256 is not in `keep`."""
        raise NotImplementedError
