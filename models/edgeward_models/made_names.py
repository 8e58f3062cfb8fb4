"""Names of tensors that ONNX Runtime made up when it saved an optimised graph.

It gives some of them fixed names (`gemm_input_shape`), and the next session that fuses the like once more
fails on them: "Attempt to replace the existing tensor" (seen in 1.23 and 1.32).
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from edgeward_models.graph import all_graphs

MADE_UP = "optimised/"


def set_apart(model: onnx.ModelProto, before: onnx.ModelProto) -> None:
    """Rename, in place, all tensors of a saved graph that the graph before did not have.

    Inputs and outputs keep their names: they are the same in both.
    """
    old = {name for graph in all_graphs(before.graph) for name in _names(graph)}

    def new(name: str) -> str:
        if not name or name in old:
            return name
        apart = f"{MADE_UP}{name}"
        while apart in old:  # one of an earlier time
            apart = f"{MADE_UP}{apart}"
        return apart

    for graph in all_graphs(model.graph):
        for named in (*graph.initializer, *graph.value_info):
            named.name = new(named.name)
        for node in graph.node:
            node.input[:] = [new(name) for name in node.input]
            node.output[:] = [new(name) for name in node.output]


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (value.name for value in [*graph.input, *graph.output])
    yield from (tensor.name for tensor in graph.initializer)
    for node in graph.node:
        yield from node.output
