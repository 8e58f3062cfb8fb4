"""What is known of a model file, for people: the facts, what was inferred, and what is missing.

Invariant: the sidecar text that comes out is a sidecar that goes in: `deploy` with it means what `deploy`
without it would have inferred, and comments stand where something is missing or was only assumed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from edgeward_models.graph import Facts, embed_external_data, read_facts
from edgeward_models.variants import Further, further_variants
from edgeward_runtime.contract_guess import Guess, guess
from edgeward_wire.contract import Contract, InputPort
from edgeward_wire.manifest import TargetHints

_ARRAY = re.compile(r"\[\n((?: +[-+.0-9e]+,\n)+)\]")


@dataclass(frozen=True)
class Inspection:
    """One file: what it says of itself, and what that means for a pipeline."""

    facts: Facts
    guess: Guess
    whole: Path
    """The file with its weights inside: itself, or a copy where they lay beside it."""
    further: tuple[Further, ...] = ()
    """What its sidecar declares beside it."""


def inspect_model(
    path: Path, sidecar: Path | None = None, flags: Mapping[str, Any] | None = None, *, scratch: Path
) -> Inspection:
    """Read a file, its sidecar and its metadata. `flags` has the sidecar's shape and wins.

    A file whose weights lie beside it is made whole in the directory `scratch`.

    Raises:
        Rejected: not ONNX, not complete, not supported, or a declaration is wrong.
        Unavailable: a file cannot be read.
    """
    facts = read_facts(path)
    whole = embed_external_data(facts, scratch)
    beside = path.with_suffix(".toml")
    if sidecar is None and beside.is_file():
        sidecar = beside
    known = guess(whole, sidecar, flags)
    return Inspection(facts, known, whole, further_variants(known.variants))


def facts_table(inspection: Inspection) -> list[tuple[str, str]]:
    """The facts as (what, value) for people."""
    facts = inspection.facts
    most = list(facts.operators.items())[:8]
    more = len(facts.operators) - len(most)
    return [
        ("file", f"{facts.path.name}, {facts.bytes / 1e6:.1f} MB" + (", external data" * facts.external)),
        ("made by", facts.producer or "not said"),
        ("opset", f"{facts.opset} (IR {facts.ir_version})"),
        *((f"input {p.name}", f"{p.dtype} {_shape(p.shape)}") for p in facts.inputs),
        *((f"output {p.name}", f"{p.dtype} {_shape(p.shape)}") for p in facts.outputs),
        ("precision", precision_line(facts)),
        ("parameters", f"{facts.parameters / 1e6:.2f} M"),
        ("operators", ", ".join(f"{n} {name}" for name, n in most) + (f" and {more} more" if more else "")),
    ]


def precision_line(facts: Facts) -> str:
    """`int8: 87 % of 385 M multiplications`."""
    if not facts.macs:
        return f"{facts.precision}: no convolutions or matrix products"
    work = f"{facts.macs / 1e6:.0f} M" if facts.macs >= 1e6 else str(facts.macs)
    return f"{facts.precision}: {facts.int8_share:.0%} of {work} multiplications are INT8".replace("%", " %")


def plain(inspection: Inspection) -> dict[str, Any]:
    """Everything, for `--json`."""
    facts, known = inspection.facts, inspection.guess
    return {
        "file": str(facts.path),
        "bytes": facts.bytes,
        "opset": facts.opset,
        "ir_version": facts.ir_version,
        "producer": facts.producer,
        "inputs": [{"name": p.name, "dtype": p.dtype, "shape": list(p.shape)} for p in facts.inputs],
        "outputs": [{"name": p.name, "dtype": p.dtype, "shape": list(p.shape)} for p in facts.outputs],
        "operators": facts.operators,
        "parameters": facts.parameters,
        "macs": facts.macs,
        "int8_share": round(facts.int8_share, 4),
        "precision": facts.precision,
        "name": known.name,
        "contract": known.contract.model_dump(mode="json", exclude_none=True),
        "labels": str(known.labels) if known.labels else None,
        "samples": str(known.samples) if known.samples else None,
        "assumed": list(known.notes),
        "missing": [{"what": m.what, "next_step": m.next_step} for m in known.missing],
        "sidecar": sidecar_text(inspection),
    }


def sidecar_text(inspection: Inspection) -> str:
    """The sidecar TOML of what is known."""
    facts, known = inspection.facts, inspection.guess
    head = [f"# {facts.path.name}: opset {facts.opset}, {precision_line(facts)}."]
    head += [f"# assumed: {note}" for note in known.notes]
    for missing in known.missing:
        head += [f"# MISSING: {missing.what}", f"#          {missing.next_step}"]
    body: dict[str, Any] = {"name": known.name, "task": known.contract.task}
    if known.labels is not None:
        body["labels"] = _relative(known.labels, facts.path)
    elif known.contract.task == "classification":
        head.append('# labels = "labels.txt"  # one a line, in the order of the classes')
    if known.samples is not None:
        body["samples"] = _relative(known.samples, facts.path)
    else:
        head.append(f"# samples = {_SAMPLES[_kind(known.contract)]}: strong evidence")
    if known.float_reason:
        body["float"] = known.float_reason
    if known.report is not None:
        body["report"] = _relative(known.report, facts.path)
    tables: dict[str, dict[str, Any]] = {
        "accuracy": known.accuracy,
        "limits": known.limits.model_dump(exclude_none=True),
        "targets": _hints(known.targets),
        "annotations": known.annotations,
    }
    body.update({name: table for name, table in tables.items() if table})
    body.update(_ports(known.contract))
    if inspection.further:
        body["variants"] = {one.name: _variant(one, facts.path) for one in inspection.further}
    return "\n".join(head) + "\n" + _ARRAY.sub(_one_line, tomli_w.dumps(body))


_SAMPLES = {
    "image": '"pictures"    # pictures as the device will see them',
    "audio": '"sounds"      # WAV files as the device will hear them',
    "tensor": '"samples.npz" # one array for each input, a row a sample',
}


def _kind(contract: Contract) -> str:
    source = contract.source
    return "image" if source.image is not None else "audio" if source.audio is not None else "tensor"


def _one_line(array: re.Match[str]) -> str:
    return "[" + " ".join(array.group(1).split()).rstrip(",") + "]"


def _ports(contract: Contract) -> dict[str, Any]:
    inputs = {port.name: _input(port) for port in contract.inputs}
    outputs = {
        port.name: {"activation": port.activation} | ({"bind": port.bind} if port.bind != "result" else {})
        for port in contract.outputs
    }
    return {"inputs": {name: table for name, table in inputs.items() if table}, "outputs": outputs}


def _input(port: InputPort) -> dict[str, Any]:
    if port.const is not None:
        return {"const": list(port.const)}
    if port.image is not None:
        table = port.image.model_dump(mode="json", exclude_none=True)
        return table if port.image.resize == "letterbox" else {k: v for k, v in table.items() if k != "pad"}
    if port.audio is not None:
        return port.audio.model_dump(mode="json")
    return {} if port.bind == "source" else {"bind": port.bind}


def _variant(variant: Further, model: Path) -> dict[str, Any]:
    table: dict[str, Any] = {"file": _relative(variant.file, model)}
    if variant.precision is not None:
        table["precision"] = variant.precision
    table |= _hints(variant.targets)
    return table | ({"accuracy": variant.accuracy} if variant.accuracy else {})


def _hints(targets: TargetHints) -> dict[str, Any]:
    return {key: list(value) for key, value in targets if value}


def _relative(path: Path, model: Path) -> str:
    """Relative to the sidecar, which lies beside the model: both may move together, and no home is named."""
    return os.path.relpath(path.resolve(), model.resolve().parent)


def _shape(shape: tuple[int | str, ...]) -> str:
    return " × ".join(map(str, shape)) or "scalar"
