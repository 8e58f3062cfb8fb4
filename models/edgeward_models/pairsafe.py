"""Eight-bit weights that no x86 processor can saturate, and the proof that a written file has them.

x86 without VNNI adds two u8 x s8 products of neighbouring inputs in 16 bits (vpmaddubsw), and a sum beyond
32767 is cut off. Neighbours are the inputs 2i and 2i + 1 in the order in which the kernel reads them: for a
product, along K; for a convolution, which ONNX Runtime turns into a product of its NHWC patches, kernel
position by position, the channels of the group within each, so that with an odd number of channels a pair
spans two positions. An activation is at most 255: what must hold is that no two neighbours of one sign
exceed 128 together (255 x 128 = 32640). That bounds the pair, not each weight as 7 bits do: it costs less.
Depthwise kernels sum in 32 bits and need none of this. (The order was checked on AVX2 without VNNI, ONNX
Runtime 1.32: weights of 127 in every other place of it, the rest 0, are exact in convolutions of one to three
dimensions, grouped, with odd channels, and in products; in any other order they would have been cut off.)

Invariant: NumPy only, but for reading the file in `worst_pairs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from edgeward_models.shield import requantised
from edgeward_models.unfold import unfold

LARGEST_ACTIVATION = 255
LIMIT = 32767
_ROUNDED = 127  # one code less than 128 leaves room for two weights that round up
_SMALLEST = 1e-8

Weights = npt.NDArray[Any]
Scales = npt.NDArray[np.float64]


def kernel_rows(op: str, weights: Weights, axis: int) -> Weights:
    """(output channels, K): each row in the order in which a kernel multiplies and adds.

    `weights` are (out, in / groups, *kernel) of a convolution, or the matrix of a product, whose output
    channels lie along `axis`.
    """
    if op == "Conv":
        return np.moveaxis(weights, 1, -1).reshape(len(weights), -1)
    return weights if axis == 0 else weights.T


def pair_sums(rows: Weights) -> Weights:
    """(output channels,): the largest sum, by amount, of two neighbours of one sign, of rows (n, K)."""
    if rows.shape[1] % 2:
        rows = np.pad(rows, ((0, 0), (0, 1)))
    if not rows.shape[1]:
        return np.zeros(len(rows), rows.dtype)
    signs = np.stack([np.maximum(rows, 0), np.maximum(-rows, 0)])
    return np.asarray(signs.reshape(2, len(rows), -1, 2).sum(axis=3).max(axis=(0, 2)))


def scales(rows: Weights, *, pairs: bool, codes: int = 127) -> Scales:
    """(output channels,): the finest scale of each channel with |w| <= `codes`, and, with `pairs`, no two
    neighbours of one sign beyond 128 after rounding."""
    wide = np.asarray(rows, np.float64)
    widest = np.abs(wide).max(axis=1, initial=0.0) / codes
    if pairs:
        widest = np.maximum(widest, pair_sums(wide) / _ROUNDED)
    return np.asarray(np.maximum(widest, _SMALLEST))


@dataclass(frozen=True)
class PairBound:
    """The worst that a node's 16-bit sums can become."""

    node: str
    op: str
    worst: int
    """The largest amount of a pair's sum with activations of 255; 0 where nothing is summed in 16 bits."""

    @property
    def safe(self) -> bool:
        """Whether no activations can saturate it."""
        return self.worst <= LIMIT


def worst_pairs(quantised: Path) -> list[PairBound]:
    """Each node of a QDQ or QOperator file with constant 8-bit weights, in the graph's order: its bound.

    Float weights that ONNX Runtime quantises when it loads the file (shield.py) count as what they become.
    """
    model = unfold(onnx.load(str(quantised)))
    reader = Reader(model)
    return [bound for node in model.graph.node if (bound := reader.bound(node)) is not None]


# Operator -> (position of the data, of the weights).
_INTEGER: dict[str, tuple[int, int]] = {
    "QLinearConv": (0, 3),  # these three where they could not be unfolded
    "QLinearMatMul": (0, 3),
    "QGemm": (0, 3),
    "ConvInteger": (0, 1),
    "MatMulInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "DynamicQuantizeMatMul": (0, 1),
}
_QDQ: dict[str, tuple[int, int]] = {"Conv": (0, 1), "Gemm": (0, 1), "MatMul": (0, 1)}
_SAME_CODES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity")


class Reader:
    """The products of an unfolded graph: their weights as stored, and whether a kernel pairs them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.constants = {t.name: t for t in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.requantised = requantised(model.graph)

    def bound(self, node: onnx.NodeProto) -> PairBound | None:
        if node.op_type == "DynamicQuantizeLSTM":
            return self._recurrent(node)
        """What a node's sums can become; None: it is no product with constant weights in codes."""
        weights = self.weights(node)
        if weights is None:
            return None
        if not self.paired(node, weights):
            return PairBound(node.name, node.op_type, 0)
        groups = _attribute(node, "group", 1)
        if "Conv" in node.op_type:
            if groups > 1 and weights.shape[1] == 1 and weights.shape[0] == groups:
                return PairBound(node.name, node.op_type, 0)
            return PairBound(node.name, node.op_type, _worst(kernel_rows("Conv", weights, 0)))
        transposed = bool(_attribute(node, "transB", 0))
        matrices = weights.reshape(-1, *weights.shape[-2:])
        worst = max(_worst(matrix if transposed else matrix.T) for matrix in matrices)
        return PairBound(node.name, node.op_type, worst)

    def _recurrent(self, node: onnx.NodeProto) -> PairBound:
        """Of the weights for the input and for the state: (directions, K, 4 x hidden) each."""
        tensors = [self.constants[name] for name in node.input[1:3] if name in self.constants]
        arrays = [numpy_helper.to_array(tensor) for tensor in tensors]
        worst = max((_worst(m.T) for a in arrays if a.dtype == np.int8 for m in a), default=0)
        return PairBound(node.name, node.op_type, worst)

    def paired(self, node: onnx.NodeProto, weights: Weights) -> bool:
        """Whether a kernel adds its products by pairs: u8 activations and s8 weights; others widen first."""
        return weights.dtype == np.int8 and not self._signed(node)

    def weights(self, node: onnx.NodeProto) -> Weights | None:
        """The node's constant weights as stored, or None."""
        if node.op_type in _INTEGER:
            tensor = self.constants.get(node.input[_INTEGER[node.op_type][1]])
        elif node.name in self.requantised and node.op_type in _QDQ:
            weights = numpy_helper.to_array(self.constants[node.input[1]])
            largest = max(float(np.abs(weights).max(initial=0.0)), _SMALLEST)
            return np.asarray(np.round(weights * (127 / largest)), np.int8)
        elif node.op_type in _QDQ:
            source = self.producers.get(node.input[1])
            if source is None or source.op_type != "DequantizeLinear":
                return None
            tensor = self.constants.get(source.input[0])
        else:
            return None
        return None if tensor is None else np.asarray(numpy_helper.to_array(tensor))

    def _signed(self, node: onnx.NodeProto) -> bool:
        """Whether the activations are signed: then no kernel pairs them in 16 bits."""
        if node.op_type in _QDQ:
            source = self.producers.get(node.input[0])
            while source is not None and source.op_type in _SAME_CODES:
                source = self.producers.get(source.input[0])
            if source is None or source.op_type != "DequantizeLinear":
                return True  # float data: the node runs in float
            zero = source.input[2] if len(source.input) > 2 else ""
        elif node.op_type in ("QLinearConv", "QLinearMatMul", "QGemm"):
            zero = node.input[2]
        else:
            return False  # quantised while it runs, to u8
        tensor = self.constants.get(zero)
        return tensor is not None and tensor.data_type == onnx.TensorProto.INT8


def _worst(rows: Weights) -> int:
    return int(pair_sums(rows.astype(np.int32)).max(initial=0)) * LARGEST_ACTIVATION


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)
