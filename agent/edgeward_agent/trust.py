"""What this device is told to run, verified. Only importer of tuf.

Invariants: nothing leaves here that its signature chain, its floors and trusted time do not allow. Expired
metadata stops updates and never inference. Trusted time is the system clock, but at least the last
authenticated time and BUILD_TIME; only times that the timestamp role has signed are kept, so one visit to
2106 expires nothing for ever. The metadata cache is disposable: what it must remember is in the floors.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import cast

from tuf.api import exceptions
from tuf.api.metadata import Metadata, Root, TargetFile, Targets

from edgeward_agent.files import replace_file
from edgeward_agent.floors import Floors
from edgeward_agent.http import Http, refusal
from edgeward_agent.identity import Identity
from edgeward_wire.assignment import MAX_ASSIGNMENT_BYTES, Assignment
from edgeward_wire.document import parse
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.identifiers import assignment_path
from edgeward_wire.manifest import MAX_MANIFEST_BYTES, Manifest, ModelRef


@contextmanager
def _without_urllib3() -> Iterator[None]:
    """tuf's default fetcher would load urllib3, a megabyte that we never use: `_Fetcher` stands in for it."""
    name = "tuf.ngclient.urllib3_fetcher"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = ModuleType(name)
    sys.modules[name].Urllib3Fetcher = type("Urllib3Fetcher", (), {})  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del sys.modules[name]


with _without_urllib3():
    from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

BUILD_TIME = datetime(2026, 11, 1, tzinfo=timezone.utc).timestamp()
"""No later than any release of this code was built; raised now and then. Unix seconds."""

SIGNED_AT = "x-edgeward-signed-at"
MAX_JUMP = 10 * 365 * 86_400
"""No version, revision or time may run further ahead than this: most of ours are Unix seconds."""

_LATEST = datetime(9999, 1, 1, tzinfo=timezone.utc).timestamp()
_BOUNDS = UpdaterConfig(max_root_rotations=64, max_delegations=8)
_SHA256_JSON = re.compile(r"^([0-9a-f]{64})\.json$")
_EXPIRED = re.compile(r"([a-z0-9-]+)(?:\.json)? is expired")
_SIGNERS = {
    "root": "the holders of the root keys must sign a new root",
    "targets": "the holder of the targets key must sign it again",
    "models": "an operator must sign it again (`agent-ctl deploy` does)",
}
_DISK_STEP = "Free some space there, or check that disk."
_ONLINE = "the cloud must re-sign it"


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
        self._device = identity.device
        self._root = identity.root
        self._http = http
        self._fetcher = _Fetcher(http)
        self._cache = state / "tuf"
        self._manifests = state / "manifests"
        self._floors = floors
        self._clock = clock
        self._last = b""
        """The newest assignment's bytes, so that an unchanged one is not fetched again."""

    def check(self) -> Desired | None:
        """Look once; None when nothing is assigned to this device yet. The floors are fsynced on return.

        Raises:
            Unavailable: network, disk, or expired metadata (the text says whose, since when, who must act).
            Rejected: a signature, a rollback, a wrong document.
        """
        if self._floors.damaged:
            raise self._floors.damaged
        try:
            look = self._refreshed()
            assignment, raw = self._assignment(look)
            if assignment is None:
                return None
            return self._desired(look, assignment, raw)
        finally:
            self._floors.save()

    def manifest(self, ref: ModelRef) -> VerifiedManifest:
        """A released manifest that nobody has assigned, verified as an assigned one is. For commands.

        Raises:
            Unavailable, Rejected: as `check`; Rejected when no release key has signed this very manifest.
        """
        if self._floors.damaged:
            raise self._floors.damaged
        try:
            return self._manifest(self._refreshed(), ref)
        finally:
            self._floors.save()

    def trusted_time(self) -> float:
        """Unix seconds."""
        return min(max(self._clock(), self._floors.last_authenticated_time, BUILD_TIME), _LATEST)

    def prune_manifests(self, keep: set[str]) -> None:
        """Forget verified manifests whose sha256 is not in `keep`. One that stays costs some kB."""
        for path in self._manifests.glob("*.json"):
            name = _SHA256_JSON.match(path.name)
            if name and name[1] not in keep:
                with contextlib.suppress(OSError):  # the next look tries again; serving goes on
                    path.unlink()

    def _refreshed(self) -> _Look:
        """A look at the newest top-level metadata, within the floors.

        A refresh can fail because a stolen timestamp key has signed a far time. Once root has taken that key
        away, its time lapses and the refresh is tried again.
        """
        while True:
            look = self._look()
            try:
                look.refresh()
            except (Rejected, Unavailable):
                known = look.version("root") >= self._floors.version("root", [])
                if not known or not self._floors.lapse_time(look.keys("root", "timestamp")):
                    raise
                continue
            self._judge(look)
            self._learn_time(look)
            look.expire(self.trusted_time())
            return look

    def _look(self) -> _Look:
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            return _Look(self._root, self._cache, self._fetcher, self.trusted_time())
        except OSError as error:
            raise Unavailable(f"{self._cache} cannot be written: {error.strerror}.", _DISK_STEP) from error

    def _judge(self, look: _Look) -> None:
        """Hold all that was verified so far against the floors, and raise them."""
        found = [(role, look.keys(by, role), look.version(role)) for by, role in look.verified()]
        for role, keys, version in found:
            self._check_floor(role, keys, version)
        for role, keys, version in found:
            self._floors.raise_version(role, keys, version)

    def _check_floor(self, role: str, keys: list[str], version: int) -> None:
        floor = self._floors.version(role, keys)
        if version < floor:
            raise Rejected(
                f"The registry's {role} is version {version}, but this device has seen {floor}: "
                "an older state was put back.",
                "Find out who put it back. A restored cloud signs newer versions by itself.",
            )
        if version > max(floor, self.trusted_time()) + MAX_JUMP:
            raise Rejected(
                f"The registry's {role} jumps from version {floor} to {version}.",
                "Check the clock of whoever signed it.",
            )

    def _learn_time(self, look: _Look) -> None:
        """Keep the time that the timestamp role has signed."""
        text = look.signed_at()
        if text is None:
            return
        try:
            at = datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc).timestamp()
        except ValueError as error:
            raise Rejected(f"{SIGNED_AT} of timestamp.json is not a time: {text[:40]!r}.") from error
        if at > self.trusted_time() + MAX_JUMP:
            raise Rejected(
                f"timestamp.json says that it was signed at {text}.", "Check the clock of the cloud."
            )
        self._floors.raise_time(max(at, 0.0), look.keys("root", "timestamp"))

    def _assignment(self, look: _Look) -> tuple[Assignment | None, bytes]:
        path = assignment_path(self._device)
        target = look.target(path)
        self._judge(look)
        if target is None:
            return None, b""
        if not _is(self._last, target):
            self._last = self._download(target, MAX_ASSIGNMENT_BYTES)
        assignment = parse(Assignment, self._last, limit=MAX_ASSIGNMENT_BYTES, name="The assignment")
        if assignment.device != self._device:
            raise Rejected(f"The assignment at {path} is for {assignment.device}.")
        keys = look.keys("targets", "director")
        self._check_floor("assignment", keys, assignment.revision)
        self._floors.raise_version("assignment", keys, assignment.revision)
        return assignment, self._last

    def _desired(self, look: _Look, assignment: Assignment, raw: bytes) -> Desired:
        manifests: dict[str, VerifiedManifest] = {}
        refused: dict[str, Rejected | Unavailable] = {}
        for pipeline, row in assignment.pipelines.items():
            found = self._manifest_or_fault(look, row.model)
            if isinstance(found, VerifiedManifest):
                manifests[pipeline] = found
            else:
                refused[pipeline] = found
        return Desired(assignment, raw, manifests, refused)

    def _manifest_or_fault(self, look: _Look, ref: ModelRef) -> VerifiedManifest | Rejected | Unavailable:
        """One pipeline's fault must not hold up another."""
        try:
            return self._manifest(look, ref)
        except (Rejected, Unavailable) as error:
            return error

    def _manifest(self, look: _Look, ref: ModelRef) -> VerifiedManifest:
        """A manifest from this disk if it was verified before, so that a way back needs no fresh `models`."""
        stored = self._manifests / f"{ref.sha256}.json"
        try:
            raw = stored.read_bytes()
        except OSError:
            raw = b""
        if hashlib.sha256(raw).hexdigest() != ref.sha256:
            raw = self._fetch_manifest(look, ref)
            try:
                replace_file(stored, raw)
            except OSError as error:
                raise Unavailable(f"{stored} cannot be written: {error.strerror}.", _DISK_STEP) from error
        manifest = parse(Manifest, raw, limit=MAX_MANIFEST_BYTES, name=ref.path)
        if manifest.path != ref.path:
            raise Rejected(f"The manifest at {ref.path} says that it is {manifest.path}.")
        return VerifiedManifest(ref, manifest, raw)

    def _fetch_manifest(self, look: _Look, ref: ModelRef) -> bytes:
        target = look.target(ref.path)
        self._judge(look)
        if target is None:
            raise Rejected(f"{ref.path} is asked for, but no release key has signed it.", "Deploy it again.")
        if target.hashes.get("sha256") != ref.sha256:
            raise Rejected(
                f"{ref.path} is asked for with another sha256 than the release key has signed.",
                "Deploy it again, and find out who asks for it.",
            )
        return self._download(target, MAX_MANIFEST_BYTES)

    def _download(self, target: TargetFile, limit: int) -> bytes:
        """A small target's bytes, verified against its signed length and hashes."""
        if target.length > limit:
            raise Rejected(f"{target.path} is {target.length} bytes long; at most {limit} are read.")
        directory, _, name = target.path.rpartition("/")
        path = f"/tuf/targets/{directory}/{target.hashes.get('sha256', '')}.{name}"
        answer = self._http.get(path, limit=max(target.length, 64 << 10))
        if answer.status != 200:
            raise Unavailable(f"The registry does not give {target.path} (status {answer.status}).")
        if not _is(answer.body, target):
            raise Rejected(f"The registry's bytes for {target.path} do not match what was signed.")
        return answer.body


def _is(data: bytes, target: TargetFile) -> bool:
    """Whether these are the target's bytes: signed length and all signed hashes, sha256 among them."""
    if "sha256" not in target.hashes:
        raise Rejected(f"{target.path} is signed without a sha256.")
    try:
        target.verify_length_and_hashes(data)
    except exceptions.LengthOrHashMismatchError:
        return False
    return True


class _Look:
    """One look through a new Updater. The only place that reaches into tuf's private trusted set."""

    def __init__(self, root: bytes, cache: Path, fetcher: _Fetcher, now: float) -> None:
        self._fetcher = fetcher
        try:
            self._updater = Updater(
                str(cache), "/tuf/metadata/", fetcher=fetcher, config=_BOUNDS, bootstrap=root
            )
        except exceptions.RepositoryError as error:
            raise Rejected(f"The pinned root cannot be used: {error}.", "Enrol this device again.") from error
        self._trusted = self._updater._trusted_set
        self._set_time(now)

    def _set_time(self, now: float) -> None:
        """Every expiry check of tuf reads this one attribute (a contract test holds it to that)."""
        self._trusted.reference_time = datetime.fromtimestamp(now, tz=timezone.utc)

    def refresh(self) -> None:
        """Load root, timestamp, snapshot and targets. Raises Rejected or Unavailable."""
        with self._blamed():
            self._updater.refresh()

    def target(self, path: str) -> TargetFile | None:
        """What the delegations say of a path. Raises Rejected or Unavailable."""
        with self._blamed():
            return self._updater.get_targetinfo(path)

    def expire(self, now: float) -> None:
        """Go on at a later time, as the timestamp role may have told it."""
        self._set_time(now)
        with self._blamed():
            for role in ("root", "timestamp", "snapshot", "targets"):
                if self._trusted[role].is_expired(self._trusted.reference_time):
                    raise exceptions.ExpiredMetadataError(f"{role} is expired")

    def verified(self) -> list[tuple[str, str]]:
        """(delegator, role) of all metadata that was verified so far."""
        return sorted(self._trusted._trusted_delegations)

    def version(self, role: str) -> int:
        """The version of verified metadata."""
        return self._trusted[role].version

    def keys(self, delegator: str, role: str) -> list[str]:
        """The key ids that the delegator gives the role. None for root: its floor must never lapse."""
        if role == "root":
            return []
        by = cast("Root | Targets", self._trusted[delegator])
        return list(by.get_delegated_role(role).keyids)

    def signed_at(self) -> str | None:
        """What the timestamp role says of when it signed."""
        value = self._trusted.timestamp.unrecognized_fields.get(SIGNED_AT)
        return None if value is None else str(value)

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        try:
            yield
        except exceptions.ExpiredMetadataError as error:
            raise self._expired(str(error)) from error
        except exceptions.RepositoryError as error:
            what = str(error).rstrip(".")
            raise Rejected(
                f"The registry's metadata is refused: {what}.", "Check who can write to the registry."
            ) from error
        except _Carried as error:
            raise error.error from error
        except exceptions.DownloadHTTPError as error:
            raise Unavailable(f"The registry lacks its metadata: {error}.", "Check the cloud.") from error
        except OSError as error:
            raise Unavailable(f"The metadata cache cannot be written: {error}.", _DISK_STEP) from error

    def _expired(self, text: str) -> Unavailable:
        found = _EXPIRED.search(text)
        role = found[1] if found else "metadata"
        signed = self._trusted.get(role)
        if signed is None:  # delegated: refused after its signature held, so its last bytes may be quoted
            signed = Metadata.from_bytes(self._fetcher.last).signed
        now = self._trusted.reference_time
        return Unavailable(
            f"{role}.json expired at {signed.expires:%Y-%m-%d %H:%M} UTC: {_SIGNERS.get(role, _ONLINE)}.",
            f"What runs goes on running. By this device's clock it is {now:%Y-%m-%d %H:%M} UTC; check both.",
        )


class _Carried(exceptions.DownloadError):
    """Takes an error of ours through tuf."""

    def __init__(self, error: Rejected | Unavailable) -> None:
        super().__init__(error.what)
        self.error = error


class _Fetcher(FetcherInterface):
    """tuf's downloads over our bounded GET. A `url` is a path below the cloud's address."""

    def __init__(self, http: Http) -> None:
        self._http = http
        self.last = b""
        """The last bytes fetched."""

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """All of it at once: no temporary file, and no generator for an error to escape from."""
        try:
            answer = self._http.get(url, limit=max_length)
        except (Rejected, Unavailable) as error:
            raise _Carried(error) from error
        if answer.status in (403, 404):
            name = url.rpartition("/")[2]
            raise exceptions.DownloadHTTPError(f"no {name} (status {answer.status})", answer.status)
        if answer.status != 200:
            raise _Carried(refusal(answer, "The registry cannot be read"))
        self.last = answer.body
        return answer.body

    def _fetch(self, url: str) -> Iterator[bytes]:
        return iter([self.download_bytes(url, MAX_MANIFEST_BYTES)])
