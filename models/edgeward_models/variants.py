"""Further variants of a model: `[variants.NAME]` in its sidecar.

    [variants.fp16]
    file = "model-fp16.onnx"           # relative to the sidecar
    precision = "fp16"                 # optional; the file must agree
    providers = ["Tensorrt", "CUDA"]   # optional, as are arch and isa: where it makes sense
    [variants.fp16.accuracy]           # optional: what was measured on this very file
    top1_agreement_fp32 = 0.99

Invariant: all variants have the same ports, so that one contract and one set of samples serves them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgeward_models.graph import Facts
from edgeward_runtime import parity
from edgeward_runtime.sessions import CPU
from edgeward_wire.document import faults
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import Parity, Precision, TargetHints


@dataclass(frozen=True, slots=True)
class Further:
    """A variant beside the file that is deployed."""

    name: str
    file: Path
    precision: str | None
    targets: TargetHints
    accuracy: dict[str, float] = field(default_factory=dict)


def further_variants(declared: Mapping[str, Mapping[str, Any]]) -> tuple[Further, ...]:
    """The variants of a `Guess`. Raises Rejected when a table lacks its file or holds what it must not."""
    return tuple(_further(name, table) for name, table in sorted(declared.items()))


def check_variant(variant: Further, facts: Facts, main: Facts) -> None:
    """Raises Rejected when the file is not what was declared, or its ports are not the main file's."""
    if variant.precision is not None and variant.precision != facts.precision:
        raise Rejected(
            f"Variant {variant.name} is declared {variant.precision}, but {facts.path.name} is"
            f" {facts.precision}."
        )
    for what, mine, theirs in (
        ("inputs", facts.inputs, main.inputs),
        ("outputs", facts.outputs, main.outputs),
    ):
        if [(p.name, p.dtype) for p in mine] != [(p.name, p.dtype) for p in theirs]:
            raise Rejected(
                f"Variant {variant.name} has other {what} than {main.path.name}.",
                "All variants need the same names and types; keep inputs and outputs float32 in FP16 files.",
            )


def parity_for(precision: Precision) -> Parity:
    """The gate of a variant's golden vectors."""
    return Parity(cosine=parity.gate(parity.GATE, precision, CPU))


def _further(name: str, table: Mapping[str, Any]) -> Further:
    where = f"[variants.{name}]"
    if "file" not in table:
        raise Rejected(f'{where} needs file = "...".')
    figures = table.get("accuracy", {})
    numbers = isinstance(figures, Mapping) and all(type(v) in (int, float) for v in figures.values())
    if not numbers:
        raise Rejected(f"{where} has an accuracy that is not a table of numbers.")
    hints = {key: table[key] for key in TargetHints.model_fields if key in table}
    try:
        targets = TargetHints(**hints)
    except ValidationError as error:
        raise Rejected(f"{where} is not valid: {faults(error)}.") from error
    accuracy = {str(key): float(value) for key, value in figures.items()}
    return Further(name, Path(table["file"]), table.get("precision"), targets, accuracy)
