"""What ranges the activations of a float model take on data: the range of each tensor, and how it is cut.

Invariants
- The same file and feeds give the same ranges on any machine of one kind: nothing is optimised, one thread,
  ranges rounded to three digits.
- Memory does not grow with the number of feeds nor with the size of the activations: the graph itself reduces
  each tensor to its smallest and largest value and, for a histogram, to an even sample of at most
  `SAMPLES` values a run; histograms widen by powers of two as they go. (ONNX Runtime's own calibrators keep
  every activation of every feed until the end, and open sessions of their own, past our plans.)
- What a ReLU or Clip cuts off needs no codes: its input has its output's range.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from edgeward_models.histogram import Histogram
from edgeward_models.progress import Progress, silent
from edgeward_models.regions import CNN, Graph, bypassed
from edgeward_models.schemes import Calibration
from edgeward_runtime.sessions import NotLoaded, RunFailed, Session, open_exact
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected

SAMPLES = 65536
"""Values of one tensor that one run adds to its histogram, at most."""
PERCENTILE = 99.99
"""The share of values, in percent, that stays within a percentile range."""

Feeds = dict[str, npt.NDArray[Any]]
Range = tuple[float, float]


class Ranges(Mapping[str, Range]):
    """Tensor -> (smallest, largest) value that gets a code; zero is always within."""

    def __init__(self, ranges: Mapping[str, Iterable[float]]) -> None:
        """Raises ValueError when a range does not hold zero, or is not finite."""
        found: dict[str, Range] = {}
        for name, (low, high) in sorted(ranges.items()):
            if not (math.isfinite(low) and math.isfinite(high) and low <= 0 <= high):
                raise ValueError(f"no range of {name}: {low} .. {high}")
            found[name] = (float(low), float(high))
        self._ranges = found

    def __getitem__(self, name: str) -> Range:
        return self._ranges[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranges)

    def __len__(self) -> int:
        return len(self._ranges)

    def plain(self) -> dict[str, list[float]]:
        """As JSON knows it; `Ranges(plain)` is the same again."""
        return {name: list(limits) for name, limits in self._ranges.items()}

    def knowing(self, known: Mapping[str, Range]) -> Ranges:
        """The same with ranges that are known rather than seen."""
        return Ranges({**self._ranges, **known})


def source_ranges(contract: Contract) -> dict[str, Range]:
    """The exact range of each picture input: with it a code is a pixel, and nothing is lost."""
    found = {}
    for port in contract.inputs:
        if port.image is not None and port.bind == "source":
            ends = [
                b + s * x for s, b in zip(port.image.scale, port.image.bias, strict=True) for x in (0, 255)
            ]
            found[port.name] = (min(0.0, *ends), max(0.0, *ends))
    return found


def calibrate(
    prepared: Path,
    feeds: Iterable[Feeds],
    method: Calibration = "minmax",
    operators: Iterable[str] = (),
    progress: Progress = silent,
    *,
    known: Mapping[str, Range] | None = None,
    percentile: float = PERCENTILE,
    total: int = 0,
) -> Ranges:
    """Observe a prepared file's activations over `feeds` (all inputs of the graph, each run once).

    `operators`: whose inputs and outputs to observe; empty: all that a scheme may quantise. `known` ranges
    win over what is seen. `total` is the number of feeds for the progress, where `feeds` has no length.

    Raises:
        Rejected: no feeds, feeds that do not fit, or an output that is not finite.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(str(prepared)))
    graph = Graph(model)
    tensors = _tensors(graph, set(operators) or set(CNN))
    observer = _Observer(graph, tensors, sampled=method != "minmax")
    count = len(feeds) if isinstance(feeds, list | tuple) else total
    with tempfile.TemporaryDirectory(prefix="edgeward-calibrate-") as scratch:
        session = observer.open(Path(scratch) / "observed.onnx", prepared.name)
        done = 0
        for feed in feeds:
            progress("calibrating", done, max(count, done + 1))
            observer.observe(session, feed)
            done += 1
        session.close()
    if not done:
        raise Rejected(
            "There is nothing to calibrate with: no samples.", "Give at least a few dozen samples."
        )
    progress("calibrating", done, done)
    ranges = {name: _rounded(limits) for name, limits in observer.ranges(method, percentile).items()}
    for before, after in bypassed(graph):
        if before in ranges and after in ranges:
            ranges[before] = ranges[after]
    return Ranges(ranges).knowing({name: r for name, r in (known or {}).items() if name in ranges})


def _rounded(limits: Range) -> Range:
    return float(f"{min(limits[0], 0.0):.3g}"), float(f"{max(limits[1], 0.0):.3g}")


def _tensors(graph: Graph, operators: set[str]) -> list[str]:
    """The float activations around the nodes of these operators, and the outputs, in the graph's order."""
    seen: dict[str, None] = {}
    for node in graph.nodes:
        if node.op_type in operators:
            seen.update(dict.fromkeys(name for name in (*node.input, *node.output) if name in graph.floats))
    seen.update(dict.fromkeys(name for name in graph.outputs if name in graph.floats))
    return list(seen)


class _Observer:
    """A copy of the graph whose outputs are what is to be known of its activations."""

    def __init__(self, graph: Graph, tensors: list[str], *, sampled: bool) -> None:
        self.graph, self.tensors, self.sampled = graph, tensors, sampled
        self.low = dict.fromkeys(tensors, 0.0)
        self.high = dict.fromkeys(tensors, 0.0)
        self.unbounded: set[str] = set()
        self.histograms = {name: Histogram() for name in tensors} if sampled else {}
        self._results = set(graph.outputs)
        self.sizes = _sizes(graph.model)

    def open(self, path: Path, name: str) -> Session:
        model = onnx.ModelProto()
        model.CopyFrom(self.graph.model)
        del model.graph.output[:]
        flat = helper.make_tensor("edgeward/flat", TensorProto.INT64, [1], [-1])
        zero = helper.make_tensor("edgeward/zero", TensorProto.INT64, [1], [0])
        end = helper.make_tensor("edgeward/end", TensorProto.INT64, [1], [(1 << 62)])
        model.graph.initializer.extend([flat, zero, end])
        for k, tensor in enumerate(self.tensors):
            self._reduce(model.graph, tensor, k)
        path.write_bytes(model.SerializeToString())
        try:
            return open_exact(path)
        except NotLoaded as error:
            raise Rejected(f"{name} does not load: {error.what}") from error

    def _reduce(self, graph: onnx.GraphProto, tensor: str, k: int) -> None:
        for op in ("ReduceMin", "ReduceMax"):
            out = f"edgeward/{op}/{k}"
            graph.node.append(helper.make_node(op, [tensor], [out], name=out, keepdims=0))
            graph.output.append(helper.make_tensor_value_info(out, TensorProto.FLOAT, None))
        if not self.sampled:
            return
        step = _stride(self.sizes.get(tensor, 0))
        out, flat = f"edgeward/sample/{k}", f"edgeward/flat/{k}"
        graph.initializer.append(helper.make_tensor(f"edgeward/step/{k}", TensorProto.INT64, [1], [step]))
        graph.node.append(helper.make_node("Reshape", [tensor, "edgeward/flat"], [flat], name=flat))
        inputs = [flat, "edgeward/zero", "edgeward/end", "edgeward/zero", f"edgeward/step/{k}"]
        graph.node.append(helper.make_node("Slice", inputs, [out], name=out))
        graph.output.append(helper.make_tensor_value_info(out, TensorProto.FLOAT, None))

    def observe(self, session: Session, feed: Feeds) -> None:
        check_feeds(session, feed)
        try:
            outputs = session.run(feed)
        except RunFailed as error:
            raise Rejected(f"The model does not run on a sample: {error.what}") from error
        each = 3 if self.sampled else 2
        for k, tensor in enumerate(self.tensors):
            low, high = float(outputs[each * k]), float(outputs[each * k + 1])
            if not (math.isfinite(low) and math.isfinite(high)):
                self._not_finite(tensor)
                continue
            self.low[tensor] = min(self.low[tensor], low)
            self.high[tensor] = max(self.high[tensor], high)
            if self.sampled:
                self.histograms[tensor].add(outputs[each * k + 2])

    def _not_finite(self, tensor: str) -> None:
        """Masks of attention are infinite by design: such a tensor has no range. An output must have one."""
        if tensor in self._results:
            raise Rejected(
                f"Output {tensor} is not finite in float on a sample: there is nothing to hold INT8 against.",
                "Check the samples' preprocessing and the export.",
            )
        self.unbounded.add(tensor)

    def ranges(self, method: Calibration, percentile: float) -> dict[str, Range]:
        found = {}
        for tensor in self.tensors:
            if tensor in self.unbounded:
                continue
            low, high = self.low[tensor], self.high[tensor]
            if method == "percentile":
                cut = self.histograms[tensor].percentile(percentile)
            elif method == "entropy":
                cut = self.histograms[tensor].entropy()
            else:
                cut = (low, high)
            found[tensor] = (max(low, cut[0]), min(high, cut[1]))
        return found


def check_feeds(session: Session, feed: Mapping[str, npt.NDArray[Any]]) -> None:
    """Hold a feed against the graph's inputs. Raises Rejected: what was expected, and what came."""
    expected = {port.name: port for port in session.inputs}
    if set(feed) != set(expected):
        missing, extra = sorted(set(expected) - set(feed)), sorted(set(feed) - set(expected))
        what = " and ".join(
            part
            for part in (
                f"lack {', '.join(missing)}" * bool(missing),
                f"have {', '.join(extra)}" * bool(extra),
            )
            if part
        )
        raise Rejected(f"The samples do not fit the model's inputs: they {what}.")
    for name, port in expected.items():
        array = feed[name]
        fits = len(port.shape) == array.ndim and all(
            not isinstance(want, int) or want == got
            for want, got in zip(port.shape, array.shape, strict=True)
        )
        if not fits or str(array.dtype) != port.dtype:
            shape = tuple("?" if d is None else d for d in port.shape)
            raise Rejected(
                f"Input {name} takes {port.dtype} of shape {shape}; the samples have {array.dtype} of shape "
                f"{array.shape}."
            )


def _sizes(model: onnx.ModelProto) -> dict[str, int]:
    """Elements of each tensor of known shape; an open dimension counts as one."""
    graph = model.graph
    return {
        value.name: math.prod(max(d.dim_value, 1) for d in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }


def _stride(size: int) -> int:
    """An odd step, so that it walks through all columns and channels of tensors with even sides."""
    return max(1, -(-size // SAMPLES)) | 1
