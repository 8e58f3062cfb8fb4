"""A small network with work enough for INT8 to pay on any processor, and its sidecar, labels and pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import helper

from models.graphs import model_of, save
from runtime import builders


def heavy(path: Path, *, size: int = 32, width: int = 48, bad: bool = False, last: str = "") -> Path:
    """image (1, 3, size, size) -> four convolutions -> logits (1, 3), through the operator `last`.

    `bad` takes their logarithm.
    """
    rng = np.random.default_rng(7)
    weights: dict[str, np.ndarray] = {}
    nodes = []
    source, channels = "image", 3
    for k in range(4):
        fan = channels * 9
        weights[f"w{k}"] = rng.normal(0, (2 / fan) ** 0.5, (width, channels, 3, 3)).astype(np.float32)
        nodes.append(helper.make_node("Conv", [source, f"w{k}"], [f"c{k}"], name=f"conv{k}", pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{k}"], [f"r{k}"], name=f"relu{k}"))
        source, channels = f"r{k}", width
    weights["dense"] = rng.normal(0, width**-0.5, (3, width)).astype(np.float32)
    weights["bias"] = np.zeros(3, np.float32)
    last = "Log" if bad else last
    scores = "inner" if last else "logits"
    nodes += [
        helper.make_node("GlobalAveragePool", [source], ["pool"], name="pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "dense", "bias"], [scores], name="gemm", transB=1),
    ]
    if last:
        nodes.append(helper.make_node(last, ["inner"], ["logits"], name="last"))
    model = model_of(nodes, {"image": [1, 3, size, size]}, {"logits": [1, 3]}, weights)
    return save(path, model)


def beside(model: Path, size: int = 32) -> Path:
    """Give a model its labels, pictures and sidecar; returns the model."""
    builders.labels_file(model.parent / "labels.txt")
    builders.picture_directory(model.parent / "pictures")
    builders.sidecar_file(model.with_suffix(".toml"), size=size, samples="pictures")
    return model
