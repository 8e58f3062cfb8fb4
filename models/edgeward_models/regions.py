"""Which nodes of a float graph to quantise. Pure: a graph in, names out.

Invariants
- What carries weights is quantised by name; what stands between (additions, activations, pools) follows only
  where its data are quantised already, so a float region has no lonely Q/DQ pairs inside.
- A product of two activations (attention) stays in float. So does what follows the last weights of a branch:
  the decoding of boxes, a distribution's expectation (DFL), a final softmax.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import onnx

WEIGHTED = ("Conv", "Gemm", "MatMul")
CNN = (
    *WEIGHTED,
    "Add",
    "AveragePool",
    "Clip",
    "Concat",
    "Flatten",
    "GlobalAveragePool",
    "LeakyRelu",
    "MaxPool",
    "Mul",
    "Relu",
    "Reshape",
    "Resize",
    "Sigmoid",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
"""All that ONNX Runtime's CPU provider folds into integer kernels between two convolutions."""
TRANSFORMER = WEIGHTED
"""Norms, GELU and softmax have no integer kernels: what stands between products stays in float."""

_MORE_WEIGHTS = (
    "ConvTranspose",
    "LSTM",
    "GRU",
    "RNN",
)  # work that a tail cannot precede, never quantised here
_FUSED = ("Relu", "Clip")  # become part of the integer kernel before them
_LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_ELEMENTWISE = ("Add", "Mul")


@dataclass(frozen=True)
class Weighted:
    """A node with constant float weights: what a quantiser must know of it."""

    name: str
    op: str
    data: str
    """The tensor that is multiplied by the weights."""
    weights: str
    """The initialiser."""
    shape: tuple[int, ...]
    """Of the weights."""
    axis: int
    """The axis of the output channels in the weights."""
    groups: int = 1

    @property
    def depthwise(self) -> bool:
        """One input and one output channel a group: kernels for these sum in 32 bits."""
        return self.op == "Conv" and self.groups > 1 and self.shape[1] == 1 and self.shape[0] == self.groups


class Graph:
    """A float model's graph with its indices. The model must not change meanwhile."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: Sequence[onnx.NodeProto] = model.graph.node
        self.constants: dict[str, onnx.TensorProto] = {t.name: t for t in model.graph.initializer}
        self.producers: dict[str, onnx.NodeProto] = {name: n for n in self.nodes for name in n.output if name}
        self.inputs = tuple(v.name for v in model.graph.input if v.name not in self.constants)
        self.outputs = tuple(v.name for v in model.graph.output)

    @cached_property
    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """Tensor -> the nodes that read it."""
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in {name for name in node.input if name}:
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def floats(self) -> frozenset[str]:
        """The activations that are known to be float32."""
        graph = self.model.graph
        return frozenset(
            value.name
            for value in (*graph.input, *graph.value_info, *graph.output)
            if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT and value.name not in self.constants
        )

    @cached_property
    def weighted(self) -> tuple[Weighted, ...]:
        """All nodes with constant float weights, in the graph's order."""
        return tuple(found for node in self.nodes if (found := self._weighted(node)) is not None)

    @cached_property
    def tail(self) -> frozenset[str]:
        """The nodes that no weights follow: a decoder of boxes with its DFL, a final softmax or resize.

        An activation that becomes part of the kernel before it is not among them.
        """
        work = {w.name for w in self.weighted if not self._expectation(w)}
        work |= {node.name for node in self.nodes if node.op_type in _MORE_WEIGHTS}
        before: set[str] = set()
        for node in reversed(self.nodes):
            followed = any(c.name in before for name in node.output for c in self.consumers.get(name, ()))
            if node.name in work or followed:
                before.add(node.name)
        after = [node for node in self.nodes if node.name not in before]
        return frozenset(node.name for node in after if not self._fused(node, work))

    @cached_property
    def quantisable(self) -> tuple[Weighted, ...]:
        """The weighted nodes that are worth quantising: all but those of the tail."""
        return tuple(w for w in self.weighted if w.name not in self.tail)

    def operators(self) -> tuple[str, ...]:
        """The operators to quantise in a graph of this kind."""
        products = sum(w.op != "Conv" for w in self.quantisable)
        pictures = sum(w.op == "Conv" and len(w.shape) > 3 for w in self.quantisable)
        attention = any(
            node.op_type == "MatMul" and not any(name in self.constants for name in node.input)
            for node in self.nodes
        )
        return TRANSFORMER if attention and products >= pictures else CNN

    def to_quantise(self, operators: Collection[str] = (), keep_float: Collection[str] = ()) -> list[str]:
        """Names of the nodes to quantise, in the graph's order; `operators` empty: what suits the graph."""
        wanted = set(operators or self.operators())
        weighted = {w.name for w in self.quantisable}
        chosen: list[str] = []
        integer: set[str] = set()
        for node in self.nodes:
            if node.op_type not in wanted or node.name in keep_float or node.name in self.tail:
                continue
            if node.op_type in WEIGHTED:
                follows = node.name in weighted
            else:
                follows = any(name in integer for name in node.input) and not self._needs_precision(node)
            if follows:
                chosen.append(node.name)
                integer.update(node.output)
        return chosen

    def attribute(self, node: onnx.NodeProto, name: str, default: int) -> int:
        """An integer attribute."""
        return next((int(a.i) for a in node.attribute if a.name == name), default)

    def _weighted(self, node: onnx.NodeProto) -> Weighted | None:
        if node.op_type not in WEIGHTED or len(node.input) < 2:
            return None
        tensor = self.constants.get(node.input[1])
        if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT or node.input[0] in self.constants:
            return None
        shape = tuple(tensor.dims)
        found = Weighted(node.name, node.op_type, node.input[0], tensor.name, shape, 0)
        if node.op_type == "Conv":
            groups = self.attribute(node, "group", 1)
            return (
                Weighted(found.name, "Conv", found.data, found.weights, shape, 0, groups)
                if len(shape) > 2
                else None
            )
        if len(shape) != 2:  # the integer kernels want one matrix
            return None
        axis = 0 if node.op_type == "Gemm" and self.attribute(node, "transB", 0) else 1
        return Weighted(found.name, found.op, found.data, found.weights, shape, axis)

    def _expectation(self, weighted: Weighted) -> bool:
        """A convolution over a softmax: the expectation of a distribution (DFL), part of a decoder."""
        node = self.producers.get(weighted.data)
        while node is not None and node.op_type in _LAYOUT:
            node = self.producers.get(node.input[0])
        return weighted.op == "Conv" and node is not None and node.op_type == "Softmax"

    def _fused(self, node: onnx.NodeProto, work: Collection[str]) -> bool:
        source = self.producers.get(node.input[0]) if node.input else None
        return node.op_type in _FUSED and source is not None and source.name in work

    def _needs_precision(self, node: onnx.NodeProto) -> bool:
        """A sum or product with a constant a channel: eight bits would be few for these."""
        sizes = (self.constants[name].dims for name in node.input if name in self.constants)
        return node.op_type in _ELEMENTWISE and any(dim > 1 for dims in sizes for dim in dims)


def bypassed(graph: Graph) -> Iterator[tuple[str, str]]:
    """(a tensor that only a ReLU or Clip reads, what that gives): both get the same codes."""
    for node in graph.nodes:
        if (
            node.op_type in _FUSED
            and len(graph.consumers[node.input[0]]) == 1
            and node.input[0] not in graph.outputs
        ):
            yield node.input[0], node.output[0]


def operator_counts(graph: Graph) -> Mapping[str, int]:
    """Operator -> how many nodes of it there are."""
    counts: dict[str, int] = {}
    for node in graph.nodes:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts
