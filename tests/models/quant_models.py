"""Small float ONNX models for the tests of quantising: the blocks that real networks are made of. Seeded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]


class Net:
    """A graph that grows: each method adds nodes and returns the tensor that they give."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.count = 0

    def constant(self, value: Array) -> str:
        self.count += 1
        name = f"c{self.count}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def op(self, kind: str, *inputs: str, name: str = "", outputs: int = 1, **attributes: Any) -> Any:
        self.count += 1
        name = name or f"{kind.lower()}{self.count}"
        outs = [f"{name}.out{k}" if outputs > 1 else f"{name}.out" for k in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), outs, name=name, **attributes))
        return outs[0] if outputs == 1 else outs

    def conv(
        self, x: str, shape: tuple[int, ...], *, name: str = "", bias: bool = True, **attributes: Any
    ) -> str:
        fan = int(np.prod(shape[1:]))
        weights = self.rng.standard_normal(shape).astype(np.float32) / np.sqrt(fan)
        inputs = [x, self.constant(weights.astype(np.float32))]
        if bias:
            inputs.append(
                self.constant(self.rng.standard_normal(shape[0]).astype(np.float32) * np.float32(0.1))
            )
        pads = [side // 2 for side in shape[2:]] * 2
        return str(self.op("Conv", *inputs, name=name, **{"pads": pads, **attributes}))

    def dense(self, x: str, inputs: int, outputs: int, *, name: str = "") -> str:
        weights = self.rng.standard_normal((outputs, inputs)).astype(np.float32) / np.float32(np.sqrt(inputs))
        bias = self.rng.standard_normal(outputs).astype(np.float32)
        return str(self.op("Gemm", x, self.constant(weights), self.constant(bias), name=name, transB=1))

    def matmul(self, x: str, inputs: int, outputs: int, *, name: str = "") -> str:
        weights = self.rng.standard_normal((inputs, outputs)).astype(np.float32) / np.float32(np.sqrt(inputs))
        return str(self.op("MatMul", x, self.constant(weights), name=name))

    def save(
        self, path: Path, inputs: dict[str, tuple[Any, ...]], outputs: dict[str, str], opset: int = 17
    ) -> Path:
        """`outputs`: name of the graph's output -> the tensor that becomes it."""
        for name, tensor in outputs.items():
            self.nodes.append(helper.make_node("Identity", [tensor], [name], name=f"give.{name}"))
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(s)) for n, s in inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        path.write_bytes(onnx.shape_inference.infer_shapes(model).SerializeToString(deterministic=True))
        return path


def resnet(path: Path, *, channels: int = 8) -> Path:
    """Stem, an identity block and a downsampling block, global pool, dense: (1, 3, 16, 16) -> logits."""
    net = Net()
    x = net.op("Relu", net.conv("image", (channels, 3, 3, 3), name="stem"), name="stem.relu")
    x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], name="pool")
    y = net.op("Relu", net.conv(x, (channels, channels, 3, 3), name="a1"), name="a1.relu")
    x = net.op(
        "Relu",
        net.op("Add", net.conv(y, (channels, channels, 3, 3), name="a2"), x, name="a.add"),
        name="a.relu",
    )
    y = net.op("Relu", net.conv(x, (2 * channels, channels, 3, 3), name="b1"), name="b1.relu")
    y = net.conv(y, (2 * channels, 2 * channels, 3, 3), name="b2")
    short = net.conv(x, (2 * channels, channels, 1, 1), name="b.short")
    x = net.op("Relu", net.op("Add", y, short, name="b.add"), name="b.relu")
    x = net.op("Flatten", net.op("GlobalAveragePool", x, name="gap"), name="flat")
    return net.save(path, {"image": (1, 3, 16, 16)}, {"logits": net.dense(x, 2 * channels, 5, name="fc")})


def silu(net: Net, x: str) -> str:
    return str(net.op("Mul", x, net.op("Sigmoid", x)))


def yolo(path: Path) -> Path:
    """SiLU stages, a split and concat block, a resize, a head of boxes by DFL and classes: (1, 3, 16, 16)."""
    net = Net(1)
    x = silu(net, net.conv("image", (8, 3, 3, 3), name="stem"))
    left, right = net.op("Split", x, outputs=2, axis=1, name="split")
    right = net.op("Add", silu(net, net.conv(right, (4, 4, 3, 3), name="m1")), right, name="m.add")
    x = silu(net, net.conv(net.op("Concat", left, right, axis=1, name="cat"), (8, 8, 1, 1), name="m2"))
    small = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], name="down")
    scales = net.constant(np.array([1, 1, 2, 2], np.float32))
    up = net.op("Resize", small, "", scales, mode="nearest", name="up")
    x = silu(net, net.conv(net.op("Concat", up, x, axis=1, name="cat2"), (8, 16, 1, 1), name="neck"))
    boxes = net.conv(x, (16, 8, 1, 1), name="head.box")
    classes = net.conv(x, (3, 8, 1, 1), name="head.cls")
    flat = net.op("Reshape", boxes, net.constant(np.array([1, 4, 4, 256], np.int64)), name="dfl.view")
    soft = net.op(
        "Softmax", net.op("Transpose", flat, perm=[0, 2, 1, 3], name="dfl.turn"), axis=1, name="dfl.soft"
    )
    net.constants.append(
        numpy_helper.from_array(np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1), "dfl.weight")
    )
    box = net.op("Conv", soft, "dfl.weight", name="dfl.conv")
    box = net.op("Reshape", box, net.constant(np.array([1, 4, 256], np.int64)), name="box.view")
    box = net.op("Mul", box, net.constant(np.array(8.0, np.float32)), name="box.scale")
    cls = net.op("Reshape", classes, net.constant(np.array([1, 3, 256], np.int64)), name="cls.view")
    out = net.op("Concat", box, net.op("Sigmoid", cls, name="cls.prob"), axis=1, name="decode")
    return net.save(path, {"image": (1, 3, 16, 16)}, {"boxes": out})


def gelu(net: Net, x: str, name: str) -> str:
    root = net.constant(np.array(np.sqrt(2), np.float32))
    erf = net.op("Erf", net.op("Div", x, root, name=f"{name}.div"), name=f"{name}.erf")
    both = net.op(
        "Mul",
        x,
        net.op("Add", erf, net.constant(np.array(1, np.float32)), name=f"{name}.one"),
        name=f"{name}.mul",
    )
    return str(net.op("Mul", both, net.constant(np.array(0.5, np.float32)), name=f"{name}.half"))


def transformer(path: Path, *, width: int = 16, steps: int = 8) -> Path:
    """A Conv1d feature extractor with GELU, one attention block, one MLP: (1, 1, 64) -> (1, 8, width)."""
    net = Net(2)
    x = gelu(
        net, net.conv("sound", (width, 1, 9), strides=[8], pads=[4, 4], bias=False, name="feature"), "feature"
    )
    x = net.op("Transpose", x, perm=[0, 2, 1], name="turn")
    q, k, v = (net.matmul(x, width, width, name=name) for name in ("q", "k", "v"))
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1]), name="scores")
    scores = net.op("Softmax", net.op("Mul", scores, net.constant(np.array(0.25, np.float32))), axis=-1)
    x = net.op(
        "Add", x, net.matmul(net.op("MatMul", scores, v, name="mix"), width, width, name="o"), name="residual"
    )
    ones, zeros = net.constant(np.ones(width, np.float32)), net.constant(np.zeros(width, np.float32))
    x = net.op("LayerNormalization", x, ones, zeros, axis=-1, name="norm")
    y = gelu(net, net.matmul(x, width, 2 * width, name="up"), "mlp")
    x = net.op("Add", x, net.matmul(y, 2 * width, width, name="down"), name="end")
    return net.save(path, {"sound": (1, 1, 8 * steps)}, {"features": x})


def folded(qdq: Path, out: Path) -> int:
    """Write each Conv between conversions as a QLinearConv, as the other format does; returns how many."""
    model = onnx.load(str(qdq))
    made = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    count = 0
    for node in model.graph.node:
        inputs, after = [made.get(name) for name in node.input], readers.get(node.output[0], [])
        coded = all(one is not None and one.op_type == "DequantizeLinear" for one in inputs)
        if node.op_type != "Conv" or not coded or [one.op_type for one in after] != ["QuantizeLinear"]:
            continue
        data, weights, *bias = [list(one.input) for one in inputs if one is not None]
        result = after[0]
        ports = [*data, *weights, *result.input[1:3], *(one[0] for one in bias)]
        node.CopyFrom(
            helper.make_node(
                "QLinearConv", ports, [result.output[0]], name=node.name,
                **{a.name: helper.get_attribute_value(a) for a in node.attribute},
            )
        )  # fmt: skip
        result.CopyFrom(helper.make_node("Identity", [result.output[0]], [f"{node.name}/unused"]))
        count += 1
    onnx.save(model, str(out))
    return count


def noise(model: Path, count: int = 4, seed: int = 0) -> list[dict[str, Array]]:
    """Seeded feeds for all float inputs of a model; an open dimension is 1."""
    rng = np.random.default_rng(seed)
    graph = onnx.load(str(model)).graph
    constants = {t.name for t in graph.initializer}
    shapes = {
        v.name: [max(d.dim_value, 1) for d in v.type.tensor_type.shape.dim]
        for v in graph.input
        if v.name not in constants
    }
    return [{n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()} for _ in range(count)]
