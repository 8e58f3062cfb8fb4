"""ResNet-50 (v1.5: the stride is in the 3 x 3 convolution), ImageNet, 224 x 224.

Batch normalisation stays a node of its own, as `torch.onnx.export(training=PRESERVE)` leaves it, so that
optimisers meet what they meet in users' models. Random weights, unless `--weights` brings a state dict with
torchvision's names (`conv1.weight`, `layer1.0.bn1.running_mean`, ... `fc.bias`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from edgeward_models.progress import Progress, silent
from edgeward_models.zoo import Built

from . import forward, sidecars, states
from .graphs import (
    Graph,
    Value,
    add,
    batch_norm,
    conv,
    he,
    normal,
    photographs,
    save,
    scaled_by,
)

NAME = "resnet50"
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
"""(width, blocks); a block gives four times its width."""
CONVOLUTIONS = 53
CLASSES = 1000
BRANCH_GAIN = 0.5
"""Of a block's last normalisation: as in a trained network, a branch is less than what it is added to."""
PROBE_SIZE = 160


def build(out: Path, *, weights: Path | None = None, progress: Progress = silent) -> Built:
    """Write the float model, its sidecar, labels and pictures into `out`.

    Raises:
        Rejected: `weights` is not a state dict of this network.
    """
    name, parameters = states.parameters(NAME, weights)
    about = f"ResNet-50, {states.origin(weights)}"
    model = network(Graph(name, parameters, progress, CONVOLUTIONS), about)
    states.finish(parameters)
    path = out / f"{name}.onnx"
    save(model, path)
    return sidecars.classifier(path, about, trained=weights is not None)


def network(graph: Graph, about: str) -> onnx.ModelProto:
    """`image` (batch, 3, 224, 224) to `logits` (batch, 1000)."""
    spread = np.array(sidecars.IMAGENET_SPREAD)[:, None, None]
    mean = np.array(sidecars.IMAGENET_MEAN)[:, None, None]
    probe = (photographs(PROBE_SIZE) - mean) / spread
    image = graph.input("image", ("batch", 3, 224, 224), probe)
    x = _rectified(graph, conv(graph, image, "conv1", (3, 64), (7, 7), stride=2, pad=3), "bn1", 64)
    x = graph.op(
        "MaxPool",
        [x],
        "maxpool",
        lambda a: forward.max_pool(a, 3, 2, 1),
        ceil_mode=0,
        kernel_shape=[3, 3],
        pads=[1, 1, 1, 1],
        strides=[2, 2],
    )
    channels = 64
    for stage, (width, blocks) in enumerate(STAGES, start=1):
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            x = _bottleneck(graph, x, f"layer{stage}.{block}", (channels, width), stride)
            channels = 4 * width
    return graph.model({"logits": (_head(graph, x, channels), ("batch", CLASSES))}, about)


def _rectified(graph: Graph, x: Value, at: str, channels: int) -> Value:
    x = batch_norm(graph, x, at, channels)
    return graph.op("Relu", [x], at.rpartition(".")[0] or "relu", lambda a: np.maximum(a, 0))


def _bottleneck(graph: Graph, x: Value, at: str, channels: tuple[int, int], stride: int) -> Value:
    """From channels[0] to four times channels[1]."""
    given, width = channels
    y = _rectified(graph, conv(graph, x, f"{at}.conv1", (given, width), (1, 1)), f"{at}.bn1", width)
    y = conv(graph, y, f"{at}.conv2", (width, width), (3, 3), stride=stride, pad=1)
    y = conv(graph, _rectified(graph, y, f"{at}.bn2", width), f"{at}.conv3", (width, 4 * width), (1, 1))
    y = batch_norm(graph, y, f"{at}.bn3", 4 * width, gain=BRANCH_GAIN)
    if stride != 1 or given != 4 * width:
        x = conv(graph, x, f"{at}.downsample.0", (given, 4 * width), (1, 1), stride=stride)
        x = batch_norm(graph, x, f"{at}.downsample.1", 4 * width)
    return graph.op("Relu", [add(graph, y, x, at)], at, lambda a: np.maximum(a, 0))


def _head(graph: Graph, x: Value, channels: int) -> Value:
    x = graph.op("GlobalAveragePool", [x], "avgpool", lambda a: a.mean(axis=(2, 3), keepdims=True))
    x = graph.op("Flatten", [x], "", lambda a: a.reshape(len(a), -1), axis=1)
    shape = (CLASSES, channels)
    get = graph.parameters.get
    weights = get("fc.weight", shape, scaled_by(lambda w: x.seen @ w.T, he(shape), spread=2.0))
    bias = get("fc.bias", shape[:1], normal(shape[:1], 0.1))
    inputs = [x, graph.constant("fc.weight", weights), graph.constant("fc.bias", bias)]
    return graph.op("Gemm", inputs, "fc", lambda a, w, b: a @ w.T + b, alpha=1.0, beta=1.0, transB=1)
