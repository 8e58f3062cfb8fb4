"""Where a quantised file departs from its float original: SQNR tensor by tensor.

Both files run unoptimised on the same inputs with their inner tensors as outputs, a few tensors at a time.
A tensor is found in the other file by its name; where the quantised file passes it through
QuantizeLinear and DequantizeLinear, what comes out of these is compared, for that is what the next
layer sees. Where a Relu or Clip was left to the quantisation's own cut, its output stands for both.

Invariants: memory is bounded by one group of tensors for one input (`GROUP_BYTES` where shapes are
known); a tensor that is not finite in the original (a mask) is skipped and counted; the files stay as
they are.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import shape_inference

from edgeward_models.graph import embed_external_data, read_facts
from edgeward_models.progress import Progress, silent
from edgeward_models.samples import Feeds
from edgeward_models.similarity import energies, ratio_db
from edgeward_runtime.sessions import Session, open_exact
from edgeward_wire.errors import Rejected

MAX_FEEDS = 64
GROUP_BYTES = 128 << 20
_GROUP_TENSORS = 32
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
_CUTS = frozenset({"Relu", "Clip"})
# They move numbers about and change none: what they give is as good as what they took.
_MOVES = frozenset(
    {"Constant", "ConstantOfShape", "Identity", "Cast", "Shape", "Size", "Range"}
    | {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand"}
    | {"Gather", "Slice", "Split", "Concat", "QuantizeLinear", "DequantizeLinear"}
)


@dataclass(frozen=True, slots=True)
class LayerSqnr:
    """One tensor in both files."""

    node: str
    """The float file's node that makes it, or the tensor's name where the node has none."""
    op: str
    tensor: str
    sqnr_db: float
    """Against the float original: all error up to here. inf: equal."""
    own_db: float | None
    """What rounding this very tensor adds, within the quantised file; None where it is not rounded."""


class Layers(NamedTuple):
    """All tensors that could be compared, worst first."""

    rows: tuple[LayerSqnr, ...]
    skipped: int
    """Float tensors that the quantised file does not have, or that are not finite."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor's names in both files."""

    node: str
    op: str
    original: str
    seen: str
    """In the quantised file, as the next layer sees it."""
    before: str | None
    """The same before it was rounded; None where it is not, or was cut as well."""


def layer_sqnr(
    float_file: Path, quantised_file: Path, feeds: Sequence[Feeds], progress: Progress = silent
) -> Layers:
    """Compare the inner tensors of two files. `feeds` hold every input of the graph, one run each.

    Raises:
        Rejected: a file does not load, or nothing in the one is found in the other.
        RunFailed: a run failed.
    """
    if not 1 <= len(feeds) <= MAX_FEEDS:
        raise Rejected(f"Layers are compared on 1 to {MAX_FEEDS} inputs, not {len(feeds)}.")
    with tempfile.TemporaryDirectory(prefix="edgeward-layers-") as scratch:
        home = Path(scratch)
        original, quantised = _load(float_file, home), _load(quantised_file, home)
        pairs, skipped = match(original.graph, quantised.graph)
        if not pairs:
            raise Rejected(
                f"{quantised_file.name} has no tensor of the names that {float_file.name} has.",
                "Compare it with the float file that it was made from.",
            )
        groups = _groups(pairs, _sizes(original))
        rows: list[LayerSqnr] = []
        for k, group in enumerate(groups):
            progress("comparing layers", k, len(groups))
            rows += _compare(group, original, quantised, feeds, home)
        progress("comparing layers", len(groups), len(groups))
    known = [row for row in rows if not math.isnan(row.sqnr_db)]
    return Layers(tuple(sorted(known, key=lambda row: row.sqnr_db)), skipped + len(rows) - len(known))


def match(original: onnx.GraphProto, quantised: onnx.GraphProto) -> tuple[list[Pair], int]:
    """The tensors that both graphs have, in the original's order, and how many it has alone."""
    makers = {name: node for node in quantised.node for name in node.output}
    users = _users(quantised)
    original_users = _users(original)
    pairs: list[Pair] = []
    skipped = 0
    for node in original.node:
        if node.op_type in _MOVES or not node.output or not node.output[0]:
            continue
        name = node.output[0]
        cut = _only_cut(original_users.get(name, ()))
        if cut is not None and (name not in makers or cut.output[0] not in makers):
            continue  # its cut is part of the quantised tensor: the pair is made there
        there = name if name in makers or node.op_type not in _CUTS else node.input[0]
        if there not in makers:
            skipped += 1
            continue
        seen, before = _through(there, users, makers)
        kept = before is not None and makers[before].op_type == node.op_type
        pairs.append(Pair(node.name or name, node.op_type, name, seen, before if kept else None))
    return pairs, skipped


def _through(
    name: str, users: Mapping[str, Sequence[onnx.NodeProto]], makers: Mapping[str, onnx.NodeProto]
) -> tuple[str, str | None]:
    """(as the next layer sees it, before it was rounded): through Quantize and Dequantize, either way."""
    for quantise in users.get(name, ()):
        if quantise.op_type == "QuantizeLinear" and quantise.input[0] == name:
            for dequantise in users.get(quantise.output[0], ()):
                if dequantise.op_type == "DequantizeLinear":
                    return dequantise.output[0], name
    maker = makers[name]
    if maker.op_type == "DequantizeLinear":  # an output of the graph keeps its name behind the pair
        quantise = makers.get(maker.input[0], maker)
        if quantise.op_type == "QuantizeLinear" and quantise.input[0] in makers:
            return name, quantise.input[0]
    return name, None


def _users(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    return users


def _only_cut(users: Sequence[onnx.NodeProto]) -> onnx.NodeProto | None:
    return users[0] if len(users) == 1 and users[0].op_type in _CUTS else None


def _load(path: Path, home: Path) -> onnx.ModelProto:
    return onnx.load(str(embed_external_data(read_facts(path), home)))


def _sizes(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of the tensors whose shape is known; an open dimension counts as one."""
    try:
        graph = shape_inference.infer_shapes(model, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, ValueError):  # over 2 GB, or an operator that it misreads
        graph = model.graph
    sizes: dict[str, int] = {}
    for value in [*graph.value_info, *graph.output]:
        tensor = value.type.tensor_type
        if tensor.elem_type in _FLOATS:
            sizes[value.name] = 4 * math.prod(max(d.dim_value, 1) for d in tensor.shape.dim)
    return sizes


def _groups(pairs: Sequence[Pair], sizes: Mapping[str, int]) -> list[list[Pair]]:
    """Cut into groups whose tensors are in memory together."""
    groups: list[list[Pair]] = [[]]
    room = GROUP_BYTES
    for pair in pairs:
        # Up to three copies of a tensor: the original, the rounded one, and that before.
        size = 3 * sizes.get(pair.original, GROUP_BYTES // _GROUP_TENSORS // 3)
        if groups[-1] and (size > room or len(groups[-1]) == _GROUP_TENSORS):
            groups.append([])
            room = GROUP_BYTES
        groups[-1].append(pair)
        room -= size
    return groups


def _compare(
    group: Sequence[Pair],
    original: onnx.ModelProto,
    quantised: onnx.ModelProto,
    feeds: Sequence[Feeds],
    home: Path,
) -> list[LayerSqnr]:
    float_names = [pair.original for pair in group]
    names = [name for pair in group for name in (pair.seen, pair.before) if name is not None]
    mine = _open(original, float_names, home / "original.onnx")
    theirs = _open(quantised, names, home / "quantised.onnx")
    total, own = np.zeros((len(group), 2)), np.zeros((len(group), 2))
    for feed in feeds:
        reference, seen = _run(mine, feed), _run(theirs, feed)
        for k, pair in enumerate(group):
            total[k] += _energies(reference[pair.original], seen[pair.seen])
            if pair.before is not None:
                own[k] += _energies(seen[pair.before], seen[pair.seen])
    mine.close()
    theirs.close()
    return [
        LayerSqnr(
            pair.node,
            pair.op,
            pair.original,
            _ratio(total[k]),
            None if pair.before is None else _ratio(own[k]),
        )
        for k, pair in enumerate(group)
    ]


def _open(model: onnx.ModelProto, names: Sequence[str], path: Path) -> Session:
    """The model with these tensors as its further outputs."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    there = {value.name for value in opened.graph.output}
    for name in dict.fromkeys(names):
        if name not in there:
            # Without a type: the runtime infers it, where onnx cannot for operators of other domains.
            opened.graph.output.append(onnx.ValueInfoProto(name=name))
    path.write_bytes(opened.SerializeToString())
    return open_exact(path)


def _run(session: Session, feed: Feeds) -> Feeds:
    names = [port.name for port in session.outputs]
    return dict(zip(names, session.run(feed), strict=True))


def _energies(reference: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    if reference.shape != other.shape or not np.isfinite(reference).all():
        return math.nan, math.nan
    return energies(reference, other)


def _ratio(parts: np.ndarray) -> float:
    return math.nan if np.isnan(parts).any() else ratio_db(float(parts[0]), float(parts[1]))
