"""A float file made ready to be quantised: the same function, in a graph that a quantiser can read.

Local functions are inlined; constants, batch norms and pads folded; shapes inferred; every node has a name of
its own; weights that two products share are copied, so that each can have its own scales; the operator set is
at least 13 (a scale per channel needs it). What tells of the tools or the machine is taken off, what the
file says of itself (its own metadata) is kept.

Invariant: the outputs are those of the original, checked on the samples given or on seeded noise.
"""

from __future__ import annotations

import contextlib
import heapq
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import inliner, shape_inference, version_converter

from edgeward_models.graph import MAX_IR_VERSION, embed_external_data, read_facts
from edgeward_models.made_names import set_apart
from edgeward_models.regions import WEIGHTED
from edgeward_models.whole_file import write_whole
from edgeward_runtime import sessions
from edgeward_runtime.sessions import NotLoaded, RunFailed, Session, open_exact
from edgeward_wire.errors import Rejected
from edgeward_wire.verdict import Plan

Array = npt.NDArray[Any]

OPSET = 13
TOLERANCE = 1e-3
"""Of the largest output's amount: what folding may change by rounding."""
_COPIED_BYTES = 256 << 20
_OPEN = {0: 1, 2: 224, 3: 224}  # what an open dimension of a four-dimensional input is fed with; others 64
_TOOLS = ("onnx.infer", "onnx.quant.pre_process")


def prepare(model: Path, out: Path, feeds: Sequence[Mapping[str, Array]] = ()) -> Path:
    """Write the prepared copy of `model` to `out`; returns `out`. The original is not touched.

    `feeds` (all inputs of the graph) are what the copy is held against the original with; without them it is
    noise of the inputs' shapes, and a model that does not run on noise goes unchecked.

    Raises:
        Rejected: not ONNX, not complete, not loadable, or not the same function after folding.
        Unavailable: `out` cannot be written.
    """
    facts = read_facts(model)
    if facts.precision == "int8":
        raise Rejected(f"{model.name} is quantised already.", "Give the float model that it was made from.")
    with tempfile.TemporaryDirectory(prefix="edgeward-prepare-") as scratch:
        home = Path(scratch)
        whole = embed_external_data(facts, home)
        original = onnx.load(str(whole))
        if _name_nodes(original.graph):  # two of one name do not load
            whole = home / "named.onnx"
            whole.write_bytes(original.SerializeToString(deterministic=True))
        plain = _modernised(original, model.name)
        folded = _folded(plain, home, model.name)
        set_apart(folded, plain)
        _name_nodes(folded.graph)
        _unshare_weights(folded.graph)
        folded = _shaped(folded)
        strip(folded)
        made = home / "prepared.onnx"
        raw = folded.SerializeToString(deterministic=True)
        made.write_bytes(raw)
        _check_same(whole, made, feeds, model.name)
    write_whole(out, raw)
    return out


def strip(model: onnx.ModelProto) -> None:
    """Take off what tells of the machine or the tools; in place. Inferred shapes stay."""
    kept = sorted((e.key, e.value) for e in model.metadata_props if e.key not in _TOOLS)
    del model.metadata_props[:]
    for key, value in kept:
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    used = {node.domain for node in model.graph.node} | {""}
    opsets = sorted((o.domain, o.version) for o in model.opset_import if o.domain in used)
    del model.opset_import[:]
    model.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in opsets)
    model.producer_name, model.producer_version, model.doc_string = "edgeward", "", ""
    model.graph.doc_string = ""
    model.ir_version = min(model.ir_version, MAX_IR_VERSION)


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Put every node behind those that it reads, otherwise in the order that they have; in place."""
    makers = {name: k for k, node in enumerate(graph.node) for name in node.output if name}
    waits = [{makers[name] for name in _reads(node) if name in makers} for node in graph.node]
    readers: dict[int, list[int]] = {}
    for k, before in enumerate(waits):
        for other in before:
            readers.setdefault(other, []).append(k)
    ready = [k for k, before in enumerate(waits) if not before]  # ascending: a heap already
    order: list[int] = []
    while ready:
        k = heapq.heappop(ready)
        order.append(k)
        for reader in readers.get(k, ()):
            waits[reader].discard(k)
            if not waits[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(graph.node):
        raise Rejected("The graph has a cycle.", "Export the model again.")
    nodes = [onnx.NodeProto.FromString(graph.node[k].SerializeToString()) for k in order]
    del graph.node[:]
    graph.node.extend(nodes)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, the graphs inside it included."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _reads(inner)
            yield from (value.name for value in graph.output)


def _modernised(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Functions inlined, the operator set at least `OPSET`."""
    if model.functions:
        model = inliner.inline_local_functions(model)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), OPSET)
    if opset >= OPSET:
        return model
    try:
        return version_converter.convert_version(model, OPSET)
    except (RuntimeError, ValueError) as error:  # the converter's own kinds of failure
        raise Rejected(
            f"{name} has operator set {opset}, and cannot be converted to {OPSET}: {_line(error)}",
            f"Export it with operator set {OPSET} or newer.",
        ) from error


def _folded(model: onnx.ModelProto, home: Path, name: str) -> onnx.ModelProto:
    """As ONNX Runtime's basic optimisation leaves it: constants, norms and pads folded, ONNX's operators."""
    source, target = home / "source.onnx", home / "folded.onnx"
    source.write_bytes(model.SerializeToString(deterministic=True))
    plan = Plan(provider=sessions.CPU, variant="prepare", threads=1, optimisation="basic")
    try:
        sessions.save_optimised(source, plan, target)
    except NotLoaded as error:
        raise Rejected(f"{name} does not load: {error.what}") from error
    return onnx.load(str(target))


def _shaped(model: onnx.ModelProto) -> onnx.ModelProto:
    """With the shapes and types of all activations, as far as they can be told."""
    del model.graph.value_info[:]
    with contextlib.suppress(shape_inference.InferenceError):  # then fewer tensors can be quantised
        return shape_inference.infer_shapes(model, data_prop=True)
    return model


def _name_nodes(graph: onnx.GraphProto) -> bool:
    """A name of its own for each node; those that have one keep it. Whether two had the same."""
    taken = {node.name for node in graph.node}
    used: set[str] = set()
    clash = False
    for place, node in enumerate(graph.node):
        if not node.name or node.name in used:
            clash = clash or bool(node.name)
            stem = node.name or f"{node.op_type}_{place}"
            names = (stem, *(f"{stem}_{k}" for k in range(1, len(graph.node) + 1)))
            node.name = next(name for name in names if name not in used and name not in taken - {""})
        used.add(node.name)
    return clash


def _unshare_weights(graph: onnx.GraphProto) -> None:
    """A copy of the weights for each product but the first that reads them; at most `_COPIED_BYTES`."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers = Counter(
        node.input[1] for node in graph.node if node.op_type in WEIGHTED and len(node.input) > 1
    )
    first: set[str] = set()
    copied = 0
    for node in graph.node:
        if node.op_type not in WEIGHTED or len(node.input) < 2:
            continue
        weights = node.input[1]
        tensor = constants.get(weights)
        if tensor is None or readers[weights] < 2 or weights not in first:
            first.add(weights)
            continue
        copied += tensor.ByteSize()
        if copied > _COPIED_BYTES:
            return
        own = graph.initializer.add()
        own.CopyFrom(tensor)
        own.name = node.input[1] = f"{weights}/{node.name}"


# --- the check


def _check_same(original: Path, made: Path, feeds: Sequence[Mapping[str, Array]], name: str) -> None:
    try:
        before, after = open_exact(original), open_exact(made)
    except NotLoaded as error:
        raise Rejected(f"{name} does not load: {error.what}") from error
    for feed in feeds or [_noise(before)]:
        try:
            expected = before.run(feed)
        except RunFailed as error:
            if feeds:
                raise Rejected(f"{name} does not run on a sample: {error.what}") from error
            return
        try:
            found = after.run(feed)
        except RunFailed as error:
            raise Rejected(f"{name} does not run any more once it is folded: {error.what}") from error
        for port, mine, other in zip(before.outputs, expected, found, strict=True):
            if not _same(mine, other):
                raise Rejected(
                    f"Folding changes output {port.name} of {name}: it cannot be prepared for quantising.",
                    "Export it again with constant folding and in evaluation mode.",
                )


def _same(mine: Array, other: Array) -> bool:
    if mine.shape != other.shape or mine.dtype != other.dtype:
        return False
    if not np.issubdtype(mine.dtype, np.floating):
        return bool(np.array_equal(mine, other))
    finite = np.isfinite(mine)
    room = TOLERANCE * float(np.abs(mine[finite]).max(initial=0.0)) + 1e-6
    return bool(np.allclose(mine, other, rtol=0.0, atol=room, equal_nan=True))


def _noise(session: Session) -> dict[str, Array]:
    """Seeded noise for each input: floats around zero, ones for integers."""
    rng = np.random.default_rng(0)
    feed: dict[str, Array] = {}
    for port in session.inputs:
        usual = _OPEN if len(port.shape) == 4 else {0: 1}
        shape = tuple(d if isinstance(d, int) else usual.get(k, 64) for k, d in enumerate(port.shape))
        if "float" in port.dtype:
            feed[port.name] = rng.standard_normal(shape).astype(port.dtype)
        else:
            feed[port.name] = np.ones(shape, np.dtype(port.dtype))
    return feed


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
