"""Concrete shapes and constant tensors of a contract's ports."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeward_wire.contract import Contract, InputPort
from edgeward_wire.errors import Rejected

MAX_ELEMENTS = 1 << 28


def shape_of(contract: Contract, port: InputPort) -> tuple[int, ...]:
    """The port's shape with each named dimension at its default. Raises Rejected when it is huge."""
    shape = tuple(contract.dimensions[d].default if isinstance(d, str) else d for d in port.shape)
    if math.prod(shape) > MAX_ELEMENTS:
        raise Rejected(f"Input {port.name} has {math.prod(shape)} numbers; at most {MAX_ELEMENTS} are fed.")
    return shape


def sources(contract: Contract) -> list[InputPort]:
    """The inputs that a source feeds, in the graph's order."""
    return [port for port in contract.inputs if port.bind == "source"]


def constants(contract: Contract) -> dict[str, npt.NDArray[Any]]:
    """The tensors of the inputs bound to `const`: as many values as the shape takes, or one for all."""
    found: dict[str, npt.NDArray[Any]] = {}
    for port in contract.inputs:
        if port.const is None:
            continue
        shape = shape_of(contract, port)
        if len(port.const) not in (1, math.prod(shape)):
            raise Rejected(f"Input {port.name} has {len(port.const)} constants for the shape {shape}.")
        values = np.asarray(port.const, dtype=np.dtype(port.dtype))
        found[port.name] = np.ascontiguousarray(
            np.broadcast_to(values, shape) if values.size == 1 else values.reshape(shape)
        )
    return found
