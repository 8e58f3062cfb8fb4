"""ONNX graphs written by hand, node by node, with or without trained weights.

Invariants
- A graph is a function of its parameters: the same ones give the same bytes, on any machine.
- While it is built with random weights, each operator also runs on a small probe (`forward`), so that a
  normalisation can take its statistics from what really arrives there: activations keep their size through
  the depth, as they do in a trained network. With trained weights nothing runs.
- Nodes and weights have the names that PyTorch's exporter gives them, in opset 17.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeward_models.progress import Progress, silent
from edgeward_runtime import images

from . import forward
from .forward import Array

OPSET, IR_VERSION = 17, 8
Shape = Sequence[int | str]
Make = Callable[[np.random.Generator], Array]


class Parameters(Protocol):
    """Where a graph's weights come from."""

    random: bool

    def get(self, name: str, shape: tuple[int, ...], make: Make) -> Array:
        """Float32 of this shape; `make` draws it, unless it is known."""


class Seeded:
    """Random weights: each tensor has its own stream, so that one more layer changes no other."""

    random = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.tensors: dict[str, Array] = {}

    def get(self, name: str, shape: tuple[int, ...], make: Make) -> Array:
        """Drawn by `make`, and kept in `tensors`."""
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        tensor = np.ascontiguousarray(make(rng), dtype=np.float32)
        if tensor.shape != shape:
            raise ValueError(f"{name} is drawn as {tensor.shape}, not {shape}")
        self.tensors[name] = tensor
        return tensor


@dataclass(frozen=True)
class Value:
    """A tensor of the graph, and what it is on the probe (None without one)."""

    name: str
    array: Array | None

    @property
    def seen(self) -> Array:
        """On the probe. Only for what draws weights."""
        if self.array is None:
            raise ValueError(f"{self.name} was not computed")
        return self.array


class Graph:
    """One model in the making; `total` convolutions are counted for `progress`."""

    def __init__(
        self, name: str, parameters: Parameters, progress: Progress = silent, total: int = 0
    ) -> None:
        self.name, self.parameters = name, parameters
        self._progress, self._done, self._total = progress, 0, total
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._names: Counter[str] = Counter()
        self.results: dict[str, Array | None] = {}
        """What the outputs are on the probe, once the model is made."""

    def input(self, name: str, shape: Shape, probe: Array | None) -> Value:
        """A float32 input; `probe` is only used where weights are drawn."""
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))
        return Value(name, probe if self.parameters.random else None)

    def constant(self, name: str, array: Any) -> Value:
        """An initialiser: float32, or int64 for whole numbers."""
        values = np.asarray(array)
        values = values.astype(np.int64 if values.dtype.kind == "i" else np.float32)
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(values, name)
        return Value(name, values)

    def ops(
        self,
        kind: str,
        inputs: Sequence[Value],
        at: str,
        compute: Callable[..., Sequence[Array]],
        outputs: int,
        **attributes: Any,
    ) -> list[Value]:
        """A node with several outputs. `compute` gives them on the probe from the inputs."""
        name = self._unique(f"{_scope(at)}/{kind}")
        names = [f"{name}_output_{k}" for k in range(outputs)]
        inner = [value.name for value in inputs]
        self._nodes.append(helper.make_node(kind, inner, names, name=name, **attributes))
        arrays = [value.array for value in inputs]
        known = self.parameters.random and all(a is not None for a in arrays)
        results: Sequence[Array | None] = compute(*arrays) if known else [None] * outputs
        return [Value(n, result) for n, result in zip(names, results, strict=True)]

    def op(
        self, kind: str, inputs: Sequence[Value], at: str, compute: Callable[..., Array], **attributes: Any
    ) -> Value:
        """A node with one output."""
        return self.ops(kind, inputs, at, lambda *a: [compute(*a)], 1, **attributes)[0]

    def count(self, at: str) -> None:
        """One more convolution is done."""
        self._done += 1
        self._progress(at, min(self._done, self._total), self._total)

    def model(self, outputs: Mapping[str, tuple[Value, Shape]], about: str) -> onnx.ModelProto:
        """The checked model; `about` says what it is to whoever opens it."""
        self.results = {name: value.array for name, (value, _) in outputs.items()}
        renamed = {value.name: name for name, (value, _) in outputs.items()}
        for node in self._nodes:
            for names in (node.input, node.output):
                for k, name in enumerate(names):
                    names[k] = renamed.get(name, name)
        results = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))
            for name, (_, shape) in outputs.items()
        ]
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, results, list(self._constants.values())
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="edgeward",
            doc_string=about,
        )
        helper.set_model_props(model, {"about": about})
        return model

    def _unique(self, name: str) -> str:
        self._names[name] += 1
        seen = self._names[name] - 1
        return f"{name}_{seen}" if seen else name


def save(model: onnx.ModelProto, path: Path) -> None:
    """Check and write it, the same bytes each time."""
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


# --- drawing weights


def normal(shape: Sequence[int], spread: float) -> Make:
    """Of mean 0 and standard deviation `spread`."""
    return lambda rng: rng.standard_normal(tuple(shape)) * spread


def scaled_by(apply: Callable[[Array], Array], draw: Make, spread: float = 1.0) -> Make:
    """What `draw` gives, scaled so that `apply` of it has the standard deviation `spread` on the probe."""

    def make(rng: np.random.Generator) -> Array:
        weights = draw(rng).astype(np.float32)
        return weights * forward.rounded(np.asarray(spread / apply(weights).std()))

    return make


def around(value: float, shape: Sequence[int], spread: float) -> Make:
    """Of this mean and standard deviation."""
    return lambda rng: value + rng.standard_normal(tuple(shape)) * spread


def he(shape: Sequence[int]) -> Make:
    """He's initialisation for rectified layers: variance 2 / fan in."""
    return normal(shape, math.sqrt(2 / math.prod(shape[1:])))


def photographs(size: int) -> Array:
    """The zoo's pictures in small, (9, 3, size, size) in 0..1, RGB: whole ones and details in turn.

    Statistics of noise would not do: photographs drive a network that was normalised with them out of bounds.
    Whole numbers until the last step, so that every machine gets the same.
    """
    tiles = []
    for k, path in enumerate(sorted((Path(__file__).resolve().parent / "pictures").glob("*.jpg"))):
        picture = images.decode(path.read_bytes(), path.name).astype(np.int64)[:, :, ::-1]
        factor = 1 if k % 2 else min(picture.shape[:2]) // size
        top, left = ((side - factor * size) // 2 for side in picture.shape[:2])
        square = picture[top : top + factor * size, left : left + factor * size]
        blocks = square.reshape(size, factor, size, factor, 3).sum(axis=(1, 3)) // factor**2
        tiles.append(blocks.transpose(2, 0, 1))
    return np.stack(tiles) / 255


# --- layers


def conv(
    graph: Graph,
    x: Value,
    at: str,
    channels: tuple[int, int],
    kernel: Sequence[int],
    *,
    stride: int = 1,
    pad: int = 0,
    draw: Callable[[Sequence[int]], Make] = he,
) -> Value:
    """Convolution without bias, from channels[0] to channels[1]; weights `at`.weight."""
    shape = (channels[1], channels[0], *kernel)
    weights = graph.parameters.get(f"{at}.weight", shape, draw(shape))
    graph.count(at)
    return graph.op(
        "Conv",
        [x, graph.constant(f"{at}.weight", weights)],
        at,
        lambda a, w: forward.conv(a, w, stride, pad),
        **conv_attributes(kernel, stride, pad),
    )


def conv_attributes(kernel: Sequence[int], stride: int, pad: int, groups: int = 1) -> dict[str, Any]:
    """As PyTorch's exporter writes them."""
    return {
        "dilations": [1] * len(kernel),
        "group": groups,
        "kernel_shape": list(kernel),
        "pads": [pad] * 2 * len(kernel),
        "strides": [stride] * len(kernel),
    }


@dataclass(frozen=True)
class Norm:
    """The parameters of a batch normalisation, (channels,) each."""

    weight: Array
    bias: Array
    mean: Array
    variance: Array
    epsilon: float

    def apply(self, x: Array) -> Array:
        """To (n, channels, ...)."""
        axes = (slice(None), *[None] * (x.ndim - 2))
        scale = (self.weight / np.sqrt(self.variance.astype(np.float64) + self.epsilon))[axes]
        return np.asarray((x - self.mean[axes]) * scale + self.bias[axes])


def norm(
    graph: Graph, seen: Array | None, at: str, channels: int, *, epsilon: float = 1e-5, gain: float = 1.0
) -> Norm:
    """Drawn around `gain`, with the statistics of what the probe shows; or as they were trained."""

    def statistic(which: Callable[..., Array]) -> Make:
        def make(_: np.random.Generator) -> Array:
            if seen is None:
                raise ValueError(f"nothing was computed at {at}")
            return forward.rounded(which(seen, axis=(0, *range(2, seen.ndim))))

        return make

    get = graph.parameters.get
    return Norm(
        get(f"{at}.weight", (channels,), around(gain, (channels,), 0.2 * gain)),
        get(f"{at}.bias", (channels,), normal((channels,), 0.2 * gain)),
        get(f"{at}.running_mean", (channels,), statistic(np.mean)),
        get(f"{at}.running_var", (channels,), statistic(np.var)),
        epsilon,
    )


def batch_norm(graph: Graph, x: Value, at: str, channels: int, *, gain: float = 1.0) -> Value:
    """A BatchNormalization node."""
    parts = norm(graph, x.array, at, channels, gain=gain)
    named = {
        "weight": parts.weight,
        "bias": parts.bias,
        "running_mean": parts.mean,
        "running_var": parts.variance,
    }
    inputs = [x, *(graph.constant(f"{at}.{key}", array) for key, array in named.items())]
    return graph.op(
        "BatchNormalization", inputs, at, lambda a, *_: parts.apply(a), epsilon=parts.epsilon, momentum=0.9
    )


def add(graph: Graph, x: Value, y: Value, at: str) -> Value:
    """Their sum."""
    return graph.op("Add", [x, y], at, np.add)


def concat(graph: Graph, values: Sequence[Value], at: str, axis: int = 1) -> Value:
    """One after the other along `axis`."""
    return graph.op("Concat", values, at, lambda *a: np.concatenate(a, axis=axis), axis=axis)


def split(graph: Graph, x: Value, at: str, sizes: Sequence[int]) -> list[Value]:
    """Along the channels."""
    target = graph.constant("split_" + "_".join(map(str, sizes)), list(sizes))
    ends = np.cumsum(sizes)[:-1]
    return graph.ops("Split", [x, target], at, lambda a, _: np.split(a, ends, axis=1), len(sizes), axis=1)


def reshape(graph: Graph, x: Value, at: str, shape: Sequence[int]) -> Value:
    """To a shape of the full-sized input, batch 1."""
    target = graph.constant("shape_" + "_".join(map(str, shape)).replace("-", "m"), list(shape))
    return graph.op("Reshape", [x, target], at, lambda a, s: a.reshape(s))


def transpose(graph: Graph, x: Value, at: str, order: Sequence[int]) -> Value:
    """The axes in this order."""
    return graph.op("Transpose", [x], at, lambda a: a.transpose(order), perm=list(order))


def _scope(at: str) -> str:
    """layer1.0.conv1 -> /layer1.0/conv1"""
    return re.sub(r"\.(?!\d)|^(?=.)", "/", at)
