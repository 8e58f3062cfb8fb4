"""Per-layer SQNR: tensors found in both files, and figures that can be computed by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeward_models import layers
from edgeward_models.layers import layer_sqnr, match
from edgeward_models.similarity import sqnr_db
from edgeward_wire.errors import Rejected
from runtime import builders

SCALE = np.float32(1 / 16)


def model(path: Path, nodes: list, weights: dict[str, np.ndarray], output: str = "y") -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [1, 8])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 8
    path.write_bytes(made.SerializeToString())
    return path


def rounding(source: str, scale: str = "s") -> list[onnx.NodeProto]:
    return [
        helper.make_node("QuantizeLinear", [source, scale, "z"], [f"{source}_q"]),
        helper.make_node("DequantizeLinear", [f"{source}_q", scale, "z"], [f"{source}_d"]),
    ]


WEIGHTS = {
    "w": np.random.default_rng(0).normal(0, 0.5, (8, 8)).astype(np.float32),
    "v": np.random.default_rng(1).normal(0, 0.5, (8, 8)).astype(np.float32),
}
STEPS = {"s": SCALE, "z": np.int8(0)}


def original(path: Path) -> Path:
    """a = x·w, b = relu(a), y = b·v."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="cut"),
        helper.make_node("MatMul", ["b", "v"], ["y"], name="last"),
    ]
    return model(path, nodes, WEIGHTS)


def feeds(count: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(2)
    return [{"x": rng.normal(0, 1, (1, 8)).astype(np.float32)} for _ in range(count)]


def rounded(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values / SCALE), -128, 127) * SCALE


def test_the_figures_are_those_computed_by_hand(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        *rounding("a"),
        helper.make_node("Relu", ["a_d"], ["b"]),
        helper.make_node("MatMul", ["b", "v"], ["y"]),
    ]
    quantised = model(tmp_path / "q.onnx", nodes, {**WEIGHTS, **STEPS})
    found = layer_sqnr(original(tmp_path / "f.onnx"), quantised, feeds())
    by_node = {row.node: row for row in found.rows}
    x = np.concatenate([feed["x"] for feed in feeds()])
    a = x @ WEIGHTS["w"]
    b = np.maximum(a, 0)
    assert by_node["first"].sqnr_db == pytest.approx(sqnr_db(a, rounded(a)), abs=1e-3)
    assert by_node["first"].own_db == pytest.approx(by_node["first"].sqnr_db)
    assert by_node["cut"].sqnr_db == pytest.approx(sqnr_db(b, np.maximum(rounded(a), 0)), abs=1e-3)
    assert by_node["cut"].own_db is None
    y = np.maximum(rounded(a), 0) @ WEIGHTS["v"]
    assert by_node["last"].sqnr_db == pytest.approx(sqnr_db(b @ WEIGHTS["v"], y), abs=1e-3)
    assert list(found.rows) == sorted(found.rows, key=lambda row: row.sqnr_db)
    assert found.skipped == 0


@pytest.mark.parametrize("kept", ["a", "b"])
def test_a_relu_that_the_rounding_replaced_is_compared_behind_it(tmp_path: Path, kept: str) -> None:
    """Unsigned codes cut off what is negative; quantisers name the tensor by either side of the Relu."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], [kept]),
        *rounding(kept),
        helper.make_node("MatMul", [f"{kept}_d", "v"], ["y"]),
    ]
    weights = {**WEIGHTS, "s": SCALE, "z": np.uint8(0)}
    found = layer_sqnr(original(tmp_path / "f.onnx"), model(tmp_path / "q.onnx", nodes, weights), feeds())
    assert {row.node for row in found.rows} == {"cut", "last"}
    assert all(
        row.sqnr_db > 20 for row in found.rows
    )  # against the values before the cut it would be some 3 dB
    assert all(row.own_db is None for row in found.rows)


def test_an_output_keeps_its_name_behind_the_pair(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "v"], ["y_raw"]),
        helper.make_node("QuantizeLinear", ["y_raw", "s", "z"], ["y_q"]),
        helper.make_node("DequantizeLinear", ["y_q", "s", "z"], ["y"]),
    ]
    found = layer_sqnr(
        original(tmp_path / "f.onnx"),
        model(tmp_path / "q.onnx", nodes, {**WEIGHTS, **STEPS}),
        feeds(),
    )
    assert [(row.node, row.own_db) for row in found.rows] == [
        ("last", pytest.approx(found.rows[0].sqnr_db)),
        ("first", None),
        ("cut", None),
    ]


def test_a_file_against_itself_is_equal_everywhere(tmp_path: Path) -> None:
    path = original(tmp_path / "f.onnx")
    found = layer_sqnr(path, path, feeds(1))
    assert [row.sqnr_db for row in found.rows] == [math.inf] * 3


def test_groups_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor at a time gives what all at once give."""
    mine, theirs = builders.classifier(tmp_path / "f.onnx"), builders.int8_classifier(tmp_path / "q.onnx")
    pictures = [{"image": np.random.default_rng(3).uniform(0, 1, (1, 3, 32, 32)).astype(np.float32)}]
    whole = layer_sqnr(mine, theirs, pictures)
    steps: list[tuple[int, int]] = []
    monkeypatch.setattr(layers, "GROUP_BYTES", 1)
    assert layer_sqnr(mine, theirs, pictures, lambda _, done, total: steps.append((done, total))) == whole
    assert steps == [(k, 3) for k in range(4)]
    assert {row.op for row in whole.rows} == {"Relu", "GlobalAveragePool", "Gemm"}
    assert whole.skipped == 0


def test_a_mask_is_skipped_and_counted(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("Div", ["a", "zero"], ["m"], name="mask"),
        helper.make_node("Tanh", ["m"], ["y"], name="last"),
    ]
    path = model(tmp_path / "f.onnx", nodes, {**WEIGHTS, "zero": np.zeros(8, np.float32)})
    found = layer_sqnr(path, path, feeds())
    assert {row.node for row in found.rows} == {"first", "last"}
    assert found.skipped == 1


def test_another_model_is_refused(tmp_path: Path) -> None:
    other = model(tmp_path / "o.onnx", [helper.make_node("Tanh", ["x"], ["z"])], {}, output="z")
    with pytest.raises(Rejected, match=r"o\.onnx has no tensor of the names that f\.onnx has"):
        layer_sqnr(original(tmp_path / "f.onnx"), other, feeds())
    with pytest.raises(Rejected, match="1 to 64 inputs, not 0"):
        layer_sqnr(original(tmp_path / "f.onnx"), other, [])


def test_matching_reads_names_only(tmp_path: Path) -> None:
    graph = onnx.load(str(original(tmp_path / "f.onnx"))).graph
    pairs, skipped = match(graph, graph)
    assert [(p.node, p.original, p.seen, p.before) for p in pairs] == [
        ("first", "a", "a", None),
        ("cut", "b", "b", None),
        ("last", "y", "y", None),
    ]
    assert skipped == 0
