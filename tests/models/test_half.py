"""FP16 in the graph, float32 at its ends; norms, decoders and what overflows stay in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from edgeward_models.graph import read_facts
from edgeward_models.half import float_nodes
from edgeward_models.prepare import prepare
from edgeward_models.quantiser import quantise
from edgeward_models.regions import Graph
from edgeward_models.schemes import Scheme
from edgeward_models.similarity import sqnr_db
from edgeward_runtime.sessions import CPU, open_exact, open_session
from edgeward_wire.verdict import Plan
from models import quant_models
from models.quant_models import Net


def halved(model: Path, home: Path, *keep: str) -> tuple[Path, Path]:
    prepared = prepare(model, home / "p.onnx")
    return prepared, quantise(prepared, home / "half.onnx", Scheme("fp16").keeping(*keep))


@pytest.mark.parametrize("build", [quant_models.resnet, quant_models.yolo, quant_models.transformer])
def test_a_halved_model_answers_as_the_float_one(build: Callable[[Path], Path], tmp_path: Path) -> None:
    prepared, half = halved(build(tmp_path / "m.onnx"), tmp_path)
    assert read_facts(half).precision == "fp16"
    for feed in quant_models.noise(prepared, 2):
        reference = open_exact(prepared).run(feed)[0]
        for session in (open_exact(half), open_session(half, Plan(provider=CPU, variant="half", threads=1))):
            found = session.run(feed)[0]
            assert found.dtype == np.float32
            assert sqnr_db(reference, found) > 45


def test_it_is_half_as_large_and_the_same_each_time(tmp_path: Path) -> None:
    prepared, half = halved(quant_models.resnet(tmp_path / "m.onnx", channels=32), tmp_path)
    assert half.stat().st_size < 0.6 * prepared.stat().st_size
    assert quantise(prepared, tmp_path / "again.onnx", Scheme("fp16")).read_bytes() == half.read_bytes()


def test_the_decoder_of_boxes_stays_in_float32(tmp_path: Path) -> None:
    """FP16 has half a pixel between 512 and 1024."""
    _, half = halved(quant_models.yolo(tmp_path / "m.onnx"), tmp_path)
    graph = onnx.load(str(half)).graph
    kinds = {t.name: t.data_type for t in graph.initializer}
    weights = {node.name: kinds[node.input[1]] for node in graph.node if node.op_type == "Conv"}
    assert weights.pop("dfl.conv") == TensorProto.FLOAT
    assert set(weights.values()) == {TensorProto.FLOAT16}


def test_what_is_named_stays_in_float32(tmp_path: Path) -> None:
    _, half = halved(quant_models.resnet(tmp_path / "m.onnx"), tmp_path, "stem", "fc")
    graph = onnx.load(str(half)).graph
    kinds = {t.name: t.data_type for t in graph.initializer}
    kept = {
        n.name for n in graph.node if n.op_type in ("Conv", "Gemm") and kinds[n.input[1]] == TensorProto.FLOAT
    }
    assert kept == {"stem", "fc"}


def _norm(path: Path, *, squared_by: str) -> Path:
    """A layer norm that an exporter has taken apart, over values whose squares overflow FP16."""
    net = Net()
    x = net.op(
        "Mul", net.matmul("x", 8, 8, name="mm"), net.constant(np.array(500.0, np.float32)), name="large"
    )
    centred = net.op("Sub", x, net.op("ReduceMean", x, axes=[-1], name="mean"), name="centre")
    if squared_by == "Pow":
        square = net.op("Pow", centred, net.constant(np.array(2.0, np.float32)), name="square")
    else:
        square = net.op("Mul", centred, centred, name="square")
    mean = net.op("ReduceMean", square, axes=[-1], name="variance")
    epsilon = net.op("Add", mean, net.constant(np.array(1e-12, np.float32)), name="epsilon")
    out = net.op("Div", centred, net.op("Sqrt", epsilon, name="root"), name="norm")
    return net.save(path, {"x": (1, 4, 8)}, {"y": net.matmul(out, 8, 4, name="last")})


@pytest.mark.parametrize("squared_by", ["Pow", "Mul"])
def test_the_variance_of_a_norm_stays_in_float32(squared_by: str, tmp_path: Path) -> None:
    model = _norm(tmp_path / "m.onnx", squared_by=squared_by)
    graph = Graph(onnx.load(str(model)))
    assert float_nodes(graph) == ["square", "variance", "epsilon", "root", "give.y"]
    prepared, half = halved(model, tmp_path)
    feed = quant_models.noise(prepared, 1)[0]
    assert sqnr_db(open_exact(prepared).run(feed)[0], open_exact(half).run(feed)[0]) > 40


def test_a_square_that_is_no_variance_is_halved(tmp_path: Path) -> None:
    net = Net()
    x = net.matmul("x", 4, 4, name="mm")
    out = net.matmul(net.op("Mul", x, x, name="square"), 4, 4, name="last")
    graph = Graph(onnx.load(str(net.save(tmp_path / "m.onnx", {"x": (1, 4)}, {"y": out}))))
    assert float_nodes(graph) == ["give.y"]
    assert float_nodes(graph, ["mm"]) == ["mm", "give.y"]


def test_constants_beyond_fp16_do_not_become_infinite(tmp_path: Path) -> None:
    """Attention masks are often the smallest float32."""
    net = Net()
    mask = net.constant(np.array([0, np.finfo(np.float32).min, 0, 0], np.float32))
    soft = net.op("Softmax", net.op("Add", net.matmul("x", 4, 4), mask, name="masked"), axis=-1)
    _, half = halved(net.save(tmp_path / "m.onnx", {"x": (1, 4)}, {"y": net.matmul(soft, 4, 4)}), tmp_path)
    for tensor in onnx.load(str(half)).graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            assert np.isfinite(numpy_helper.to_array(tensor)).all()
    assert np.isfinite(open_exact(half).run({"x": np.ones((1, 4), np.float32)})[0]).all()
