"""Concrete shapes of a contract's ports, and the tensors that no source feeds: constants and states.

    feeds = {**constants(contract), **states, **what the source gives}
    states = next_states(contract, outputs)          # for the next run; the first has initial_states

Invariant: a state begins at zero, and what a run leaves in it is what the next one is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
        # Not broadcast: that cannot make a scalar of one value.
        found[port.name] = np.full(shape, values[0]) if values.size == 1 else values.reshape(shape)
    return found


def initial_states(contract: Contract) -> dict[str, npt.NDArray[Any]]:
    """Zeros for each input that is bound to a state. Raises Rejected when one is huge."""
    return {
        port.name: np.zeros(shape_of(contract, port), np.dtype(port.dtype))
        for port in contract.inputs
        if port.bind.startswith("state:")
    }


def next_states(contract: Contract, outputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """What the next run's state inputs get, from this run's outputs by name; the very arrays, not copies.

    Raises:
        Rejected: an output that the contract binds to a state is not among them.
    """
    written = {port.bind: port.name for port in contract.outputs}
    carried = {}
    for port in contract.inputs:
        if port.bind.startswith("state:"):
            name = written[port.bind]  # the contract has checked that each state is written
            if name not in outputs:
                raise Rejected(f"The file has no output {name!r}, which the contract binds to {port.bind}.")
            carried[port.name] = outputs[name]
    return carried
