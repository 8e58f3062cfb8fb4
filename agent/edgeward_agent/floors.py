"""Anti-rollback floors: what this device has seen and will not go below again. Outside the metadata cache.

Invariants: the file is replaced atomically and fsynced. A floor of a role belongs to the set of key ids that
signed it and lapses when the role gets other keys; root's own floor never lapses. Only authenticated times
are kept. While the file is damaged, nothing is accepted and nothing is overwritten. Safe to share between
threads.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field

from edgeward_agent.files import replace_file
from edgeward_wire.document import Signed, parse
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.identifiers import ModelName, Sha256, UnixTime

_MAX_BYTES = 1 << 20
_DAMAGED_STEP = (
    "Restore floors.json from a backup, or delete it: the device then forgets which versions it has seen."
)


class _Role(Signed):
    keys: Sha256
    version: int = Field(ge=0)


class _Time(Signed):
    keys: Sha256
    at: UnixTime


class _Document(Signed):
    schema_: Literal["edgeward.floors/1"] = Field(default="edgeward.floors/1", alias="schema")
    roles: dict[str, _Role] = Field(default_factory=dict, max_length=1000)
    time: _Time | None = None
    security: dict[ModelName, int] = Field(default_factory=dict, max_length=10_000)


class Floors:
    """`<state>/floors.json`. Make one per process and share it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._changed = False
        self._damaged: Rejected | None = None
        self._now = _Document()
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            self._damaged = Rejected(f"{path} cannot be read: {error.strerror}.", _DAMAGED_STEP)
            return
        try:
            self._now = parse(_Document, raw, limit=_MAX_BYTES, name=str(path))
        except Rejected as error:
            self._damaged = Rejected(error.what, _DAMAGED_STEP)

    @property
    def damaged(self) -> Rejected | None:
        """None, or why the file cannot be read: then `Registry.check` refuses every update."""
        return self._damaged

    @property
    def last_authenticated_time(self) -> float:
        """Unix seconds, 0 when none is known."""
        with self._lock:
            return self._now.time.at if self._now.time else 0.0

    def version(self, role: str, keys: Iterable[str]) -> int:
        """The lowest version of `role` that may still be accepted from this set of key ids; 0 for any."""
        with self._lock:
            known = self._now.roles.get(role)
            return known.version if known and known.keys == _digest(keys) else 0

    def raise_version(self, role: str, keys: Iterable[str], version: int) -> None:
        """Remember a verified version; in memory until `save`."""
        with self._lock:
            if version > self.version(role, keys) or role not in self._now.roles:
                roles = {**self._now.roles, role: _Role(keys=_digest(keys), version=version)}
                self._update(roles=roles)

    def raise_time(self, at: float, keys: Iterable[str]) -> None:
        """Remember an authenticated time (Unix seconds) by the timestamp role's keys. Until `save`."""
        digest = _digest(keys)
        with self._lock:
            known = self._now.time
            if known is None or known.keys != digest or at > known.at:
                self._update(time=_Time(keys=digest, at=at))

    def lapse_time(self, keys: Iterable[str]) -> bool:
        """Forget a time that other keys than these have signed; whether there was one. Until `save`."""
        with self._lock:
            if self._now.time is None or self._now.time.keys == _digest(keys):
                return False
            self._update(time=None)
            return True

    def security(self, model: str) -> int:
        """The security epoch below which no update of this model is accepted."""
        with self._lock:
            return self._now.security.get(model, 0)

    def raise_security(self, model: str, epoch: int) -> None:
        """A model with this epoch was committed. Saved at once.

        Raises:
            Unavailable: the disk does not take it.
        """
        with self._lock:
            if epoch > self.security(model):
                self._update(security={**self._now.security, model: epoch})
            self.save()

    def save(self) -> None:
        """Write what changed, atomically and fsynced; nothing when nothing changed.

        Raises:
            Unavailable: the disk does not take it.
        """
        with self._lock:
            if not self._changed or self._damaged:
                return
            try:
                replace_file(self._path, self._now.to_bytes())
            except OSError as error:
                raise Unavailable(f"{self._path} cannot be written: {error.strerror}.") from error
            self._changed = False

    def _update(self, **change: object) -> None:
        self._now = self._now.model_copy(update=change)
        self._changed = True


def _digest(keys: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()
