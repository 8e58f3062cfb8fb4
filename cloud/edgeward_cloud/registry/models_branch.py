"""What a new `models` metadata must satisfy before it goes into force. Pure: bytes in, a decision out.

Invariants: release keys signed it; it is version n+1; every entry of version n stands unchanged; each new
entry's manifest is here, is valid, is what the entry says, and all its blobs are in the store. It cannot
delegate, so that a release key never makes another.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, TargetFile, Targets
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from edgeward_wire.api import DELEGATION
from edgeward_wire.document import parse
from edgeward_wire.errors import Rejected
from edgeward_wire.identifiers import MODEL_PATH_PATTERN
from edgeward_wire.manifest import MAX_MANIFEST_BYTES, Manifest

MAX_METADATA_BYTES = 5_000_000
"""What python-tuf's client reads at most of a targets file: more would lock every device out."""

SHORTEST = timedelta(days=1)
LONGEST = timedelta(days=730)

BlobLength = Callable[[str], "int | None"]
"""sha256 -> length in the store; None when it is not there."""

_PATH = re.compile(MODEL_PATH_PATTERN)
_SIGN_AGAIN = "Fetch the current metadata, add your entries, and sign again."


class Conflict(Rejected):
    """Someone else published first (HTTP 412): fetch, merge, sign again."""


@dataclass(frozen=True, slots=True)
class Release:
    """A checked next step of the models branch."""

    version: int
    raw: bytes
    """The metadata as it will be served: what was verified, written anew."""
    manifests: dict[str, bytes]
    """Path of the target -> its bytes, new ones only."""


def check_release(
    raw: bytes,
    manifests: Mapping[str, str],
    *,
    current: Targets,
    delegator: Targets,
    now: float,
    blob_length: BlobLength,
) -> Release:
    """Check the metadata that shall follow `current`, with the texts of its new manifests.

    Raises:
        Rejected: one of the invariants does not hold; says which, for which entry, and what to do.
    """
    metadata = _read(raw)
    signed = metadata.signed
    _check_signature(metadata, delegator)
    _check_form(signed, current.version + 1, now)
    added = _new_entries(signed, current)
    if missing := sorted(added.keys() - manifests.keys()):
        raise Rejected(f"The manifest of {missing[0]} was not sent along.", "Send the text of each new one.")
    if unknown := sorted(manifests.keys() - added.keys()):
        raise Rejected(f"The metadata has no new entry {unknown[0][:200]}.", _SIGN_AGAIN)
    texts = {path: manifests[path].encode() for path in added}
    for path, target in added.items():
        _check_entry(path, target, texts[path], blob_length)
    return Release(signed.version, metadata.to_bytes(JSONSerializer(compact=True)), texts)


def read_models(raw: bytes) -> Metadata[Targets]:
    """Read `models` metadata without trusting it. Raises Rejected."""
    return _read(raw)


def _read(raw: bytes) -> Metadata[Targets]:
    if len(raw) > MAX_METADATA_BYTES:
        raise Rejected(
            f"The models metadata is {len(raw)} bytes long: devices read {MAX_METADATA_BYTES} at most."
        )
    try:
        metadata = Metadata[Targets].from_bytes(raw)
    except DeserializationError as error:
        raise Rejected("The models metadata is not TUF metadata.", _SIGN_AGAIN) from error
    if not isinstance(metadata.signed, Targets):
        raise Rejected("The models metadata is not of type targets.", _SIGN_AGAIN)
    return metadata


def _check_signature(metadata: Metadata[Targets], delegator: Targets) -> None:
    try:
        delegator.verify_delegate(DELEGATION, metadata.signed_bytes, metadata.signatures)
    except UnsignedMetadataError as error:
        raise Rejected(
            "No release key of this registry has signed the models metadata.",
            "Sign with the release key of your operator profile.",
        ) from error


def _check_form(signed: Targets, version: int, now: float) -> None:
    if signed.version != version:
        raise Rejected(f"The models metadata has version {signed.version}, not {version}.", _SIGN_AGAIN)
    if signed.delegations is not None:
        raise Rejected("The models metadata must not delegate.", "Leave delegations out and sign again.")
    if signed.unrecognized_fields:
        field = min(signed.unrecognized_fields)
        raise Rejected(
            f"The models metadata has an unknown field {field[:64]!r}.", "Leave it out, sign again."
        )
    left = signed.expires - datetime.fromtimestamp(now, timezone.utc)
    if not SHORTEST <= left <= LONGEST:
        raise Rejected(
            f"The models metadata expires at {signed.expires:%Y-%m-%d}: it must live one day to two years.",
            "Check this machine's clock and sign again.",
        )


def _new_entries(signed: Targets, current: Targets) -> dict[str, TargetFile]:
    for path, target in current.targets.items():
        if path not in signed.targets:
            raise Rejected(f"The metadata drops {path}: what is released stays.", _SIGN_AGAIN)
        if signed.targets[path] != target:
            raise Rejected(f"The metadata changes {path}: a version never changes.", "Publish a new version.")
    return {path: target for path, target in signed.targets.items() if path not in current.targets}


def _check_entry(path: str, target: TargetFile, text: bytes, blob_length: BlobLength) -> None:
    if not _PATH.fullmatch(path):
        raise Rejected(f"{path[:200]!r} is not models/<name>/<version>.json.")
    found = {"sha256": hashlib.sha256(text).hexdigest()}
    if target.hashes != found or target.length != len(text):
        raise Rejected(f"{path}: the manifest sent is not the one that was signed.", _SIGN_AGAIN)
    manifest = parse(Manifest, text, limit=MAX_MANIFEST_BYTES, name=f"The manifest {path}")
    if manifest.path != path:
        raise Rejected(f"{path}: the manifest calls itself {manifest.name} {manifest.version}.")
    if target.unrecognized_fields != {"custom": {"content": manifest.content_digest()}}:
        raise Rejected(f"{path}: the entry's content digest is not the manifest's.", _SIGN_AGAIN)
    for blob in manifest.blobs():
        length = blob_length(blob.sha256)
        named = f"blob {blob.name or 'without a name'} ({blob.sha256[:12]})"
        if length is None:
            raise Rejected(f"{path}: {named} is not in the store.", "Upload the blobs first.")
        if length != blob.length:
            raise Rejected(f"{path}: {named} has {length} bytes, not {blob.length}.", "Correct the manifest.")
