"""What is to stay in float does stay in float, whatever ONNX Runtime thinks of it.

When ONNX Runtime loads a file, a convolution or Gemm with float weights between a DequantizeLinear and a
QuantizeLinear (a ReLU or Clip may follow) gets its weights quantised all the same, to 8 bits with one scale
for the whole tensor (WeightBiasQuantization, in 1.23 and 1.32). That undoes what a layer was kept in float
for, and such weights may saturate. It asks that the scale of the data be one number: so we give the layer
a DequantizeLinear of its own with the same number for each channel. The values are the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

_REQUANTISED = ("Conv", "ConvTranspose", "Gemm")
_PASSED = ("Relu", "Clip")


def shield(model: onnx.ModelProto) -> list[str]:
    """Give each float layer that would be quantised scales that keep it from that; in place. Their names."""
    names = requantised(model.graph)
    constants = {t.name: t for t in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in [node for node in model.graph.node if node.name in names]:
        before = makers[node.input[0]]
        channels = _channels(node, constants)
        stem = f"{node.name}/data"
        ports = [before.input[0]]
        for kind, name in zip(("scale", "zero"), before.input[1:], strict=False):
            one = numpy_helper.to_array(constants[name]).reshape(-1)
            vector = numpy_helper.from_array(np.repeat(one, channels), f"{stem}/{kind}")
            model.graph.initializer.append(vector)
            ports.append(vector.name)
        model.graph.node.append(
            helper.make_node("DequantizeLinear", ports, [stem], f"{stem}/dequantise", axis=1)
        )
        node.input[0] = stem
    return sorted(names)


def requantised(graph: onnx.GraphProto) -> set[str]:
    """Names of the nodes with constant float weights that ONNX Runtime quantises when it loads the graph."""
    constants = {t.name: t for t in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}

    def reaches_codes(node: onnx.NodeProto) -> bool:
        following = readers.get(node.output[0], [])
        if len(following) != 1 or node.output[0] in outputs:
            return False
        return following[0].op_type == "QuantizeLinear" or (
            following[0].op_type in _PASSED and reaches_codes(following[0])
        )

    def comes_from_codes(node: onnx.NodeProto) -> bool:
        before = makers.get(node.input[0])
        if before is None or before.op_type != "DequantizeLinear":
            return False
        scale = constants.get(before.input[1])
        return scale is not None and int(np.prod(scale.dims)) == 1

    return {
        node.name
        for node in graph.node
        if node.op_type in _REQUANTISED
        and (tensor := constants.get(node.input[1])) is not None
        and tensor.data_type == onnx.TensorProto.FLOAT
        and comes_from_codes(node)
        and reaches_codes(node)
    }


def _channels(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> int:
    """How many channels the data have that a layer reads (axis 1 of the data)."""
    shape = constants[node.input[1]].dims
    attributes = {a.name: a.i for a in node.attribute}
    if node.op_type == "Conv":
        return int(shape[1]) * int(attributes.get("group", 1))
    if node.op_type == "ConvTranspose":
        return int(shape[0])
    return int(shape[1] if attributes.get("transB", 0) else shape[0])
