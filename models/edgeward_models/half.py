"""What stays in float32 when a graph becomes FP16. Pure: the conversion itself is the quantiser's adapter.

FP16 ends at 65504 and has eleven bits. So three kinds of nodes keep float32: operators without a kernel
for it or whose results overflow; the variance inside a norm that an exporter has taken apart (squares
of large values, and an epsilon that FP16 does not know); and what follows the last weights: a box decoder in
FP16 would round coordinates beyond 512 to half a pixel.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
from onnx import numpy_helper

from edgeward_models.regions import Graph

BLOCKED = (
    "CumSum",
    "Exp",
    "Log",
    "LpNormalization",
    "Max",
    "Min",
    "NonMaxSuppression",
    "RandomNormalLike",
    "RandomUniformLike",
    "Range",
    "ReduceL2",
    "ReduceLogSumExp",
    "ReduceSumSquare",
    "RoiAlign",
    "TopK",
    "Upsample",
)
"""Operators that stay in float32 wherever they stand."""

_MEANS = ("ReduceMean", "GlobalAveragePool")


def float_nodes(graph: Graph, keep_float: Collection[str] = ()) -> list[str]:
    """Names of the nodes that stay in float32, in the graph's order, beside those that `BLOCKED` names."""
    kept = {*keep_float, *graph.tail}
    for node in graph.nodes:
        if _squares(graph, node):
            kept.update(_variance(graph, node))
    return [node.name for node in graph.nodes if node.name in kept]


def join_floats(model: onnx.ModelProto, kept: Collection[str]) -> None:
    """Take out the way through FP16 between two nodes that stay in float32; in place.

    The converter puts a cast behind the one and another before the next, and what lies between them overflows
    and rounds as if neither had been kept. `kept` are the names of the nodes that were.
    """
    graph = model.graph
    wide = {value.name for value in graph.input if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    wide |= {name for n in graph.node if n.op_type in BLOCKED or n.name in kept for name in n.output}
    narrowed = {n.output[0]: n.input[0] for n in graph.node if _casts(n, onnx.TensorProto.FLOAT16)}
    outputs = {value.name for value in graph.output}
    direct: dict[str, str] = {}
    for node in graph.node:
        source = narrowed.get(node.input[0]) if _casts(node, onnx.TensorProto.FLOAT) else None
        if source is None or source not in wide:
            continue
        if node.output[0] in outputs:
            node.input[0] = source  # float to float: a runtime drops it
        else:
            direct[node.output[0]] = source
    for node in graph.node:
        for k, name in enumerate(node.input):
            node.input[k] = direct.get(name, name)
    while unread := _unread(graph):
        for node in unread:
            graph.node.remove(node)


def _unread(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    return [node for node in graph.node if node.op_type == "Cast" and node.output[0] not in read]


def _casts(node: onnx.NodeProto, kind: int) -> bool:
    return node.op_type == "Cast" and any(a.name == "to" and a.i == kind for a in node.attribute)


def _squares(graph: Graph, node: onnx.NodeProto) -> bool:
    if node.op_type == "Mul":
        return len(node.input) == 2 and node.input[0] == node.input[1]
    if node.op_type != "Pow" or node.input[1] not in graph.constants:
        return False
    exponent = numpy_helper.to_array(graph.constants[node.input[1]])
    return bool(exponent.size == 1 and float(exponent.reshape(-1)[0]) == 2.0)


def _variance(graph: Graph, square: onnx.NodeProto) -> set[str]:
    """The nodes from a square over its mean and an epsilon to the root, if that is what it is."""
    chain, node = {square.name}, square
    for wanted in (_MEANS, ("Add",), ("Sqrt",)):
        following = graph.consumers.get(node.output[0], [])
        if len(following) != 1 or following[0].op_type not in wanted:
            return set()
        node = following[0]
        chain.add(node.name)
    return chain
