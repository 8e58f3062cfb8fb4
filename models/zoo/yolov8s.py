"""YOLOv8-s, COCO, 640 x 640, written from the published architecture in the graph that its exporter emits.

Batch normalisation is folded into the convolutions, SiLU is Sigmoid and Mul, and the decode is in the graph:
`output0` (1, 84, 8400) holds centre x, centre y, width and height in pixels and 80 scores for each place.
Random weights, unless `--weights` brings a state dict with the published names (`model.0.conv.weight`,
`model.0.bn.running_mean`, ... `model.22.dfl.conv.weight`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

from edgeward_models.progress import Progress, silent
from edgeward_models.zoo import Built

from . import forward, sidecars, states
from .forward import Array
from .graphs import (
    Graph,
    Value,
    add,
    around,
    concat,
    conv_attributes,
    he,
    norm,
    photographs,
    reshape,
    save,
    scaled_by,
    split,
    transpose,
)

NAME = "yolov8s"
SIZE, CLASSES, BINS = 640, 80, 16
STRIDES = (8, 16, 32)
CONVOLUTIONS = 63
EPSILON = 1e-3
SCORE_SPREAD, SCORE_BIAS = 1.0, -7.0
"""Of the random classifier: a handful of boxes in a picture, as a detector gives them."""
PROBE_SIZE = 256


def build(out: Path, *, weights: Path | None = None, progress: Progress = silent) -> Built:
    """Write the float model, its sidecar, labels and pictures into `out`.

    Raises:
        Rejected: `weights` is not a state dict of this network.
    """
    name, parameters = states.parameters(NAME, weights)
    about = f"YOLOv8-s, {states.origin(weights)}"
    model = network(Graph(name, parameters, progress, CONVOLUTIONS), about)
    states.finish(parameters)
    path = out / f"{name}.onnx"
    save(model, path)
    return sidecars.detector(path, about, size=SIZE, trained=weights is not None)


def network(graph: Graph, about: str) -> onnx.ModelProto:
    """`images` (1, 3, 640, 640) to `output0` (1, 84, 8400)."""
    images = graph.input("images", (1, 3, SIZE, SIZE), photographs(PROBE_SIZE))
    levels = _neck(graph, _backbone(graph, images))
    outputs = [_outputs(graph, level, k) for k, level in enumerate(levels)]
    return graph.model({"output0": (_decode(graph, outputs), (1, 4 + CLASSES, _places()))}, about)


# --- the network


def _backbone(graph: Graph, x: Value) -> tuple[Value, Value, Value]:
    """Features at strides 8, 16 and 32: 128, 256 and 512 channels."""
    x = _conv(graph, x, "model.0", 3, 32, kernel=3, stride=2)
    x = _conv(graph, x, "model.1", 32, 64, kernel=3, stride=2)
    x = _c2f(graph, x, "model.2", 64, 64, blocks=1)
    x = _conv(graph, x, "model.3", 64, 128, kernel=3, stride=2)
    fine = _c2f(graph, x, "model.4", 128, 128, blocks=2)
    x = _conv(graph, fine, "model.5", 128, 256, kernel=3, stride=2)
    middle = _c2f(graph, x, "model.6", 256, 256, blocks=2)
    x = _conv(graph, middle, "model.7", 256, 512, kernel=3, stride=2)
    x = _c2f(graph, x, "model.8", 512, 512, blocks=1)
    return fine, middle, _pooled(graph, x, "model.9")


def _neck(graph: Graph, features: tuple[Value, Value, Value]) -> tuple[Value, Value, Value]:
    """The features, down from the coarse ones and up again."""
    fine, middle, coarse = features
    join = functools.partial(_join, graph)
    c2f = functools.partial(_c2f, graph, blocks=1, shortcut=False)
    x12 = c2f(join(_upsampled(graph, coarse, "model.10"), middle, "model.11"), "model.12", 768, 256)
    x15 = c2f(join(_upsampled(graph, x12, "model.13"), fine, "model.14"), "model.15", 384, 128)
    down = _conv(graph, x15, "model.16", 128, 128, kernel=3, stride=2)
    x18 = c2f(join(down, x12, "model.17"), "model.18", 384, 256)
    down = _conv(graph, x18, "model.19", 256, 256, kernel=3, stride=2)
    x21 = c2f(join(down, coarse, "model.20"), "model.21", 768, 512)
    return x15, x18, x21


def _conv(
    graph: Graph, x: Value, at: str, channels: int, out: int, *, kernel: int = 1, stride: int = 1
) -> Value:
    """Convolution with its normalisation folded in, then SiLU."""
    shape, pad = (out, channels, kernel, kernel), kernel // 2
    weights = graph.parameters.get(f"{at}.conv.weight", shape, he(shape))
    plain = None if x.array is None else forward.conv(x.array, weights, stride, pad)
    parts = norm(graph, plain, f"{at}.bn", out, epsilon=EPSILON)
    scale = parts.weight / np.sqrt(parts.variance.astype(np.float64) + EPSILON)
    graph.count(at)
    y = graph.op(
        "Conv",
        [
            x,
            graph.constant(f"{at}.conv.weight", weights * scale[:, None, None, None]),
            graph.constant(f"{at}.conv.bias", parts.bias - parts.mean * scale),
        ],
        f"{at}.conv",
        lambda *_: parts.apply(plain) if plain is not None else np.empty(0),
        **conv_attributes((kernel, kernel), stride, pad),
    )
    gate = graph.op("Sigmoid", [y], f"{at}.act", forward.sigmoid)
    return graph.op("Mul", [y, gate], f"{at}.act", np.multiply)


def _c2f(
    graph: Graph, x: Value, at: str, channels: int, out: int, *, blocks: int, shortcut: bool = True
) -> Value:
    """Half of the channels pass, half go through the blocks; every block's result is kept."""
    half = out // 2
    parts = split(graph, _conv(graph, x, f"{at}.cv1", channels, out), at, (half, half))
    for k in range(blocks):
        y = _conv(graph, parts[-1], f"{at}.m.{k}.cv1", half, half, kernel=3)
        y = _conv(graph, y, f"{at}.m.{k}.cv2", half, half, kernel=3)
        parts.append(add(graph, parts[-1], y, f"{at}.m.{k}") if shortcut else y)
    return _conv(graph, concat(graph, parts, at), f"{at}.cv2", half * len(parts), out)


def _pooled(graph: Graph, x: Value, at: str) -> Value:
    """The same pooling three times in a row (SPPF): 5, 9 and 13 pixels wide."""
    parts = [_conv(graph, x, f"{at}.cv1", 512, 256)]
    for _ in range(3):
        pooled = graph.op(
            "MaxPool",
            [parts[-1]],
            f"{at}.m",
            lambda a: forward.max_pool(a, 5, 1, 2),
            ceil_mode=0,
            dilations=[1, 1],
            kernel_shape=[5, 5],
            pads=[2, 2, 2, 2],
            strides=[1, 1],
        )
        parts.append(pooled)
    return _conv(graph, concat(graph, parts, at), f"{at}.cv2", 1024, 512)


def _upsampled(graph: Graph, x: Value, at: str) -> Value:
    """Every pixel four times."""
    scales = graph.constant("upsample_scales", np.array([1.0, 1.0, 2.0, 2.0]))
    return graph.op(
        "Resize",
        [x, Value("", np.empty(0)), scales],
        at,
        lambda a, *_: a.repeat(2, axis=2).repeat(2, axis=3),
        coordinate_transformation_mode="asymmetric",
        cubic_coeff_a=-0.75,
        mode="nearest",
        nearest_mode="floor",
    )


def _join(graph: Graph, x: Value, y: Value, at: str) -> Value:
    return concat(graph, (x, y), at)


# --- the head


def _outputs(graph: Graph, x: Value, level: int) -> Value:
    """(1, 144, height, width): four distributions over 16 distances, and 80 scores."""
    channels = (128, 256, 512)[level]
    parts = []
    for branch, width, out, spread, bias in (
        ("cv2", 64, 4 * BINS, 1.0, 1.0),
        ("cv3", 128, CLASSES, SCORE_SPREAD, SCORE_BIAS),
    ):
        at = f"model.22.{branch}.{level}"
        y = _conv(graph, x, f"{at}.0", channels, width, kernel=3)
        y = _conv(graph, y, f"{at}.1", width, width, kernel=3)
        parts.append(_last(graph, y, f"{at}.2", (out, width, 1, 1), (bias, spread)))
    return concat(graph, parts, "model.22")


def _last(
    graph: Graph, x: Value, at: str, shape: tuple[int, int, int, int], result: tuple[float, float]
) -> Value:
    """A convolution with a bias of its own, drawn to give this mean and spread. The last that is drawn."""
    bias, spread = result
    draw = scaled_by(lambda w: forward.conv(x.seen, w), he(shape), spread)
    weights = graph.parameters.get(f"{at}.weight", shape, draw)
    offsets = graph.parameters.get(f"{at}.bias", shape[:1], around(bias, shape[:1], 0.1))
    graph.count(at)
    inputs = [
        Value(x.name, None),
        graph.constant(f"{at}.weight", weights),
        graph.constant(f"{at}.bias", offsets),
    ]
    return graph.op("Conv", inputs, at, np.add, **conv_attributes((1, 1), 1, 0))


def _decode(graph: Graph, levels: Sequence[Value]) -> Value:
    """Boxes in pixels and scores in 0..1, (1, 84, 8400)."""
    at, places = "model.22", _places()
    rows = [reshape(graph, level, at, (1, 4 * BINS + CLASSES, -1)) for level in levels]
    boxes, scores = split(graph, concat(graph, rows, at, axis=2), at, (4 * BINS, CLASSES))
    shares = transpose(
        graph, reshape(graph, boxes, f"{at}.dfl", (1, 4, BINS, places)), f"{at}.dfl", (0, 2, 1, 3)
    )
    shares = graph.op("Softmax", [shares], f"{at}.dfl", np.add, axis=1)
    mean = _expectation(graph, shares, f"{at}.dfl.conv")
    distances = reshape(graph, mean, f"{at}.dfl", (1, 4, places))
    anchors, strides = (graph.constant(f"{at}.{k}", a) for k, a in _grid().items())
    before, after = split(graph, distances, at, (2, 2))
    first = graph.op("Sub", [anchors, before], at, np.subtract)
    last = graph.op("Add", [anchors, after], at, np.add)
    middle = graph.op(
        "Div", [add(graph, first, last, at), graph.constant("two", np.float32(2))], at, np.divide
    )
    sides = graph.op("Sub", [last, first], at, np.subtract)
    pixels = graph.op("Mul", [concat(graph, (middle, sides), at), strides], at, np.multiply)
    likely = graph.op("Sigmoid", [scores], at, forward.sigmoid)
    return concat(graph, (pixels, likely), at)


def _expectation(graph: Graph, shares: Value, at: str) -> Value:
    """The mean of each distribution, as a convolution with the weights 0, 1, ... 15."""
    shape = (1, BINS, 1, 1)
    weights = graph.parameters.get(
        f"{at}.weight", shape, lambda _: np.arange(BINS, dtype=np.float32).reshape(shape)
    )
    return graph.op(
        "Conv", [shares, graph.constant(f"{at}.weight", weights)], at, np.add, **conv_attributes((1, 1), 1, 0)
    )


def _places() -> int:
    return sum((SIZE // stride) ** 2 for stride in STRIDES)


def _grid() -> dict[str, Array]:
    """The centres of all cells, in cells, (1, 2, 8400); and the side of each in pixels, (1, 8400)."""
    centres, sides = [], []
    for stride in STRIDES:
        cells = SIZE // stride
        axis = np.arange(cells) + 0.5
        centres.append(np.stack([np.tile(axis, cells), np.repeat(axis, cells)]))
        sides.append(np.full(cells * cells, float(stride)))
    return {"anchors": np.concatenate(centres, axis=1)[None], "strides": np.concatenate(sides)[None]}
