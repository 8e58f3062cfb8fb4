"""What can be read of an ONNX file without running it. The only importer of onnx.

Invariant: a `Facts` stands for a file that a device of the oldest supported ONNX Runtime can be asked to
load: it parses, its opset and IR version are supported, it holds its own weights or they are beside it,
and all of its operators are ONNX's or ONNX Runtime's own.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import external_data_helper, inliner, shape_inference

from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import Precision

OPSETS = (7, 23)
"""The first and the last opset that ONNX Runtime 1.23, the oldest that a device may have, runs."""
MAX_IR_VERSION = 11
MAX_FILE_BYTES = (2 << 30) - 1
"""A protobuf message ends here, and a variant is one file."""
INT8_SHARE = 0.5
"""From this share of its multiplications on, a file counts as quantised."""

WEIGHT = "weight"

_KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
_BIG = 4096  # elements; what shapes are computed from is smaller
_HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_FLOATS = (*_HALVES, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
_DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.DOUBLE: "float64",
    onnx.TensorProto.UINT8: "uint8",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.INT32: "int32",
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.BOOL: "bool",
    onnx.TensorProto.STRING: "string",
}
_WIDTHS: dict[int, int] = {
    **dict.fromkeys((onnx.TensorProto.UINT8, onnx.TensorProto.INT8, onnx.TensorProto.BOOL), 1),
    **dict.fromkeys(_HALVES, 2),
    **dict.fromkeys((onnx.TensorProto.FLOAT, onnx.TensorProto.INT32), 4),
    **dict.fromkeys((onnx.TensorProto.DOUBLE, onnx.TensorProto.INT64), 8),
}
# Operator -> (position of the data, position of the weights) among its inputs.
_CONVOLUTIONS = {"Conv": (0, 1), "ConvTranspose": (0, 1), "ConvInteger": (0, 1), "QLinearConv": (0, 3)}
_PRODUCTS = {
    "MatMul": (0, 1),
    "Gemm": (0, 1),
    "FusedMatMul": (0, 1),
    "MatMulInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "DynamicQuantizeMatMul": (0, 1),
    "QLinearMatMul": (0, 3),
    "QGemm": (0, 3),
}
_RECURRENT = {"LSTM": 4, "GRU": 3, "RNN": 1, "DynamicQuantizeLSTM": 4}
_INTEGER = frozenset(
    {
        "ConvInteger",
        "QLinearConv",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "QLinearMatMul",
        "QGemm",
        "DynamicQuantizeLSTM",
    }
)
_LAYOUT_ONLY = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
_LOOKALIKES = (
    (b"PK\x03\x04", "a PyTorch or Keras archive", "Export it to ONNX first, e.g. with torch.onnx.export."),
    (b"\x80", "a Python pickle", "Export it to ONNX first, e.g. with torch.onnx.export."),
    (b"\x89HDF", "a Keras HDF5 file", "Convert it with tf2onnx first."),
    (b"ftrt", "a TensorRT engine", "Deploy the ONNX file: each device builds its own engine."),
)


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of the graph; an unknown dimension is its name, or `?`."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """What an ONNX file says of itself. `macs` are multiplications of one run, estimated from shapes."""

    path: Path
    bytes: int
    """The file, and its external data."""
    external: bool
    ir_version: int
    opset: int
    producer: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    operators: dict[str, int]
    parameters: int
    macs: int
    quantised_macs: int
    precision: Precision
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def int8_share(self) -> float:
        """The quantised share of all multiplications, 0..1; 0 when there are none."""
        return self.quantised_macs / self.macs if self.macs else 0.0


def read_facts(path: Path, sizes: Mapping[str, int] | None = None) -> Facts:
    """Read and judge an ONNX file. `sizes` gives named dimensions a length for the estimate.

    Raises:
        Rejected: it is not ONNX, not complete, or nothing that a device could load.
    """
    model = _load(path)
    opset = _check_versions(path, model)
    _check_domains(path, model)
    external = _external_files(path, model)
    initialisers = list(_initialisers(model.graph))
    names = {tensor.name for tensor in model.graph.initializer}
    halves = _mostly_halves(initialisers)
    read = {
        "inputs": tuple(_port(value) for value in model.graph.input if value.name not in names),
        "outputs": tuple(_port(value) for value in model.graph.output),
        "operators": dict(Counter(node.op_type for node in _nodes(model.graph)).most_common()),
        "parameters": sum(math.prod(tensor.dims) for tensor in initialisers),
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "ir_version": model.ir_version,
    }
    macs, quantised = _work(model, dict(sizes or {}))
    quantised_enough = bool(macs) and quantised / macs >= INT8_SHARE
    return Facts(
        path=path,
        bytes=path.stat().st_size + sum(file.stat().st_size for file in external),
        external=bool(external),
        opset=opset,
        macs=macs,
        quantised_macs=quantised,
        precision="int8" if quantised_enough else "fp16" if halves else "fp32",
        **read,
    )


def load_graph(path: Path) -> onnx.ModelProto:
    """The model as it stands, for those who look into the graph; external data stays where it is.

    Raises:
        Rejected: it is not ONNX, or cannot be read.
    """
    return _load(path)


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph, and the graphs inside its nodes (the branches of If, the bodies of Loop and Scan)."""
    return _graphs(graph)


def weights_of(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All initialisers and constants, those of inner graphs too."""
    return _initialisers(graph)


def skeleton(model: onnx.ModelProto, sizes: Mapping[str, int] | None = None) -> onnx.ModelProto:
    """A copy to infer shapes on: large weights are inputs, open dimensions have a length, no functions.

    The inputs that stand for weights have the doc string `WEIGHT`.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    weights = {tensor.name for tensor in model.graph.initializer}
    _weights_to_inputs(bare.graph)
    for value in bare.graph.input:
        value.doc_string = WEIGHT if value.name in weights else ""
    if bare.functions:
        bare = inliner.inline_local_functions(bare)
    _fix_dimensions(bare, dict(sizes or {}))
    return bare


def embed_external_data(facts: Facts, out: Path) -> Path:
    """The model as one file that holds its weights: the file itself, or a copy in the directory `out`.

    Raises:
        Rejected: all together are too large for one file.
    """
    if not facts.external:
        return facts.path
    if facts.bytes > MAX_FILE_BYTES:
        raise Rejected(
            f"{facts.path.name} and its external data are {facts.bytes / 1e9:.1f} GB together; "
            f"at most {MAX_FILE_BYTES / 1e9:.1f} GB fit one file.",
            "Quantise the model first.",
        )
    model = onnx.load(str(facts.path), load_external_data=True)
    for tensor in _initialisers(model.graph):
        tensor.ClearField("data_location")
        del tensor.external_data[:]
    whole = out / facts.path.name
    whole.write_bytes(model.SerializeToString(deterministic=True))
    return whole


def _load(path: Path) -> onnx.ModelProto:
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise Rejected(f"{path} is a directory.", "Name the ONNX file in it.")
        if size > MAX_FILE_BYTES:
            raise Rejected(f"{path.name} is {size / 1e9:.1f} GB; at most 2.1 GB can be ONNX in one file.")
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise Rejected(f"There is no file {path}.", "Check the path.") from error
    except OSError as error:
        raise Rejected(f"{path} cannot be read: {error.strerror}.") from error
    try:
        model = onnx.ModelProto.FromString(raw)
    except DecodeError as error:
        raise _not_onnx(path, raw) from error
    if not model.ir_version or not model.opset_import or not model.graph.node:
        raise _not_onnx(path, raw)
    return model


def _not_onnx(path: Path, raw: bytes) -> Rejected:
    if not raw:
        return Rejected(f"{path.name} is empty.", "Copy it again.")
    if raw[4:8] == b"TFL3":
        return Rejected(f"{path.name} is a TensorFlow Lite file, not ONNX.", "Convert it with tf2onnx first.")
    if raw.startswith(b"version https://git-lfs"):
        return Rejected(f"{path.name} is a Git LFS pointer, not the model.", "Fetch it with `git lfs pull`.")
    for magic, looks_like, remedy in _LOOKALIKES:
        if raw.startswith(magic):
            return Rejected(f"{path.name} is not ONNX: it looks like {looks_like}.", remedy)
    return Rejected(f"{path.name} is not an ONNX file, or it is damaged.", "Export or copy it again.")


def _check_versions(path: Path, model: onnx.ModelProto) -> int:
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    first, last = OPSETS
    if opset and not first <= opset <= last:
        raise Rejected(
            f"{path.name} uses ONNX opset {opset}; opsets {first} to {last} are supported.",
            f"Export it with an opset in that range, or convert it: "
            f"onnx.version_converter.convert_version(model, {min(max(opset, 13), last)}).",
        )
    if model.ir_version > MAX_IR_VERSION:
        raise Rejected(
            f"{path.name} has ONNX IR version {model.ir_version}; up to {MAX_IR_VERSION} is supported.",
            f"Export it with onnx 1.18, or set `model.ir_version = {MAX_IR_VERSION}` and save it again.",
        )
    return opset or 1


def _check_domains(path: Path, model: onnx.ModelProto) -> None:
    local = {function.domain for function in model.functions}
    foreign = {
        f"{node.domain}::{node.op_type}"
        for node in _nodes(model.graph)
        if node.domain not in _KNOWN_DOMAINS | local
    }
    if foreign:
        raise Rejected(
            f"{path.name} needs operators that are not ONNX's: {', '.join(sorted(foreign)[:5])}.",
            "Export it without custom operators.",
        )


def _external_files(path: Path, model: onnx.ModelProto) -> set[Path]:
    """The files beside the model that hold its weights."""
    found: set[Path] = set()
    home = path.resolve().parent
    for tensor in _initialisers(model.graph):
        if not external_data_helper.uses_external_data(tensor):
            continue
        told = external_data_helper.ExternalDataInfo(tensor)
        location = told.location
        file = (home / location).resolve()
        if home not in file.parents:
            raise Rejected(f"{path.name} keeps weights outside of its own directory: {location!r}.")
        if not file.is_file():
            raise Rejected(
                f"{path.name} keeps its weights in {location!r}, which is not beside it.",
                f"Copy {location} into {path.resolve().parent} as well.",
            )
        if (told.offset or 0) + (told.length or _bytes_of(tensor)) > file.stat().st_size:
            raise Rejected(f"{location} is shorter than {path.name} says.", "Copy it again.")
        found.add(file)
    return found


def _bytes_of(tensor: onnx.TensorProto) -> int:
    """How long its data must be where that is not said; 0 for types of less than a byte."""
    return int(math.prod(tensor.dims)) * _WIDTHS.get(tensor.data_type, 0)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for one in _graphs(graph):
        yield from one.node


def _initialisers(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for one in _graphs(graph):
        yield from one.initializer
        for node in one.node:
            yield from (a.t for a in node.attribute if node.op_type == "Constant" and a.HasField("t"))


def _port(value: onnx.ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim)
    return Port(value.name, _DTYPES.get(tensor.elem_type, f"type {tensor.elem_type}"), shape)


def _mostly_halves(initialisers: list[onnx.TensorProto]) -> bool:
    weights: Counter[bool] = Counter()
    for tensor in initialisers:
        if tensor.data_type in _FLOATS:
            weights[tensor.data_type in _HALVES] += math.prod(tensor.dims)
    return weights[True] > weights[False]


# --- multiplications


def macs_by_node(model: onnx.ModelProto) -> dict[str, int]:
    """Multiplications of one run, by the name of the node, from the shapes that the model declares."""
    shapes = _shapes(model.graph)
    return {node.name: _macs(node, shapes) for node in model.graph.node}


def _work(model: onnx.ModelProto, sizes: dict[str, int]) -> tuple[int, int]:
    """(multiplications, those that run on integers) of one run. Uses `model` up."""
    _weights_to_inputs(model.graph)
    if model.functions:
        model = inliner.inline_local_functions(model)
    _fix_dimensions(model, sizes)
    with contextlib.suppress(shape_inference.InferenceError):  # then the weights' shapes alone must do
        model = shape_inference.infer_shapes(model, data_prop=True)
    total = quantised = 0
    shapes: dict[str, tuple[int, ...]] = {}
    producers: dict[str, onnx.NodeProto] = {}
    for graph in _graphs(model.graph):
        shapes.update(_shapes(graph))
        producers.update({name: node for node in graph.node for name in node.output})
        for node in graph.node:
            macs = _macs(node, shapes)
            total += macs
            if macs and _runs_on_integers(node, producers):
                quantised += macs
    return total, quantised


def _weights_to_inputs(graph: onnx.GraphProto) -> None:
    """Make large weights inputs with a shape: it is all that shape inference needs of them."""
    kept = []
    inputs = {value.name for value in graph.input}
    for tensor in graph.initializer:
        external = external_data_helper.uses_external_data(tensor)
        if math.prod(tensor.dims) <= _BIG and not external:
            kept.append(tensor)
        elif tensor.name not in inputs:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            graph.input.append(value)
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _fix_dimensions(model: onnx.ModelProto, sizes: dict[str, int]) -> None:
    """Give every open dimension of an input a length: what `sizes` says, else 1 for the batch."""
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        for axis, dim in enumerate(dims):
            if not dim.HasField("dim_value"):
                usual = 1 if axis == 0 else 224 if len(dims) == 4 else 64
                dim.dim_value = sizes.get(dim.dim_param, usual)


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    shapes = {t.name: tuple(t.dims) for t in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"):
            shapes[value.name] = tuple(max(d.dim_value, 1) for d in value.type.tensor_type.shape.dim)
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    shapes[node.output[0]] = tuple(attribute.t.dims)
    return shapes


def _macs(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    if node.op_type in _CONVOLUTIONS:
        data, weights = (shapes.get(node.input[i]) for i in _CONVOLUTIONS[node.op_type])
        if not weights:
            return 0
        where = data if node.op_type == "ConvTranspose" else shapes.get(node.output[0])
        return math.prod(weights) * math.prod((where or ())[2:])
    if node.op_type in _PRODUCTS:
        a, b = (shapes.get(node.input[i]) for i in _PRODUCTS[node.op_type])
        out = shapes.get(node.output[0])
        if out and a:
            transposed = any(x.name == "transA" and x.i for x in node.attribute)
            return math.prod(out) * a[0 if transposed else -1]
        return math.prod(b) if b else 0
    if node.op_type in _RECURRENT:
        steps = (shapes.get(node.input[0]) or (1,))[0]
        return steps * sum(math.prod(shapes.get(name, (0,))) for name in node.input[1:3])
    return 0


def _runs_on_integers(node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto]) -> bool:
    """An integer operator, or one with Dequantize on both sides, which ONNX Runtime fuses into one."""
    if node.op_type in _INTEGER:
        return True
    positions = _CONVOLUTIONS.get(node.op_type) or _PRODUCTS.get(node.op_type)
    return positions is not None and all(_dequantised(node.input[i], producers) for i in positions)


def _dequantised(name: str, producers: Mapping[str, onnx.NodeProto]) -> bool:
    node = producers.get(name)
    while node is not None and node.op_type in _LAYOUT_ONLY:
        node = producers.get(node.input[0])
    return node is not None and node.op_type == "DequantizeLinear"
