"""How much memory the activations of one run need at once, read from the graph alone.

    peak = peak_activations(skeleton(load_graph(path)))

The nodes run in the file's order. A tensor is alive from the node that makes it to the last one that reads
it; inputs are alive throughout (they are the caller's), outputs to the end. Reshape and its like are views
of their input; an element-wise operator writes over an input that it is the last to read and that is as
large. That is what ONNX Runtime's planner does on one thread, but for its arena's rounding and for scratch
buffers inside kernels. Weights are not activations. Graphs inside nodes are not looked into.

Invariant: a tensor whose shape cannot be inferred counts nothing and is counted in `unknown`: the peak
is then a lower bound.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, shape_inference

from edgeward_models.contrib_shapes import standard_twin
from edgeward_models.graph import WEIGHT

_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Dropout"})
_IN_PLACE = frozenset(
    {
        *("Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Softmax"),
        *("Add", "Sub", "Mul", "Div", "Sqrt", "Exp", "Neg", "Abs", "Where", "BatchNormalization"),
    }
)
_BITS: dict[int, int] = {
    TensorProto.FLOAT: 32,
    TensorProto.UINT8: 8,
    TensorProto.INT8: 8,
    TensorProto.UINT16: 16,
    TensorProto.INT16: 16,
    TensorProto.INT32: 32,
    TensorProto.INT64: 64,
    TensorProto.BOOL: 8,
    TensorProto.FLOAT16: 16,
    TensorProto.BFLOAT16: 16,
    TensorProto.DOUBLE: 64,
    TensorProto.UINT32: 32,
    TensorProto.UINT64: 64,
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
}


@dataclass(frozen=True, slots=True)
class Peak:
    """The moment at which most is alive."""

    bytes: int
    node: str
    """The node that runs then: its operator and name."""
    total: int
    """Bytes of all activations of a run, each counted once."""
    unknown: int
    """Tensors whose size is not known; above 0 the peak is a lower bound."""


def peak_activations(bare: onnx.ModelProto) -> Peak:
    """The peak of one run. `bare` is a `graph.skeleton`: open dimensions have a length."""
    graph = bare.graph
    sizes = tensor_bytes(bare)
    plan = _Plan(graph, sizes)
    peak, where = plan.alive, "before the first node"
    for k, node in enumerate(graph.node):
        if plan.step(k, node) > peak:
            peak, where = plan.most, f"{node.op_type} {node.name}".strip()
    made = {name for node in graph.node for name in node.output if name} - plan.weights
    total = sum(sizes.get(name, 0) for name in made if plan.root(name) == name)
    return Peak(peak, where, total, sum(name not in sizes for name in made))


def tensor_bytes(bare: onnx.ModelProto) -> dict[str, int]:
    """Bytes of every tensor whose type and shape can be inferred, by name."""
    twin = standard_twin(bare)
    with contextlib.suppress(shape_inference.InferenceError):  # then what is declared must do
        twin = shape_inference.infer_shapes(twin, data_prop=True)
    found: dict[str, int] = {}
    for value in [*twin.graph.value_info, *twin.graph.input, *twin.graph.output]:
        tensor = value.type.tensor_type
        dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
        if tensor.elem_type in _BITS and tensor.HasField("shape") and min(dims, default=0) >= 0:
            found[value.name] = -(-math.prod(dims) * _BITS[tensor.elem_type] // 8)
    return found


class _Plan:
    """Buffers by the tensor that first had them, and when the last of their tensors is read."""

    def __init__(self, graph: onnx.GraphProto, sizes: dict[str, int]) -> None:
        self.weights = _weights(graph)
        inputs = [v.name for v in graph.input if v.name not in self.weights]
        self._sizes = sizes
        self._root: dict[str, str] = {name: name for name in inputs}
        self._own = {v.name for v in graph.output} | set(inputs)  # the caller's: alive to the end
        self._reads: dict[str, int] = {}
        for k, node in enumerate(graph.node):
            for name in node.input:
                self._reads[name] = k
        self._inputs = set(inputs)
        self._last: dict[str, float] = {}
        self.alive = sum(sizes.get(name, 0) for name in inputs)
        self.most = self.alive

    def root(self, name: str) -> str:
        return self._root.get(name, name)

    def step(self, k: int, node: onnx.NodeProto) -> int:
        """Run node `k`: its outputs come to life, then what nobody reads any more dies. Bytes at the most."""
        for position, name in enumerate(node.output):
            if not name or name in self.weights:
                continue
            taken = self._takes_over(k, node, name) if position == 0 else None
            self._root[name] = taken if taken is not None else name
            if taken is None:
                self.alive += self._sizes.get(name, 0)
            end = math.inf if name in self._own else self._reads.get(name, k)
            root = self._root[name]
            if root not in self._inputs:  # those are alive to the end, whatever reads their views
                self._last[root] = max(self._last.get(root, 0), end)
        self.most = self.alive
        for name in [one for one, last in self._last.items() if last <= k]:
            self.alive -= self._sizes.get(name, 0)
            del self._last[name]
        return self.most

    def _takes_over(self, k: int, node: onnx.NodeProto, output: str) -> str | None:
        """The buffer that the output lies in, if it is one that is there already."""
        if node.op_type in _VIEWS and node.input and node.input[0] in self._root:
            return self._root[node.input[0]]
        if node.op_type not in _IN_PLACE:
            return None
        for name in node.input:
            root = self._root.get(name)
            if root is None or root in self._inputs or self._last.get(root) != k:
                continue
            if self._sizes.get(output) == self._sizes.get(root, -1):
                return root
        return None


def _weights(graph: onnx.GraphProto) -> set[str]:
    """Initialisers, what `skeleton` made inputs of them, and what is computed of nothing else."""
    known = {tensor.name for tensor in graph.initializer}
    known |= {value.name for value in graph.input if value.doc_string == WEIGHT}
    for node in graph.node:
        if node.op_type == "Constant" or (node.input and all(name in known for name in node.input if name)):
            known.update(node.output)
    return known


def human(peaks: Sequence[Peak]) -> list[str]:
    """Each peak in MB; `≥` where it is a lower bound."""
    return [f"{'≥ ' if peak.unknown else ''}{peak.bytes / 1e6:.2f} MB" for peak in peaks]
