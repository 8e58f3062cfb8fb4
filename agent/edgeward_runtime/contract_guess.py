"""What an ONNX file takes and gives, from the file itself and from what people say about it.

In this order: flags, then the sidecar (`model.toml` beside `model.onnx`, or one that is named), then the
file's own metadata (`metadata_props["edgeward"]`, the same as JSON), then what can be inferred. What had
to be inferred and could be wrong is in `notes`; what nobody can infer is in `missing`, each with what
to do about it: `model inspect` prints both, `deploy` calls `Guess.complete` first.

The sidecar:

    name = "lite0"                     # default: the file's name
    task = "classification"
    labels = "labels.txt"              # relative to the sidecar
    samples = "pictures"               # a directory of pictures for the golden vectors
    precision = "int8"                 # default: read from the file
    float = "reason"                   # why there is no INT8 variant
    [accuracy]
    top1_agreement_fp32 = 0.95
    [inputs.image]                     # by the input's name
    colour = "rgb"                     # and width, height, resize, resize_to, interpolation, crop, pad,
                                       # scale, bias, layout: edgeward_wire.contract.ImageSpec
    [inputs.threshold]
    const = [0.5]
    [outputs.logits]
    activation = "softmax"
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from edgeward_runtime.onnx_file import Facts, read_facts
from edgeward_runtime.sessions import NotLoaded, Port, Session, open_exact
from edgeward_wire.contract import Contract, DimensionRange, ImageSpec, InputPort, OutputPort, Task
from edgeward_wire.document import faults
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.identifiers import NAME_PATTERN
from edgeward_wire.manifest import Precision

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]  # mypy checks for 3.10 on any

METADATA_KEY = "edgeward"
MAX_SIDECAR_BYTES = 1 << 20
_NAME_STEP = "Use a-z, 0-9, dot, dash and underscore, beginning with a letter or number."
_KEYS = frozenset(
    {"name", "task", "labels", "samples", "precision", "float", "accuracy", "inputs", "outputs", "dimensions"}
)
_IMAGE_KEYS = frozenset(ImageSpec.model_fields)
_INPUT_KEYS = _IMAGE_KEYS | {"bind", "const"}
_OUTPUT_KEYS = frozenset({"activation", "bind"})

Declared = Mapping[str, Any]


@dataclass(frozen=True)
class Missing:
    """Something that the file does not tell: what, and what to do."""

    key: str
    """Where it would be declared: labels, task, inputs.<name>."""
    what: str
    next_step: str


@dataclass(frozen=True)
class Guess:
    """What is known of a model. With `missing` empty it can be deployed."""

    name: str
    contract: Contract
    precision: Precision
    opset: int
    labels: Path | None = None
    samples: Path | None = None
    float_reason: str | None = None
    accuracy: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    missing: tuple[Missing, ...] = ()

    def complete(self, without: Sequence[str] = ()) -> Guess:
        """Itself, if nothing is missing but the keys in `without`. Raises Rejected with the first that is."""
        missing = [one for one in self.missing if one.key not in without]
        if missing:
            first, more = missing[0], len(missing) - 1
            also = f" ({more} more: see `agent-ctl model inspect`)" if more else ""
            raise Rejected(first.what + also, first.next_step)
        return self


def guess(path: Path, sidecar: Path | None = None, flags: Declared | None = None) -> Guess:
    """Everything that can be said about one ONNX file.

    `sidecar` None: the .toml of the same name, if it is there. `flags` has the sidecar's shape;
    relative paths in it are relative to the working directory.

    Raises:
        Rejected: not ONNX, an operator set that is not supported, a sidecar that is wrong.
        Unavailable: a file cannot be read.
    """
    facts = read_facts(path)
    declared = _declared(path, facts, sidecar, flags or {})
    try:
        session = open_exact(path)
    except NotLoaded as error:
        raise Rejected(
            f"{path.name} does not load: {error.what}",
            "Export it again with an operator set that is supported.",
        ) from error
    try:
        return _Inference(path, facts, session, declared).guess()
    finally:
        session.close()


# --- what people declare


def read_sidecar(path: Path) -> dict[str, Any]:
    """A sidecar with its relative paths made absolute. Raises Rejected, Unavailable."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_SIDECAR_BYTES + 1)
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from error
    if len(raw) > MAX_SIDECAR_BYTES:
        raise Rejected(f"{path.name} is longer than {MAX_SIDECAR_BYTES} bytes.")
    try:
        declared = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Rejected(f"{path.name} is not TOML: {error}.") from None
    return _checked(declared, path.name, path.parent)


def _checked(declared: Any, where: str, base: Path) -> dict[str, Any]:
    """`declared` with only keys that we know, and paths below `base`."""
    if not isinstance(declared, dict):
        raise Rejected(f"{where} is not a table of settings.")
    _known(declared, _KEYS, where)
    for part, keys in (("inputs", _INPUT_KEYS), ("outputs", _OUTPUT_KEYS)):
        tables = declared.get(part, {})
        if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
            raise Rejected(f"{where}: [{part}] holds one table for each name.")
        for name, table in tables.items():
            _known(table, keys, f"{where}: [{part}.{name}]")
    checked = dict(declared)
    for key in ("labels", "samples"):
        if key in checked:
            checked[key] = base / str(checked[key])
    return checked


def _known(table: Mapping[str, Any], keys: frozenset[str], where: str) -> None:
    unknown = sorted(set(table) - keys)
    if unknown:
        raise Rejected(
            f"{where} has the unknown key {unknown[0]!r}.", f"Known are: {', '.join(sorted(keys))}."
        )


def _declared(path: Path, facts: Facts, sidecar: Path | None, flags: Declared) -> dict[str, Any]:
    """All declarations in one: flags over sidecar over metadata."""
    layers: list[Declared] = []
    if METADATA_KEY in facts.metadata:
        where = f"{path.name}: metadata {METADATA_KEY!r}"
        try:
            layers.append(_checked(json.loads(facts.metadata[METADATA_KEY]), where, path.parent))
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


def _merge(into: dict[str, Any], over: Declared) -> None:
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        elif value is not None:
            into[key] = dict(value) if isinstance(value, Mapping) else value


# --- what can be inferred


class _Inference:
    """One file's guess in the making."""

    def __init__(self, path: Path, facts: Facts, session: Session, declared: dict[str, Any]) -> None:
        self.path, self.facts, self.session, self.declared = path, facts, session, declared
        self.notes: list[str] = []
        self.missing: list[Missing] = []
        self.dimensions: dict[str, DimensionRange] = {}
        for part, ports in (("inputs", session.inputs), ("outputs", session.outputs)):
            names = [port.name for port in ports]
            for name in declared.get(part, {}):
                if name not in names:
                    raise Rejected(
                        f"{path.name} has no {part[:-1]} named {name!r}.", f"It has: {', '.join(names)}."
                    )

    def guess(self) -> Guess:
        try:
            inputs = self._inputs()
            task = self._task(inputs)
            outputs = tuple(self._output(port, task) for port in self.session.outputs)
            contract = Contract(
                task=task, inputs=inputs, outputs=outputs, dimensions={**self.dimensions, **self._ranges()}
            )
            accuracy = {str(k): float(v) for k, v in self.declared.get("accuracy", {}).items()}
        except ValidationError as error:
            raise Rejected(
                f"What is declared about {self.path.name} is not valid: {faults(error)}."
            ) from None
        except (TypeError, ValueError, AttributeError) as error:
            raise Rejected(f"What is declared about {self.path.name} is not valid: {error}.") from None
        return Guess(
            name=self._name(),
            contract=contract,
            precision=self._precision(),
            opset=self.facts.opset,
            labels=self._labels(task),
            samples=self._samples(),
            float_reason=self.declared.get("float"),
            accuracy=accuracy,
            notes=tuple(self.notes),
            missing=tuple(self.missing),
        )

    def _inputs(self) -> tuple[InputPort, ...]:
        """The first input that looks like a picture is the source, else the first; others are declared."""
        ports = self.session.inputs
        declared = self.declared.get("inputs", {})
        free = [p for p in ports if not {"bind", "const"} & set(declared.get(p.name, {}))]
        pictures = [p for p in free if set(declared.get(p.name, {})) & _IMAGE_KEYS or _layout(p) is not None]
        source = next(iter(pictures or free), None)
        return tuple(self._input(port, declared.get(port.name, {}), port is source) for port in ports)

    def _input(self, port: Port, declared: Declared, source: bool) -> InputPort:
        bind = declared.get("bind") or ("const" if "const" in declared else "source")
        if bind == "source" and not source and "bind" not in declared:
            self.missing.append(
                Missing(
                    f"inputs.{port.name}",
                    f"Nothing says what goes into input {port.name}.",
                    f"Declare const or bind under [inputs.{port.name}] in {self.path.stem}.toml.",
                )
            )
        image = None
        pictured = bool(set(declared) & _IMAGE_KEYS) or (source and _layout(port) is not None)
        if bind == "source" and pictured:
            image = self._image(port, declared)
        shape = self._shape(port, image)
        const = declared.get("const")
        values = (
            tuple(float(v) for v in (const if isinstance(const, list) else [const]))
            if const is not None
            else None
        )
        return InputPort(name=port.name, dtype=port.dtype, shape=shape, bind=bind, image=image, const=values)

    def _image(self, port: Port, declared: Declared) -> ImageSpec:
        layout = declared.get("layout") or _layout(port) or "nchw"
        rank4 = len(port.shape) == 4
        height, width = (port.shape[2:4] if layout == "nchw" else port.shape[1:3]) if rank4 else (None, None)
        channels = (port.shape[1] if layout == "nchw" else port.shape[3]) if rank4 else 3
        spec = {k: v for k, v in declared.items() if k in _IMAGE_KEYS}
        spec["layout"] = layout
        for key, size in (("width", width), ("height", height)):
            if key not in spec and isinstance(size, int):
                spec[key] = size
            elif key not in spec:
                spec[key] = 224
                self.missing.append(
                    Missing(
                        f"inputs.{port.name}",
                        f"Input {port.name} takes pictures of any {key}.",
                        f"Declare width and height under [inputs.{port.name}] in {self.path.stem}.toml.",
                    )
                )
            elif isinstance(size, int) and spec[key] != size:
                raise Rejected(
                    f"Input {port.name} has {key} {size} in the file, but {spec[key]} is declared."
                )
        spec.setdefault("colour", "gray" if channels == 1 else "rgb")
        self._normalisation(port, spec, 1 if spec["colour"] == "gray" else 3)
        return ImageSpec(**spec)

    def _normalisation(self, port: Port, spec: dict[str, Any], channels: int) -> None:
        if "scale" not in spec:
            one = 1.0 if port.dtype == "uint8" else 1 / 255
            spec["scale"] = [one] * channels
            if port.dtype != "uint8":
                self.notes.append(
                    f"scale and bias of {port.name} are not declared: taken as 1/255 and 0 (colours in 0..1)."
                )
        if "colour" in spec and "resize" not in spec:
            self.notes.append(f"resize of {port.name} is not declared: taken as stretch.")
        for key, default in (("scale", 1.0), ("bias", 0.0)):
            value = spec.get(key, default)
            # One number stands for every channel.
            spec[key] = (
                [float(v) for v in value] if isinstance(value, (list, tuple)) else [float(value)] * channels
            )

    def _shape(self, port: Port, image: ImageSpec | None) -> tuple[int | str, ...]:
        """The port's shape with every free dimension named and ranged."""
        sizes: dict[int, int] = {}
        if image is not None and len(port.shape) == 4:
            first = 2 if image.layout == "nchw" else 1
            sizes = {first: image.height, first + 1: image.width, (1 if first == 2 else 3): image.channels}
        shape: list[int | str] = []
        for axis, dimension in enumerate(port.shape):
            if isinstance(dimension, int):
                shape.append(dimension)
            elif axis in sizes:
                shape.append(sizes[axis])
            else:
                name = (dimension or f"{port.name}_{axis}")[:64]
                self.dimensions.setdefault(name, DimensionRange())
                shape.append(name)
        return tuple(shape)

    def _output(self, port: Port, task: Task) -> OutputPort:
        declared = self.declared.get("outputs", {}).get(port.name, {})
        activation = declared.get("activation")
        if activation is None:
            activation = "none"
            if task == "classification" and port is self.session.outputs[0]:
                last = self.facts.producer_of(port.name)
                activation = "none" if last in ("Softmax", "Sigmoid") else "softmax"
                if activation == "softmax":
                    self.notes.append(f"activation of {port.name} is not declared: taken as softmax.")
        shape = tuple(
            d if isinstance(d, int) else (d or f"{port.name}_{axis}")[:64]
            for axis, d in enumerate(port.shape)
        )
        return OutputPort(
            name=port.name,
            dtype=port.dtype,
            shape=shape,
            activation=activation,
            bind=declared.get("bind", "result"),
        )

    def _task(self, inputs: tuple[InputPort, ...]) -> Task:
        declared = self.declared.get("task")
        if declared is not None:
            if declared not in get_args(Task):
                raise Rejected(
                    f"The task {declared!r} is not known.", f"Known are: {', '.join(get_args(Task))}."
                )
            task: Task = declared
            return task
        rows = self.session.outputs[0].shape
        if (
            any(p.image is not None for p in inputs)
            and len(rows) == 2
            and (rows[0] == 1 or not isinstance(rows[0], int))
        ):
            self.notes.append("task is not declared: one row of numbers a picture, taken as classification.")
            return "classification"
        self.missing.append(
            Missing("task", f"Nothing says what {self.path.name} is for.", "Say it with --task.")
        )
        return "tensor"

    def _ranges(self) -> dict[str, DimensionRange]:
        return {str(k): DimensionRange(**v) for k, v in self.declared.get("dimensions", {}).items()}

    def _name(self) -> str:
        declared = self.declared.get("name")
        if declared is not None:
            if not re.match(NAME_PATTERN, str(declared)):
                raise Rejected(f"{declared!r} cannot be a model's name.", _NAME_STEP)
            return str(declared)
        name = re.sub(r"[^a-z0-9._-]+", "-", self.path.stem.lower()).strip("-._")[:63]
        return name or "model"

    def _precision(self) -> Precision:
        declared = self.declared.get("precision")
        if declared is None:
            return self.facts.precision
        if declared not in get_args(Precision):
            raise Rejected(
                f"The precision {declared!r} is not known.", f"Known are: {', '.join(get_args(Precision))}."
            )
        precision: Precision = declared
        return precision

    def _labels(self, task: Task) -> Path | None:
        declared = self.declared.get("labels")
        if declared is not None:
            path = Path(declared)
            if not path.is_file():
                raise Rejected(
                    f"The labels file {path} is not there.", "Name a text file with one label a line."
                )
            return path
        if task == "classification":
            classes = self.session.outputs[0].shape[-1]
            lines = f"{classes} lines" if isinstance(classes, int) else "lines"
            self.missing.append(
                Missing(
                    "labels",
                    f"A classification needs labels, and nothing names those of {self.path.name}.",
                    f"Give --labels FILE: {lines} of text, one a class.",
                )
            )
        return None

    def _samples(self) -> Path | None:
        declared = self.declared.get("samples")
        if declared is None:
            self.notes.append("no samples are named: the golden vectors are made of noise (evidence: weak).")
            return None
        path = Path(declared)
        if not path.exists():
            raise Rejected(f"The samples {path} are not there.", "Name a directory of pictures.")
        return path


def _layout(port: Port) -> Literal["nchw", "nhwc"] | None:
    """The layout of what looks like one picture: four dimensions, one of them 1 or 3 channels."""
    shape = port.shape
    if len(shape) != 4 or port.dtype not in ("float32", "float16", "uint8"):
        return None
    if isinstance(shape[0], int) and shape[0] != 1:
        return None
    if shape[1] in (1, 3):
        return "nchw"
    return "nhwc" if shape[3] in (1, 3) else None
