"""Which layers quantising hurts most: each alone as the scheme would make it, all else in float.

A layer's figure is the SQNR (dB) of the model's outputs when the layer's weights and the activations that it
reads have the scheme's codes. Everything runs in float kernels (weights are rounded beforehand, activations
pass a QuantizeLinear and a DequantizeLinear), so that it is the scheme that is measured, and no machine.

Invariants: a layer that is not in the answer was not reached before the deadline, nothing stands in for a
measurement; all figures of one answer come from the same samples.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from edgeward_models.calibration import Feeds, Ranges, check_feeds
from edgeward_models.codes import activation_code, rounded_weights
from edgeward_models.graph import macs_by_node
from edgeward_models.progress import Progress, silent
from edgeward_models.regions import Graph, Weighted
from edgeward_models.schemes import Scheme
from edgeward_models.similarity import energies, ratio_db
from edgeward_runtime.sessions import CPU, NotLoaded, RunFailed, Session, open_session
from edgeward_wire.errors import Rejected
from edgeward_wire.verdict import Plan

FEEDS = 8
"""Samples that each layer is measured on, at most."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Layer:
    """One weighted node, and what quantising it alone does to the outputs."""

    name: str
    op: str
    macs_share: float
    """Of all multiplications of the model, 0..1."""
    sqnr_db: float
    """Infinite when nothing changes."""


def rank_layers(
    prepared: Path,
    scheme: Scheme,
    ranges: Ranges,
    feeds: Sequence[Feeds],
    *,
    constants: Mapping[str, Array] | None = None,
    known: Mapping[str, float] | None = None,
    deadline: float | None = None,
    progress: Progress = silent,
) -> list[Layer]:
    """The quantisable layers, the most sensitive first; those that the scheme keeps in float are not asked.

    `feeds` and `constants` together are all inputs; at most `FEEDS` of them are used. `known` are figures
    that were measured on these feeds before: they are not measured again. `deadline` is a time of
    `time.monotonic()`: layers are measured in the order of their weights' own noise, the noisiest first, and
    those that are neither known nor reached are left out.

    Raises:
        Rejected: the model does not load or does not run on the samples.
    """
    model = onnx.load(str(prepared))
    graph = Graph(model)
    layers = _asked(graph, scheme, ranges)
    samples = [{**feed, **(constants or {})} for feed in feeds[:FEEDS]]
    if not samples:
        raise ValueError("no feeds to rank layers on")
    figures = {name: sqnr for name, sqnr in (known or {}).items() if name in {one.name for one in layers}}
    rest = [one for one in layers if one.name not in figures]
    if rest and (deadline is None or time.monotonic() <= deadline):
        with tempfile.TemporaryDirectory(prefix="edgeward-sensitivity-") as scratch:
            bench = _Bench(model, graph, Path(scratch), prepared.name)
            reference = bench.reference(samples)
            for one in rest:
                if deadline is not None and time.monotonic() > deadline:
                    break
                progress("layer by layer", len(figures), len(layers))
                figures[one.name] = bench.sqnr(one, scheme, ranges, samples, reference)
    progress("layer by layer", len(figures), len(figures))
    macs = macs_by_node(model)
    every = max(1, sum(macs.values()))
    found = [
        Layer(one.name, one.op, macs.get(one.name, 0) / every, figures[one.name])
        for one in layers
        if one.name in figures
    ]
    return sorted(found, key=lambda layer: (layer.sqnr_db, layer.name))


def _asked(graph: Graph, scheme: Scheme, ranges: Ranges) -> list[Weighted]:
    """The layers to rank, those with the noisiest weights first."""
    layers = [w for w in graph.quantisable if w.name not in scheme.keep_float and w.data in ranges]
    if scheme.operators:
        layers = [w for w in layers if w.op in scheme.operators]
    return sorted(layers, key=lambda one: _weight_noise(graph, one, scheme), reverse=True)


class _Bench:
    """The model with its weights in a file beside it, so that one layer's model is a small file."""

    def __init__(self, model: onnx.ModelProto, graph: Graph, home: Path, name: str) -> None:
        self.home, self.name = home, name
        self.weights = {
            w.weights: numpy_helper.to_array(graph.constants[w.weights]) for w in graph.quantisable
        }
        self.plain = onnx.ModelProto()
        self.plain.CopyFrom(model)
        external_data_helper.convert_model_to_external_data(
            self.plain, all_tensors_to_one_file=True, location="weights", size_threshold=4096
        )
        onnx.save(self.plain, str(home / "plain.onnx"))

    def reference(self, samples: Sequence[Feeds]) -> list[list[Array]]:
        """The float outputs on the samples."""
        session = self._open(self.home / "plain.onnx")
        check_feeds(session, samples[0])
        outputs = [self._run(session, sample) for sample in samples]
        session.close()
        return outputs

    def sqnr(
        self,
        one: Weighted,
        scheme: Scheme,
        ranges: Ranges,
        samples: Sequence[Feeds],
        reference: Sequence[Sequence[Array]],
    ) -> float:
        path = self.home / "layer.onnx"
        path.write_bytes(self._with(one, scheme, ranges).SerializeToString())
        session = self._open(path)
        signal = noise = 0.0
        for sample, expected in zip(samples, reference, strict=True):
            for mine, other in zip(expected, self._run(session, sample), strict=True):
                if np.issubdtype(mine.dtype, np.floating):
                    parts = energies(mine, other)
                    signal, noise = signal + parts[0], noise + parts[1]
        session.close()
        return ratio_db(signal, noise)

    def _with(self, one: Weighted, scheme: Scheme, ranges: Ranges) -> onnx.ModelProto:
        """The model with this one layer's weights rounded and the activations that it reads in codes."""
        model = onnx.ModelProto()
        model.CopyFrom(self.plain)
        rounded = rounded_weights(self.weights[one.weights], one, scheme)
        tensor = next(t for t in model.graph.initializer if t.name == one.weights)
        tensor.CopyFrom(numpy_helper.from_array(rounded, one.weights))
        scale, zero = activation_code(ranges[one.data], scheme)
        kind = TensorProto.UINT8 if scheme.activations == "u8" else TensorProto.INT8
        model.graph.initializer.extend(
            [
                helper.make_tensor("edgeward/scale", TensorProto.FLOAT, [], [scale]),
                helper.make_tensor("edgeward/zero", kind, [], [zero]),
            ]
        )
        place = next(k for k, node in enumerate(model.graph.node) if node.name == one.name)
        node = model.graph.node[place]
        node.input[0] = "edgeward/dequantised"
        codes = ["edgeward/scale", "edgeward/zero"]
        model.graph.node.insert(
            place, helper.make_node("DequantizeLinear", ["edgeward/code", *codes], ["edgeward/dequantised"])
        )
        model.graph.node.insert(
            place, helper.make_node("QuantizeLinear", [one.data, *codes], ["edgeward/code"])
        )
        return model

    def _open(self, path: Path) -> Session:
        try:
            return open_session(path, Plan(provider=CPU, variant="sensitivity", threads=1))
        except NotLoaded as error:
            raise Rejected(f"{self.name} does not load: {error.what}") from error

    def _run(self, session: Session, feed: Feeds) -> list[Array]:
        try:
            return session.run(feed)
        except RunFailed as error:
            raise Rejected(f"{self.name} does not run on a sample: {error.what}") from error


def _weight_noise(graph: Graph, one: Weighted, scheme: Scheme) -> float:
    """The relative energy of what rounding takes from the weights: says where to look first."""
    weights = numpy_helper.to_array(graph.constants[one.weights])
    signal, noise = energies(weights, rounded_weights(weights, one, scheme))
    return noise / signal if signal else 0.0
