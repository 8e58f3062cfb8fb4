"""A bare ONNX file becomes a bundle: the manifest, and every blob that it names.

Invariants: the same inputs give the same content digest; every blob is named by what it is; golden
outputs are the file's own, with all optimisation off; what stands on weak evidence says so.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgeward_models.graph import INT8_SHARE, Facts, embed_external_data, read_facts
from edgeward_models.inspect import Inspection, inspect_model, precision_line
from edgeward_models.progress import Progress, silent
from edgeward_models.variants import check_variant, parity_for
from edgeward_runtime import golden
from edgeward_runtime.contract_guess import Guess
from edgeward_wire import __version__
from edgeward_wire.contract import Contract
from edgeward_wire.document import faults
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import MAX_MANIFEST_BYTES, BlobRef, Manifest, TargetHints, Variant

MAX_LABELS_BYTES = 1 << 20
STEPS = ("reading the file", "checking the contract", "golden outputs", "golden preprocessing", "hashing")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class BundleRequest:
    """What to bundle. `flags` has the sidecar's shape and wins over the sidecar and the file's metadata."""

    model: Path
    sidecar: Path | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    allow_float: str | None = None
    """Why a file that is not INT8 may go out."""
    created: str = ""
    """ISO 8601, UTC; empty: now. Not part of the content."""


@dataclass(frozen=True)
class Bundle:
    """A manifest of version "0" (whoever releases it gives it one), and the files of its blobs."""

    manifest: Manifest
    blobs: dict[str, Path]
    facts: Facts
    notes: tuple[str, ...]
    """What had to be assumed."""

    @property
    def content(self) -> str:
        """The same bundle has the same."""
        return self.manifest.content_digest()

    @property
    def weak(self) -> bool:
        """Whether the golden inputs are noise, for want of samples."""
        return any(variant.evidence == "weak" for variant in self.manifest.variants.values())

    @property
    def bytes(self) -> int:
        """Of all blobs."""
        return sum(ref.length for ref in self.manifest.blobs())


def make_bundle(request: BundleRequest, out: Path, progress: Progress = silent) -> Bundle:
    """Make the bundle; blobs that are not files already are written into the directory `out`.

    Raises:
        Rejected: the file, or what is declared about it, cannot be deployed; says what to do.
        Unavailable: a file cannot be read or written.
    """

    def step(k: int) -> None:
        progress(STEPS[k] if k < len(STEPS) else "bundled", k, len(STEPS))

    store = _Store(_directory(out))
    step(0)
    inspection = inspect_model(request.model, request.sidecar, request.flags, scratch=store.directory)
    step(1)
    known = inspection.guess.complete()
    files = _files(inspection, store.directory)
    float_reason = _float_reason(inspection, files, request.allow_float)
    labels = _labels(known.labels, known.contract)
    pictures = golden.find_pictures(known.samples) if known.samples is not None else []
    step(2)
    variants = {name: _variant(f, inspection.facts, known, pictures, store) for name, f in files.items()}
    step(3)
    has_picture = known.contract.source.image is not None
    preprocess = golden.make_preprocess_golden(known.contract, pictures) if has_picture else None
    step(4)
    facts = inspection.facts
    try:
        manifest = Manifest(
            name=known.name,
            version="0",
            created=request.created or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            contract=known.contract,
            variants=variants,
            labels=store.write(labels, "labels.txt") if labels is not None else None,
            preprocess=store.write(preprocess, "preprocess.npz") if preprocess is not None else None,
            requires=(known.contract.task,),
            float_reason=float_reason,
            provenance={"file": facts.path.name[:200], "made_by": f"edgeward {__version__}"},
        )
    except ValidationError as error:
        raise Rejected(f"{facts.path.name} cannot become a bundle: {faults(error)}.") from error
    _check_size(manifest)
    step(5)
    return Bundle(manifest, store.blobs, facts, known.notes)


@dataclass(frozen=True)
class _File:
    """A variant's file, whole."""

    facts: Facts
    whole: Path
    targets: TargetHints


def _files(inspection: Inspection, scratch: Path) -> dict[str, _File]:
    """All variants by name: the file that was named, and those that its sidecar adds."""
    main = inspection.facts
    found: dict[str, _File] = {main.precision: _File(main, inspection.whole, TargetHints())}
    for one in inspection.further:
        if one.name in found:
            raise Rejected(
                f"Variant {one.name} is {main.path.name} itself.", "Give the other file another name."
            )
        facts = read_facts(one.file)
        check_variant(one, facts, main)
        home = _directory(scratch / f"variant-{len(found)}")
        found[one.name] = _File(facts, embed_external_data(facts, home), one.targets)
    return found


def _variant(file: _File, main: Facts, known: Guess, pictures: Sequence[Path], store: _Store) -> Variant:
    facts = file.facts
    return Variant(
        model=store.file(file.whole, f"{facts.precision}.onnx"),
        precision=facts.precision,
        targets=file.targets,
        golden=store.write(golden.make_golden(file.whole, known.contract, pictures), "golden.npz"),
        evidence="strong" if pictures else "weak",
        parity=parity_for(facts.precision),
        opset=facts.opset,
        accuracy=known.accuracy if facts is main else {},  # it was measured on the file that was named
    )


def _float_reason(inspection: Inspection, files: Mapping[str, _File], allow: str | None) -> str | None:
    facts = inspection.facts
    if any(file.facts.precision == "int8" for file in files.values()):
        return None
    if not facts.macs:
        return "The model has no convolutions or matrix products to quantise."
    reason = allow or inspection.guess.float_reason
    if reason and reason.strip():
        return reason.strip()
    raise Rejected(
        f"{facts.path.name} is not INT8 ({precision_line(facts)}; {INT8_SHARE * 100:.0f} % are needed).",
        "Quantise it (static QDQ; models/zoo has a recipe), or say why not with --allow-float REASON.",
    )


def _labels(path: Path | None, contract: Contract) -> bytes | None:
    """The labels' bytes, held against the number of scores that the model gives."""
    if path is None:
        return None
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_LABELS_BYTES + 1)
    except OSError as error:
        raise Rejected(
            f"The labels {path} cannot be read: {error.strerror}.", "Name the file with --labels."
        ) from error
    if len(raw) > MAX_LABELS_BYTES:
        raise Rejected(
            f"The labels {path} are longer than {MAX_LABELS_BYTES >> 20} MB: is it the right file?"
        )
    try:
        lines = raw.decode("utf-8-sig").rstrip("\r\n").splitlines()
    except UnicodeDecodeError as error:
        raise Rejected(f"The labels {path} are not UTF-8 text.", "Save them as UTF-8, one a line.") from error
    if contract.task == "classification":
        classes = contract.results[0].shape[-1] if contract.results[0].shape else None
        if isinstance(classes, int) and len(lines) != classes:
            raise Rejected(
                f"{path.name} has {len(lines)} labels, but {contract.results[0].name} has {classes} scores.",
                "One label a line, in the order of the classes; some models begin with a background class.",
            )
    return ("\n".join(line.strip() for line in lines) + "\n").encode()


def _directory(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"{out} cannot be made: {error.strerror}.") from error
    return out


def _check_size(manifest: Manifest) -> None:
    size = len(manifest.to_bytes())
    if size > MAX_MANIFEST_BYTES:
        raise Rejected(
            f"The manifest would be {size} bytes long; at most {MAX_MANIFEST_BYTES} are allowed.",
            "Constants of inputs are what makes one large: put them into the graph as initialisers.",
        )


class _Store:
    """Blobs by their digest."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.blobs: dict[str, Path] = {}

    def file(self, path: Path, name: str) -> BlobRef:
        """A file that is there already."""
        digest, length = hashlib.sha256(), 0
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                length += len(chunk)
        self.blobs[digest.hexdigest()] = path
        return BlobRef(sha256=digest.hexdigest(), length=length, name=name[:200])

    def write(self, raw: bytes, name: str) -> BlobRef:
        """A blob that only exists from now on."""
        sha256 = hashlib.sha256(raw).hexdigest()
        path = self.directory / sha256
        try:
            path.write_bytes(raw)
        except OSError as error:
            raise Unavailable(f"{path} cannot be written: {error.strerror}.", "Is the disk full?") from error
        self.blobs[sha256] = path
        return BlobRef(sha256=sha256, length=len(raw), name=name)
