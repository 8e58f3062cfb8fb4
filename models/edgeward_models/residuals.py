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

    `products` are the names of the quantised nodes. Where both branches end in one, the later is the one that
    is fused.
    """
    makers = {name: (k, node) for k, node in enumerate(model.graph.node) for name in node.output}
    kind = TensorProto.UINT8 if scheme.activations == "u8" else TensorProto.INT8
    for node in [node for node in model.graph.node if node.op_type == "Add"]:
        branches = [(*makers[name], port) for port, name in enumerate(node.input) if name in makers]
        if len(branches) < 2 or not any(maker.name in products for _, maker, _ in branches):
            continue
        fused = max(branches, key=lambda branch: (branch[1].name in products, branch[0]))
        port = 1 - fused[2]
        tensor = node.input[port]
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
