"""Small, valid documents for the agent's tests."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from edgeward_agent.states import Deployment
from edgeward_wire.assignment import Assignment, PipelineAssignment
from edgeward_wire.contract import Contract, InputPort, OutputPort
from edgeward_wire.identifiers import model_path
from edgeward_wire.manifest import BlobRef, Limits, Manifest, ModelRef, TargetHints, Variant
from edgeward_wire.verdict import Plan, PlanOutcome, Verdict

FINGERPRINT = "f" * 64


def blob(content: bytes, directory: Path | None = None, name: str = "") -> BlobRef:
    sha256 = hashlib.sha256(content).hexdigest()
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / sha256).write_bytes(content)
    return BlobRef(sha256=sha256, length=len(content), name=name)


def manifest(
    version: str = "1",
    *,
    name: str = "m",
    blobs: Path | None = None,
    targets: TargetHints | None = None,
    p99_ms: float | None = None,
    **more: Any,
) -> Manifest:
    contract = Contract(
        task="classification",
        inputs=(InputPort(name="x", dtype="float32", shape=(1, 3, 8, 8), bind="source"),),
        outputs=(OutputPort(name="y", dtype="float32", shape=(1, 4)),),
    )
    variant = Variant(
        model=blob(f"model {name} {version}".encode(), blobs, "model.onnx"),
        precision="int8",
        targets=targets or TargetHints(),
        golden=blob(f"golden {name} {version}".encode(), blobs, "golden.npz"),
        evidence="strong",
        opset=17,
    )
    return Manifest(
        name=name,
        version=version,
        created="2026-01-01T00:00:00Z",
        contract=contract,
        variants={"int8": variant},
        labels=blob(b"a\nb\nc\nd\n", blobs, "labels.txt"),
        limits=Limits(p99_ms=p99_ms),
        **more,
    )


def row(of: Manifest, *, attempt: int = 1, rollout: str = "", probation_s: float = 0.0) -> PipelineAssignment:
    raw = of.to_bytes()
    return PipelineAssignment(
        model=ModelRef(path=model_path(of.name, of.version), sha256=hashlib.sha256(raw).hexdigest()),
        rollout=rollout or f"r-{of.name}-{of.version}-{attempt}",
        attempt=attempt,
        probation_s=probation_s,
    )


def plan(variant: str = "int8") -> Plan:
    return Plan(provider="CPUExecutionProvider", variant=variant)


def verdict(of: Manifest, key: str = "0" * 64, *, p50_ms: float = 5.0, memory_mb: float = 10.0) -> Verdict:
    chosen = PlanOutcome(
        plan=plan(), outcome="chosen", parity=1.0, p50_ms=p50_ms, p99_ms=2 * p50_ms, memory_mb=memory_mb
    )
    return Verdict(
        model_sha256=row(of).model.sha256, key=key, chosen=chosen.plan, plans=(chosen,), took_s=0.1
    )


def deployment(of: Manifest, *, judged: bool = False, **of_row: Any) -> Deployment:
    return Deployment(
        row=row(of, **of_row),
        manifest=of.to_bytes().decode(),
        fingerprint=FINGERPRINT,
        verdict=verdict(of) if judged else None,
    )


def assignment(revision: int, **pipelines: PipelineAssignment) -> Assignment:
    return Assignment(device="edge-01a", fleet="edge-01", revision=revision, pipelines=pipelines)
