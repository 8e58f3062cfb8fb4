"""DistilHuBERT: speech features from one second of sound at 16 kHz, as PyTorch's exporter writes it.

Seven convolutions over the samples (the first with group normalisation), a positional convolution of 128 taps
in 16 groups, two transformer layers of 768 with twelve heads; `features` (1, 49, 768). LayerNormalization is
one node (opset 17), GELU and the attention are decomposed. The published model ends there: its prediction
heads served training only. Random weights, unless `--weights` brings a state dict with Hugging Face's names.
"""

from __future__ import annotations

import math
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
    conv_attributes,
    he,
    normal,
    reshape,
    save,
    scaled_by,
    transpose,
)

NAME = "distilhubert"
RATE = WINDOW = 16_000
EXTRACTOR = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
"""(kernel, stride) of each convolution."""
CHANNELS, WIDTH, HEADS, INNER, LAYERS = 512, 768, 12, 3072, 2
POSITIONS, GROUPS = 128, 16
CONVOLUTIONS = len(EXTRACTOR) + 1
EPSILON = 1e-5
_PER_HEAD = WIDTH // HEADS
_WEIGHT_NORM = {  # as PyTorch calls the parts since 2.1: as checkpoints of before call them
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


def build(out: Path, *, weights: Path | None = None, progress: Progress = silent) -> Built:
    """Write the float model and its sidecar into `out`.

    Raises:
        Rejected: `weights` is not a state dict of this network.
    """
    name, parameters = states.parameters(
        NAME, weights, prefixes=("hubert.",), ignore=("masked_spec_embed",), renamed=_WEIGHT_NORM
    )
    about = f"DistilHuBERT, {states.origin(weights)}"
    model = network(Graph(name, parameters, progress, CONVOLUTIONS), about)
    states.finish(parameters)
    path = out / f"{name}.onnx"
    save(model, path)
    return sidecars.listener(path, about, rate=RATE, window=WINDOW, trained=weights is not None)


def network(graph: Graph, about: str) -> onnx.ModelProto:
    """`audio` (1, 16000) to `features` (1, 49, 768)."""
    x, steps = _extractor(graph, graph.input("audio", (1, WINDOW), chirps()))
    x = transpose(graph, x, "feature_extractor", (0, 2, 1))
    x = _linear(graph, x, "feature_projection.projection", CHANNELS, WIDTH)
    x = add(graph, x, _positions(graph, x, "encoder.pos_conv_embed"), "encoder")
    x = _layer_norm(graph, x, "encoder.layer_norm")
    for layer in range(LAYERS):
        x = _transformer(graph, x, f"encoder.layers.{layer}", steps)
    return graph.model({"features": (x, (1, steps, WIDTH))}, about)


def chirps() -> Array:
    """(1, 16000): half of it rising tones, half noise with pauses; mean 0, variance 1."""
    time = np.arange(WINDOW) / RATE
    tones = sum(np.sin(2 * np.pi * base * (time + time**2)) / k for k, base in enumerate((120, 440, 900), 1))
    noise = np.random.default_rng(7).standard_normal(WINDOW) * (np.sin(2 * np.pi * 6 * time) > 0)
    sound = np.where(time < 0.5, tones, noise)
    return forward.rounded((sound - sound.mean()) / sound.std())[None]


# --- sound to features


def _extractor(graph: Graph, audio: Value) -> tuple[Value, int]:
    """(1, 512, 49), and the 49."""
    axis = graph.constant("channel_axis", [1])
    x = graph.op("Unsqueeze", [audio, axis], "feature_extractor", lambda a, _: a[:, None])
    steps, channels = WINDOW, 1
    for k, (kernel, stride) in enumerate(EXTRACTOR):
        at = f"feature_extractor.conv_layers.{k}"
        steps = (steps - kernel) // stride + 1
        x = _conv(graph, x, f"{at}.conv", (CHANNELS, channels, kernel), stride)
        if k == 0:
            x = _group_norm(graph, x, f"{at}.layer_norm", steps)
        x = _gelu(graph, x, f"{at}.activation")
        channels = CHANNELS
    return x, steps


def _conv(graph: Graph, x: Value, at: str, shape: tuple[int, int, int], stride: int) -> Value:
    draw = scaled_by(lambda w: forward.conv(x.seen, w, stride), he(shape))
    inputs = [x, graph.constant(f"{at}.weight", graph.parameters.get(f"{at}.weight", shape, draw))]
    graph.count(at)
    attributes = conv_attributes(shape[2:], stride, 0)
    return graph.op("Conv", inputs, at, lambda a, w: forward.conv(a, w, stride), **attributes)


def _group_norm(graph: Graph, x: Value, at: str, steps: int) -> Value:
    """A group for each channel: as InstanceNormalization between two Reshapes, then weight and bias."""
    ones, zeros = (
        graph.constant(f"{at}.{n}", np.full(CHANNELS, v)) for n, v in (("one", 1.0), ("zero", 0.0))
    )
    x = reshape(graph, x, at, (1, CHANNELS, -1))
    x = graph.op(
        "InstanceNormalization",
        [x, ones, zeros],
        at,
        lambda a, *_: forward.normalise(a, (2,), EPSILON),
        epsilon=EPSILON,
    )
    x = reshape(graph, x, at, (1, CHANNELS, steps))
    weight = graph.parameters.get(f"{at}.weight", (CHANNELS,), around(1.0, (CHANNELS,), 0.2))
    bias = graph.parameters.get(f"{at}.bias", (CHANNELS,), normal((CHANNELS,), 0.2))
    scaled = graph.op("Mul", [x, graph.constant(f"{at}.weight", weight[:, None])], at, np.multiply)
    return add(graph, scaled, graph.constant(f"{at}.bias", bias[:, None]), at)


def _positions(graph: Graph, x: Value, at: str) -> Value:
    """A convolution over 128 steps, its weights normalised for each tap; the step too many is cut off."""
    shape = (WIDTH, WIDTH // GROUPS, POSITIONS)
    x = transpose(graph, x, at, (0, 2, 1))
    direction = graph.parameters.get(f"{at}.conv.weight_v", shape, normal(shape, 1.0))
    unit = direction / np.sqrt(np.square(direction, dtype=np.float64).sum(axis=(0, 1), keepdims=True))

    def convolve(weights: Array) -> Array:
        return forward.conv(x.seen, unit * weights, pad=POSITIONS // 2, groups=GROUPS)

    lengths = (1, 1, POSITIONS)
    length = graph.parameters.get(
        f"{at}.conv.weight_g", lengths, scaled_by(convolve, around(1, lengths, 0.1))
    )
    bias = graph.parameters.get(f"{at}.conv.bias", (WIDTH,), normal((WIDTH,), 0.1))
    graph.count(at)
    y = graph.op(
        "Conv",
        [
            x,
            graph.constant(f"{at}.conv.weight", unit * length),
            graph.constant(f"{at}.conv.bias", bias),
        ],
        f"{at}.conv",
        lambda a, w, b: forward.conv(a, w, pad=POSITIONS // 2, groups=GROUPS) + b[:, None],
        **conv_attributes((POSITIONS,), 1, POSITIONS // 2, GROUPS),
    )
    cut = [graph.constant(f"cut_{name}", [value]) for name, value in (("from", 0), ("to", -1), ("axis", 2))]
    y = graph.op("Slice", [y, *cut], f"{at}.padding", lambda a, *_: a[:, :, :-1])
    return transpose(graph, _gelu(graph, y, f"{at}.activation"), at, (0, 2, 1))


# --- the transformer


def _transformer(graph: Graph, x: Value, at: str, steps: int) -> Value:
    """Attention and two linear layers, each added to its input and then normalised."""
    x = add(graph, x, _attention(graph, x, f"{at}.attention", steps), at)
    x = _layer_norm(graph, x, f"{at}.layer_norm")
    y = _gelu(
        graph, _linear(graph, x, f"{at}.feed_forward.intermediate_dense", WIDTH, INNER), f"{at}.feed_forward"
    )
    y = _linear(graph, y, f"{at}.feed_forward.output_dense", INNER, WIDTH)
    return _layer_norm(graph, add(graph, x, y, at), f"{at}.final_layer_norm")


def _attention(graph: Graph, x: Value, at: str, steps: int) -> Value:
    def heads(which: str, order: Sequence[int]) -> Value:
        projected = _linear(graph, x, f"{at}.{which}_proj", WIDTH, WIDTH)
        parted = reshape(graph, projected, at, (1, steps, HEADS, _PER_HEAD))
        return transpose(graph, parted, at, order)

    queries, keys, values = heads("q", (0, 2, 1, 3)), heads("k", (0, 2, 3, 1)), heads("v", (0, 2, 1, 3))
    products = graph.op("MatMul", [queries, keys], at, np.matmul)
    root = graph.constant("root_of_head", np.float32(math.sqrt(_PER_HEAD)))
    products = graph.op("Div", [products, root], at, np.divide)
    shares = graph.op("Softmax", [products], at, lambda a: forward.softmax(a, -1), axis=-1)
    mixed = graph.op("MatMul", [shares, values], at, np.matmul)
    joined = reshape(graph, transpose(graph, mixed, at, (0, 2, 1, 3)), at, (1, steps, WIDTH))
    return _linear(graph, joined, f"{at}.out_proj", WIDTH, WIDTH)


def _linear(graph: Graph, x: Value, at: str, inputs: int, outputs: int) -> Value:
    """MatMul with the transposed weights, then Add: a linear layer on sequences, as it is exported."""
    shape = (outputs, inputs)
    draw = scaled_by(lambda w: x.seen @ w.T, normal(shape, 1 / math.sqrt(inputs)))
    weights = graph.parameters.get(f"{at}.weight", shape, draw)
    bias = graph.parameters.get(f"{at}.bias", (outputs,), normal((outputs,), 0.1))
    y = graph.op("MatMul", [x, graph.constant(f"{at}.weight", weights.T)], at, np.matmul)
    return graph.op("Add", [graph.constant(f"{at}.bias", bias), y], at, np.add)


def _layer_norm(graph: Graph, x: Value, at: str) -> Value:
    weight = graph.parameters.get(f"{at}.weight", (WIDTH,), around(1.0, (WIDTH,), 0.1))
    bias = graph.parameters.get(f"{at}.bias", (WIDTH,), normal((WIDTH,), 0.1))
    return graph.op(
        "LayerNormalization",
        [x, graph.constant(f"{at}.weight", weight), graph.constant(f"{at}.bias", bias)],
        at,
        lambda a, w, b: forward.normalise(a, (-1,), EPSILON) * w + b,
        axis=-1,
        epsilon=EPSILON,
    )


def _gelu(graph: Graph, x: Value, at: str) -> Value:
    """x / 2 * (1 + erf(x / sqrt 2)), node by node."""
    root, one, half = (
        graph.constant(name, np.float32(value))
        for name, value in (("root_of_two", math.sqrt(2)), ("one", 1.0), ("half", 0.5))
    )
    y = graph.op("Erf", [graph.op("Div", [x, root], at, np.divide)], at, forward.erf)
    y = graph.op("Mul", [x, graph.op("Add", [y, one], at, np.add)], at, np.multiply)
    return graph.op("Mul", [y, half], at, np.multiply)
