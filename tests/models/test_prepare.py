"""A prepared file is the same function, in a graph that can be quantised and loaded again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeward_models.prepare import prepare, sort_nodes
from edgeward_runtime.sessions import CPU, open_exact, open_session, save_optimised
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.verdict import Plan
from models import quant_models
from models.quant_models import Net
from runtime import builders

PLAN = Plan(provider=CPU, variant="test", threads=1)


def kinds(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


@pytest.mark.parametrize("build", [quant_models.resnet, quant_models.yolo, quant_models.transformer])
def test_the_outputs_stay_and_the_file_loads_at_any_level(build: object, tmp_path: Path) -> None:
    original = build(tmp_path / "m.onnx")  # type: ignore[operator]
    before = original.read_bytes()
    prepared = prepare(original, tmp_path / "deep" / "p.onnx", quant_models.noise(original, 2))
    assert original.read_bytes() == before
    for feed in quant_models.noise(original, 2, seed=5):
        (mine,), (other,) = (open_exact(file).run(feed) for file in (original, prepared))
        np.testing.assert_allclose(mine, other, atol=1e-4)
        np.testing.assert_allclose(mine, open_session(prepared, PLAN).run(feed)[0], atol=1e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "m.onnx"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["p.onnx"]


def test_the_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    original = quant_models.transformer(tmp_path / "m.onnx")
    first, second = (prepare(original, tmp_path / name).read_bytes() for name in ("a", "b"))
    assert first == second
    assert b"onnx.quant" not in first


def test_a_norm_is_folded_into_its_convolution(tmp_path: Path) -> None:
    net = Net()
    x = net.conv("x", (4, 3, 3, 3), bias=False, name="conv")
    norm = [net.constant(net.rng.uniform(0.5, 1.5, 4).astype(np.float32)) for _ in range(4)]
    model = net.save(tmp_path / "m.onnx", {"x": (1, 3, 8, 8)}, {"y": net.op("BatchNormalization", x, *norm)})
    assert kinds(prepare(model, tmp_path / "p.onnx")) == {"Conv": 1}


def test_what_is_optimised_twice_still_loads(tmp_path: Path) -> None:
    """ONNX Runtime names what it makes alike each time: its names would collide when it loads the file."""
    prepared = prepare(quant_models.transformer(tmp_path / "m.onnx"), tmp_path / "p.onnx")
    names = [t.name for t in onnx.load(str(prepared)).graph.initializer]
    assert not any(name.startswith("gemm_") for name in names)
    save_optimised(prepared, PLAN, tmp_path / "o.onnx")


def test_every_node_has_a_name_of_its_own(tmp_path: Path) -> None:
    net = Net()
    x = net.conv(net.conv("x", (4, 3, 3, 3), name="same"), (4, 4, 3, 3), name="other")
    path = net.save(tmp_path / "m.onnx", {"x": (1, 3, 8, 8)}, {"y": net.op("Tanh", x, name="t")})
    model = onnx.load(str(path))
    model.graph.node[1].name = "same"
    model.graph.node[2].name = ""
    path.write_bytes(model.SerializeToString())
    names = [node.name for node in onnx.load(str(prepare(path, tmp_path / "p.onnx"))).graph.node]
    assert names[0] == "same"
    assert len(set(names)) == len(names)
    assert all(names)


def test_shared_weights_get_a_copy_each(tmp_path: Path) -> None:
    net = Net()
    x = net.matmul("x", 4, 4, name="one")
    net.nodes.append(helper.make_node("MatMul", [x, net.constants[0].name], ["two.out"], name="two"))
    prepared = prepare(net.save(tmp_path / "m.onnx", {"x": (1, 4)}, {"y": "two.out"}), tmp_path / "p.onnx")
    graph = onnx.load(str(prepared)).graph
    weights = [node.input[1] for node in graph.node if node.op_type == "MatMul"]
    assert len(set(weights)) == 2


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    function = helper.make_function(
        "local",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 17)],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Twice", ["x"], ["m"], domain="local"),
            helper.make_node("MatMul", ["m", "w"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(np.ones((4, 2), np.float32), "w")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=8)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    prepared = onnx.load(str(prepare(tmp_path / "m.onnx", tmp_path / "p.onnx")))
    assert {node.op_type for node in prepared.graph.node} == {"Add", "MatMul"}
    assert [o.domain for o in prepared.opset_import] == [""]


def test_an_old_operator_set_is_converted(tmp_path: Path) -> None:
    net = Net()
    path = net.save(tmp_path / "m.onnx", {"x": (1, 3, 8, 8)}, {"y": net.conv("x", (4, 3, 3, 3))}, opset=11)
    prepared = onnx.load(str(prepare(path, tmp_path / "p.onnx")))
    assert prepared.opset_import[0].version >= 13


def test_a_file_keeps_what_it_says_of_itself_and_loses_what_tools_say(tmp_path: Path) -> None:
    path = quant_models.resnet(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    model.graph.node[0].doc_string = "/home/someone/net.py"
    for key in ("names", "onnx.infer"):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, "x"
    path.write_bytes(model.SerializeToString())
    prepared = onnx.load(str(prepare(path, tmp_path / "p.onnx")))
    assert {entry.key for entry in prepared.metadata_props} == {"names"}
    assert not any(node.doc_string for node in prepared.graph.node)
    assert prepared.producer_name == "edgeward"


# --- bad input


def test_what_is_not_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"not a model at all")
    with pytest.raises(Rejected, match="not an ONNX file"):
        prepare(tmp_path / "m.onnx", tmp_path / "p.onnx")
    with pytest.raises(Rejected, match="no file"):
        prepare(tmp_path / "none.onnx", tmp_path / "p.onnx")


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    path = quant_models.resnet(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    onnx.save(model, str(path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert prepare(path, tmp_path / "p.onnx").stat().st_size > 1000
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(Rejected, match=r"weights\.bin"):
        prepare(path, tmp_path / "p.onnx")


def test_what_is_quantised_is_not_quantised_again(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="quantised already"):
        prepare(builders.int8_classifier(tmp_path / "m.onnx"), tmp_path / "p.onnx")


def test_what_does_not_load_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = quant_models.resnet(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    model.graph.node[0].input[0] = "nowhere"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(Rejected):
        prepare(path, tmp_path / "p.onnx")
    assert not (tmp_path / "p.onnx").exists()


def test_samples_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = quant_models.resnet(tmp_path / "m.onnx")
    with pytest.raises(Rejected, match="does not run on a sample"):
        prepare(path, tmp_path / "p.onnx", [{"image": np.zeros((1, 4, 16, 16), np.float32)}])


def test_a_place_that_cannot_be_written_is_the_worlds_fault(tmp_path: Path) -> None:
    path = quant_models.resnet(tmp_path / "m.onnx")
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable):
        prepare(path, tmp_path / "file" / "p.onnx")


def test_nodes_are_sorted_and_a_cycle_is_refused() -> None:
    nodes = [helper.make_node("Relu", [a], [b]) for a, b in (("c", "d"), ("x", "b"), ("b", "c"))]
    graph = helper.make_graph(nodes, "g", [], [])
    sort_nodes(graph)
    assert [node.output[0] for node in graph.node] == ["b", "c", "d"]
    graph.node[0].input[0] = "d"
    with pytest.raises(Rejected, match="cycle"):
        sort_nodes(graph)
