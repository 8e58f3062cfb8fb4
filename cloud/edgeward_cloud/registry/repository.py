"""The registry: a TUF repository of static files that says what is released and who should run it.

Invariants: one writer at a time, over threads and processes (a file lock); readers need no lock. New
files are written first, versioned and never over one in force, then the snapshot, and `timestamp.json`
last: a crash at any point leaves either the old state or the new one. State is what timestamp.json leads
to, read anew each time: there is nothing in memory that could be stale. Superseded files stay 48 h.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from edgeward_cloud.files import exclusive, read_bounded, write_atomic
from edgeward_cloud.keys import Signer, load_signer
from edgeward_cloud.registry import versions
from edgeward_cloud.registry.blobs import BlobStore
from edgeward_cloud.registry.models_branch import MAX_METADATA_BYTES, Conflict, check_release
from edgeward_cloud.settings import Settings
from edgeward_wire.api import DELEGATION, ModelEntry
from edgeward_wire.assignment import MAX_ASSIGNMENT_BYTES, Assignment
from edgeward_wire.document import parse
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.identifiers import assignment_path
from edgeward_wire.manifest import MAX_MANIFEST_BYTES, Manifest, ModelRef

__all__ = ["Conflict", "Registry", "Write", "role_signer", "to_bytes"]

SIGNED_AT = "x-edgeward-signed-at"
DIRECTOR = "director"
AGENT = "agent"
MAX_CACHED_MANIFESTS = 1024

Write = Callable[[Path, bytes], None]
T = TypeVar("T", Root, Snapshot, Targets, Timestamp)
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _State:
    """What timestamp.json leads to."""

    timestamp: Metadata[Timestamp]
    snapshot: Metadata[Snapshot]

    def version(self, role: str) -> int:
        """The version in force of a role below the snapshot."""
        return self.snapshot.signed.meta[f"{role}.json"].version

    @property
    def in_force(self) -> dict[str, int]:
        """Role -> version, of everything that carries a version in its name."""
        below = {name.removesuffix(".json"): meta.version for name, meta in self.snapshot.signed.meta.items()}
        return {"snapshot": self.snapshot.signed.version, **below}


class Registry:
    """The repository in `<dir>/registry` and its blobs. Every method may be called from any thread."""

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.time,
        write: Write = write_atomic,
    ) -> None:
        """Open it; `edgeward-cloud init` made it.

        Raises:
            Rejected: there is none, or an online key is missing.
        """
        self.blobs = BlobStore(settings.blobs)
        self._metadata = settings.metadata
        self._targets = settings.targets
        self._lock = settings.metadata.parent / ".lock"
        self._clock = clock
        self._write = write
        self._signers = {role: role_signer(settings, role) for role in ("timestamp", "snapshot", DIRECTOR)}
        self._manifests: dict[str, Manifest] = {}
        self._warned: frozenset[str] = frozenset()
        self._state()

    @property
    def root_sha256(self) -> str:
        """sha256 of root 1, which an enrolment string pins."""
        return hashlib.sha256((self._metadata / "1.root.json").read_bytes()).hexdigest()

    # --- what is released

    def models_metadata(self) -> tuple[bytes, int]:
        """The current `models` metadata and its version."""
        state = self._state()
        version = state.version(DELEGATION)
        return self._read(DELEGATION, version), version

    def models(self) -> list[ModelEntry]:
        """What the models role has signed, by name, the newest first."""
        targets = self._load(self._state(), DELEGATION).signed.targets
        entries = [self._entry(path, target) for path, target in targets.items()]
        entries.sort(key=lambda entry: (entry.created, entry.version), reverse=True)
        return sorted(entries, key=lambda entry: entry.name)

    def manifest(self, ref: ModelRef) -> Manifest:
        """A released manifest.

        Raises:
            Rejected: the models role has not signed this very one.
        """
        self._check_released(self._load(self._state(), DELEGATION).signed, [ref])
        return self._manifest(ref.path, ref.sha256)

    def publish_models(self, metadata: bytes, manifests: Mapping[str, str], if_match: int) -> int:
        """Put the next `models` metadata into force and return its version.

        `manifests` has the text of each new entry's manifest by its path; `if_match` is the version that
        the metadata follows.

        Raises:
            Conflict: that version is no longer the current one. Rejected: see `models_branch`.
        """
        with exclusive(self._lock):
            state, now = self._state(), self._clock()
            current = self._load(state, DELEGATION).signed
            if if_match != current.version:
                raise Conflict(
                    f"Someone else has published: the models metadata is at version {current.version}.",
                    "Fetch it, add your entries, and sign again.",
                )
            release = check_release(
                metadata,
                manifests,
                current=current,
                delegator=self._load(state, "targets").signed,
                now=now,
                blob_length=self.blobs.length,
            )
            for path, text in release.manifests.items():
                self._write_target(path, text)
            self._commit(state, {DELEGATION: Metadata[Targets].from_bytes(release.raw)}, now)
        log.info("models version %d: %s", release.version, ", ".join(release.manifests) or "no new entry")
        return release.version

    # --- who should run it

    def assignment(self, device: str) -> Assignment | None:
        """What is signed for a device; None when nothing is."""
        state = self._state()
        role = self._bin_of(self._load(state, DIRECTOR).signed, assignment_path(device))
        return self._signed_for(device, self._load(state, role).signed)

    def assign(self, assignments: Sequence[Assignment]) -> list[Assignment]:
        """Sign the desired state of these devices, and return it as it now stands.

        `revision` is set here, whatever the caller put there: max(previous + 1, Unix seconds). An
        assignment that says the same as the one in force is left alone. Only the bins that change are
        written.

        Raises:
            Rejected: one assigns a model that the models role has not signed.
        """
        with exclusive(self._lock):
            state, now = self._state(), self._clock()
            wanted = [row.model for each in assignments for row in each.pipelines.values()]
            if wanted:
                self._check_released(self._load(state, DELEGATION).signed, wanted)
            director = self._load(state, DIRECTOR).signed
            bins: dict[str, Metadata[Targets]] = {}
            touched: set[str] = set()
            stale: list[Path] = []
            result = []
            for each in assignments:
                role = self._bin_of(director, assignment_path(each.device))
                if role not in bins:
                    bins[role] = self._load(state, role)
                previous = self._signed_for(each.device, bins[role].signed)
                final = _revised(each, previous, now)
                if final is not previous:
                    stale += self._place(bins[role].signed, final)
                    touched.add(role)
                result.append(final)
            if touched:
                self._commit(state, {role: self._sign(role, bins[role], now) for role in touched}, now)
                _touch(stale, now)
        return result

    # --- keeping it fresh

    def resign_due(self, now: float | None = None) -> float:
        """Sign online roles again that are past half of their life, prune, and return when to come next.

        Returns:
            Unix seconds. Coming earlier is harmless.
        """
        moment = self._clock() if now is None else now
        with exclusive(self._lock):
            state = self._state()
            roles = {role: self._load(state, role) for role in self._online(state)}
            due = {r: m for r, m in roles.items() if versions.resign_at(r, m.signed.expires) <= moment}
            top = (("snapshot", state.snapshot.signed.expires), ("timestamp", state.timestamp.signed.expires))
            if due or any(versions.resign_at(role, expires) <= moment for role, expires in top):
                state = self._commit(state, {r: self._sign(r, m, moment) for r, m in due.items()}, moment)
                log.info("signed again: %s", ", ".join([*sorted(due), "snapshot", "timestamp"]))
            self._prune(state, roles.values(), moment)
        self._warn_of_expiry(moment)
        ages = [versions.resign_at(role, metadata.signed.expires) for role, metadata in roles.items()]
        ages += [
            versions.resign_at("snapshot", state.snapshot.signed.expires),
            versions.resign_at("timestamp", state.timestamp.signed.expires),
        ]
        return min(ages)

    def renew_offline(
        self, root_signers: Sequence[Signer], targets_signer: Signer, agent_signer: Signer
    ) -> dict[str, datetime]:
        """Sign root, targets and the agent's branch for another life; role -> new expiry.

        Raises:
            Rejected: these keys are not the ones that root and targets name.
        """
        with exclusive(self._lock):
            state, now = self._state(), self._clock()
            root, targets, agent = self.root(), self._load(state, "targets"), self._load(state, AGENT)
            _renew("root", root, root_signers, now)
            _renew("targets", targets, [targets_signer], now)
            _renew(AGENT, agent, [agent_signer], now)
            try:
                root.signed.verify_delegate("root", root.signed_bytes, root.signatures)
                root.signed.verify_delegate("targets", targets.signed_bytes, targets.signatures)
                targets.signed.verify_delegate(AGENT, agent.signed_bytes, agent.signatures)
            except UnsignedMetadataError as error:
                raise Rejected(
                    f"These are not this registry's keys: {error}.", "Use its offline/."
                ) from error
            self._write(self._file("root", root.signed.version), to_bytes(root))
            self._commit(state, {"targets": targets, AGENT: agent}, now)
        found = {"root": root.signed.expires, "targets": targets.signed.expires}
        return {**found, AGENT: agent.signed.expires}

    def expiries(self) -> dict[str, float]:
        """Role -> expiry in Unix seconds, for what only people can sign: root, targets, models, agent."""
        state = self._state()
        found = {role: self._load(state, role).signed.expires for role in ("targets", DELEGATION, AGENT)}
        found["root"] = self.root().signed.expires
        return {role: when.timestamp() for role, when in found.items()}

    def root(self) -> Metadata[Root]:
        """The newest root."""
        names = (versions.split_name(file.name) for file in self._metadata.iterdir())
        newest = max(parts[0] for parts in names if parts and parts[1] == "root")
        return _parse(Metadata[Root], self._read("root", newest), "root")

    # --- reading

    def _state(self) -> _State:
        try:
            raw = read_bounded(self._metadata / "timestamp.json", MAX_METADATA_BYTES)
        except FileNotFoundError as error:
            raise Rejected(
                f"There is no registry in {self._metadata.parent}.", "Make one with `edgeward-cloud init`."
            ) from error
        timestamp = _parse(Metadata[Timestamp], raw, "timestamp")
        version = timestamp.signed.snapshot_meta.version
        return _State(timestamp, _parse(Metadata[Snapshot], self._read("snapshot", version), "snapshot"))

    def _load(self, state: _State, role: str) -> Metadata[Targets]:
        return _parse(Metadata[Targets], self._read(role, state.version(role)), role)

    def _read(self, role: str, version: int) -> bytes:
        path = self._metadata / f"{version}.{role}.json"
        try:
            return read_bounded(path, MAX_METADATA_BYTES)
        except FileNotFoundError as error:
            raise Rejected(f"The registry is damaged: {path} is missing.", "Restore a backup.") from error

    def _online(self, state: _State) -> list[str]:
        bins = [role for role in state.in_force if role.startswith("bin-")]
        return [DIRECTOR, *sorted(bins)]

    def _bin_of(self, director: Targets, path: str) -> str:
        delegations = director.delegations
        if delegations is None or delegations.succinct_roles is None:
            raise Rejected("The registry is damaged: director has no bins.", "Restore a backup.")
        return delegations.succinct_roles.get_role_for_target(path)

    def _signed_for(self, device: str, hash_bin: Targets) -> Assignment | None:
        path = assignment_path(device)
        target = hash_bin.targets.get(path)
        if target is None:
            return None
        raw = read_bounded(self._target_file(path, target.hashes["sha256"]), MAX_ASSIGNMENT_BYTES)
        return parse(Assignment, raw, limit=MAX_ASSIGNMENT_BYTES, name=path)

    def _manifest(self, path: str, sha256: str) -> Manifest:
        found = self._manifests.get(sha256)
        if found is None:
            raw = read_bounded(self._target_file(path, sha256), MAX_MANIFEST_BYTES)
            found = parse(Manifest, raw, limit=MAX_MANIFEST_BYTES, name=path)
            if len(self._manifests) >= MAX_CACHED_MANIFESTS:
                self._manifests.clear()
            self._manifests[sha256] = found
        return found

    def _entry(self, path: str, target: TargetFile) -> ModelEntry:
        sha256 = target.hashes["sha256"]
        manifest = self._manifest(path, sha256)
        return ModelEntry(
            name=manifest.name,
            version=manifest.version,
            path=path,
            sha256=sha256,
            length=target.length,
            created=manifest.created,
            content=target.custom["content"],
            variants={name: variant.precision for name, variant in manifest.variants.items()},
        )

    def _check_released(self, models: Targets, refs: Iterable[ModelRef]) -> None:
        for ref in refs:
            target = models.targets.get(ref.path)
            if target is None:
                raise Rejected(f"{ref.path} is not released.", "`agent-ctl models` lists what is.")
            if target.hashes["sha256"] != ref.sha256:
                raise Rejected(f"{ref.path} is released with another digest than {ref.sha256[:12]}.")

    def _target_file(self, path: str, sha256: str) -> Path:
        folder, _, name = path.rpartition("/")
        return self._targets / folder / f"{sha256}.{name}"

    # --- writing, under the lock

    def _write_target(self, path: str, data: bytes) -> None:
        file = self._target_file(path, hashlib.sha256(data).hexdigest())
        file.parent.mkdir(parents=True, exist_ok=True)
        self._write(file, data)

    def _place(self, hash_bin: Targets, assignment: Assignment) -> list[Path]:
        """Write an assignment and enter it into its bin; the files that this supersedes."""
        path = assignment_path(assignment.device)
        raw = assignment.to_bytes()
        if len(raw) > MAX_ASSIGNMENT_BYTES:
            raise Rejected(f"{path} would be {len(raw)} bytes long, more than {MAX_ASSIGNMENT_BYTES}.")
        old = hash_bin.targets.get(path)
        self._write_target(path, raw)
        hash_bin.targets[path] = TargetFile.from_data(path, raw, ["sha256"])
        return [self._target_file(path, old.hashes["sha256"])] if old else []

    def _sign(self, role: str, metadata: Metadata[T], now: float) -> Metadata[T]:
        """Give an online role its next version and expiry, and sign it. Raises Unavailable."""
        metadata.signed.version = versions.next_version(metadata.signed.version, now)
        metadata.signed.expires = versions.expiry(role, now)
        _put_signature(role, metadata, self._signers[role if role in self._signers else DIRECTOR])
        return metadata

    def _commit(self, state: _State, changed: Mapping[str, Metadata[Targets]], now: float) -> _State:
        """Put signed roles into force: they, then the snapshot, then the timestamp."""
        stale = [self._file(role, state.version(role)) for role in changed]
        stale.append(self._file("snapshot", state.snapshot.signed.version))
        snapshot, timestamp = state.snapshot, state.timestamp
        for role, metadata in sorted(changed.items()):
            raw = to_bytes(metadata)
            if len(raw) > MAX_METADATA_BYTES:
                raise Rejected(f"{role} would be {len(raw)} bytes long: no client would read it.")
            self._write(self._file(role, metadata.signed.version), raw)
            snapshot.signed.meta[f"{role}.json"] = MetaFile.from_data(
                metadata.signed.version, raw, ["sha256"]
            )
        raw = to_bytes(self._sign("snapshot", snapshot, now))
        self._write(self._file("snapshot", snapshot.signed.version), raw)
        timestamp.signed.snapshot_meta = MetaFile.from_data(snapshot.signed.version, raw, ["sha256"])
        timestamp.signed.unrecognized_fields[SIGNED_AT] = versions.signed_at(now)
        self._write(self._metadata / "timestamp.json", to_bytes(self._sign("timestamp", timestamp, now)))
        _touch(stale, now)
        return _State(timestamp, snapshot)

    def _file(self, role: str, version: int) -> Path:
        return self._metadata / f"{version}.{role}.json"

    def _prune(self, state: _State, online: Iterable[Metadata[Targets]], now: float) -> None:
        in_force = state.in_force
        for file in self._metadata.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if versions.may_be_pruned(file.name, in_force, file.stat().st_mtime, now):
                    file.unlink()
        keep = {
            self._target_file(path, target.hashes["sha256"])
            for metadata in online
            for path, target in metadata.signed.targets.items()
        }
        devices = self._targets / "devices"
        for file in devices.iterdir() if devices.is_dir() else ():
            if file not in keep and file.stat().st_mtime + versions.KEEP_S < now:
                file.unlink()
        self.blobs.clean(now)

    def _warn_of_expiry(self, now: float) -> None:
        near = {role: when for role, when in self.expiries().items() if when - now < versions.WARN_S}
        for role in near.keys() - self._warned:
            days = (near[role] - now) / versions.DAY
            log.warning("%s expires in %.0f days, and only a person can sign it again", role, days)
        self._warned = frozenset(near)


def role_signer(settings: Settings, role: str) -> Signer:
    """The signer of an online role. Raises Rejected."""
    uri: str = getattr(settings.keys, role)
    return load_signer(uri, settings.online_keys / f"{role}.pub.json", base=settings.dir)


def to_bytes(metadata: Metadata[T]) -> bytes:
    """The bytes that are served."""
    return metadata.to_bytes(JSONSerializer(compact=True))


def _parse(kind: type[Metadata[T]], raw: bytes, role: str) -> Metadata[T]:
    try:
        return kind.from_bytes(raw)
    except DeserializationError as error:
        raise Rejected(f"The registry is damaged: {role} cannot be read.", "Restore a backup.") from error


def _renew(role: str, metadata: Metadata[T], signers: Iterable[Signer], now: float) -> None:
    """Another version and life for what offline keys sign, under the signatures of these."""
    metadata.signed.version += 1
    metadata.signed.expires = versions.expiry(role, now)
    metadata.signatures.clear()
    for signer in signers:
        _put_signature(role, metadata, signer, append=True)


def _put_signature(role: str, metadata: Metadata[T], signer: Signer, *, append: bool = False) -> None:
    try:
        metadata.sign(signer, append=append)
    except UnsignedMetadataError as error:  # whatever a KMS, a token or its driver raised
        raise Unavailable(
            f"{role} cannot be signed: {error}.",
            "See that the key's KMS or token is there and lets this machine sign. What is signed holds on.",
        ) from error


def _revised(wanted: Assignment, previous: Assignment | None, now: float) -> Assignment:
    """What is to be signed; `previous` itself when it says the same."""
    if previous is None:
        return wanted.model_copy(update={"revision": versions.next_version(0, now)})
    if wanted.model_copy(update={"revision": previous.revision}) == previous:
        return previous
    return wanted.model_copy(update={"revision": versions.next_version(previous.revision, now)})


def _touch(files: Iterable[Path], now: float) -> None:
    """Note on files when they were superseded; pruning goes by it."""
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            os.utime(file, (now, now))
