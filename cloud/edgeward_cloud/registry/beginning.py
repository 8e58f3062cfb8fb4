"""The first state of a registry: root 1 with all roles reserved, and empty branches below it.

Invariants: root's threshold is below the number of its keys, because a lost key must not mean a new world.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    SuccinctRoles,
    Targets,
    Timestamp,
)

from edgeward_cloud.files import write_atomic
from edgeward_cloud.keys import Key, Signer
from edgeward_cloud.registry import versions
from edgeward_cloud.registry.repository import AGENT, DIRECTOR, SIGNED_AT, to_bytes
from edgeward_cloud.settings import Settings
from edgeward_wire.api import DELEGATION
from edgeward_wire.errors import Rejected

BIN_BITS = 4
BIN_PREFIX = "bin"


def begin(
    settings: Settings,
    *,
    root: Sequence[Signer],
    root_threshold: int,
    signers: Mapping[str, Signer],
    release: Sequence[Signer],
    now: float,
) -> None:
    """Write root 1, targets 1, empty branches for models and the agent, and the director with its bins.

    `signers` are those of targets, agent, timestamp, snapshot and director. `release` are the release keys;
    the first signs the empty models branch.

    Raises:
        Rejected: the threshold is not below the number of root keys.
    """
    first = int(now)
    signed: dict[str, bytes] = {"1.root.json": _root(root, root_threshold, signers, now)}
    meta: dict[str, MetaFile] = {}

    def add(role: str, content: Targets, signer: Signer) -> None:
        content.expires = versions.expiry(role, now)
        metadata = Metadata(content)
        metadata.sign(signer)
        raw = to_bytes(metadata)
        signed[f"{content.version}.{role}.json"] = raw
        meta[f"{role}.json"] = MetaFile.from_data(content.version, raw, ["sha256"])

    director = signers[DIRECTOR]
    bins = SuccinctRoles([director.public_key.keyid], 1, BIN_BITS, BIN_PREFIX)
    below = Delegations({director.public_key.keyid: director.public_key}, succinct_roles=bins)
    keys = ([signer.public_key for signer in release], director.public_key, signers[AGENT].public_key)
    add("targets", Targets(1, delegations=_delegations(*keys)), signers["targets"])
    add(DELEGATION, Targets(1), release[0])
    add(AGENT, Targets(1), signers[AGENT])
    add(DIRECTOR, Targets(first, delegations=below), director)
    for role in bins.get_roles():
        add(role, Targets(first), director)
    snapshot = Metadata(Snapshot(first, expires=versions.expiry("snapshot", now), meta=meta))
    snapshot.sign(signers["snapshot"])
    raw = to_bytes(snapshot)
    signed[f"{first}.snapshot.json"] = raw
    timestamp = Timestamp(
        first,
        expires=versions.expiry("timestamp", now),
        snapshot_meta=MetaFile.from_data(first, raw, ["sha256"]),
        unrecognized_fields={SIGNED_AT: versions.signed_at(now)},
    )
    last = Metadata(timestamp)
    last.sign(signers["timestamp"])
    signed["timestamp.json"] = to_bytes(last)
    settings.metadata.mkdir(parents=True, exist_ok=True)
    settings.targets.mkdir(parents=True, exist_ok=True)
    for name, data in signed.items():
        write_atomic(settings.metadata / name, data)


def _root(root_signers: Sequence[Signer], threshold: int, signers: Mapping[str, Signer], now: float) -> bytes:
    if not 1 <= threshold < len(root_signers):
        raise Rejected(
            f"A root threshold of {threshold} of {len(root_signers)} keys: one lost key would end it all.",
            "Use more root keys than the threshold.",
        )
    root = Root(1, expires=versions.expiry("root", now), consistent_snapshot=True)
    for signer in root_signers:
        root.add_key(signer.public_key, "root")
    root.roles["root"].threshold = threshold
    for role in ("targets", "snapshot", "timestamp"):
        root.add_key(signers[role].public_key, role)
    metadata = Metadata(root)
    for signer in root_signers:
        metadata.sign(signer, append=True)
    return to_bytes(metadata)


def _delegations(release: Sequence[Key], director: Key, agent: Key) -> Delegations:
    """The branches in the order in which a client searches them; each ends the search in its paths."""
    roles = (
        DelegatedRole(DELEGATION, [key.keyid for key in release], 1, True, paths=["models/*/*"]),
        DelegatedRole(DIRECTOR, [director.keyid], 1, True, paths=["devices/*"]),
        DelegatedRole(AGENT, [agent.keyid], 1, True, paths=["agent/*/*"]),
    )
    keys = {key.keyid: key for key in (*release, director, agent)}
    return Delegations(keys, {role.name: role for role in roles})


def root_file(settings: Settings) -> Path:
    """Root 1, which devices and operators pin."""
    return settings.metadata / "1.root.json"
