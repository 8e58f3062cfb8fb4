"""Integer operators written out: QLinearConv, QLinearMatMul and QGemm as float ones between conversions.

Both ways of writing a quantised graph say the same: what reads graphs (pairsafe.py, saturation.py) then has
one to read. Invariant: names of nodes, and of all tensors that were there, stay; outputs stay but for a
rounding that lies on the edge. An operator whose weights or numbers are not constant stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper


@dataclass(frozen=True)
class _Ports:
    """Where an operator has its inputs; each of data, weights and result is followed by scale and zero."""

    op: str
    weights: int
    bias: int
    result: int


_PORTS = {
    "QLinearConv": _Ports("Conv", 3, 8, 6),
    "QLinearMatMul": _Ports("MatMul", 3, -1, 6),
    "QGemm": _Ports("Gemm", 3, 6, 7),
}


def unfold(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model itself, its integer operators written out in place."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        ports = _PORTS.get(node.op_type)
        nodes += [node] if ports is None else _written_out(model, constants, node, ports)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _written_out(
    model: onnx.ModelProto, constants: dict[str, onnx.TensorProto], node: onnx.NodeProto, ports: _Ports
) -> list[onnx.NodeProto]:
    data, weights = list(node.input[0:3]), list(node.input[ports.weights : ports.weights + 3])
    result = list(node.input[ports.result : ports.result + 2])
    if any(name not in constants for name in (*data[1:], *weights)):
        return [node]
    stem = node.name or node.output[0]
    axis = _axis(constants, node, ports)
    made = [
        helper.make_node("DequantizeLinear", data, [f"{stem}/data"]),
        helper.make_node("DequantizeLinear", weights, [f"{stem}/weights"], axis=axis),
    ]
    inputs = [f"{stem}/data", f"{stem}/weights"]
    bias = node.input[ports.bias] if 0 <= ports.bias < len(node.input) else ""
    if bias:
        unit = _numbers(constants, data[1]) * _numbers(constants, weights[1])
        scale = numpy_helper.from_array(unit.astype(np.float32), f"{stem}/unit")
        model.graph.initializer.append(scale)
        made.append(helper.make_node("DequantizeLinear", [bias, scale.name], [f"{stem}/bias"], axis=0))
        inputs.append(f"{stem}/bias")
    float_result = len(result) < 2 or not result[1]  # QGemm without: a float result
    output = node.output[0] if float_result else f"{stem}/result"
    product = helper.make_node(ports.op, inputs, [output], name=node.name)
    product.attribute.extend(node.attribute)
    made.append(product)
    if not float_result:
        made.append(helper.make_node("QuantizeLinear", [output, *result], list(node.output)))
    return made


def _axis(constants: dict[str, onnx.TensorProto], node: onnx.NodeProto, ports: _Ports) -> int | None:
    """Along which the weights have a scale for each channel; None: they have one for all."""
    if _numbers(constants, node.input[ports.weights + 1]).size == 1:
        return None
    if ports.op == "Conv" or any(a.name == "transB" and a.i for a in node.attribute):
        return 0
    return len(constants[node.input[ports.weights]].dims) - 1


def _numbers(constants: dict[str, onnx.TensorProto], name: str) -> np.ndarray:
    """A scale: one number, or one for each channel."""
    value = np.asarray(numpy_helper.to_array(constants[name]))
    return value.reshape(-1) if value.size > 1 else value.reshape(())
