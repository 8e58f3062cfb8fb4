"""A real model as a device gets it: a manifest and its blobs, with true golden vectors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeward_runtime.contract_guess import guess
from edgeward_runtime.golden import find_pictures, make_golden, make_preprocess_golden
from edgeward_wire.manifest import BlobRef, Manifest, ModelRef, Variant, features
from runtime.builders import classifier, int8_classifier, labels_file, picture_directory, sidecar_file


@dataclass(frozen=True)
class Bundle:
    """A manifest, and the directory in which its blobs lie."""

    manifest: Manifest
    blobs: Path

    @property
    def ref(self) -> ModelRef:
        digest = hashlib.sha256(self.manifest.to_bytes()).hexdigest()
        return ModelRef(path=self.manifest.path, sha256=digest)

    def blob(self, ref: BlobRef) -> Path:
        return self.blobs / ref.sha256

    def with_manifest(self, **changes: Any) -> Bundle:
        return Bundle(Manifest.model_validate({**dict(self.manifest), **changes}), self.blobs)


def put(directory: Path, raw: bytes) -> BlobRef:
    """A blob in its place."""
    digest = hashlib.sha256(raw).hexdigest()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / digest).write_bytes(raw)
    return BlobRef(sha256=digest, length=len(raw))


def colour_bundle(directory: Path, *, version: str = "1", salt: int = 0, float_too: bool = False) -> Bundle:
    """The colour classifier as INT8, and as FP32 beside it."""
    files = directory / f"files-{version}"
    files.mkdir(parents=True, exist_ok=True)
    labels = labels_file(files / "labels.txt")
    pictures = find_pictures(picture_directory(files / "pictures"))
    blobs = directory / "blobs"
    made = {"int8": int8_classifier(files / "int8.onnx", salt=salt)}
    if float_too:
        made["fp32"] = classifier(files / "fp32.onnx", salt=salt)
    variants = {}
    for name, path in made.items():
        known = guess(path, sidecar_file(path.with_suffix(".toml")))
        variants[name] = Variant(
            model=put(blobs, path.read_bytes()),
            precision=known.precision,
            golden=put(blobs, make_golden(path, known.contract, pictures)),
            evidence="strong",
            opset=known.opset,
        )
    manifest = Manifest(
        name="colours",
        version=version,
        created="2026-01-01T00:00:00Z",
        contract=known.contract,
        variants=variants,
        labels=put(blobs, labels.read_bytes()),
        preprocess=put(blobs, make_preprocess_golden(known.contract, pictures)),
    )
    return Bundle(manifest, blobs)


def bundle_of(directory: Path, path: Path, *, name: str = "tiny") -> Bundle:
    """Any one file with its sidecar beside it, as FP32; golden vectors are noise."""
    known = guess(path).complete()
    blobs = directory / "blobs"
    variant = Variant(
        model=put(blobs, path.read_bytes()),
        precision=known.precision,
        golden=put(blobs, make_golden(path, known.contract)),
        evidence="weak",
        opset=known.opset,
    )
    pictured = any(port.image is not None for port in known.contract.inputs)
    manifest = Manifest(
        name=name,
        version="1",
        created="2026-01-01T00:00:00Z",
        contract=known.contract,
        variants={known.precision: variant},
        labels=put(blobs, known.labels.read_bytes()) if known.labels else None,
        preprocess=put(blobs, make_preprocess_golden(known.contract)) if pictured else None,
        float_reason=known.float_reason or "a tiny one, for tests",
        requires=features(known.contract),
    )
    return Bundle(manifest, blobs)
