"""Shapes behind ONNX Runtime's own operators: each is replaced by ONNX operators of the same output shape.

Invariant: a twin is for shape inference only; it has the names and shapes of the original, not its values.
An operator that has no twin stays, and what follows it is simply not known.
(Operators: the runtime's ContribOperators document, domains com.microsoft and com.microsoft.nchwc.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_SAME_AS_FIRST = frozenset(
    {
        *("Gelu", "FastGelu", "BiasGelu", "QuickGelu", "BiasAdd", "BiasDropout", "GroupNorm", "Inverse"),
        *("QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "RotaryEmbedding", "MultiHeadAttention"),
        *("SkipLayerNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"),
    }
)
_BROADCAST = {"QLinearAdd": "Add", "QLinearMul": "Mul"}
_POOLS = {"QLinearAveragePool": "AveragePool", "QLinearGlobalAveragePool": "GlobalAveragePool"}
_CONVOLUTION_ATTRIBUTES = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def standard_twin(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose top-level nodes are ONNX's, as far as there are twins."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    del twin.graph.node[:]
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    for value in model.graph.input:  # large weights, in a skeleton
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    made = _Made(twin.graph, shapes)
    for node in model.graph.node:
        rule = _RULES.get((node.domain, node.op_type))
        if rule is None:
            twin.graph.node.append(node)
        else:
            rule(node, made)
    return twin


@dataclass
class _Made:
    """The twin on its way."""

    graph: onnx.GraphProto
    shapes: dict[str, tuple[int, ...]]
    """Of weights."""
    _constants: dict[tuple[int, ...], str] = field(default_factory=dict)

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        self.graph.node.append(helper.make_node(op, list(inputs), [output], **attributes))

    def indices(self, *values: int) -> str:
        """A constant of int64."""
        if values not in self._constants:
            name = f"edgeward/twin/{len(self._constants)}"
            self.graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.int64), name))
            self._constants[values] = name
        return self._constants[values]

    def tensor(self, name: str, shape: Sequence[int]) -> str:
        """Something of this shape that needs no values."""
        self.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))
        return name


Rule = Callable[[onnx.NodeProto, _Made], None]


def _same_as_first(node: onnx.NodeProto, made: _Made) -> None:
    made.node("Identity", node.input[:1], node.output[0])
    if node.op_type.startswith("Skip") and len(node.output) > 3 and node.output[3]:
        made.node("Identity", node.input[:1], node.output[3])  # the sum before the normalisation


def _convolution(node: onnx.NodeProto, made: _Made) -> None:
    made.node("Conv", node.input[:2], node.output[0], **_attributes(node, _CONVOLUTION_ATTRIBUTES))


def _quantised_convolution(node: onnx.NodeProto, made: _Made) -> None:
    if _attributes(node, ("channels_last",)).get("channels_last"):
        made.graph.node.append(node)  # no twin: ONNX has no such layout
        return
    made.node(
        "Conv", [node.input[0], node.input[3]], node.output[0], **_attributes(node, _CONVOLUTION_ATTRIBUTES)
    )


def _pool(node: onnx.NodeProto, made: _Made) -> None:
    attributes = _attributes(node, tuple(a.name for a in node.attribute if a.name != "channels_last"))
    made.node(_POOLS.get(node.op_type, node.op_type), node.input[:1], node.output[0], **attributes)


def _broadcast(node: onnx.NodeProto, made: _Made) -> None:
    made.node(_BROADCAST[node.op_type], [node.input[0], node.input[3]], node.output[0])


def _matmul(node: onnx.NodeProto, made: _Made) -> None:
    how = _attributes(node, ("transA", "transB", "transBatchA", "transBatchB"))
    if how.get("transBatchA") or how.get("transBatchB"):
        made.graph.node.append(node)
        return
    a, b = "ki" if how.get("transA") else "ik", "jk" if how.get("transB") else "kj"
    made.node("Einsum", node.input[:2], node.output[0], equation=f"...{a},...{b}->...ij")


def _quantised_matmul(node: onnx.NodeProto, made: _Made) -> None:
    made.node("MatMul", node.input[:2], node.output[0])


def _gemm(node: onnx.NodeProto, made: _Made) -> None:
    weights = node.input[3] if node.op_type == "QGemm" else node.input[1]
    made.node("Gemm", [node.input[0], weights], node.output[0], **_attributes(node, ("transA", "transB")))


def _attention(node: onnx.NodeProto, made: _Made) -> None:
    """(batch, steps, width) x (width, q + k + v) -> (batch, steps, v)."""
    weights = made.shapes.get(node.input[1])
    if not weights or len(weights) != 2:
        made.graph.node.append(node)
        return
    sizes = _attributes(node, ("qkv_hidden_sizes",)).get("qkv_hidden_sizes")
    width = sizes[2] if sizes else weights[1] // 3
    value = made.tensor(f"{node.output[0]}/edgeward/twin", (weights[0], width))
    made.node("MatMul", [node.input[0], value], node.output[0])


def _reorder_output(node: onnx.NodeProto, made: _Made) -> None:
    """From blocks of channels back to as many as there are."""
    how = _attributes(node, ("channels", "channels_last"))
    if how.get("channels_last") or "channels" not in how:
        made.graph.node.append(node)
        return
    ends = [made.indices(0), made.indices(how["channels"]), made.indices(1)]
    made.node("Slice", [node.input[0], *ends], node.output[0])


def _reorder_input(node: onnx.NodeProto, made: _Made) -> None:
    made.node("Identity", node.input[:1], node.output[0])


_RULES: dict[tuple[str, str], Rule] = {
    **{("com.microsoft", op): _same_as_first for op in _SAME_AS_FIRST},
    **{("", op): _same_as_first for op in ("SimplifiedLayerNormalization",)},
    **{("com.microsoft", op): _same_as_first for op in ("QuantizeLinear", "DequantizeLinear")},
    **{("com.microsoft", op): _broadcast for op in _BROADCAST},
    **{("com.microsoft", op): _pool for op in _POOLS},
    **{
        ("com.microsoft.nchwc", op): _pool
        for op in ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
    },
    ("com.microsoft", "FusedConv"): _convolution,
    ("com.microsoft.nchwc", "Conv"): _convolution,
    ("com.microsoft.nchwc", "ReorderInput"): _reorder_input,
    ("com.microsoft.nchwc", "ReorderOutput"): _reorder_output,
    ("com.microsoft", "QLinearConv"): _quantised_convolution,
    ("com.microsoft", "FusedMatMul"): _matmul,
    ("com.microsoft", "DynamicQuantizeMatMul"): _quantised_matmul,
    ("com.microsoft", "MatMulIntegerToFloat"): _quantised_matmul,
    ("com.microsoft", "FusedGemm"): _gemm,
    ("com.microsoft", "QGemm"): _gemm,
    ("com.microsoft", "Attention"): _attention,
}


def _attributes(node: onnx.NodeProto, names: Sequence[str]) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name in names}
