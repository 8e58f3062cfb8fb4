"""The Open Inference Protocol v2: requests read against a contract, answers written. Pure.

Bodies come from anybody: every length, shape and number is checked before memory is taken for it.
Invariant: no step on a flat list, which is what clients send, holds the interpreter lock for long: numbers
are read in blocks of `_BLOCK` bytes, so that a health check gets its turn beside eight bodies of megabytes.
(The other way, `json.loads` of one 224 x 224 tensor, holds it for 58 ms.) Every look at a body takes time
in proportion to its length, whatever it holds.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic_core import from_json, to_json

from edgeward_agent.serving.faults import Fault
from edgeward_wire.contract import Contract, InputPort, OutputPort

MAX_HEADER = 64 << 10
"""Of the JSON before binary tensors."""
MAX_DIMENSIONS = 8
_BLOCK = 32 << 10
_PLACE = f"@{secrets.token_hex(8)}:"
_LIST = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*\[')
_NAMES = {
    "float32": "FP32",
    "float16": "FP16",
    "uint8": "UINT8",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
}

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Asked:
    """One request: inputs by name, and which outputs are wanted, each in binary or not."""

    id: str
    inputs: dict[str, Array]
    outputs: dict[str, bool]


def metadata(name: str, version: str, contract: Contract) -> dict[str, Any]:
    """What `/v2/models/NAME` says: the inputs that a client gives, and the results."""
    fed = [port for port in contract.inputs if port.bind == "source"]
    return {
        "name": name,
        "versions": [version],
        "platform": "onnx",
        "inputs": [_described(port, contract) for port in fed],
        "outputs": [_described(port, contract) for port in contract.results],
    }


def _described(port: InputPort | OutputPort, contract: Contract) -> dict[str, Any]:
    shape = [side if isinstance(side, int) else _fixed(contract, side) for side in port.shape]
    return {"name": port.name, "datatype": _NAMES[port.dtype], "shape": shape}


def _fixed(contract: Contract, side: str) -> int:
    known = contract.dimensions.get(side)
    return known.default if known is not None and known.min == known.max else -1


# --- requests


def read(body: bytes, header_length: int | None, contract: Contract) -> Asked:
    """A request's body. Raises Fault (400)."""
    whole = memoryview(body)
    spans: list[tuple[int, int]] = []
    if header_length is None:
        text, held = _without_numbers(body, spans), _Body(body, spans, memoryview(b""))
    else:
        if not 0 < header_length <= min(len(body), MAX_HEADER):
            raise Fault(400, f"Inference-Header-Content-Length is {header_length}, which cannot be.")
        text, held = bytes(whole[:header_length]), _Body(body, spans, whole[header_length:])
    said = _json(text)
    if not isinstance(said, dict) or not isinstance(said.get("inputs"), list):
        raise Fault(400, "The body is not a JSON object with `inputs`.")
    number = said.get("id", "")
    if not isinstance(number, str) or len(number) > 256:
        raise Fault(400, "`id` is a text of at most 256 characters.")
    inputs: dict[str, Array] = {}
    for one in said["inputs"]:
        name, array = _input(one, contract, held)
        if name in inputs:
            raise Fault(400, f"Input {name} is there twice.")
        inputs[name] = array
    if len(held.binary):
        raise Fault(400, f"{len(held.binary)} bytes of the body belong to no input.")
    fed = {port.name for port in contract.inputs if port.bind == "source"}
    if missing := sorted(fed - set(inputs)):
        raise Fault(400, f"Input {missing[0]} is missing.")
    return Asked(number, inputs, _outputs(said, contract))


def _json(text: bytes) -> Any:
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise Fault(400, f"The body is not JSON: {str(error)[:120]}.") from None


def _without_numbers(body: bytes, spans: list[tuple[int, int]]) -> bytes:
    """The JSON with each flat list after a "data" key put aside: where they are goes into `spans`.

    `"data"` with its quotes cannot stand inside a text of valid JSON but escaped, so what is cut is a value.
    """
    pieces: list[bytes] = []
    done = end = 0
    for opened in _LIST.finditer(body):
        start = opened.end()
        if end < start:  # else the bracket that was found for one before is the next one still
            end = body.find(b"]", start)
        if end < 0:
            break
        if any(body.find(mark, start, end) >= 0 for mark in (b"[", b"{", b'"')):
            continue  # nested, or texts: read with the rest
        pieces += [body[done : start - 1], f'"{_PLACE}{len(spans)}"'.encode()]
        spans.append((start, end))
        done = end + 1
    return b"".join([*pieces, body[done:]]) if pieces else body


@dataclass
class _Body:
    """What of a body is not the small JSON."""

    whole: bytes
    spans: list[tuple[int, int]]
    """Lists of numbers that were put aside."""
    binary: memoryview
    """Tensors that no input has taken yet."""


def _input(said: Any, contract: Contract, body: _Body) -> tuple[str, Array]:
    """One input."""
    ports = {port.name: port for port in contract.inputs if port.bind == "source"}
    name = said.get("name") if isinstance(said, dict) else None
    port = ports.get(name) if isinstance(name, str) else None
    if port is None:
        known = ", ".join(ports)
        raise Fault(400, f"There is no input {str(name)[:64]!r}; the model takes {known}.")
    wanted = _NAMES[port.dtype]
    if said.get("datatype") != wanted:
        raise Fault(400, f"Input {port.name} is {str(said.get('datatype'))[:16]}, not {wanted}.")
    shape = _shape(port, said.get("shape"), contract)
    dtype, count = np.dtype(port.dtype), math.prod(shape)
    size = _parameters(said).get("binary_data_size")
    if size is not None:
        if "data" in said:
            raise Fault(400, f"Input {port.name} has both data and binary_data_size.")
        if type(size) is not int or size != count * dtype.itemsize or size > len(body.binary):
            raise Fault(
                400,
                f"Input {port.name} of shape {list(shape)} needs {count * dtype.itemsize} bytes;"
                f" binary_data_size is {size}, and {len(body.binary)} bytes follow.",
            )
        array = np.frombuffer(body.binary[:size], dtype.newbyteorder("<"))
        body.binary = body.binary[size:]
    else:
        array = _numbers(port.name, said.get("data"), dtype, count, body)
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise Fault(400, f"Input {port.name} holds a number that is not finite.")
    if dtype.kind == "b":
        array = array.view(np.uint8) != 0
    return port.name, array.reshape(shape)


def _parameters(said: Mapping[str, Any]) -> Mapping[str, Any]:
    found = said.get("parameters", {})
    if not isinstance(found, dict):
        raise Fault(400, "`parameters` is an object.")
    return found


def _shape(port: InputPort, said: Any, contract: Contract) -> tuple[int, ...]:
    """The shape of a request, if the contract allows it."""
    wanted = [
        str(side)
        if isinstance(side, int)
        else f"{contract.dimensions[side].min}..{contract.dimensions[side].max}"
        for side in port.shape
    ]
    if (
        not isinstance(said, list)
        or len(said) != len(port.shape)
        or not all(isinstance(side, int) and not isinstance(side, bool) for side in said)
        or not all(_fits(side, port_side, contract) for side, port_side in zip(said, port.shape, strict=True))
    ):
        shown = str(said)[:64]
        raise Fault(400, f"Input {port.name} has the shape {shown}, not [{', '.join(wanted)}].")
    return tuple(said)


def _fits(side: int, port_side: int | str, contract: Contract) -> bool:
    if isinstance(port_side, int):
        return side == port_side
    known = contract.dimensions[port_side]
    return known.min <= side <= known.max


def _numbers(name: str, said: Any, dtype: np.dtype[Any], count: int, body: _Body) -> Array:
    """The numbers of a JSON tensor, flat."""
    if isinstance(said, str) and said.startswith(_PLACE):
        start, end = body.spans[int(said.removeprefix(_PLACE))]
        if 2 * count - 1 > end - start:  # a digit and a comma each: no memory for what cannot be there
            raise Fault(400, f"Input {name} has fewer than {count} numbers.")
        out, at = np.empty(count, dtype), 0
        for block in _blocks(body.whole, start, end):
            at = _put(name, _json(b"[" + block + b"]"), out, at)
    elif isinstance(said, list):
        flat = _flat(said, count)
        out, at = np.empty(len(flat), dtype), 0
        for k in range(0, len(flat), _BLOCK >> 3):
            at = _put(name, flat[k : k + (_BLOCK >> 3)], out, at)
    else:
        raise Fault(400, f"Input {name} has neither data nor binary_data_size.")
    if at != count or out.size != count:
        raise Fault(400, f"Input {name} has {at} numbers, and its shape {count}.")
    return out


def _blocks(body: bytes, start: int, end: int) -> Iterator[bytes]:
    """A list's text in parts that are lists."""
    while start < end:
        cut = end if end - start <= _BLOCK else body.find(b",", start + _BLOCK, end)
        cut = end if cut < 0 else cut
        yield body[start:cut]
        start = cut + 1


def _put(name: str, values: list[Any], out: Array, at: int) -> int:
    """Write values where they belong; returns where the next go."""
    if at + len(values) > out.size:
        raise Fault(400, f"Input {name} has more than {out.size} numbers.")
    kinds = {bool} if out.dtype.kind == "b" else {int} if out.dtype.kind in "iu" else {int, float}
    if not set(map(type, values)) <= kinds:
        raise Fault(400, f"Input {name} holds something that is no number of its datatype.")
    too_large = Fault(400, f"Input {name} holds a number that its datatype cannot hold.")
    if values and out.dtype.kind in "iu":  # NumPy 1 cuts off what does not fit
        holds = np.iinfo(out.dtype)
        if min(values) < holds.min or max(values) > holds.max:
            raise too_large
    try:
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused as that
            out[at : at + len(values)] = np.array(values, dtype=out.dtype)
    except (OverflowError, ValueError):
        raise too_large from None
    return at + len(values)


def _flat(said: list[Any], most: int) -> list[Any]:
    """Nested lists row by row, as they are; at most a little more than `most` values."""
    for _ in range(MAX_DIMENSIONS):
        if not any(isinstance(one, list) for one in said):
            break
        if not all(isinstance(one, list) for one in said):
            raise Fault(400, "`data` is nested unevenly.")
        said = [inner for one in said for inner in one]
        if len(said) > most:
            break
    return said


def _outputs(said: Mapping[str, Any], contract: Contract) -> dict[str, bool]:
    names = [port.name for port in contract.results]
    every = _parameters(said).get("binary_data_output", False) is True
    listed = said.get("outputs")
    if listed is None:
        return dict.fromkeys(names, every)
    wanted: dict[str, bool] = {}
    for one in listed if isinstance(listed, list) else [None]:
        name = one.get("name") if isinstance(one, dict) else None
        if not isinstance(one, dict) or name not in names:
            raise Fault(400, f"There is no output {str(name)[:64]!r}; the model gives {', '.join(names)}.")
        parameters = _parameters(one)
        if "classification" in parameters:
            raise Fault(400, "The classification extension is not spoken here: POST /predict gives labels.")
        wanted[name] = parameters.get("binary_data", every) is True
    return wanted or dict.fromkeys(names, every)


# --- answers


def write(
    asked: Asked, name: str, version: str, outputs: Mapping[str, Array]
) -> tuple[list[bytes], int | None]:
    """The body of an answer in parts, and the length of its JSON when binary tensors follow. Raises Fault."""
    told, tail = [], []
    for port, array in outputs.items():
        entry: dict[str, Any] = {
            "name": port,
            "datatype": _NAMES[array.dtype.name],
            "shape": list(array.shape),
        }
        if asked.outputs[port]:
            raw = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
            entry["parameters"] = {"binary_data_size": len(raw)}
            tail.append(raw)
        else:
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise Fault(500, f"Output {port} is not finite, which JSON cannot say; ask for binary data.")
            entry["data"] = array.reshape(-1).tolist()
        told.append(entry)
    head: dict[str, Any] = {"model_name": name, "model_version": version, "outputs": told}
    if asked.id:
        head["id"] = asked.id
    text = to_json(head)
    return [text, *tail], len(text) if tail else None
