"""The registry: what is released, and who should run it (skeleton)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from edgeward_cloud.registry.blobs import BlobStore
from edgeward_cloud.settings import Settings
from edgeward_wire.api import ModelEntry
from edgeward_wire.assignment import Assignment
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import Manifest, ModelRef


class Conflict(Rejected):
    """Someone else published first (HTTP 412): fetch, merge, sign again."""


class Registry:
    """One writer at a time over any number of threads and processes (a file lock); readers take no lock."""

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.time) -> None:
        self.blobs = BlobStore(settings.blobs)

    @property
    def root_sha256(self) -> str:
        """sha256 of root 1, for enrolment strings."""
        raise NotImplementedError

    def models_metadata(self) -> tuple[bytes, int]:
        """The current `models` metadata and its version."""
        raise NotImplementedError

    def publish_models(self, metadata: bytes, manifests: Mapping[str, str], if_match: int) -> int:
        """Put the next `models` metadata into force; its version. Raises Conflict or Rejected."""
        raise NotImplementedError

    def models(self) -> list[ModelEntry]:
        """What the models role has signed, by name and then newest first."""
        raise NotImplementedError

    def manifest(self, ref: ModelRef) -> Manifest:
        """A released manifest. Raises Rejected when `models` has not signed this very one."""
        raise NotImplementedError

    def assign(self, assignments: Sequence[Assignment]) -> list[Assignment]:
        """Sign the desired state of these devices.

        `revision` is set here (whatever the caller put there): max(previous + 1, Unix seconds). One that
        says the same as the device's current one is left alone. Returns them as they now stand.
        """
        raise NotImplementedError

    def assignment(self, device: str) -> Assignment | None:
        """What is signed for a device; None when nothing is."""
        raise NotImplementedError

    def resign_due(self, now: float | None = None) -> float:
        """Re-sign the online roles that are past half of their life and prune; the next time to call it."""
        raise NotImplementedError
