"""`manifest/1`: what one version of a model is. Signed by a release key as `models/<name>/<version>.json`.

It must outlive the first release: `requires` names features that a device must have (one that lacks
any stays pending and says why), `annotations` is free. Every blob is named by sha256 and length, so
the one signature covers all of them.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import Field, model_validator

from edgeward_wire.contract import Contract, Task
from edgeward_wire.document import Signed
from edgeward_wire.identifiers import Key, ModelName, Reason, Sha256, ShortText, VariantName, Version
from edgeward_wire.identifiers import model_path as path_of

MAX_BLOB_BYTES = 8 << 30
MAX_MANIFEST_BYTES = 256 << 10
FEATURES = frozenset(
    {"classification", "detection", "segmentation", "audio-classification", "vad", "tensor"}  # tasks
    | {"audio", "state", "tensors"}  # see `features`
    | {"golden-cut"}  # see GOLDEN_CUT
)
"""What this release of the agent can run; a manifest that requires more stays pending."""
GOLDEN_CUT = "golden-cut"
"""Required where golden vectors hold `cut.<k>.<output>`: older readers refuse names that they do not know."""


def features(contract: Contract) -> tuple[str, ...]:
    """What a device must be able to do for this contract: the task, and whatever goes beyond one picture.

    `audio`: sound goes in. `state`: state is carried from run to run. `tensors`: something else than one
    picture or one sound goes in.
    """
    sources = [port for port in contract.inputs if port.bind == "source"]
    plain = len(sources) == 1 and (sources[0].image is not None or sources[0].audio is not None)
    beyond = {
        "audio": any(port.audio is not None for port in sources),
        "state": contract.stateful,
        "tensors": not plain,
    }
    return (contract.task, *(name for name, needed in beyond.items() if needed))


Precision = Literal["int8", "fp16", "fp32"]


class BlobRef(Signed):
    """A blob, named by what it is. `name` is the file's name, for people only."""

    sha256: Sha256
    length: int = Field(ge=0, le=MAX_BLOB_BYTES)
    name: ShortText = ""


class TargetHints(Signed):
    """Where a variant makes sense; empty means anywhere. A device fetches what it may use."""

    arch: tuple[Key, ...] = Field(default=(), max_length=8)
    """As `platform.machine()` prints it: x86_64, aarch64."""
    isa: tuple[Key, ...] = Field(default=(), max_length=8)
    """The processor's features by the kernel's names; one of them is enough: avx512_vnni, avx_vnni."""
    providers: tuple[Key, ...] = Field(default=(), max_length=8)
    """ONNX Runtime's names without the suffix: CPU, CUDA, Tensorrt, OpenVINO."""


class Parity(Signed):
    """The gate of a variant's golden vectors: cosine of each output with its own exact one."""

    cosine: float = Field(default=0.99, ge=0.5, le=1.0)


class Variant(Signed):
    """One file of the model, and the proof that a device runs it right."""

    model: BlobRef
    precision: Precision
    targets: TargetHints = TargetHints()
    golden: BlobRef
    """`.npz` with `in.<k>.<input>` and `out.<k>.<output>`, k = 0, 1, ...: this very file's outputs on the
    CPU with all optimisation off. Where its sums could saturate also `cut.<k>.<output>`: about what that
    would give."""
    evidence: Literal["strong", "weak"]
    """`weak`: the golden inputs are seeded noise, for want of samples."""
    parity: Parity = Parity()
    opset: int = Field(ge=1, le=1000)
    accuracy: dict[Key, float] = Field(default_factory=dict, max_length=32)
    """Figures measured when it was built, e.g. top1_agreement_fp32."""


class Limits(Signed):
    """What a device must reach to validate; absent means no limit."""

    p99_ms: float | None = Field(default=None, gt=0, le=600_000)
    memory_mb: float | None = Field(default=None, gt=0, le=1_000_000)


class Manifest(Signed):
    """One version of a model."""

    schema_: Literal["edgeward.manifest/1"] = Field(default="edgeward.manifest/1", alias="schema")
    name: ModelName
    version: Version
    created: ShortText
    """ISO 8601, UTC."""
    contract: Contract
    variants: dict[VariantName, Variant] = Field(min_length=1, max_length=16)
    labels: BlobRef | None = None
    """UTF-8 text, one label a line, in the order of the classes."""
    preprocess: BlobRef | None = None
    """`.npz` with `picture.<k>` (an encoded picture, uint8) and `tensor.<k>` (what it must become)."""
    limits: Limits = Limits()
    requires: tuple[Key, ...] = Field(default=(), max_length=32)
    security_epoch: int = Field(default=0, ge=0, le=1 << 31)
    """Committing epoch e means that no later update to an epoch below e is accepted (the security floor)."""
    float_reason: Reason | None = None
    """Why no INT8 variant stands here."""
    provenance: dict[Key, ShortText] = Field(default_factory=dict, max_length=64)
    annotations: dict[Key, ShortText] = Field(default_factory=dict, max_length=64)

    @model_validator(mode="after")
    def _proven(self) -> Manifest:
        if not self.float_reason and not any(v.precision == "int8" for v in self.variants.values()):
            raise ValueError("needs an INT8 variant, or float_reason to say why there is none")
        if self.contract.task == "classification" and self.labels is None:
            raise ValueError("a classification needs labels")
        return self

    @property
    def task(self) -> Task:
        """The contract's task."""
        return self.contract.task

    @property
    def path(self) -> str:
        """The manifest's TUF target path."""
        return path_of(self.name, self.version)

    def blobs(self) -> tuple[BlobRef, ...]:
        """All blobs, each once, in a fixed order."""
        refs = [self.labels, self.preprocess]
        for _, variant in sorted(self.variants.items()):
            refs += [variant.model, variant.golden]
        return tuple({ref.sha256: ref for ref in refs if ref is not None}.values())

    def content_digest(self) -> str:
        """sha256 of everything but version, time and provenance: the same bundle gets the same version."""
        same = self.model_copy(update={"version": "0", "created": "", "provenance": {}})
        return hashlib.sha256(same.to_bytes()).hexdigest()


class ModelRef(Signed):
    """A manifest by path and digest: what an assignment points at."""

    path: ShortText = Field(
        pattern=r"^models/[a-z0-9][a-z0-9._-]{0,62}/[0-9A-Za-z][0-9A-Za-z.+_-]{0,62}\.json$"
    )
    sha256: Sha256

    @property
    def name(self) -> str:
        """The model's name."""
        return self.path.split("/")[1]

    @property
    def version(self) -> str:
        """The model's version."""
        return self.path.split("/")[2].removesuffix(".json")
