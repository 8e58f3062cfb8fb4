"""Small graphs with the patterns that exporters write: a convolutional block, an attention block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = Sequence[int | str]


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape],
    weights: Mapping[str, np.ndarray],
    opset: int = 17,
) -> onnx.ModelProto:
    """A float32 model of these parts."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(s)) for name, s in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(s)) for name, s in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports)
    model.ir_version = 8
    return model


def save(path: Path, model: onnx.ModelProto) -> Path:
    """Its file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def convolution_block(size: int = 8, channels: int = 8, seed: int = 0) -> onnx.ModelProto:
    """image (1, 3, size, size) -> Conv, BatchNormalization, Relu, GlobalAveragePool, Flatten -> scores."""
    rng = np.random.default_rng(seed)
    weights = {
        "w": rng.standard_normal((channels, 3, 3, 3)).astype(np.float32) * 0.2,
        "scale": rng.uniform(0.5, 2, channels).astype(np.float32),
        "shift": rng.standard_normal(channels).astype(np.float32),
        "mean": rng.standard_normal(channels).astype(np.float32),
        "var": rng.uniform(0.5, 2, channels).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["n"], name="bn"),
        helper.make_node("Relu", ["n"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["scores"], name="flatten"),
    ]
    return model_of(nodes, {"image": [1, 3, size, size]}, {"scores": [1, channels]}, weights)


def attention_block(
    steps: int = 8, width: int = 16, heads: int = 2, opset: int = 17, seed: int = 0, normed: bool = False
) -> onnx.ModelProto:
    """x (1, steps, width) -> self-attention, sum, LayerNorm, GELU: written out as PyTorch's exporter does.

    `normed` puts another LayerNorm before it, where a network's next block would have one.
    """
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {
        "heads": np.array([1, steps, heads, width // heads], np.int64),
        "back": np.array([1, steps, width], np.int64),
        "root": np.float32((width // heads) ** 0.5),
    }
    nodes: list[onnx.NodeProto] = []

    def op(kind: str, *inputs: str, out: str, **how: object) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [out], name=f"{kind}_{out}", **how))
        return out

    def linear(source: str, name: str) -> str:
        weights[f"{name}.w"] = rng.standard_normal((width, width)).astype(np.float32) / width**0.5
        weights[f"{name}.b"] = rng.standard_normal(width).astype(np.float32) * 0.1
        return op("Add", f"{name}.b", op("MatMul", source, f"{name}.w", out=f"{name}.m"), out=name)

    source = _layer_norm("x", "first.", width, weights, op, opset) if normed else "x"

    def split(name: str, perm: list[int]) -> str:
        reshaped = op("Reshape", linear(source, name), "heads", out=f"{name}.r")
        return op("Transpose", reshaped, out=f"{name}.t", perm=perm)

    query, key, value = split("q", [0, 2, 1, 3]), split("k", [0, 2, 3, 1]), split("v", [0, 2, 1, 3])
    scaled = op("Div", op("MatMul", query, key, out="qk"), "root", out="scaled")
    mixed = op("MatMul", op("Softmax", scaled, out="share", axis=-1), value, out="mixed")
    joined = op("Reshape", op("Transpose", mixed, out="mixed.t", perm=[0, 2, 1, 3]), "back", out="joined")
    total = op("Add", source, linear(joined, "o"), out="total")
    _gelu(linear(_layer_norm(total, "", width, weights, op, opset), "f"), weights, op)
    return model_of(nodes, {"x": [1, steps, width]}, {"y": [1, steps, width]}, weights, opset)


def _layer_norm(source: str, mark: str, width: int, weights: dict, op: object, opset: int) -> str:
    gain, shift = f"{mark}gain", f"{mark}shift"
    weights[gain], weights[shift] = np.full(width, 1.25, np.float32), np.full(width, 0.5, np.float32)
    assert callable(op)
    if opset >= 17:
        return str(op("LayerNormalization", source, gain, shift, out=f"{mark}normed", axis=-1, epsilon=1e-5))
    weights["two"], weights["epsilon"] = np.float32(2), np.float32(1e-5)
    centred = op("Sub", source, op("ReduceMean", source, out=f"{mark}mean", axes=[-1]), out=f"{mark}centred")
    squared = op("Pow", centred, "two", out=f"{mark}squared")
    variance = op("ReduceMean", squared, out=f"{mark}variance", axes=[-1])
    spread = op("Sqrt", op("Add", variance, "epsilon", out=f"{mark}variance.e"), out=f"{mark}spread")
    unit = op("Div", centred, spread, out=f"{mark}unit")
    return str(op("Add", op("Mul", unit, gain, out=f"{mark}gained"), shift, out=f"{mark}normed"))


def _gelu(source: str, weights: dict, op: object) -> str:
    weights["sqrt2"], weights["one"], weights["half"] = np.float32(2**0.5), np.float32(1), np.float32(0.5)
    assert callable(op)
    erf = op("Erf", op("Div", source, "sqrt2", out="g.d"), out="g.e")
    product = op("Mul", source, op("Add", erf, "one", out="g.a"), out="g.m")
    return str(op("Mul", product, "half", out="y"))
