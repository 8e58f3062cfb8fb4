"""A TUF repository with real keys in the layout of the cloud's registry, served by `sim.server`.

It can do what a real cloud must not: sign wrongly, go back, let things expire.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

from securesystemslib.signer import CryptoSigner, Signer
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    SuccinctRoles,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from edgeward_agent.trust import BUILD_TIME
from edgeward_wire.assignment import Assignment, PipelineAssignment
from edgeward_wire.contract import Contract, ImageSpec, InputPort, OutputPort
from edgeward_wire.identifiers import assignment_path, blob_path
from edgeward_wire.manifest import BlobRef, Manifest, ModelRef, Variant

DAY = 86_400
NOW = BUILD_TIME + 30 * DAY
LIVES: Mapping[str, float] = {
    "timestamp": 7,
    "snapshot": 7,
    "director": 30,
    "models": 365,
    "targets": 365,
    "root": 730,
}
"""Days from signing to expiry; the bins' are the director's."""
SIGNED_AT = "x-edgeward-signed-at"
_ONLINE = ("timestamp", "snapshot", "director")


def new_signer() -> Signer:
    """An ed25519 key."""
    return CryptoSigner.generate_ed25519()


class Repository:
    """Holds the roles, signs them at `now`, and puts the files into `files` (a server's)."""

    def __init__(self, files: dict[str, bytes], now: float = NOW, lives: Mapping[str, float] = LIVES) -> None:
        self.files = files
        self.now = now
        self.lives = lives
        self.signers = {r: new_signer() for r in ("root", "spare", "targets", "models", *_ONLINE)}
        self.roles: dict[str, Any] = {}
        self.revision = int(now)
        self._begin()

    # --- what a cloud does

    def publish(self) -> None:
        """Sign snapshot and timestamp at `now`; versions are max(previous + 1, Unix seconds)."""
        snapshot, timestamp = self.roles["snapshot"], self.roles["timestamp"]
        for role in (snapshot, timestamp):
            role.version = max(role.version + 1, int(self.now))
        data = self.write("snapshot")
        timestamp.snapshot_meta = MetaFile.from_data(snapshot.version, data, ["sha256"])
        timestamp.unrecognized_fields[SIGNED_AT] = _iso(self.now)
        self.write("timestamp")

    def assign(self, device_id: str, pipelines: dict[str, ModelRef], **changes: Any) -> Assignment:
        """Give a device its assignment. `changes` go over the document, to make it lie."""
        self.revision += 1
        rows = {p: PipelineAssignment(model=ref, rollout="r1") for p, ref in pipelines.items()}
        document = Assignment(device=device_id, fleet="lab", revision=self.revision, pipelines=rows)
        document = document.model_copy(update=changes)
        self.add_target(assignment_path(device_id), document.to_bytes(), self.bin_of(device_id))
        self.publish()
        return document

    def release(self, manifest: Manifest, blobs: Iterable[bytes] = ()) -> ModelRef:
        """Sign a manifest with the release key, and put its blobs there."""
        raw = manifest.to_bytes()
        self.add_target(manifest.path, raw, "models")
        for blob in blobs:
            self.files[f"/{blob_path(hashlib.sha256(blob).hexdigest())}"] = blob
        self.publish()
        return ModelRef(path=manifest.path, sha256=hashlib.sha256(raw).hexdigest())

    def add_target(self, path: str, data: bytes, role: str) -> None:
        """Put a target into a role, its file under its hash, and write the role's next version."""
        target = TargetFile.from_data(path, data, ["sha256"])
        signed = self.roles[role]
        signed.targets[path] = target
        signed.version = signed.version + 1 if role == "models" else max(signed.version + 1, int(self.now))
        directory, _, name = path.rpartition("/")
        self.files[f"/tuf/targets/{directory}/{target.hashes['sha256']}.{name}"] = data
        self.write(role)

    def write(self, role: str, *, signer: Signer | None = None) -> bytes:
        """Sign one role at `now` (by its own key, or a wrong one) and write its file."""
        signed = self.roles[role]
        signed.expires = _moment(self.now) + timedelta(
            days=self.lives["director" if role.startswith("bin-") else role]
        )
        metadata = Metadata(signed)
        for key in [signer] if signer else self._keys(role):
            metadata.sign(key, append=True)
        data = metadata.to_bytes(JSONSerializer())
        name = "timestamp.json" if role == "timestamp" else f"{signed.version}.{role}.json"
        self.files[f"/tuf/metadata/{name}"] = data
        if role not in ("root", "snapshot", "timestamp"):
            self.roles["snapshot"].meta[f"{role}.json"] = MetaFile.from_data(signed.version, data, ["sha256"])
        return data

    def rotate(self, role: str) -> None:
        """Root gives an online top-level role another key. Its file must be written anew."""
        root, old = self.roles["root"], self.signers[role]
        self.signers[role] = new_signer()
        root.revoke_key(old.public_key.keyid, role)
        root.add_key(self.signers[role].public_key, role)
        root.version += 1
        self.write("root")

    # --- what an attacker or a power cut does

    def freeze(self) -> dict[str, bytes]:
        """All files as they are now."""
        return dict(self.files)

    def put_back(self, frozen: dict[str, bytes]) -> None:
        """An older state of the files; newer roots go, too."""
        self.files.clear()
        self.files.update(frozen)

    def saved(self) -> Any:
        """The roles' state, to go on from it as a cloud restored from a backup does."""
        return copy.deepcopy(self.roles)

    # --- the layout

    @property
    def root_bytes(self) -> bytes:
        """Root 1."""
        return self.files["/tuf/metadata/1.root.json"]

    def bin_of(self, device: str) -> str:
        """The bin that a device's assignment is in."""
        bins = self.roles["director"].delegations.succinct_roles
        return str(bins.get_role_for_target(assignment_path(device)))

    def _keys(self, role: str) -> list[Signer]:
        if role == "root":
            return [self.signers["root"], self.signers["spare"]]
        return [self.signers["director" if role.startswith("bin-") else role]]

    def _begin(self) -> None:
        root = Root(1, consistent_snapshot=True)
        for name in ("root", "spare"):
            root.add_key(self.signers[name].public_key, "root")
        for role in ("targets", "snapshot", "timestamp"):
            root.add_key(self.signers[role].public_key, role)
        director, release = self.signers["director"].public_key, self.signers["models"].public_key
        bins = SuccinctRoles([director.keyid], 1, 4, "bin")
        branches = {
            "models": DelegatedRole("models", [release.keyid], 1, True, paths=["models/*/*"]),
            "director": DelegatedRole("director", [director.keyid], 1, True, paths=["devices/*"]),
            "agent": DelegatedRole("agent", [], 1, True, paths=["agent/*/*"]),
        }
        keys = {key.keyid: key for key in (director, release)}
        first = int(self.now)
        self.roles = {
            "root": root,
            "snapshot": Snapshot(first - 1, meta={}),
            "timestamp": Timestamp(first - 1),
            "targets": Targets(1, delegations=Delegations(keys, branches)),
            "models": Targets(1),
            "director": Targets(
                first, delegations=Delegations({director.keyid: director}, succinct_roles=bins)
            ),
            **{name: Targets(first) for name in bins.get_roles()},
        }
        for role in self.roles:
            if role not in ("snapshot", "timestamp"):
                self.write(role)
        self.publish()


def _moment(at: float) -> datetime:
    return datetime.fromtimestamp(int(at), timezone.utc)


def _iso(at: float) -> str:
    return _moment(at).strftime("%Y-%m-%dT%H:%M:%SZ")


def ref_of(data: bytes, name: str = "") -> BlobRef:
    """A blob's reference."""
    return BlobRef(sha256=hashlib.sha256(data).hexdigest(), length=len(data), name=name)


def small_manifest(name: str = "toy", version: str = "1", model: bytes = b"onnx", **changes: Any) -> Manifest:
    """A valid manifest of a classifier of two classes. Its blobs: `model`, b"golden", b"cat\\ndog"."""
    variant = Variant(
        model=ref_of(model, "model.onnx"),
        precision="int8",
        golden=ref_of(b"golden"),
        evidence="weak",
        opset=17,
    )
    image = ImageSpec(width=8, height=8)
    contract = Contract(
        task="classification",
        inputs=(InputPort(name="x", dtype="float32", shape=(1, 3, 8, 8), bind="source", image=image),),
        outputs=(OutputPort(name="y", dtype="float32", shape=(1, 2)),),
    )
    manifest = Manifest(
        name=name,
        version=version,
        created="2026-12-01T00:00:00Z",
        contract=contract,
        variants={"int8": variant},
        labels=ref_of(b"cat\ndog"),
    )
    return manifest.model_copy(update=changes)
