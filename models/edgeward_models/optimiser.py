"""The only importer of `onnxruntime.transformers`: attention, LayerNorm and GELU fused by its Python rules.

They see more attention than the runtime's own fusions do, but only in the graph as it was exported: the
runtime's basic level rewrites MatMul + Add to Gemm, and hides it from both. So this comes first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import onnx


def fuse_transformer(model: onnx.ModelProto) -> onnx.ModelProto | str:
    """The graph with its transformer blocks fused, or why they could not be.

    The number of heads is read from the graph. The result holds operators of com.microsoft; whether it
    still gives the same outputs is for the caller to prove.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with _quiet():
        from onnxruntime.transformers.fusion_options import FusionOptions
        from onnxruntime.transformers.optimizer import optimize_by_fusion

        options = FusionOptions("bert")
        options.enable_shape_inference = False  # it needs sympy, and finds a Reshape more at the most
        try:
            fused: onnx.ModelProto = optimize_by_fusion(copy, "bert", optimization_options=options).model
        except Exception as error:  # noqa: BLE001 - its rules trip over graphs that they do not know
            return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    fused.producer_name, fused.producer_version = model.producer_name, model.producer_version
    return fused


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep its loggers, which have no handlers of their own, from Python's last resort: stderr."""
    handler = logging.NullHandler()
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
