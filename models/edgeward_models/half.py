"""FP16 in the graph, float32 at its inputs and outputs: what CUDA and TensorRT run as it is."""

from __future__ import annotations

from collections.abc import Collection

import onnx


def to_half(model: onnx.ModelProto, keep_float: Collection[str] = ()) -> onnx.ModelProto:
    """The model with FP16 weights and activations; nodes named in `keep_float` stay in float32."""
    raise NotImplementedError
