"""Further variants of a model: `[variants.NAME]` in its sidecar.

    [variants.fp16]
    file = "model-fp16.onnx"           # relative to the sidecar
    precision = "fp16"                 # optional; the file must agree
    providers = ["Tensorrt", "CUDA"]   # optional, as are arch and isa: where it makes sense

Invariant: all variants have the same ports, so that one contract and one set of samples serves them all.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from edgeward_models.graph import Facts
from edgeward_runtime.contract_guess import MAX_SIDECAR_BYTES
from edgeward_wire.document import faults
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import Parity, Precision, TargetHints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]  # mypy checks for 3.10 on any

_KEYS = {"file", "precision", "arch", "isa", "providers"}
_PARITY: dict[Precision, float] = {"int8": 0.99, "fp32": 0.99, "fp16": 0.98}


@dataclass(frozen=True, slots=True)
class Further:
    """A variant beside the file that is deployed."""

    name: str
    file: Path
    precision: str | None
    targets: TargetHints


def take_variants(sidecar: Path, scratch: Path) -> tuple[Path, tuple[Further, ...]]:
    """The sidecar without its variants (itself, or a copy in `scratch`), and the variants.

    Raises:
        Rejected: a table is not in the format. Unavailable: the sidecar cannot be read.
    """
    try:
        with sidecar.open("rb") as stream:
            raw = stream.read(MAX_SIDECAR_BYTES + 1)
        table: dict[str, Any] = tomllib.loads(raw.decode())
    except OSError as error:
        raise Unavailable(f"{sidecar} cannot be read: {error.strerror}.", "Check the path.") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError):
        return sidecar, ()  # whoever reads the rest says what is wrong with it
    if "variants" not in table:
        return sidecar, ()
    declared = table.pop("variants")
    if not isinstance(declared, dict):
        raise Rejected(f"{sidecar.name}: [variants] holds one table for each name.")
    further = tuple(_further(sidecar, name, value) for name, value in sorted(declared.items()))
    for key in ("labels", "samples"):
        if key in table:
            table[key] = str((sidecar.parent / str(table[key])).absolute())
    rest = scratch / sidecar.name
    rest.write_text(tomli_w.dumps(table))
    return rest, further


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
    return Parity(cosine=_PARITY[precision])


def _further(sidecar: Path, name: str, table: Any) -> Further:
    where = f"{sidecar.name}: [variants.{name}]"
    if not isinstance(table, dict) or not isinstance(table.get("file"), str):
        raise Rejected(f'{where} needs file = "...".')
    unknown = sorted(table.keys() - _KEYS)
    if unknown:
        raise Rejected(
            f"{where} has the unknown key {unknown[0]!r}.", f"Known are: {', '.join(sorted(_KEYS))}."
        )
    hints = {key: table[key] for key in ("arch", "isa", "providers") if key in table}
    try:
        targets = TargetHints(**hints)
    except ValidationError as error:
        raise Rejected(f"{where} is not valid: {faults(error)}.") from error
    return Further(name, sidecar.parent / table["file"], table.get("precision"), targets)
