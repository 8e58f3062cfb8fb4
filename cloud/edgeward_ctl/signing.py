"""The `models` role, verified and signed on the operator's machine. The only importer of tuf here.

Invariants: nothing is signed that was not verified from the pinned root first; a release key signs a
version n+1 that keeps every entry of version n; the cloud never holds the key. Metadata verified once
stays in the profile's cache, so that an older repository is refused (rollback protection).
"""

from __future__ import annotations

import datetime
import fcntl
import getpass
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from securesystemslib.exceptions import UnsupportedLibraryError
from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import (
    DownloadError,
    DownloadHTTPError,
    ExpiredMetadataError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.metadata import Metadata, Snapshot, TargetFile, Targets
from tuf.api.serialization import DeserializationError
from tuf.ngclient import FetcherInterface, Updater

from edgeward_ctl.client import Client, Conflict
from edgeward_ctl.profile import Profile
from edgeward_ctl.releases import Choice, Release, choose_version
from edgeward_wire.api import DELEGATION, Publish
from edgeward_wire.document import faults
from edgeward_wire.errors import EdgewardError, Rejected, Unavailable
from edgeward_wire.manifest import MAX_MANIFEST_BYTES, Manifest, ModelRef

LIFE = datetime.timedelta(days=365)
ATTEMPTS = 10
_MAX_METADATA = 5_000_000
_LOCK_S = 30.0


@dataclass(frozen=True, slots=True)
class Publication:
    """What came of publishing: the released manifest, and whether it had been there before."""

    ref: ModelRef
    reused: bool
    attempts: int


class ReleaseKey:
    """A release key that is ready to sign. Loaded early, so that its absence costs no time."""

    def __init__(self, profile: Profile) -> None:
        self._signer = _load_signer(profile)

    @property
    def keyid(self) -> str:
        """As TUF names it."""
        return self._signer.public_key.keyid

    def sign(self, metadata: Metadata[Targets]) -> bytes:
        """The metadata's bytes under this key's signature."""
        metadata.sign(self._signer)
        return metadata.to_bytes()


class Models:
    """The `models` role of one registry, verified from the profile's root."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._profile = client.profile

    def releases(self) -> dict[str, Release]:
        """Every release by target path.

        Raises:
            Rejected: the registry's metadata does not verify.
            Unavailable: it cannot be had.
        """
        return _releases(self._verified()[0].signed)

    def publish(
        self,
        manifest: Manifest,
        key: ReleaseKey,
        *,
        wanted: str | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> Publication:
        """Release a bundle whose blobs are in the registry. Another operator at the same moment is no error.

        The manifest's own version is replaced by the chosen one.
        """
        content = manifest.content_digest()
        for attempt in range(1, ATTEMPTS + 1):
            metadata, etag = self._verified(key)
            choice = choose_version(_releases(metadata.signed), manifest.name, content, wanted)
            if choice.existing is not None:
                return Publication(choice.existing.ref, True, attempt)
            try:
                ref = self._put(metadata, etag, manifest, choice, key)
            except Conflict:
                say(f"someone else published in between: merging and signing again ({attempt} of {ATTEMPTS})")
                time.sleep(random.uniform(0.05, 0.3) * attempt)
                continue
            return Publication(ref, False, attempt)
        raise Unavailable(
            f"Others published {ATTEMPTS} times while this release was being signed.", "Try again."
        )

    def _put(
        self, metadata: Metadata[Targets], etag: str, manifest: Manifest, choice: Choice, key: ReleaseKey
    ) -> ModelRef:
        manifest = manifest.model_copy(update={"version": choice.version})
        raw = manifest.to_bytes()
        if len(raw) > MAX_MANIFEST_BYTES:
            raise Rejected(
                f"The manifest is {len(raw)} bytes long; at most {MAX_MANIFEST_BYTES} are allowed.",
                "Shorten annotations, provenance and constants.",
            )
        target = TargetFile.from_data(manifest.path, raw, ["sha256"])
        target.unrecognized_fields["custom"] = {"content": manifest.content_digest()}
        metadata.signed.targets[manifest.path] = target
        metadata.signed.version += 1
        metadata.signed.expires = _now() + LIFE
        signed = key.sign(metadata)
        body = Publish(metadata=signed.decode(), manifests={manifest.path: raw.decode()})
        self._client.publish(body, etag)
        return ModelRef(path=manifest.path, sha256=target.hashes["sha256"])

    def _verified(self, key: ReleaseKey | None = None) -> tuple[Metadata[Targets], str]:
        """The newest `models` metadata and its ETag, verified against what the pinned root leads to.

        Its expiry does not matter here: signing again is what heals it.
        """
        with _translated(self._profile):
            delegator, least = self._refresh()
        raw, etag = self._client.models_metadata()
        with _translated(self._profile):
            metadata = Metadata[Targets].from_bytes(raw)
            if not isinstance(metadata.signed, Targets):
                raise RepositoryError(f"{DELEGATION} is a {metadata.signed.type}")
            delegator.verify_delegate(DELEGATION, metadata.signed_bytes, metadata.signatures)
        if metadata.signed.version < least:
            raise Rejected(
                f"The registry offers {DELEGATION} version {metadata.signed.version}, but version {least} is"
                " in force: someone is turning it back.",
                "Do not sign. Ask the cloud's operators what happened.",
            )
        if key is not None:
            _check_authority(delegator, key)
        return metadata, etag

    def _refresh(self) -> tuple[Targets, int]:
        """Verify all top-level roles; returns the delegations and the version of `models` in force."""
        cache = self._profile.cache / "tuf"
        cache.mkdir(parents=True, exist_ok=True)
        with _exclusive(self._profile.cache / "lock"):
            updater = Updater(
                str(cache),
                "tuf/metadata",
                fetcher=_Fetcher(self._client),
                bootstrap=self._profile.root.read_bytes(),
            )
            updater.refresh()
            # refresh() leaves what it has verified in the cache, and nothing else.
            targets = Metadata[Targets].from_file(str(cache / "targets.json")).signed
            snapshot = Metadata[Snapshot].from_file(str(cache / "snapshot.json")).signed
        meta = snapshot.meta.get(f"{DELEGATION}.json")
        if meta is None:
            raise RepositoryError(f"the snapshot does not know {DELEGATION}")
        return targets, meta.version


class _Fetcher(FetcherInterface):
    """TUF's files through our own TLS."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def _fetch(self, url: str) -> Iterator[bytes]:
        status, body = self._client.fetch(f"/{url}", _MAX_METADATA)
        if status >= 400:
            raise DownloadHTTPError(f"{url}: {status}", status)
        return iter([body])


def _releases(models: Targets) -> dict[str, Release]:
    found = {}
    for path, target in models.targets.items():
        custom = target.unrecognized_fields.get("custom")
        content = custom.get("content") if isinstance(custom, dict) else None
        try:
            ref = ModelRef(path=path, sha256=target.hashes.get("sha256", ""))
        except ValidationError as error:
            raise Rejected(
                f"The registry has signed {path[:200]!r}, which is no model: {faults(error)}.",
                "It was signed by another tool with a release key: ask who holds the keys.",
            ) from error
        found[path] = Release(ref, target.length, content)
    return found


def _check_authority(delegator: Targets, key: ReleaseKey) -> None:
    role = delegator.get_delegated_role(DELEGATION)
    if key.keyid not in role.keyids:
        raise Rejected(
            f"Your release key ({key.keyid[:12]}…) is not one that may sign models.",
            "The holders of the targets key must add it; until then deploy with a profile whose key is.",
        )


def _load_signer(profile: Profile) -> Signer:
    if profile.release_key is None:
        raise Rejected(
            f"The profile {profile.directory} has no release key: its file is missing.",
            "Put release-key.pem there, or name a key's URI as `release_key` in profile.toml.",
        )
    public = profile.release_public_key
    try:
        plain = json.loads(public.read_bytes())
        key = Key.from_dict(plain.pop("keyid"), plain)
    except OSError as error:
        raise Rejected(f"{public} cannot be read: {error.strerror}.", "It belongs to the profile.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Rejected(f"{public} is not a TUF public key: {error}.", "It belongs to the profile.") from error
    try:
        return Signer.from_priv_key_uri(profile.release_key, key, lambda what: getpass.getpass(f"{what}: "))
    except UnsupportedLibraryError as error:
        raise Rejected(
            f"The release key needs a library that is not installed: {error}.",
            "Install securesystemslib's extra for that kind of key.",
        ) from error
    except (OSError, ValueError) as error:
        raise Rejected(
            f"The release key {profile.release_key} cannot be used: {error}.",
            "Key and public key must be of one pair.",
        ) from error


@contextmanager
def _translated(profile: Profile) -> Iterator[None]:
    """TUF's errors as ours, by blame."""
    try:
        yield
    except DownloadError as error:
        if isinstance(error.__cause__, EdgewardError):
            raise error.__cause__ from error
        raise Unavailable(f"The registry's metadata cannot be had: {error}.", "Try again.") from error
    except ExpiredMetadataError as error:
        raise Unavailable(
            f"The registry's metadata has expired: {error}.",
            "The cloud re-signs it while it runs: is its clock right, and yours?",
        ) from error
    except UnsignedMetadataError as error:
        raise Rejected(
            f"The registry's metadata is not signed by those whom the pinned root names: {error}.",
            f"Do not sign. Is {profile.root} the root of this cloud?",
        ) from error
    except (RepositoryError, DeserializationError) as error:
        raise Rejected(
            f"The registry's metadata does not verify: {error}.",
            f"Is {profile.root} the root of this cloud? If it is, ask its operators what happened.",
        ) from error
    except OSError as error:
        raise Unavailable(
            f"{error.filename or profile.cache} cannot be used: {error.strerror}.",
            "agent-ctl keeps verified metadata in the profile: it must be writable.",
        ) from error


@contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    """One process at a time uses the cache: an Updater must be alone in it."""
    with lock.open("w") as stream:
        deadline = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise Unavailable(f"Another agent-ctl has held {lock} for {_LOCK_S:.0f} s.") from error
                time.sleep(0.05)
        yield


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
