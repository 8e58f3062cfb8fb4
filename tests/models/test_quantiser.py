"""Quantised files: the same bytes each time, integer kernels from end to end, the float model's answers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeward_models.calibration import Ranges, calibrate
from edgeward_models.gelu import fuse_gelu
from edgeward_models.graph import read_facts
from edgeward_models.pairsafe import worst_pairs
from edgeward_models.prepare import prepare
from edgeward_models.quantiser import quantisable, quantise
from edgeward_models.schemes import TARGETS, Scheme
from edgeward_models.shield import requantised, shield
from edgeward_models.similarity import sqnr_db
from edgeward_runtime.sessions import CPU, NotLoaded, open_exact, open_session, save_optimised
from edgeward_wire.errors import Rejected
from edgeward_wire.verdict import Plan
from models import quant_models
from models.quant_models import Net

PLAN = Plan(provider=CPU, variant="test", threads=1)
Build = Callable[[Path], Path]


class Made:
    """A prepared model, its ranges, and files quantised from it."""

    def __init__(self, model: Path, home: Path) -> None:
        self.home = home
        self.prepared = prepare(model, home / "prepared.onnx")
        self.ranges = calibrate(self.prepared, quant_models.noise(self.prepared, 8))

    def quantise(self, scheme: Scheme, name: str = "q.onnx") -> Path:
        return quantise(
            self.prepared, self.home / name, scheme, self.ranges if scheme.method == "static" else None
        )

    def sqnr(self, file: Path) -> float:
        """Against the float model, on other noise, with the exact kernels."""
        pairs = [
            (open_exact(self.prepared).run(feed)[0], open_exact(file).run(feed)[0])
            for feed in quant_models.noise(self.prepared, 4, seed=9)
        ]
        return sqnr_db(np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs]))


def graph_of(file: Path) -> onnx.GraphProto:
    return onnx.load(str(file)).graph


def optimised(file: Path, scratch: Path) -> Counter[str]:
    """Operators of the graph that ONNX Runtime really runs."""
    save_optimised(file, PLAN, scratch)
    return Counter(node.op_type for node in graph_of(scratch).node)


@pytest.fixture
def resnet(tmp_path: Path) -> Made:
    return Made(quant_models.resnet(tmp_path / "m.onnx"), tmp_path)


@pytest.fixture
def transformer(tmp_path: Path) -> Made:
    return Made(quant_models.transformer(tmp_path / "m.onnx"), tmp_path)


# --- static


@pytest.mark.parametrize("weights", ["s8", "s7", "pair"])
@pytest.mark.parametrize("build", [quant_models.resnet, quant_models.yolo, quant_models.transformer])
def test_a_quantised_model_answers_as_the_float_one(build: Build, weights: str, tmp_path: Path) -> None:
    made = Made(build(tmp_path / "m.onnx"), tmp_path)
    file = made.quantise(Scheme("static", weights=weights))  # type: ignore[arg-type]
    assert made.sqnr(file) > 15
    assert read_facts(file).precision == "int8"
    for feed in quant_models.noise(made.prepared, 2):
        assert np.isfinite(open_session(file, PLAN).run(feed)[0]).all()


def test_a_resnet_runs_on_integers_from_end_to_end(resnet: Made) -> None:
    found = optimised(resnet.quantise(Scheme("static")), resnet.home / "o.onnx")
    assert found["QLinearConv"] == 6
    assert found["QLinearAdd"] == 2
    assert found["QGemm"] == found["QLinearGlobalAveragePool"] == 1
    assert found["QuantizeLinear"] == found["DequantizeLinear"] == 1  # at the two ends
    assert not {"Conv", "Gemm", "Add", "Relu"} & set(found)


def test_a_detector_runs_on_integers_up_to_its_decoder(tmp_path: Path) -> None:
    made = Made(quant_models.yolo(tmp_path / "m.onnx"), tmp_path)
    found = optimised(made.quantise(Scheme("static")), tmp_path / "o.onnx")
    assert found["QLinearConv"] == 6
    assert found["Conv"] == 1  # the expectation of the distribution (DFL)
    assert found["QLinearSigmoid"] == found["QLinearMul"] == 4
    assert found["QLinearConcat"] == 2
    assert found["Sigmoid"] == found["Mul"] == found["Concat"] == found["Softmax"] == 1
    assert found["DequantizeLinear"] == 2  # the two heads


def test_a_transformer_quantises_its_products_and_keeps_the_rest_whole(transformer: Made) -> None:
    found = optimised(transformer.quantise(Scheme("static")), transformer.home / "o.onnx")
    assert found["QLinearConv"] == 1
    assert found["QLinearMatMul"] + found["QGemm"] == 6
    assert found["Gelu"] == 2  # in one node each, though codes surround them
    assert found["Erf"] == 0
    assert found["MatMul"] + found["FusedMatMul"] + found["MatMulIntegerToFloat"] == 2  # attention


def test_the_same_input_gives_the_same_bytes_in_another_process(resnet: Made) -> None:
    file = resnet.quantise(Scheme("static"))
    program = (
        "import sys, json; from pathlib import Path\n"
        "from edgeward_models.quantiser import quantise\n"
        "from edgeward_models.calibration import Ranges\n"
        "from edgeward_models.schemes import Scheme\n"
        "quantise(Path(sys.argv[1]), Path(sys.argv[2]), Scheme('static'), Ranges(json.loads(sys.argv[3])))\n"
    )
    other = resnet.home / "other" / "name.onnx"
    arguments = [str(resnet.prepared), str(other), json.dumps(resnet.ranges.plain())]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, env={"PYTHONHASHSEED": "7"})
    assert file.read_bytes() == other.read_bytes()


def test_nothing_is_left_beside_the_files_and_nothing_of_tools_within(resnet: Made) -> None:
    before = resnet.prepared.read_bytes()
    raw = resnet.quantise(Scheme("static")).read_bytes()
    assert resnet.prepared.read_bytes() == before
    assert {p.name for p in resnet.home.iterdir()} == {"m.onnx", "prepared.onnx", "q.onnx"}
    assert b"onnx.quant" not in raw
    assert b"onnx.infer" not in raw
    assert str(resnet.home).encode() not in raw
    model = onnx.load_from_string(raw)
    assert (model.producer_name, model.producer_version) == ("edgeward", "")
    assert not model.graph.value_info


def test_layers_stay_in_float_when_they_are_named(resnet: Made) -> None:
    file = resnet.quantise(Scheme("static").keeping("stem", "a1"))
    found = optimised(file, resnet.home / "o.onnx")
    assert found["QLinearConv"] == 4
    assert found["Conv"] + found["FusedConv"] == 2


@pytest.mark.parametrize("kept", ["a1", "a2", "b.short", "b1", "fc"])
def test_a_layer_between_integers_stays_in_float_when_it_is_loaded(resnet: Made, kept: str) -> None:
    """ONNX Runtime quantises float weights between Q and DQ by itself, unless it is kept from that."""
    file = resnet.quantise(Scheme("static").keeping(kept))
    found = optimised(file, resnet.home / "o.onnx")
    assert found["QLinearConv"] + found["QGemm"] == 6
    assert found["Conv"] + found["FusedConv"] + found["Gemm"] + found["FusedGemm"] == 1
    assert all(bound.safe for bound in worst_pairs(file))
    feed = quant_models.noise(resnet.prepared, 1)[0]
    assert sqnr_db(open_exact(file).run(feed)[0], open_session(file, PLAN).run(feed)[0]) > 30


def test_what_would_be_quantised_behind_our_back_is_found(resnet: Made) -> None:
    file = resnet.quantise(Scheme("static").keeping("a1"))
    model = onnx.load(str(file))
    assert requantised(model.graph) == set()
    node = next(node for node in model.graph.node if node.name == "a1")
    node.input[0] = "pool.out_DequantizeLinear_Output"  # as it would be without its own
    assert requantised(model.graph) == {"a1"}
    file.write_bytes(model.SerializeToString())
    assert {b.node: b.worst > 0 for b in worst_pairs(file)}["a1"]
    assert optimised(file, resnet.home / "o.onnx")["QLinearConv"] == 6
    assert shield(model) == ["a1"]
    assert requantised(model.graph) == set()


def test_the_picture_keeps_its_own_codes(resnet: Made) -> None:
    ranges = resnet.ranges.knowing({"image": (-127 / 128, 1.0)})
    graph = graph_of(quantise(resnet.prepared, resnet.home / "q.onnx", Scheme("static"), ranges))
    first = next(node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "image")
    scale, zero = (
        numpy_helper.to_array(next(t for t in graph.initializer if t.name == n)) for n in first.input[1:]
    )
    assert float(scale) == 1 / 128
    assert int(zero) == 127


def test_weights_have_a_scale_a_channel_or_one(resnet: Made) -> None:
    def scales(file: Path) -> dict[str, int]:
        graph = graph_of(file)
        sizes = {t.name: int(np.prod(t.dims)) for t in graph.initializer}
        makers = {name: node for node in graph.node for name in node.output}
        return {
            n.name: sizes[makers[n.input[1]].input[1]] for n in graph.node if n.op_type in ("Conv", "Gemm")
        }

    channels = {"stem": 8, "a1": 8, "a2": 8, "b1": 16, "b2": 16, "b.short": 16, "fc": 5}
    assert scales(resnet.quantise(Scheme("static"))) == channels
    assert set(scales(resnet.quantise(Scheme("static", per_channel=False))).values()) == {1}


def test_operators_can_be_chosen(transformer: Made) -> None:
    found = optimised(
        transformer.quantise(Scheme("static", operators=("MatMul",))), transformer.home / "o.onnx"
    )
    assert found["QLinearConv"] == 0
    assert found["QLinearMatMul"] + found["QGemm"] == 6


# --- for other targets


def codes(file: Path) -> tuple[set[int], set[int]]:
    """(types, values) of all zero points of QuantizeLinear."""
    graph = graph_of(file)
    constants = {t.name: t for t in graph.initializer}
    zeros = [constants[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    return {t.data_type for t in zeros}, {int(numpy_helper.to_array(t)) for t in zeros}


def test_arm_gets_signed_activations(resnet: Made) -> None:
    file = resnet.quantise(TARGETS["arm64"].schemes[0])
    kinds, values = codes(file)
    assert kinds == {TensorProto.INT8}
    assert -128 in values  # after a ReLU all codes are positive: asymmetric
    assert resnet.sqnr(file) > 15


def test_tensorrt_gets_symmetric_inputs_and_shortcuts(resnet: Made) -> None:
    file = resnet.quantise(TARGETS["tensorrt"].schemes[0])
    assert codes(file) == ({TensorProto.INT8}, {0})
    graph = graph_of(file)
    makers = {name: node.op_type for node in graph.node for name in node.output}
    adds = {node.name: [makers[name] for name in node.input] for node in graph.node if node.op_type == "Add"}
    assert adds == {"a.add": ["Conv", "DequantizeLinear"], "b.add": ["Conv", "DequantizeLinear"]}
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert all([makers[name] for name in node.input[:2]] == ["DequantizeLinear"] * 2 for node in products)
    biases = {node.input[2] for node in products}
    assert biases <= {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT}
    readers = Counter(
        name for node in graph.node for name in node.input if makers.get(name) == "DequantizeLinear"
    )
    assert set(readers.values()) == {1}  # a pair of its own for each
    assert resnet.sqnr(file) > 15


def test_gelu_stays_onnx_for_tensorrt(transformer: Made) -> None:
    file = transformer.quantise(TARGETS["tensorrt"].schemes[0])
    assert {node.domain for node in graph_of(file).node} == {""}
    assert transformer.sqnr(file) > 15


# --- dynamic


@pytest.mark.parametrize("weights", ["s8", "s7"])
def test_dynamic_quantises_products_while_they_run(transformer: Made, weights: str) -> None:
    file = transformer.quantise(Scheme("dynamic", weights=weights))  # type: ignore[arg-type]
    found = Counter(node.op_type for node in graph_of(file).node)
    assert found["MatMulInteger"] == 6
    assert found["Conv"] == 1
    assert transformer.sqnr(file) > 20


def test_dynamic_keeps_what_is_named_in_float(transformer: Made) -> None:
    file = transformer.quantise(Scheme("dynamic").keeping("up", "down"))
    assert Counter(node.op_type for node in graph_of(file).node)["MatMulInteger"] == 4


def test_recurrent_weights_are_proven_too(tmp_path: Path) -> None:
    net = Net()
    x = net.matmul("x", 8, 8, name="mm")
    w, r = (net.constant(np.abs(net.rng.standard_normal((1, 16, k))).astype(np.float32)) for k in (8, 4))
    y = net.op("LSTM", x, w, r, outputs=3, hidden_size=4, name="lstm")[0]
    made = Made(net.save(tmp_path / "m.onnx", {"x": (3, 1, 8)}, {"y": y}), tmp_path)
    for weights, safe in (("s8", False), ("s7", True)):
        file = made.quantise(Scheme("dynamic", weights=weights))  # type: ignore[arg-type]
        bounds = {bound.op: bound for bound in worst_pairs(file)}
        assert set(bounds) == {"DynamicQuantizeLSTM", "MatMulInteger"}
        assert bounds["DynamicQuantizeLSTM"].safe is safe
        assert made.sqnr(file) > 20


# --- bad input


def test_a_model_without_weights_has_nothing_to_quantise(tmp_path: Path) -> None:
    net = Net()
    model = net.save(tmp_path / "m.onnx", {"x": (1, 4)}, {"y": net.op("Relu", net.op("Add", "x", "x"))})
    made = Made(model, tmp_path)
    assert quantisable(made.prepared) == []
    for scheme in (Scheme("static"), Scheme("dynamic")):
        with pytest.raises(Rejected, match="nothing to quantise"):
            made.quantise(scheme)
    assert not (tmp_path / "q.onnx").exists()


def test_ranges_of_another_model_are_refused(resnet: Made) -> None:
    with pytest.raises(Rejected, match="ranges are of another model"):
        quantise(resnet.prepared, resnet.home / "q.onnx", Scheme("static"), Ranges({"x": (0, 1)}))
    with pytest.raises(ValueError, match="ranges"):
        quantise(resnet.prepared, resnet.home / "q.onnx", Scheme("static"))


def test_what_does_not_load_is_for_the_caller_to_see(resnet: Made) -> None:
    """A file is written whatever a session thinks of it: x64quantprecision is only one of many settings."""
    file = resnet.quantise(Scheme("static"))
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(NotLoaded):
        open_session(file, PLAN)


def test_a_tensor_of_zeros_quantises(tmp_path: Path) -> None:
    net = Net()
    x = net.conv("x", (4, 3, 3, 3), name="dead")
    net.constants[0].CopyFrom(
        numpy_helper.from_array(np.zeros((4, 3, 3, 3), np.float32), net.constants[0].name)
    )
    model = net.save(tmp_path / "m.onnx", {"x": (1, 3, 8, 8)}, {"y": net.conv(x, (2, 4, 1, 1), name="live")})
    made = Made(model, tmp_path)
    assert np.isfinite(
        open_session(made.quantise(Scheme("static")), PLAN).run(quant_models.noise(model, 1)[0])[0]
    ).all()


# --- GELU


def _spelled(form: str) -> onnx.ModelProto:
    """x -> GELU in one of the ways that exporters spell it -> y."""
    half, one = np.array(0.5, np.float32), np.array(1.0, np.float32)
    scale = np.array(np.sqrt(0.5) if form == "mul" else np.sqrt(2), np.float32)
    node = helper.make_node
    nodes = [node("Mul" if form == "mul" else "Div", ["x", "s"], ["t"]), node("Erf", ["t"], ["e"])]
    nodes.append(node("Add", ["one", "e"] if form == "mul" else ["e", "one"], ["p"]))
    nodes += {
        "div": [node("Mul", ["x", "p"], ["m"]), node("Mul", ["m", "half"], ["y"])],
        "mul": [node("Mul", ["half", "x"], ["m"]), node("Mul", ["m", "p"], ["y"])],
        "half first": [node("Mul", ["p", "half"], ["m"]), node("Mul", ["m", "x"], ["y"])],
        "read twice": [
            node("Mul", ["x", "p"], ["m"]),
            node("Mul", ["m", "half"], ["q"]),
            node("Add", ["q", "e"], ["y"]),
        ],
        "not half": [node("Mul", ["x", "p"], ["m"]), node("Mul", ["m", "one"], ["y"])],
    }[form]
    for k, one_node in enumerate(nodes):
        one_node.name = f"n{k}"
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 5]) for name in ("x", "y")]
    constants = [numpy_helper.from_array(v, n) for n, v in (("s", scale), ("one", one), ("half", half))]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("form", "count"), [("div", 1), ("mul", 1), ("half first", 1), ("read twice", 0), ("not half", 0)]
)
def test_gelu_is_found_in_every_spelling_and_nowhere_else(form: str, count: int, tmp_path: Path) -> None:
    model = _spelled(form)
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    assert fuse_gelu(model) == count
    (tmp_path / "b.onnx").write_bytes(model.SerializeToString())
    feed = {"x": np.linspace(-3, 3, 10, dtype=np.float32).reshape(2, 5)}
    (mine,), (other,) = (open_exact(tmp_path / name).run(feed) for name in ("a.onnx", "b.onnx"))
    np.testing.assert_allclose(mine, other, atol=1e-5)
