"""A cloud made by the real ceremony, an operator who signs, and a plain HTTP server for TUF's client."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from ports import free_ports
from securesystemslib.signer import (
    SIGNER_FOR_URI_SCHEME,
    CryptoSigner,
    Key,
    SecretsHandler,
    Signature,
    Signer,
)
from tuf.api.metadata import Metadata, TargetFile, Targets
from tuf.ngclient import Updater
from tuf.ngclient.urllib3_fetcher import Urllib3Fetcher

from edgeward_cloud.ceremony import Wishes, create_cloud
from edgeward_cloud.keys import load_signer
from edgeward_cloud.registry import BlobStore, Registry
from edgeward_cloud.settings import Settings
from edgeward_wire.assignment import Assignment, PipelineAssignment
from edgeward_wire.contract import Contract, InputPort, OutputPort
from edgeward_wire.identifiers import model_path
from edgeward_wire.manifest import BlobRef, Manifest, ModelRef, Variant


def make_cloud(
    directory: Path, operators: tuple[str, ...] = ("admin",), now: float | None = None
) -> Settings:
    port, broker_port = free_ports(2)
    wishes = Wishes(dir=directory, operators=operators, port=port, broker_port=broker_port)
    return create_cloud(wishes, now=now)


def make_blob(store: BlobStore, data: bytes, name: str = "") -> BlobRef:
    ref = BlobRef(sha256=hashlib.sha256(data).hexdigest(), length=len(data), name=name)
    store.put(ref.sha256, [data], ref.length)
    return ref


def make_manifest(store: BlobStore, name: str = "net", version: str = "1") -> Manifest:
    """A small valid manifest whose blobs are in the store."""
    contract = Contract(
        task="tensor",
        inputs=(InputPort(name="x", dtype="float32", shape=(1, 4), bind="source"),),
        outputs=(OutputPort(name="y", dtype="float32", shape=(1, 4)),),
    )
    variant = Variant(
        model=make_blob(store, f"model {name} {version}".encode(), "model.onnx"),
        precision="int8",
        golden=make_blob(store, f"golden {name} {version}".encode(), "golden.npz"),
        evidence="weak",
        opset=17,
    )
    return Manifest(
        name=name,
        version=version,
        created="2026-01-01T00:00:00Z",
        contract=contract,
        variants={"int8": variant},
    )


def ref_of(manifest: Manifest) -> ModelRef:
    return ModelRef(path=manifest.path, sha256=hashlib.sha256(manifest.to_bytes()).hexdigest())


def make_assignment(device: str, ref: ModelRef | None = None, *, attempt: int = 1) -> Assignment:
    rows = {"main": PipelineAssignment(model=ref, rollout="r1", attempt=attempt)} if ref else {}
    return Assignment(device=device, fleet="edge", revision=0, pipelines=rows)


@dataclass
class Operator:
    """Signs the next models metadata, with a key from a profile directory."""

    settings: Settings
    name: str = "admin"

    def __post_init__(self) -> None:
        home = self.settings.operators / self.name
        self.signer = load_signer("file2:release-key.pem", home / "release-key.pub.json", base=home)

    def next(
        self, current: bytes, *manifests: Manifest, change: Mapping[str, Any] | None = None
    ) -> tuple[bytes, dict[str, str]]:
        """The metadata that adds these, and their texts. `change` overrides fields of the signed part."""
        metadata = Metadata[Targets].from_bytes(current)
        texts = {}
        for manifest in manifests:
            raw = manifest.to_bytes()
            target = TargetFile.from_data(manifest.path, raw, ["sha256"])
            target.unrecognized_fields["custom"] = {"content": manifest.content_digest()}
            metadata.signed.targets[manifest.path] = target
            texts[manifest.path] = raw.decode()
        metadata.signed.version += 1
        metadata.signed.expires = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=365)
        for field, value in (change or {}).items():
            setattr(metadata.signed, field, value)
        metadata.sign(self.signer)
        return metadata.to_bytes(), texts

    def publish(self, registry: Registry, *manifests: Manifest) -> int:
        current, version = registry.models_metadata()
        raw, texts = self.next(current, *manifests)
        return registry.publish_models(raw, texts, version)


class KeyService(Signer):
    """A KMS or HSM as securesystemslib drives one: behind a URI, signing elsewhere, and sometimes away."""

    away = False

    def __init__(self, inner: Signer) -> None:
        self._inner = inner

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> KeyService:
        path = priv_key_uri.partition(":")[2]
        return cls(CryptoSigner.from_priv_key_uri(f"file2:{path}", public_key))

    @property
    def public_key(self) -> Key:
        return self._inner.public_key

    def sign(self, payload: bytes) -> Signature:
        if type(self).away:
            raise ConnectionError("the key service does not answer")
        return self._inner.sign(payload)


@contextmanager
def key_service(settings: Settings, role: str) -> Iterator[tuple[Settings, type[KeyService]]]:
    """The same cloud with one online key in a key service; its `away` says whether that is."""

    class Mine(KeyService):
        pass

    keys = settings.keys.model_copy(update={role: f"testkms:{settings.online_keys / f'{role}.pem'}"})
    SIGNER_FOR_URI_SCHEME["testkms"] = Mine
    try:
        yield settings.model_copy(update={"keys": keys}), Mine
    finally:
        del SIGNER_FOR_URI_SCHEME["testkms"]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(directory: Path) -> Iterator[str]:
    """The address of a directory served over HTTP."""
    handler = functools.partial(_Quiet, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


class Client:
    """A device, as far as TUF goes: pinned root 1, a cache of its own, python-tuf's own updater."""

    def __init__(self, settings: Settings, url: str, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._url, self._directory = url, directory
        self._root = (settings.metadata / "1.root.json").read_bytes()

    def updater(self, *, reference_time: float | None = None) -> Updater:
        updater = Updater(
            str(self._directory / "metadata"),
            f"{self._url}/metadata/",
            target_dir=str(self._directory / "targets"),
            target_base_url=f"{self._url}/targets/",
            fetcher=Urllib3Fetcher(),  # named: the agent, in the same process, takes the default away
            bootstrap=self._root,
        )
        if reference_time is not None:
            updater._trusted_set.reference_time = datetime.fromtimestamp(reference_time, timezone.utc)
        return updater

    def get(self, path: str, *, reference_time: float | None = None) -> bytes | None:
        """A verified target; None when nobody has signed it."""
        (self._directory / "targets").mkdir(exist_ok=True)
        updater = self.updater(reference_time=reference_time)
        updater.refresh()
        info = updater.get_targetinfo(path)
        if info is None:
            return None
        local = self._directory / "targets" / hashlib.sha256(path.encode()).hexdigest()
        return Path(updater.download_target(info, str(local))).read_bytes()

    def assignment(self, device: str, *, reference_time: float | None = None) -> Assignment | None:
        raw = self.get(f"devices/{device}.json", reference_time=reference_time)
        return Assignment.model_validate_json(raw) if raw is not None else None

    def manifest(self, name: str, version: str) -> Manifest | None:
        raw = self.get(model_path(name, version))
        return Manifest.model_validate_json(raw) if raw is not None else None
