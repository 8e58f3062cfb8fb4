"""What a processor without VNNI would cut off: the error that 16-bit sums put into a quantised layer.

vpmaddubsw multiplies u8 activations with s8 weights and adds the products of two neighbours in 16 bits; a
sum outside of -32768..32767 is cut off there (pairsafe.py says which inputs are neighbours). Most pairs
of weights cannot get there, whatever the activations; only the others are computed. Pure NumPy on codes,
exact for the pairs that it looks at: of a layer with very many it takes the worst (`MOST_SUMS`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgeward_models.pairsafe import LARGEST_ACTIVATION, LIMIT, Reader, kernel_rows
from edgeward_models.unfold import unfold

Array = npt.NDArray[Any]

MOST_SUMS = 40_000_000
"""Sums that are computed of one layer and input at the most."""
_BLOCK_SUMS = 4_000_000
_OPERATORS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Layer:
    """A product of u8 activations with constant s8 weights, and those of its pairs that may be cut off."""

    node: int
    """Its place among the graph's nodes."""
    codes: str
    """The tensor of its input's codes."""
    output: str
    pairs: Array
    """(n, 3): output channel, and the places of both neighbours in a row of weights; ordered by channel."""
    weights: Array
    """(n, 2): their weights' codes."""
    unit: Array
    """(output channels,): what one step of the sum is worth in the output."""
    zero: int
    """The code of 0, with which a convolution is padded."""
    window: Window | None
    """None: a product of matrices."""


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution over a picture or a line."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    groups: int


def layers_at_risk(model: onnx.ModelProto) -> list[Layer]:
    """The layers that some input could saturate, in the graph's order.

    `model` itself is unfolded (unfold.py): the places of nodes are those in what it is afterwards.
    """
    reader = _Reader(unfold(model))
    found = (reader.layer(k, node) for k, node in enumerate(model.graph.node) if node.op_type in _OPERATORS)
    return [layer for layer in found if layer is not None]


def correction(layer: Layer, codes: Array) -> Array:
    """What saturation adds to the layer's float output for an input's codes (batch 1), in its shape."""
    rows, shape = _rows(layer, codes)
    error = np.zeros((len(layer.unit), rows.shape[1]), np.float32)
    per_group = len(layer.unit) // (layer.window.groups if layer.window else 1)
    width = len(rows) // (len(layer.unit) // per_group)
    pairs, weights = _worst(layer, rows.shape[1])
    step = max(1, _BLOCK_SUMS // max(1, rows.shape[1]))
    for start in range(0, len(pairs), step):
        channel, first, second = pairs[start : start + step].T
        base = channel // per_group * width
        sums = rows[base + first] * weights[start : start + step, :1]
        sums += rows[base + second] * weights[start : start + step, 1:]
        cut = np.clip(sums, -LIMIT - 1, LIMIT) - sums
        begins = np.flatnonzero(np.diff(channel, prepend=-1))
        error[channel[begins]] += np.add.reduceat(cut, begins, axis=0)
    error *= layer.unit[:, None]
    return (error if layer.window else error.T).reshape(shape)


def _worst(layer: Layer, positions: int) -> tuple[Array, Array]:
    """The pairs to compute: all, or the worst of them, still ordered by channel."""
    most = max(1, MOST_SUMS // max(1, positions))
    if len(layer.pairs) <= most:
        return layer.pairs, layer.weights
    order = np.argsort(-np.abs(layer.weights.sum(axis=1)), kind="stable")[:most]
    kept = np.sort(order)
    return layer.pairs[kept], layer.weights[kept]


def _rows(layer: Layer, codes: Array) -> tuple[Array, tuple[int, ...]]:
    """(K of all groups, positions) as the kernel reads them, float32, and the shape of the output."""
    channels = len(layer.unit)
    window = layer.window
    if window is None:
        flat = codes.reshape(-1, codes.shape[-1])
        return np.ascontiguousarray(flat.T, np.float32), (*codes.shape[:-1], channels)
    rank = len(window.kernel)
    before, after = window.pads[:rank], window.pads[rank:]
    around = ((0, 0), *zip(before, after, strict=True))
    padded = np.pad(codes[0], around, constant_values=layer.zero)
    reach = [d * (k - 1) + 1 for k, d in zip(window.kernel, window.dilations, strict=True)]
    sides = [(side - r) // s + 1 for side, r, s in zip(padded.shape[1:], reach, window.strides, strict=True)]
    patches = []
    for place in np.ndindex(*window.kernel):
        steps = zip(place, window.dilations, window.strides, sides, strict=True)
        cut = [slice(None)] + [slice(p * d, p * d + s * (n - 1) + 1, s) for p, d, s, n in steps]
        patches.append(padded[tuple(cut)].reshape(window.groups, -1, int(np.prod(sides))))
    # (groups, kernel positions, channels of the group, positions)
    rows = np.stack(patches, axis=1).reshape(-1, int(np.prod(sides)))
    return rows.astype(np.float32), (1, channels, *sides)


class _Reader:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.made = {name: node for node in model.graph.node for name in node.output}
        self.products = Reader(model)

    def layer(self, number: int, node: onnx.NodeProto) -> Layer | None:
        data, other = self.made.get(node.input[0]), self.made.get(node.input[1])
        if data is None or other is None or {data.op_type, other.op_type} != {"DequantizeLinear"}:
            return None
        stored, zero = self.products.weights(node), self._array(data, 2)
        if stored is None or zero is None or zero.size != 1 or not self.products.paired(node, stored):
            return None
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        window = None
        if node.op_type == "Conv":
            window = _window(attributes, stored)
            if window is None:
                return None
            rows = kernel_rows("Conv", stored, 0)
        elif stored.ndim != 2 or attributes.get("transA") or attributes.get("alpha", 1.0) != 1.0:
            return None
        else:
            rows = stored if attributes.get("transB") else stored.T
        pairs, weights = _risky(rows)
        scale, scales = self._array(data, 1), self._array(other, 1)
        if not len(pairs) or scale is None or scales is None:
            return None
        unit = np.broadcast_to(np.asarray(scale * scales, np.float32).reshape(-1), (len(rows),))
        return Layer(
            number, data.input[0], node.output[0], pairs, weights, unit, int(zero.reshape(-1)[0]), window
        )

    def _array(self, node: onnx.NodeProto, at: int) -> Array | None:
        tensor = self.constants.get(node.input[at]) if at < len(node.input) else None
        return None if tensor is None else np.asarray(numpy_helper.to_array(tensor))


def _window(attributes: dict[str, Any], stored: Array) -> Window | None:
    """None for depthwise kernels, which sum in 32 bits, and for padding that depends on the input."""
    rank, groups = stored.ndim - 2, int(attributes.get("group", 1))
    if (groups > 1 and stored.shape[1] == 1) or attributes.get("auto_pad", b"NOTSET") not in (
        b"NOTSET",
        b"VALID",
    ):
        return None
    return Window(
        kernel=tuple(stored.shape[2:]),
        strides=tuple(attributes.get("strides", [1] * rank)),
        dilations=tuple(attributes.get("dilations", [1] * rank)),
        pads=tuple(attributes.get("pads", [0] * 2 * rank)),
        groups=groups,
    )


def _risky(rows: Array) -> tuple[Array, Array]:
    """Of s8 codes (output channels, K): the pairs whose sum can leave 16 bits, and their weights."""
    wide = rows.astype(np.int32)
    if wide.shape[1] % 2:
        wide = np.pad(wide, ((0, 0), (0, 1)))  # the last one has no neighbour
    pairs = wide.reshape(len(wide), -1, 2)
    up = np.maximum(pairs, 0).sum(axis=2) * LARGEST_ACTIVATION > LIMIT
    down = np.minimum(pairs, 0).sum(axis=2) * LARGEST_ACTIVATION < -LIMIT - 1
    channel, pair = np.nonzero(up | down)
    places = np.stack([channel, 2 * pair, np.minimum(2 * pair + 1, rows.shape[1] - 1)], axis=1)
    return places, pairs[channel, pair].astype(np.float32)
