"""A model file becomes a bundle: the manifest, every blob that it names, and a card for people.

Invariants: the same inputs give the same content digest; every blob is named by what it is; golden
outputs are the file's own, with all optimisation off, for inputs that show a saturating kernel; what
stands on weak evidence says so; what does not change what a device runs is not part of the content.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from pydantic import ValidationError

from edgeward_models import telling
from edgeward_models.card import About, card_text
from edgeward_models.graph import INT8_SHARE, Facts, embed_external_data, read_facts
from edgeward_models.inspect import Inspection, inspect_model, precision_line
from edgeward_models.progress import Progress, silent
from edgeward_models.provenance import provenance
from edgeward_models.risks import saturation_note
from edgeward_models.samples import Feeds, Samples, open_samples
from edgeward_models.saturation import layers_at_risk
from edgeward_models.variants import check_variant, parity_for
from edgeward_models.workspace import file_digest
from edgeward_runtime import golden
from edgeward_runtime.contract_guess import Guess
from edgeward_wire.contract import Contract
from edgeward_wire.document import faults
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import (
    GOLDEN_CUT,
    MAX_MANIFEST_BYTES,
    BlobRef,
    Manifest,
    TargetHints,
    Variant,
    features,
)

MAX_LABELS_BYTES = 1 << 20
LEAST_STEPS = 8
_MOST_GOLDEN_BYTES = golden.MAX_UNPACKED_BYTES
NOTHING_TO_QUANTISE = "The model has no convolutions or matrix products to quantise."
STEPS: dict[str, int] = {
    "reading the file": 5,
    "checking the contract": 5,
    "choosing golden inputs": 60,
    "golden outputs": 20,
    "hashing": 10,
}
"""What is done, and about how much of 100 it takes."""


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
    notes: tuple[str, ...] = ()
    """What had to be assumed, and what may go wrong."""
    card: str = ""
    """Markdown, for people."""

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

    @property
    def precisions(self) -> str:
        """ "int8" or "int8, fp16": those of its variants."""
        return ", ".join(sorted({one.precision for one in self.manifest.variants.values()}, reverse=True))

    @property
    def float_reason(self) -> str | None:
        """Why it is not INT8, where it could have been."""
        reason = self.manifest.float_reason
        return None if reason == NOTHING_TO_QUANTISE else reason


def find_model(path: Path) -> Path:
    """The ONNX file: itself, or the one that the only sidecar in a directory belongs to.

    Raises:
        Rejected: the directory holds none, or several.
    """
    if not path.is_dir():
        return path
    found = sorted(one.with_suffix(".onnx") for one in path.glob("*.toml"))
    found = [one for one in found if one.is_file()] or sorted(path.glob("*.onnx"))
    if len(found) != 1:
        names = ", ".join(one.name for one in found[:5])
        raise Rejected(
            f"{path} holds {'several models: ' + names if found else 'no model'}.",
            "Name the ONNX file." if found else "Name an ONNX file, or a directory with one and its sidecar.",
        )
    return found[0]


def make_bundle(request: BundleRequest, out: Path, progress: Progress = silent) -> Bundle:
    """Make the bundle; blobs that are not files already are written into the directory `out`.

    Raises:
        Rejected: the file, or what is declared about it, cannot be deployed; says what to do.
        Unavailable: a file cannot be read or written.
    """
    steps = _Steps(progress)
    store = _Store(_directory(out))
    steps.begin("reading the file")
    model = find_model(request.model)
    inspection = inspect_model(model, request.sidecar, request.flags, scratch=store.directory)
    steps.begin("checking the contract")
    known = inspection.guess.complete()
    files = _files(inspection, store.directory)
    float_reason = _float_reason(inspection, files, request.allow_float)
    labels = _labels(known.labels, known.contract)
    samples = open_samples(known.contract, known.samples)
    steps.begin("choosing golden inputs")
    inputs = _golden_inputs(files, known.contract, samples, steps)
    goldens: dict[str, _Golden] = {}
    for name, file in files.items():
        steps.begin("golden outputs", len(goldens), len(files))
        goldens[name] = _golden(file, known.contract, inputs[name])
    preprocess = _preprocess(known)
    steps.begin("hashing")
    facts = inspection.facts
    try:
        manifest = Manifest(
            name=known.name,
            version="0",
            created=request.created or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            contract=known.contract,
            variants={name: _variant(one, goldens[name], samples, store) for name, one in files.items()},
            labels=store.write(labels, "labels.txt") if labels is not None else None,
            preprocess=store.write(preprocess, "preprocess.npz") if preprocess is not None else None,
            limits=known.limits,
            requires=_requires(known.contract, goldens.values()),
            float_reason=float_reason,
            provenance=provenance(inspection, request.sidecar, samples),
            annotations=known.annotations,
        )
    except ValidationError as error:
        raise Rejected(f"{facts.path.name} cannot become a bundle: {faults(error)}.") from error
    names = labels.decode().splitlines() if labels is not None else ()
    risks = _risks(files)
    about = About(precision_line(facts), facts.parameters, samples.origin, names, known.notes, risks)
    card = card_text(manifest, about)
    manifest = with_card(manifest, card)
    _check_size(manifest)
    steps.end()
    return Bundle(manifest, store.blobs, (*known.notes, *risks), card)


def with_card(manifest: Manifest, card: str) -> Manifest:
    """The manifest with the card's digest in its provenance, which is not part of the content."""
    digest = hashlib.sha256(card.encode()).hexdigest()
    return manifest.model_copy(update={"provenance": {**manifest.provenance, "card_sha256": digest}})


class _Steps:
    """Progress through `STEPS`, in hundredths."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._before = self._share = 0

    def begin(self, what: str, done: int = 0, total: int = 1) -> None:
        """`done` of `total` parts of this step are done."""
        names = list(STEPS)
        self._before = sum(STEPS[name] for name in names[: names.index(what)])
        self._share = STEPS[what]
        self.part(what, done, total)

    def part(self, what: str, done: int, total: int) -> None:
        """As a `Progress` within the step that has begun."""
        self._progress(what, self._before + self._share * done // max(total, 1), sum(STEPS.values()))

    def end(self) -> None:
        self._progress("bundled", sum(STEPS.values()), sum(STEPS.values()))


@dataclass(frozen=True)
class _File:
    """A variant's file, whole."""

    facts: Facts
    whole: Path
    targets: TargetHints
    accuracy: Mapping[str, float]


def _files(inspection: Inspection, scratch: Path) -> dict[str, _File]:
    """All variants by name: the file that was named, and those that its sidecar adds."""
    main, known = inspection.facts, inspection.guess
    found: dict[str, _File] = {main.precision: _File(main, inspection.whole, known.targets, known.accuracy)}
    for one in inspection.further:
        if one.name in found:
            raise Rejected(
                f"Variant {one.name} is {main.path.name} itself.", "Give the other file another name."
            )
        facts = read_facts(one.file)
        check_variant(one, facts, main)
        home = _directory(scratch / f"variant-{len(found)}")
        found[one.name] = _File(facts, embed_external_data(facts, home), one.targets, one.accuracy)
    return found


def _golden_inputs(
    files: Mapping[str, _File], contract: Contract, samples: Samples, steps: _Steps
) -> dict[str, list[Feeds]]:
    """The inputs of each variant's golden vectors: chosen for itself where it could saturate."""
    macs = max(file.facts.macs for file in files.values())
    candidates = samples.candidates(telling.candidate_count(macs))
    if contract.stateful and len(candidates) < LEAST_STEPS:
        raise Rejected(
            f"{samples.origin} gives {len(candidates)} steps; a model with state is proven on {LEAST_STEPS}"
            " or more that follow one another.",
            "Give more of it.",
        )
    risky = [name for name, file in files.items() if layers_at_risk(onnx.load(str(file.whole)))]
    chosen: dict[str, list[Feeds]] = {}
    for k, name in enumerate(risky or list(files)[:1]):
        few = candidates if risky else candidates[: telling.LEAST_CANDIDATES]

        def progress(what: str, done: int, total: int, k: int = k) -> None:
            steps.part(what, k * total + done, total * max(len(risky), 1))

        chosen[name] = telling.choose_inputs(files[name].whole, contract, few, golden.DEFAULT_COUNT, progress)
    shared = next(iter(chosen.values()))
    return {name: chosen.get(name, shared) for name in files}


@dataclass(frozen=True)
class _Golden:
    """The golden vectors of one variant, packed."""

    raw: bytes
    cut: bool
    """Whether they also tell what a saturating kernel would give."""


def _golden(file: _File, contract: Contract, inputs: Sequence[Feeds]) -> _Golden:
    cuts = telling.cut_outputs(file.whole, contract, inputs)
    arrays = [value for one in (*inputs, *cuts, *cuts) for value in one.values()]  # the outputs are as large
    if sum(value.nbytes for value in arrays) > _MOST_GOLDEN_BYTES:
        cuts = []  # a device would refuse to unpack them; the cosine decides, as without
    return _Golden(golden.make_golden(file.whole, contract, feeds=inputs, cuts=cuts), bool(cuts))


def _requires(contract: Contract, goldens: Iterable[_Golden]) -> tuple[str, ...]:
    return (*features(contract), *((GOLDEN_CUT,) if any(one.cut for one in goldens) else ()))


def _risks(files: Mapping[str, _File]) -> tuple[str, ...]:
    notes = (saturation_note(name, file.whole, file.targets) for name, file in files.items())
    return tuple(note for note in notes if note is not None)


def _variant(file: _File, made: _Golden, samples: Samples, store: _Store) -> Variant:
    facts = file.facts
    return Variant(
        model=store.file(file.whole, f"{facts.precision}.onnx"),
        precision=facts.precision,
        targets=file.targets,
        golden=store.write(made.raw, "golden.npz"),
        evidence=samples.evidence,
        parity=parity_for(facts.precision),
        opset=facts.opset,
        accuracy=dict(file.accuracy),
    )


def _preprocess(known: Guess) -> bytes | None:
    """Golden pictures, where a picture goes in; some of the samples where these are pictures."""
    if known.contract.source.image is None:
        return None
    rows = known.samples is None or known.samples.suffix.lower() == ".npz"
    return golden.make_preprocess_golden(
        known.contract, [] if rows or known.samples is None else golden.find_pictures(known.samples)
    )


def _float_reason(inspection: Inspection, files: Mapping[str, _File], allow: str | None) -> str | None:
    facts = inspection.facts
    if any(file.facts.precision == "int8" for file in files.values()):
        return None
    reason = allow or inspection.guess.float_reason
    if reason and reason.strip():
        return reason.strip()
    if not facts.macs:
        return NOTHING_TO_QUANTISE
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
        scores = contract.scores
        classes = scores.shape[-1] if scores is not None and scores.shape else None
        if scores is not None and isinstance(classes, int) and len(lines) != classes:
            raise Rejected(
                f"{path.name} has {len(lines)} labels, but {scores.name} has {classes} scores.",
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
        sha256 = file_digest(path)
        self.blobs[sha256] = path
        return BlobRef(sha256=sha256, length=path.stat().st_size, name=name[:200])

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
