"""Which inputs would tell that a kernel is wrong: golden vectors are chosen among candidates by this.

A processor without VNNI cuts off some sums of a quantised layer (saturation.py). Whether that happens, and
whether it still shows in the answer, depends on the input. So each candidate is run twice with all
optimisation off: as it is, and with what saturation would add to each layer's output, as computed from the
codes of the first run. The candidates whose answers turn the most are the most telling: on 64 inputs of
a plain EfficientNet-Lite0, predicted and true cosines of saturated answers correlate at 0.99. (Simpler
measures told no more than chance there: how much is cut off in all, or beside a layer's own signal.)

Where nothing can saturate, the largest activations lead. Half of those chosen lead this ranking, the
others are spread over the rest, so that ordinary inputs are proven too. Invariants: nothing depends on
the machine's kernels or its clock; the chosen ones keep their order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from edgeward_models.progress import Progress, silent
from edgeward_models.samples import Feeds
from edgeward_models.saturation import Layer, correction, layers_at_risk
from edgeward_runtime.golden import SEQUENCE_STEPS
from edgeward_runtime.parity import cosine
from edgeward_runtime.ports import constants, initial_states, next_states
from edgeward_runtime.sessions import NotLoaded, RunFailed, Session, open_exact
from edgeward_wire.contract import Contract

_ACTIVE = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU")
_MOST_LAYERS = 512
_MAC_BUDGET = 200e9
LEAST_CANDIDATES, _MOST_CANDIDATES = 16, 64
_ERROR, _HEIGHT = "edgeward_error_", "edgeward_height_"
_NOTHING = np.zeros(1, np.float32)

Array = npt.NDArray[Any]
Score = tuple[float, float]
"""(how far saturation would turn the answer, 0..2; how large the activations are); larger is more telling."""


def candidate_count(macs: int) -> int:
    """How many candidates are worth running, given the multiplications of one run: 16 to 64."""
    return int(np.clip(_MAC_BUDGET // max(macs, 1), LEAST_CANDIDATES, _MOST_CANDIDATES))


def choose_inputs(
    file: Path, contract: Contract, candidates: Sequence[Feeds], count: int, progress: Progress = silent
) -> list[Feeds]:
    """At most `count` of the candidates; for a model with state, steps that follow one another."""
    if contract.stateful:
        return loudest_run(candidates, max(count, SEQUENCE_STEPS))
    if len(candidates) <= count:
        return list(candidates)
    return [candidates[k] for k in pick(scores(file, contract, candidates, progress), count)]


def loudest_run(candidates: Sequence[Feeds], steps: int) -> list[Feeds]:
    """The `steps` consecutive candidates with the most energy: speech rather than the silence before it."""
    if len(candidates) <= steps:
        return list(candidates)
    energy = [sum(float(np.square(v, dtype=np.float64).mean()) for v in f.values()) for f in candidates]
    start = int(np.convolve(energy, np.ones(steps), "valid").argmax())
    return list(candidates[start : start + steps])


def pick(scored: Sequence[Score], count: int) -> list[int]:
    """Half of `count` by rank, the others spread over those that are left, in order."""
    ranked = sorted(range(len(scored)), key=lambda k: (scored[k], -k), reverse=True)
    telling = ranked[: (count + 1) // 2]
    rest = [k for k in range(len(scored)) if k not in telling]
    more = min(count - len(telling), len(rest))
    return sorted([*telling, *(rest[k * len(rest) // more] for k in range(more))])


def scores(
    file: Path, contract: Contract, candidates: Sequence[Feeds], progress: Progress = silent
) -> list[Score]:
    """One score for each candidate; all alike where the file does not run with its inside revealed."""
    fixed = constants(contract)
    found: list[tuple[float, list[float]]] = []
    try:
        with _Revealed(file) as inside:
            for k, feeds in enumerate(candidates):
                progress("choosing golden inputs", k, len(candidates))
                look = inside.look({**fixed, **feeds})
                found.append((look.turn, look.heights))  # not its outputs: there are many candidates
    except (NotLoaded, RunFailed):
        return [(0.0, 0.0)] * len(candidates)
    table = np.nan_to_num(np.asarray([heights for _, heights in found], np.float64))
    # Each layer counts alike, whatever the size of its numbers.
    relative = (table / np.maximum(table.max(axis=0, initial=0.0), 1e-30)).sum(axis=1)
    # Rounded: the last digits of float arithmetic must not decide.
    return [(round(turn, 6), round(float(h), 6)) for (turn, _), h in zip(found, relative, strict=True)]


def cut_outputs(file: Path, contract: Contract, chosen: Sequence[Feeds]) -> list[Feeds]:
    """The float outputs by name that a saturating kernel would give for each of the golden inputs in turn.

    States are carried as such a kernel would leave them. Empty where no sum of any of them can be cut off, or
    the file does not run with its inside revealed.
    """
    if not layers_at_risk(onnx.load(str(file))):
        return []
    fixed, states = constants(contract), initial_states(contract)
    found: list[Feeds] = []
    turned = False
    try:
        with _Revealed(file) as inside:
            for feeds in chosen:
                look = inside.look({**fixed, **states, **feeds})
                states = next_states(contract, look.cut)
                turned = turned or look.turned
                found.append({name: v for name, v in look.cut.items() if v.dtype.kind == "f"})
    except (NotLoaded, RunFailed):
        return []
    finite = all(np.isfinite(value).all() for outputs in found for value in outputs.values())
    return found if turned and finite else []


@dataclass(frozen=True)
class _Look:
    """One input, as it is and as saturation would have it."""

    exact: Feeds
    """All outputs by name."""
    cut: Feeds
    """The same of a kernel that saturates; `exact` itself where nothing is cut off."""
    heights: list[float]
    """How large each layer's activations are."""

    @property
    def turned(self) -> bool:
        """Whether any sum was cut off."""
        return self.cut is not self.exact

    @property
    def turn(self) -> float:
        """How far saturation would turn the answer, 0..2."""
        if not self.turned:
            return 0.0
        return 1.0 - min(cosine(self.cut[name], self.exact[name]) for name in self.exact)


class _Revealed:
    """A file with its inside revealed (`_reveal`), open with all optimisation off.

    Entering it raises NotLoaded.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> _Revealed:
        model = onnx.load(str(self._file))
        self._layers = layers_at_risk(model)[:_MOST_LAYERS]
        self._answers = [value.name for value in model.graph.output]
        _reveal(model, self._layers)
        with tempfile.TemporaryDirectory(prefix="edgeward-telling-") as scratch:
            opened = Path(scratch) / "revealed.onnx"
            opened.write_bytes(model.SerializeToString())
            del model
            self._session: Session = open_exact(opened)
        self._names = [port.name for port in self._session.outputs]
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def look(self, feeds: Feeds) -> _Look:
        """Run one input, all inputs of the graph given. Raises RunFailed."""
        all_of_it = self._run(feeds, {f"{_ERROR}{layer.node}": _NOTHING for layer in self._layers})
        exact = {name: all_of_it[name] for name in self._answers}
        heights = [float(value) for name, value in all_of_it.items() if name.startswith(_HEIGHT)]
        errors = {
            f"{_ERROR}{layer.node}": correction(layer, all_of_it[layer.codes]) for layer in self._layers
        }
        if not any(error.any() for error in errors.values()):
            return _Look(exact, exact, heights)
        cut = self._run(feeds, errors)
        return _Look(exact, {name: cut[name] for name in self._answers}, heights)

    def _run(self, feeds: Feeds, errors: Feeds) -> Feeds:
        return dict(zip(self._names, self._session.run({**feeds, **errors}), strict=True))


def _reveal(model: onnx.ModelProto, layers: Sequence[Layer]) -> None:
    """Make the codes outputs, let an error be added to each layer's output, and measure the activations."""
    graph = model.graph
    there = {value.name for value in graph.output} | {value.name for value in graph.input}
    heights = list(_heights(graph))
    for layer in layers:
        node = graph.node[layer.node]
        node.output[0] = f"{layer.output}_as_it_was"
    added = [
        helper.make_node("Add", [f"{layer.output}_as_it_was", f"{_ERROR}{layer.node}"], [layer.output])
        for layer in layers
    ]
    kept = {layer.node: new for layer, new in zip(layers, added, strict=True)}
    nodes = [one for k, node in enumerate(graph.node) for one in (node, kept.get(k)) if one is not None]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend([*copies, *heights])
    for layer in layers:
        graph.input.append(helper.make_tensor_value_info(f"{_ERROR}{layer.node}", TensorProto.FLOAT, None))
        if layer.codes not in there:
            there.add(layer.codes)
            graph.output.append(helper.make_tensor_value_info(layer.codes, TensorProto.UINT8, None))
    for node in heights[2::3]:
        graph.output.append(helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, ()))


def _heights(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Three nodes for each layer that works: the largest amount of what it gives."""
    names = [node.output[0] for node in graph.node if node.op_type in _ACTIVE and node.output[0]]
    for k, name in enumerate((names or [value.name for value in graph.output])[:_MOST_LAYERS]):
        wide, amount, height = (f"{part}{_HEIGHT}{k}" for part in ("wide_", "amount_", ""))
        yield helper.make_node("Cast", [name], [wide], to=TensorProto.FLOAT)
        yield helper.make_node("Abs", [wide], [amount])
        yield helper.make_node("ReduceMax", [amount], [height], keepdims=0)
