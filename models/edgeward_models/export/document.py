"""What an exporter wrote becomes a file that devices load and people may pass on.

Invariants: weights inside; each operator set named once; no IR version that ONNX Runtime 1.23 refuses; no
paths, source lines or stack traces of the machine that exported; and it passes `graph.read_facts`. The
computation is not touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]

from edgeward_models.export.report import NotExported
from edgeward_models.graph import MAX_FILE_BYTES, MAX_IR_VERSION, Facts, embed_external_data, read_facts
from edgeward_runtime.sidecar import METADATA_KEY
from edgeward_wire.errors import Rejected

PROVENANCE_KEY = "edgeward.export"


Observed = Sequence[tuple[int, Mapping[str, tuple[int, ...]]]]
"""For each run its batch, and the shape that each output had."""
_DATA_SHAPED = frozenset({"NonZero", "NonMaxSuppression", "Unique", "Compress", "Loop", "If", "Scan"})
"""With one of these an output's length may follow from the values that go in."""


def finish(
    raw: Path,
    out: Path,
    declared: Mapping[str, Any],
    provenance: Mapping[str, str],
    observed: Observed = (),
) -> Facts:
    """Write `raw` as a clean file at `out`. Raises NotExported when it cannot be one."""
    try:
        model = onnx.load(str(raw), load_external_data=False)
        clean(model)
        settle_outputs(model, observed)
        describe(model, declared, provenance)
        onnx.save(model, str(raw))
        whole = embed_external_data(read_facts(raw), out.parent)
        whole.replace(out)
        onnx.checker.check_model(str(out))
        return read_facts(out)
    except NotExported:
        raise
    except Rejected as error:
        raise NotExported(_unnamed(error.what, raw), error.next_step) from error
    except (onnx.checker.ValidationError, DecodeError, EncodeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0][:200]
        raise NotExported(f"What the exporter wrote is not valid ONNX: {first}") from error


def clean(model: onnx.ModelProto) -> None:
    """Remove what belongs to the exporting machine, and what older readers refuse."""
    versions: dict[str, int] = {}
    for entry in model.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        versions[domain] = max(versions.get(domain, 0), entry.version)
    used = {node.domain for graph in _graphs(model) for node in graph.node}
    del model.opset_import[:]
    for domain, version in sorted(versions.items()):
        if not domain or domain in used:
            model.opset_import.append(onnx.helper.make_opsetid(domain, version))
    model.ir_version = min(model.ir_version, MAX_IR_VERSION)
    model.doc_string = ""
    del model.metadata_props[:]
    for graph in _graphs(model):
        graph.doc_string = ""
        for item in (graph, *graph.node, *_values(graph)):
            item.doc_string = ""
            if hasattr(item, "metadata_props"):  # since onnx 1.17
                del item.metadata_props[:]


def settle_outputs(model: onnx.ModelProto, observed: Observed) -> None:
    """Say the lengths that the exporter lost: those that were the same, or the batch, in all runs."""
    if any(node.op_type in _DATA_SHAPED for graph in _graphs(model) for node in graph.node):
        return
    several = len({batch for batch, _ in observed}) > 1
    for value in model.graph.output:
        dims = value.type.tensor_type.shape.dim
        runs = [(batch, shapes[value.name]) for batch, shapes in observed if value.name in shapes]
        if not runs or any(len(shape) != len(dims) for _, shape in runs):
            continue
        for axis, dim in enumerate(dims):
            lengths = {shape[axis] for _, shape in runs}
            if dim.HasField("dim_value"):
                continue
            if len(lengths) == 1:
                dim.dim_value = lengths.pop()
            elif several and all(shape[axis] == batch for batch, shape in runs):
                dim.dim_param = "batch"


def describe(model: onnx.ModelProto, declared: Mapping[str, Any], provenance: Mapping[str, str]) -> None:
    """Write what is known of the model into its metadata."""
    for key, value in ((METADATA_KEY, declared), (PROVENANCE_KEY, provenance)):
        if value:
            entry = model.metadata_props.add()
            entry.key, entry.value = key, json.dumps(dict(value), sort_keys=True, ensure_ascii=False)


def keep_outputs(model: onnx.ModelProto, names: list[str]) -> None:
    """Leave only these outputs, in this order, and the nodes that they need."""
    graph = model.graph
    outputs = {value.name: value for value in graph.output}
    kept = [outputs[name] for name in names]
    del graph.output[:]
    graph.output.extend(kept)
    needed, nodes = set(names), []
    for node in reversed(graph.node):
        if needed & set(node.output):
            nodes.append(node)
            needed |= _reads(node)
    nodes.reverse()
    del graph.node[:]
    graph.node.extend(nodes)
    kept_constants = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(kept_constants)


def opset_of(path: Path) -> int:
    """The version of ONNX's own operators that a file uses; 0 for none."""
    model = onnx.load(str(path), load_external_data=False)
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def size_limit(count: int) -> None:
    """Raises Rejected when so many bytes of weights cannot be one file."""
    if count > MAX_FILE_BYTES:
        raise Rejected(
            f"The weights are {count / 1e9:.1f} GB; at most {MAX_FILE_BYTES / 1e9:.1f} GB fit one file.",
            "Export a smaller model, or in half precision.",
        )


def _unnamed(what: str, raw: Path) -> str:
    """Nobody knows the scratch file by its name."""
    return re.sub(rf"^{re.escape(raw.name)}\b", "What the exporter wrote", what)


def _reads(node: onnx.NodeProto) -> set[str]:
    """What a node reads, its inner graphs included."""
    names = set(node.input)
    for attribute in node.attribute:
        for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            for child in inner.node:
                names |= _reads(child)
            names |= {value.name for value in inner.output}
    return names


def _values(graph: Any) -> list[Any]:
    if isinstance(graph, onnx.FunctionProto):
        return list(graph.value_info) if hasattr(graph, "value_info") else []
    return [*graph.input, *graph.output, *graph.value_info, *graph.initializer]


def _graphs(model: onnx.ModelProto) -> Iterator[Any]:
    """All graphs and functions."""
    waiting: list[Any] = [model.graph, *model.functions]
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                waiting += ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs)


# --- small repairs of graphs


def name_batch(model: onnx.ModelProto) -> None:
    """Call the first dimension of every input and output the batch, where it is open."""
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and not dims[0].HasField("dim_value"):
            dims[0].dim_param = "batch"


def join_columns(model: onnx.ModelProto, name: str, columns: list[str]) -> None:
    """Replace one input a column by one input of all columns, split at the beginning."""
    graph = model.graph
    value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", len(columns)])
    lengths = onnx.helper.make_tensor(
        f"{name}_lengths", onnx.TensorProto.INT64, [len(columns)], [1] * len(columns)
    )
    taken = [one.name for one in graph.input]
    split = onnx.helper.make_node("Split", [name, lengths.name], taken, name=f"{name}_split", axis=1)
    nodes = [split, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(lengths)
    del graph.input[:]
    graph.input.append(value)


def rename_output(model: onnx.ModelProto, old: str, new: str) -> None:
    """Give an output, and what makes it, another name."""
    for value in model.graph.output:
        value.name = new if value.name == old else value.name
    for node in model.graph.node:
        for names in (node.input, node.output):
            for k, name in enumerate(names):
                if name == old:
                    names[k] = new


def two_columns(model: onnx.ModelProto, output: str, column: int | None) -> None:
    """Make `output` (-s, s), where s is that column of what it is now. None leaves it."""
    if column is None:
        return
    graph = model.graph
    raw = f"{output}_raw"
    rename_output(model, output, raw)
    index = onnx.helper.make_tensor(f"{output}_column", onnx.TensorProto.INT64, [1], [column])
    graph.initializer.append(index)
    graph.node.extend(
        [
            onnx.helper.make_node("Gather", [raw, index.name], [f"{output}_second"], axis=1),
            onnx.helper.make_node("Neg", [f"{output}_second"], [f"{output}_first"]),
            onnx.helper.make_node("Concat", [f"{output}_first", f"{output}_second"], [output], axis=1),
        ]
    )
    value = onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, ["batch", 2])
    del graph.output[:]
    graph.output.append(value)
