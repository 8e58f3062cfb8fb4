"""Codes on the shortcut of a residual addition, so that TensorRT fuses convolution, addition and ReLU.

The branch that ends in a product stays in float up to the addition: TensorRT makes one kernel of the product
and the addition, and that kernel reads the other branch in INT8. Pure, but that it changes the graph.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx
from onnx import TensorProto, helper

from edgeward_models.codes import activation_code
from edgeward_models.schemes import Scheme


def quantise_shortcuts(
    model: onnx.ModelProto,
    products: Collection[str],
    scheme: Scheme,
    ranges: Mapping[str, tuple[float, float]],
) -> None:
    """Give each addition to the result of a quantised product a Q/DQ pair on its other input; in place.

    `products` are the names of the quantised nodes. Where both branches end in one, the longer is fused.
    The graph may be in any order.
    """
    depths = _depths(model.graph)
    makers = {name: (depths[name], node) for node in model.graph.node for name in node.output}
    kind = TensorProto.UINT8 if scheme.activations == "u8" else TensorProto.INT8
    for node in [node for node in model.graph.node if node.op_type == "Add"]:
        branches = [(*makers[name], port) for port, name in enumerate(node.input) if name in makers]
        if len(branches) < 2 or not any(maker.name in products for _, maker, _ in branches):
            continue
        fused = max(branches, key=lambda branch: (branch[1].name in products, branch[0]))
        port = 1 - fused[2]
        tensor = _undone(node.input[port], {name: maker for name, (_, maker) in makers.items()})
        if tensor not in ranges:
            continue
        stem = f"{node.name}/shortcut"
        scale, zero = activation_code(ranges[tensor], scheme)
        model.graph.initializer.append(helper.make_tensor(f"{stem}/scale", TensorProto.FLOAT, [], [scale]))
        model.graph.initializer.append(helper.make_tensor(f"{stem}/zero", kind, [], [zero]))
        codes = [f"{stem}/scale", f"{stem}/zero"]
        model.graph.node.extend(
            [
                helper.make_node("QuantizeLinear", [tensor, *codes], [f"{stem}/code"], f"{stem}/quantise"),
                helper.make_node("DequantizeLinear", [f"{stem}/code", *codes], [stem], f"{stem}/dequantise"),
            ]
        )
        node.input[port] = stem


def _undone(tensor: str, makers: Mapping[str, onnx.NodeProto]) -> str:
    """The activation behind a Q/DQ pair, or the tensor itself."""
    after = makers.get(tensor)
    before = makers.get(after.input[0]) if after is not None and after.op_type == "DequantizeLinear" else None
    return str(before.input[0]) if before is not None and before.op_type == "QuantizeLinear" else tensor


def _depths(graph: onnx.GraphProto) -> dict[str, int]:
    """Tensor -> how many nodes lie between it and the inputs, on the longest way."""
    makers = {name: node for node in graph.node for name in node.output}
    depths: dict[str, int] = {}
    waiting = list(makers)
    while waiting:
        name = waiting.pop()
        if name in depths:
            continue
        missing = [i for i in makers[name].input if i in makers and i not in depths]
        if missing:
            waiting += [name, *missing]
        else:
            depths[name] = 1 + max((depths.get(i, 0) for i in makers[name].input), default=0)
    return depths
