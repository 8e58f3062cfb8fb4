"""What people declare about a model: flags, then the sidecar, then the file's own metadata.

The sidecar is `model.toml` beside `model.onnx`, or one that is named; the metadata is the same as JSON in
`metadata_props["edgeward"]`. Invariants: a key that nobody knows is refused by name, never skipped; every
path that leaves this module is absolute or relative to the working directory.

    name = "lite0"                     # default: the file's name
    task = "classification"
    labels = "labels.txt"              # relative to the sidecar
    samples = "pictures"               # pictures or WAV files in a directory, or an .npz
    precision = "int8"                 # default: read from the file
    float = "reason"                   # why there is no INT8 variant
    report = "report.json"             # of the quantisation: its digest goes into the provenance
    [accuracy]
    top1_agreement_fp32 = 0.95
    [limits]                           # what a device must reach: p99_ms, memory_mb
    p99_ms = 50
    [targets]                          # where this file makes sense: arch, isa, providers
    arch = ["x86_64"]
    [annotations]
    licence = "Apache-2.0"
    [inputs.image]                     # by the input's name
    colour = "rgb"                     # and width, height, resize, resize_to, interpolation, crop, pad,
                                       # scale, bias, layout: edgeward_wire.contract.ImageSpec
    [inputs.sound]
    rate = 16000                       # and window, hop, context: edgeward_wire.contract.AudioSpec
    [inputs.threshold]
    const = [0.5]
    [inputs.memory]                    # carried from run to run, from zero
    bind = "state:memory"
    [outputs.memory_out]
    bind = "state:memory"
    [outputs.logits]
    activation = "softmax"
    [outputs.output0]                  # of a detector, where shape and labels fit several kinds
    boxes = "yolov5"                   # yolov8, yolov5 or end-to-end
    [variants.fp16]                    # another file of the same model; precision, arch, isa, providers too
    file = "model-fp16.onnx"
    [variants.fp16.accuracy]
    top1_agreement_fp32 = 0.99
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeward_wire.contract import AudioSpec, ImageSpec
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import Limits, TargetHints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]  # mypy checks for 3.10 on any

METADATA_KEY = "edgeward"
MAX_SIDECAR_BYTES = 1 << 20
IMAGE_KEYS = frozenset(ImageSpec.model_fields)
AUDIO_KEYS = frozenset(AudioSpec.model_fields)

_PLAIN = frozenset({"name", "task", "labels", "samples", "precision", "float", "report"})
_TABLES: dict[str, frozenset[str] | None] = {
    "accuracy": None,
    "annotations": None,
    "dimensions": None,
    "limits": frozenset(Limits.model_fields),
    "targets": frozenset(TargetHints.model_fields),
}
"""Tables, and their keys; None: any."""
_TABLES_BY_NAME: dict[str, frozenset[str]] = {
    "inputs": IMAGE_KEYS | AUDIO_KEYS | {"bind", "const"},
    "outputs": frozenset({"activation", "bind", "boxes"}),
    "variants": frozenset({"file", "precision", "accuracy"}) | frozenset(TargetHints.model_fields),
}
"""Tables that hold one table for each name, and the keys of these."""
_PATHS = ("labels", "samples", "report")

Declared = Mapping[str, Any]


def declarations(
    path: Path, metadata: Mapping[str, str], sidecar: Path | None, flags: Declared
) -> dict[str, Any]:
    """All that is declared about the model file `path`, in one table of the sidecar's shape.

    `sidecar` None: the .toml of the same name, if it is there. Relative paths in `flags` are relative to
    the working directory.

    Raises:
        Rejected: something is not in the format. Unavailable: the sidecar cannot be read.
    """
    layers: list[Declared] = []
    if METADATA_KEY in metadata:
        where = f"{path.name}: metadata {METADATA_KEY!r}"
        try:
            layers.append(_checked(json.loads(metadata[METADATA_KEY]), where, path.parent))
        except (json.JSONDecodeError, RecursionError) as error:
            raise Rejected(f"{where} is not JSON: {error}.") from None
    beside = path.with_suffix(".toml")
    if sidecar is not None:
        layers.append(read_sidecar(sidecar))
    elif beside.is_file():
        layers.append(read_sidecar(beside))
    layers.append(_checked(dict(flags), "the command line", Path.cwd()))
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge(merged, layer)
    return merged


def read_sidecar(path: Path) -> dict[str, Any]:
    """A sidecar with its relative paths made its own. Raises Rejected, Unavailable."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_SIDECAR_BYTES + 1)
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from error
    if len(raw) > MAX_SIDECAR_BYTES:
        raise Rejected(f"{path.name} is longer than {MAX_SIDECAR_BYTES} bytes.")
    try:
        declared = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Rejected(f"{path.name} is not TOML: {error}.") from None
    return _checked(declared, path.name, path.parent)


def _checked(declared: Any, where: str, base: Path) -> dict[str, Any]:
    """`declared` with only keys that we know, and paths below `base`."""
    if not isinstance(declared, dict):
        raise Rejected(f"{where} is not a table of settings.")
    _known(declared, _PLAIN | _TABLES.keys() | _TABLES_BY_NAME.keys(), where)
    for part, known in _TABLES.items():
        table = declared.get(part, {})
        if not isinstance(table, dict):
            raise Rejected(f"{where}: [{part}] is a table of settings.")
        if known is not None:
            _known(table, known, f"{where}: [{part}]")
    for part, keys in _TABLES_BY_NAME.items():
        tables = declared.get(part, {})
        if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
            raise Rejected(f"{where}: [{part}] holds one table for each name.")
        for name, table in tables.items():
            _known(table, keys, f"{where}: [{part}.{name}]")
    checked = dict(declared)
    for key in _PATHS:
        if key in checked:
            checked[key] = base / str(checked[key])
    if "variants" in checked:
        checked["variants"] = {
            name: {**table, **({"file": base / str(table["file"])} if "file" in table else {})}
            for name, table in checked["variants"].items()
        }
    return checked


def _known(table: Mapping[str, Any], keys: frozenset[str], where: str) -> None:
    unknown = sorted(table.keys() - keys)
    if unknown:
        raise Rejected(
            f"{where} has the unknown key {unknown[0]!r}.", f"Known are: {', '.join(sorted(keys))}."
        )


def _merge(into: dict[str, Any], over: Declared) -> None:
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        elif value is not None:
            # Copied: a later layer must not write into an earlier one.
            into[key] = _copied(value)


def _copied(value: Any) -> Any:
    return {key: _copied(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value
