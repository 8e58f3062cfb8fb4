"""A prepared float file becomes INT8 or FP16. The only importer of onnxruntime's quantiser and converters.

Invariants
- The same prepared file, scheme and ranges give the same bytes. Metadata of tools is taken off.
- Nothing is written beside the input, and `out` is whole or not there.
- With `pair` weights no dense kernel of the file can saturate (pairsafe.py).
- What is written satisfies ONNX's checker. Whether a session loads it under a plan, and runs it right, is a
  verdict that the caller gets by opening it.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, shape_inference

from edgeward_models import half
from edgeward_models.calibration import Ranges
from edgeward_models.codes import CODES, weight_scales
from edgeward_models.gelu import fuse_gelu
from edgeward_models.prepare import sort_nodes, strip
from edgeward_models.regions import WEIGHTED, Graph, Weighted
from edgeward_models.residuals import quantise_shortcuts
from edgeward_models.schemes import Scheme
from edgeward_models.shield import shield
from edgeward_models.whole_file import write_whole
from edgeward_wire.errors import Rejected

_DYNAMIC = ("MatMul", "LSTM")
"""Quantised while they run; a dynamic convolution is several times slower than one in float (measured)."""

Overrides = dict[str, list[dict[str, Any]]]


def quantise(prepared: Path, out: Path, scheme: Scheme, ranges: Ranges | None = None) -> Path:
    """Write `prepared` as the scheme says to `out`; returns `out`. Static schemes need `ranges`.

    Raises:
        Rejected: the model has nothing that the scheme could quantise, or a range is missing.
        Unavailable: `out` cannot be written.
    """
    model = onnx.load(str(prepared))
    made = _METHODS[scheme.method](model, scheme, ranges, prepared.name)
    _forget_shapes(made.graph)
    sort_nodes(made.graph)
    strip(made)
    onnx.checker.check_model(made, full_check=True)
    write_whole(out, made.SerializeToString(deterministic=True))
    return out


def _forget_shapes(graph: onnx.GraphProto) -> None:
    """Leave only the shapes that nobody can infer again: those behind operators that are not ONNX's."""
    foreign = {name for node in graph.node if node.domain not in ("", "ai.onnx") for name in node.output}
    kept = [value for value in graph.value_info if value.name in foreign]
    copies = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
    del graph.value_info[:]
    graph.value_info.extend(copies)


def quantisable(prepared: Path) -> list[str]:
    """Names of the nodes whose weights a scheme may quantise, in the graph's order."""
    return [weighted.name for weighted in Graph(onnx.load(str(prepared))).quantisable]


def nothing_to_quantise(name: str) -> Rejected:
    """What to say of a model without any weights that could become integers."""
    return Rejected(
        f"{name} has nothing to quantise: no convolution or product with constant float32 weights.",
        "Deploy it in float, with --allow-float REASON.",
    )


# --- static


def _static(model: onnx.ModelProto, scheme: Scheme, ranges: Ranges | None, name: str) -> onnx.ModelProto:
    from onnxruntime.quantization import QDQQuantizer, QuantType

    if ranges is None:
        raise ValueError("a static scheme needs ranges")
    shaped = shape_inference.infer_shapes(model)
    if scheme.outputs:
        fuse_gelu(shaped)
    graph = Graph(shaped)
    nodes = _nodes(graph, scheme, ranges, name)
    weighted = [w for w in graph.quantisable if w.name in nodes]
    kinds = sorted({node.op_type for node in graph.nodes if node.name in nodes})
    with _quiet():
        quantizer = QDQQuantizer(
            shaped,
            scheme.per_channel,
            False,  # every weight has its own range below
            QuantType.QInt8,
            QuantType.QUInt8 if scheme.activations == "u8" else QuantType.QInt8,
            _tensors(ranges),
            nodes,
            [],
            kinds,
            _options(graph, weighted, scheme),
        )
        quantizer.quantize_model()
    made: onnx.ModelProto = quantizer.model.model
    if not scheme.outputs:
        quantise_shortcuts(made, {w.name for w in weighted}, scheme, ranges)
    shield(made)
    return made


def _nodes(graph: Graph, scheme: Scheme, ranges: Ranges, name: str) -> list[str]:
    """The nodes to quantise, by name. What was infinite somewhere has no range, and stays in float."""
    operators = scheme.operators or graph.operators()
    if not scheme.outputs:
        operators = tuple(op for op in operators if op in WEIGHTED)
    wanted = set(graph.to_quantise(operators, scheme.keep_float))
    nodes = [node for node in graph.nodes if node.name in wanted]
    if not any(node.op_type in WEIGHTED for node in nodes):
        raise nothing_to_quantise(name)
    ranged = [n for n in nodes if all(t in ranges for t in (*n.input, *n.output) if t in graph.floats)]
    if not any(node.op_type in WEIGHTED for node in ranged):
        raise Rejected(f"The ranges are of another model than {name}.", "Calibrate the prepared file itself.")
    return [node.name for node in ranged]


def _tensors(ranges: Ranges) -> Any:
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData

    limits: dict[str, Any] = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in ranges.items()
    }
    return TensorsData(CalibrationMethod.MinMax, limits)


def _overrides(graph: Graph, weighted: Collection[Weighted], scheme: Scheme) -> Overrides:
    """The range of each channel of each weight, as the quantiser wants to hear it."""
    from onnxruntime.quantization import QuantType

    common = {"quant_type": QuantType.QInt8, "symmetric": True, "reduce_range": False}
    found: Overrides = {}
    for one in weighted:
        weights = numpy_helper.to_array(graph.constants[one.weights])
        limits = (CODES * weight_scales(weights, one, scheme)).astype(np.float32)
        if scheme.per_channel:
            found[one.weights] = [{**common, "axis": one.axis, "rmin": -x, "rmax": x} for x in limits]
        else:
            found[one.weights] = [{**common, "rmin": -limits.max(), "rmax": limits.max()}]
    return found


def _options(graph: Graph, weighted: Collection[Weighted], scheme: Scheme) -> dict[str, Any]:
    """The quantiser's further options."""
    options: dict[str, Any] = {
        "TensorQuantOverrides": _overrides(graph, weighted, scheme),
        "ActivationSymmetric": scheme.symmetric_activations,
    }
    if not scheme.outputs:
        options |= {
            "OpTypesToExcludeOutputQuantization": list(WEIGHTED),
            "DedicatedQDQPair": True,  # TensorRT does not share one between consumers
            "QuantizeBias": False,
        }
    return options


# --- dynamic and half


def _dynamic(model: onnx.ModelProto, scheme: Scheme, ranges: Ranges | None, name: str) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = Graph(model)
    kinds = list(scheme.operators or _DYNAMIC)
    if not any(w.op in (*kinds, "Gemm") for w in graph.weighted) and "LSTM" not in {
        n.op_type for n in graph.nodes
    }:
        raise nothing_to_quantise(name)
    with tempfile.TemporaryDirectory(prefix="edgeward-dynamic-") as scratch, _quiet():
        source, target = Path(scratch) / "float.onnx", Path(scratch) / "dynamic.onnx"
        source.write_bytes(model.SerializeToString(deterministic=True))
        quantize_dynamic(
            str(source),
            str(target),
            op_types_to_quantize=kinds,
            per_channel=scheme.per_channel,
            reduce_range=scheme.weights != "s8",
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(scheme.keep_float),
        )
        return onnx.load(str(target))


def _half(model: onnx.ModelProto, scheme: Scheme, ranges: Ranges | None, name: str) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    shaped = shape_inference.infer_shapes(model)
    kept = half.float_nodes(Graph(shaped), scheme.keep_float)
    with _quiet():
        made: onnx.ModelProto = convert_float_to_float16(
            shaped, keep_io_types=True, op_block_list=list(half.BLOCKED), node_block_list=kept
        )
    half.join_floats(made, kept)
    return made


_METHODS: Mapping[str, Callable[[onnx.ModelProto, Scheme, Ranges | None, str], onnx.ModelProto]] = {
    "static": _static,
    "dynamic": _dynamic,
    "fp16": _half,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser logs on the root logger what it skips and how it likes its models made."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
