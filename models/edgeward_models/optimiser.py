"""The only importer of `onnxruntime.transformers`: attention, LayerNorm and GELU fused by its Python rules.

They see more attention than the runtime's own fusions do, but only in the graph as it was exported: the
runtime's basic level rewrites MatMul + Add to Gemm, and hides it from both. So this comes first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def fuse_transformer(path: Path, out: Path) -> str:
    """Write the fused graph to `out`. Returns why it could not be, or nothing.

    The number of heads is read from the graph. The result holds operators of com.microsoft; whether it
    still gives the same outputs is for the caller to prove.
    """
    with _quiet():
        from onnxruntime.transformers import optimizer
        from onnxruntime.transformers.fusion_options import FusionOptions

        options = FusionOptions("bert")
        options.enable_shape_inference = False  # it needs sympy, and finds a Reshape more at the most
        try:
            model = optimizer.optimize_model(
                str(path), model_type="bert", optimization_options=options, opt_level=0, use_gpu=False
            ).model
        except Exception as error:  # noqa: BLE001 - its rules trip over graphs that they do not know
            return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    out.write_bytes(model.SerializeToString(deterministic=True))
    return ""


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
