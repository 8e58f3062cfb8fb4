"""The few facts of an ONNX file that ONNX Runtime does not tell, read without the onnx package.

A small reader of the protocol buffers' wire format (onnx.proto3, field numbers beside each use) that
skips what it does not need. Invariant: whatever the bytes are, the answer is `Facts` or `Rejected`.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import MAX_BLOB_BYTES, Precision

_MAX_NODES = 200_000
_MAX_METADATA_BYTES = 1 << 20
_FLOAT16 = 10
_QUANTISED = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "QLinearConv",
        "QLinearMatMul",
        "ConvInteger",
        "MatMulInteger",
    }
)
_PASSING = frozenset(
    {"Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "QuantizeLinear", "DequantizeLinear"}
)
"""Operators that leave probabilities what they are."""

_View = memoryview
_Field = tuple[int, "int | memoryview"]


@dataclass(frozen=True)
class Node:
    """One operator of the graph."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """What the file says of itself."""

    opset: int
    producer: str
    nodes: tuple[Node, ...]
    precision: Precision
    metadata: dict[str, str] = field(default_factory=dict)

    def producer_of(self, output: str) -> str:
        """The operator whose values `output` carries, past those that only pass them on; "" if unknown."""
        made = {name: node for node in self.nodes for name in node.outputs}
        for _ in range(len(made) + 1):
            node = made.get(output)
            if node is None:
                return ""
            if node.op not in _PASSING or not node.inputs:
                return node.op
            output = node.inputs[0]
        return ""


def read_facts(path: Path) -> Facts:
    """Read the facts of one file.

    Raises:
        Unavailable: the file cannot be read.
        Rejected: it is not ONNX, or keeps its weights in other files.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise Rejected(f"{path} is not a file.", "Name an ONNX file.")
        if not 0 < size <= MAX_BLOB_BYTES:
            raise _not_onnx(path, "it is empty" if not size else "it is too large")
        with path.open("rb") as file:
            # Not closed by hand: a traceback may still hold a view; the last of them lets the pages go.
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return _facts(path, view)
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from error


def _facts(path: Path, view: _View) -> Facts:
    try:
        return _model(path, view)
    except (_Malformed, UnicodeDecodeError, RecursionError) as error:
        reason = str(error) if isinstance(error, _Malformed) else "its text is not UTF-8"
        raise _not_onnx(path, reason) from None


def _not_onnx(path: Path, why: str) -> Rejected:
    return Rejected(
        f"{path.name} is not an ONNX file: {why}.", "Export the model to ONNX and name the .onnx file."
    )


class _Malformed(Exception):
    """The bytes do not follow the format."""


def _model(path: Path, view: _View) -> Facts:  # ModelProto
    metadata: dict[str, str] = {}
    opset, producer, graph = 0, "", None
    for number, value in _fields(view):
        if number == 2:
            producer = _text(value)
        elif number == 7:
            graph = _bytes(value)
        elif number == 8:  # OperatorSetIdProto: domain 1, version 2
            entry = dict(_fields(_bytes(value)))
            if not entry.get(1, b""):
                opset = max(opset, _int(entry.get(2, 0)))
        elif number == 14:  # StringStringEntryProto: key 1, value 2
            entry = dict(_fields(_bytes(value)))
            text = _bytes(entry.get(2, _EMPTY))
            if len(text) <= _MAX_METADATA_BYTES and len(metadata) < 256:
                metadata[_text(entry.get(1, _EMPTY))] = _text(text)
    if graph is None or opset < 1:
        raise _Malformed("it has no graph" if graph is None else "it names no operator set")
    nodes, half, full = _graph(path, graph)
    if any(node.op in _QUANTISED for node in nodes):
        precision: Precision = "int8"
    else:
        precision = "fp16" if half > full else "fp32"
    return Facts(opset, producer, nodes, precision, metadata)


def _graph(path: Path, view: _View) -> tuple[tuple[Node, ...], int, int]:  # GraphProto
    nodes: list[Node] = []
    half = full = 0
    for number, value in _fields(view):
        if number == 1:
            nodes.append(_node(_bytes(value)))
            if len(nodes) > _MAX_NODES:
                raise _Malformed(f"it has more than {_MAX_NODES} operators")
        elif number == 5:  # TensorProto: data_type 2, data_location 14
            tensor = _bytes(value)
            kind = 0
            for part, content in _fields(tensor):
                kind = _int(content) if part == 2 else kind
                if part == 14 and content == 1:
                    raise Rejected(
                        f"{path.name} keeps its weights in other files.",
                        "Save it again as one file (onnx.save with save_as_external_data=False).",
                    )
            half, full = half + len(tensor) * (kind == _FLOAT16), full + len(tensor) * (kind == 1)
    return tuple(nodes), half, full


def _node(view: _View) -> Node:  # NodeProto
    op, inputs, outputs = "", [], []
    for number, value in _fields(view):
        if number == 1:
            inputs.append(_text(value))
        elif number == 2:
            outputs.append(_text(value))
        elif number == 4:
            op = _text(value)
    return Node(op, tuple(inputs), tuple(outputs))


_EMPTY = memoryview(b"")


def _fields(view: _View) -> Iterator[_Field]:
    """Each (field number, integer or bytes); numbers of fixed width are skipped."""
    at, end = 0, len(view)
    while at < end:
        tag, at = _varint(view, at)
        number, wire = tag >> 3, tag & 7
        if not number:
            raise _Malformed("its first bytes are something else")
        if wire == 0:
            value, at = _varint(view, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(view, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise _Malformed("its first bytes are something else")
        if at + length > end:
            raise _Malformed("it is cut short")
        if wire == 2:
            yield number, view[at : at + length]
        at += length


def _varint(view: _View, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(view) and shift < 70:
        byte = view[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise _Malformed("it is cut short")


def _bytes(value: int | memoryview | bytes) -> _View:
    if isinstance(value, int):
        raise _Malformed("a field has the wrong type")
    return memoryview(value)


def _text(value: int | memoryview | bytes) -> str:
    return bytes(_bytes(value)).decode()


def _int(value: int | memoryview | bytes) -> int:
    if not isinstance(value, int):
        raise _Malformed("a field has the wrong type")
    return value
