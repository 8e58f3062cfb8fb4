"""What the ports of a graph look like, from their names, types and shapes alone. Pure.

Whoever acts on such a guess says so in a note: a wrong one must be seen before it is deployed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from edgeward_runtime.onnx_file import Facts
from edgeward_runtime.sessions import Port

_CLASSIFIERS = frozenset({"TreeEnsembleClassifier", "LinearClassifier", "SVMClassifier"})
_REGRESSORS = frozenset({"TreeEnsembleRegressor", "LinearRegressor", "SVMRegressor"})


def layout(port: Port) -> Literal["nchw", "nhwc"] | None:
    """The layout of what looks like one picture: four dimensions, one of them 1 or 3 channels."""
    shape = port.shape
    if len(shape) != 4 or port.dtype not in ("float32", "float16", "uint8"):
        return None
    if isinstance(shape[0], int) and shape[0] != 1:
        return None
    if shape[1] in (1, 3):
        return "nchw"
    return "nhwc" if shape[3] in (1, 3) else None


def carried_states(inputs: Sequence[Port], outputs: Sequence[Port]) -> dict[str, str]:
    """Inputs that look like state, and the outputs that look like what it becomes.

    By name (state and stateN, h and hn, c and c_out, mem and new_mem), if type and shape agree.
    """
    found: dict[str, str] = {}
    by_name = {port.name.lower(): port for port in outputs}
    for port in inputs:
        name = port.name.lower()
        stem = re.sub(r"[_.]?in$", "", name) or name
        endings = [f"{stem}{end}" for end in ("n", "_n", "out", "_out", ".out", "_new", "_next")]
        for wanted in (*endings, f"new_{stem}", f"next_{stem}", f"out_{stem}", f"present_{stem}"):
            other = by_name.get(wanted)
            if other is not None and other.name not in found.values() and same_kind(port, other):
                found[port.name] = other.name
                break
    return found


def same_kind(one: Port, other: Port) -> bool:
    """Whether a value of the one can be fed to the other: type, rank, and the dimensions that both know."""
    return (
        one.dtype == other.dtype
        and len(one.shape) == len(other.shape)
        and all(
            a == b
            for a, b in zip(one.shape, other.shape, strict=True)
            if isinstance(a, int) and isinstance(b, int)
        )
    )


def scores(outputs: Sequence[Port]) -> Port:
    """The output that holds the scores: the first of floats (scikit-learn's first is the label)."""
    return next((port for port in outputs if port.dtype.startswith("float")), outputs[0])


def classical(facts: Facts) -> Literal["classification", "tensor"] | None:
    """What a graph of scikit-learn's kind is for: a classifier's scores, or a regressor's numbers."""
    operators = {node.op for node in facts.nodes}
    if operators & _CLASSIFIERS:
        return "classification"
    return "tensor" if operators & _REGRESSORS else None
