"""What graph optimisation made of a graph: operators before and after, fusions found, constants folded.

Pure: graphs in, counts out. Invariants: a fusion is counted by the operators that it leaves behind, never by
what should have been found; what was there to be found is counted apart, from the graph before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx

from edgeward_models.graph import all_graphs

ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish"})
_STANDARD = frozenset({"", "ai.onnx"})
_PASSING = frozenset({"Add", "Mul", "Div", "Where", "Cast", "Reshape", "Identity"})
_HOPS = 4
_MICROSOFT = "com.microsoft"
_NCHWC = "com.microsoft.nchwc"
# Operator that a fusion leaves -> what was fused. One row a fusion, in the order of the report.
_LEFT_BY: dict[tuple[str, str], str] = {
    (_MICROSOFT, "Attention"): "attention",
    (_MICROSOFT, "MultiHeadAttention"): "attention",
    (_MICROSOFT, "PackedAttention"): "attention",
    ("", "LayerNormalization"): "LayerNorm",
    (_MICROSOFT, "SkipLayerNormalization"): "Add + LayerNorm (SkipLayerNorm)",
    (_MICROSOFT, "EmbedLayerNormalization"): "embedding + LayerNorm",
    ("", "Gelu"): "GELU",
    (_MICROSOFT, "Gelu"): "GELU",
    (_MICROSOFT, "FastGelu"): "GELU by tanh (FastGelu)",
    (_MICROSOFT, "BiasGelu"): "Add + GELU (BiasGelu)",
    (_MICROSOFT, "QuickGelu"): "x · sigmoid(a x) (SiLU, QuickGelu)",
    (_MICROSOFT, "GroupNorm"): "GroupNorm",
    (_MICROSOFT, "FusedMatMul"): "MatMul + scale or transpose",
    (_MICROSOFT, "FusedGemm"): "Gemm + activation",
    (_MICROSOFT, "MatMulIntegerToFloat"): "integer MatMul + scale",
    (_MICROSOFT, "DynamicQuantizeMatMul"): "quantise + integer MatMul",
    ("", "QLinearConv"): "dequantise + Conv + quantise",
    (_MICROSOFT, "QLinearConv"): "dequantise + Conv + quantise",
    ("", "QLinearMatMul"): "dequantise + MatMul + quantise",
    (_MICROSOFT, "QGemm"): "dequantise + Gemm + quantise",
    (_MICROSOFT, "QLinearAdd"): "dequantise + Add + quantise",
    (_MICROSOFT, "QLinearMul"): "dequantise + Mul + quantise",
    (_MICROSOFT, "QLinearSigmoid"): "dequantise + Sigmoid + quantise",
    (_MICROSOFT, "QLinearConcat"): "dequantise + Concat + quantise",
    (_MICROSOFT, "QLinearGlobalAveragePool"): "dequantise + GlobalAveragePool + quantise",
    (_MICROSOFT, "QLinearAveragePool"): "dequantise + AveragePool + quantise",
    (_MICROSOFT, "QLinearSoftmax"): "dequantise + Softmax + quantise",
}


@dataclass(frozen=True, slots=True)
class Fusion:
    """One kind of fusion."""

    name: str
    count: int
    left: str
    """The operator that stands there now; empty where one of the old ones took the other in."""


@dataclass(frozen=True, slots=True)
class Patterns:
    """What a graph holds that could be fused."""

    conv_bn: int = 0
    conv_activation: int = 0
    attention: int = 0
    layer_norm: int = 0
    gelu: int = 0

    @property
    def transformer(self) -> bool:
        """Whether fusing attention and what surrounds it is worth a try."""
        return bool(self.attention or self.layer_norm)


def operators(model: onnx.ModelProto) -> dict[str, int]:
    """How many nodes of each operator, inner graphs included; the most first. `com.microsoft::FusedConv`."""
    counted = Counter(_full_name(node) for graph in all_graphs(model.graph) for node in graph.node)
    return dict(sorted(counted.items(), key=lambda pair: (-pair[1], pair[0])))


def foreign(model: onnx.ModelProto) -> tuple[str, ...]:
    """The operators that are not ONNX's own: another runtime, or another processor, may not know them."""
    return tuple(sorted(name for name in operators(model) if "::" in name and not name.startswith("ai.onnx")))


def patterns(model: onnx.ModelProto) -> Patterns:
    """What could be fused: the chains that exporters write out."""
    found = Counter[str]()
    for graph in all_graphs(model.graph):
        made_by = {name: node for node in graph.node for name in node.output}
        for node in graph.node:
            found.update(name for name, is_one in _PATTERNS.items() if is_one(node, made_by))
    return Patterns(**{name: found[name] for name in _PATTERNS})


def fusions(before: onnx.ModelProto, after: onnx.ModelProto) -> list[Fusion]:
    """The fusions that lie between two graphs of one model."""
    gained = _counts(after)
    gained.subtract(_counts(before))
    found = [
        Fusion("Conv + BatchNormalization", -gained["", "BatchNormalization"], ""),
        Fusion("Pad + Conv or pool", -gained["", "Pad"], ""),
        *_fused_convolutions(before, after),
    ]
    found += [
        Fusion(name, gained[operator], "::".join(filter(None, operator)))
        for operator, name in _LEFT_BY.items()
    ]
    into_gemm = min(gained["", "Gemm"], -gained["", "MatMul"])
    found.append(Fusion("MatMul + Add", into_gemm, "Gemm"))
    return [fusion for fusion in found if fusion.count > 0]


def constant_nodes(model: onnx.ModelProto) -> int:
    """Nodes whose result is the same for every input: what folding can take out. Top-level graph only.

    `Constant` nodes do not count: they hold a value, they compute nothing. Nor do those that dequantise
    weights: they stay, so that the runtime sees integers.
    """
    known = {tensor.name for tensor in model.graph.initializer} - {v.name for v in model.graph.input}
    count = 0
    for node in model.graph.node:
        fixed = all(name in known for name in node.input if name) and not _draws(node)
        if node.op_type == "Constant" or (fixed and node.input):
            known.update(node.output)
            count += node.op_type not in ("Constant", "DequantizeLinear")
    return count


# --- what is there


def _conv_bn(node: onnx.NodeProto, made_by: Mapping[str, onnx.NodeProto]) -> bool:
    return node.op_type == "BatchNormalization" and _op(_first(node, made_by)) in ("Conv", "ConvTranspose")


def _conv_activation(node: onnx.NodeProto, made_by: Mapping[str, onnx.NodeProto]) -> bool:
    if node.op_type not in ACTIVATIONS:
        return False
    source = _first(node, made_by)
    if _op(source) == "BatchNormalization" and source is not None:
        source = _first(source, made_by)
    return _op(source) == "Conv"


def _attention(node: onnx.NodeProto, made_by: Mapping[str, onnx.NodeProto]) -> bool:
    """The product of what a Softmax over a product gives."""
    if node.op_type != "MatMul" or _op(softmax := _behind(node.input[0], made_by, {"Softmax"})) != "Softmax":
        return False
    assert softmax is not None
    return _op(_behind(softmax.input[0], made_by, {"MatMul"})) == "MatMul"


def _layer_norm(node: onnx.NodeProto, made_by: Mapping[str, onnx.NodeProto]) -> bool:
    """The operator, or its square root of (variance + epsilon) where it is written out."""
    if node.op_type == "LayerNormalization":
        return True
    if node.op_type != "Sqrt" or (total := _first(node, made_by)) is None or total.op_type != "Add":
        return False
    return any(_op(made_by.get(name)) == "ReduceMean" for name in total.input)


def _gelu(node: onnx.NodeProto, made_by: Mapping[str, onnx.NodeProto]) -> bool:
    return node.op_type in ("Erf", "Gelu")


_PATTERNS: dict[str, Callable[[onnx.NodeProto, Mapping[str, onnx.NodeProto]], bool]] = {
    "conv_bn": _conv_bn,
    "conv_activation": _conv_activation,
    "attention": _attention,
    "layer_norm": _layer_norm,
    "gelu": _gelu,
}


def _behind(
    name: str, made_by: Mapping[str, onnx.NodeProto], wanted: set[str], hops: int = _HOPS
) -> onnx.NodeProto | None:
    """The first of `wanted` behind a tensor, through scales, masks and shapes."""
    node = made_by.get(name)
    if node is None or hops < 0:
        return None
    if node.op_type in wanted:
        return node
    if node.op_type not in _PASSING:
        return None
    found = (_behind(one, made_by, wanted, hops - 1) for one in node.input)
    return next((one for one in found if one is not None), None)


def _first(node: onnx.NodeProto, made_by: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    return made_by.get(node.input[0]) if node.input else None


def _op(node: onnx.NodeProto | None) -> str:
    return node.op_type if node is not None else ""


# --- what became of it


def _fused_convolutions(before: onnx.ModelProto, after: onnx.ModelProto) -> Iterator[Fusion]:
    """Convolutions that took their activation (and a sum) in; those in a processor's own layout."""
    had, has = (Counter(_convolutions(model)) for model in (before, after))
    for (domain, what), count in sorted((has - had).items()):
        left = f"{domain}::{'FusedConv' if domain == _MICROSOFT else 'Conv'}"
        yield Fusion(what, count, left)


def _convolutions(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    for node in _top(model):
        blocked = node.domain == _NCHWC and node.op_type == "Conv"
        if not blocked and (node.domain, node.op_type) != (_MICROSOFT, "FusedConv"):
            continue
        activation = next(
            (a.s.decode(errors="replace") for a in node.attribute if a.name == "activation"), ""
        )
        parts = ["Conv", *(["Add"] if len(node.input) > 3 and node.input[3] else []), activation]
        name = " + ".join(filter(None, parts))
        yield node.domain, f"{name}, in this processor's layout" if blocked else name


def _counts(model: onnx.ModelProto) -> Counter[tuple[str, str]]:
    return Counter(("" if n.domain in _STANDARD else n.domain, n.op_type) for n in _top(model))


def _top(model: onnx.ModelProto) -> Sequence[onnx.NodeProto]:
    return [node for graph in all_graphs(model.graph) for node in graph.node]


def _full_name(node: onnx.NodeProto) -> str:
    return node.op_type if node.domain in _STANDARD else f"{node.domain}::{node.op_type}"


def _draws(node: onnx.NodeProto) -> bool:
    return node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial")
