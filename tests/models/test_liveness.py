"""The peak of activations, counted by hand on graphs of a few nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgeward_models.graph import load_graph, skeleton
from edgeward_models.liveness import Peak, human, peak_activations, tensor_bytes
from edgeward_runtime.sessions import CPU, save_optimised
from edgeward_wire.verdict import Plan
from models.graphs import attention_block, convolution_block, model_of, save
from runtime import builders

W = np.ones((4, 4), np.float32)
ROW = 1 * 4 * 4  # bytes of one row of four floats


def node(op: str, inputs: str, output: str, **how: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], name=f"{op}-{output}", **how)


def peak(nodes: list, outputs: dict | None = None, weights: dict | None = None, **inputs: list) -> Peak:
    model = model_of(
        nodes, inputs or {"x": [1, 4]}, outputs or {"y": [1, 4]}, {"w": W} if weights is None else weights
    )
    return peak_activations(skeleton(model))


def test_a_chain_keeps_two_buffers_and_the_input() -> None:
    found = peak([node("MatMul", "x w", "a"), node("MatMul", "a w", "b"), node("MatMul", "b w", "y")])
    assert found == Peak(3 * ROW, "MatMul MatMul-b", 3 * ROW, 0)


def test_a_residual_keeps_its_shortcut_alive() -> None:
    nodes = [
        node("MatMul", "x w", "a"),
        node("MatMul", "a w", "b"),
        node("MatMul", "b w", "c"),
        node("Add", "a c", "y"),
    ]
    found = peak(nodes)
    assert (found.bytes, found.node) == (4 * ROW, "MatMul MatMul-c")  # x, a, b, c


def test_an_element_wise_operator_writes_over_what_it_reads_last() -> None:
    assert peak([node("MatMul", "x w", "a"), node("Relu", "a", "y")]).bytes == 2 * ROW
    # Here the input is the caller's, and may not be written over.
    assert peak([node("Relu", "x", "y")]).bytes == 2 * ROW
    # And here a is still read later.
    late = [
        node("MatMul", "x w", "a"),
        node("Relu", "a", "b"),
        node("MatMul", "a w", "c"),
        node("Add", "b c", "y"),
    ]
    assert peak(late).bytes == 4 * ROW


def test_a_larger_result_needs_its_own_buffer() -> None:
    nodes = [node("MatMul", "x w", "a"), node("Add", "a big", "y")]
    found = peak(nodes, {"y": [8, 4]}, {"w": W, "big": np.ones((8, 4), np.float32)})
    assert found.bytes == (1 + 1 + 8) * ROW


def test_views_take_nothing_and_keep_their_buffer_alive() -> None:
    nodes = [
        node("MatMul", "x w", "a"),
        node("Reshape", "a shape", "v"),
        node("MatMul", "a w", "b"),
        node("Reshape", "v back", "u"),
        node("Add", "u b", "y"),
    ]
    shapes = {"shape": np.array([4, 1], np.int64), "back": np.array([1, 4], np.int64)}
    found = peak(nodes, None, {"w": W, **shapes})
    assert (found.bytes, found.total) == (3 * ROW, 2 * ROW)


def test_a_view_that_nobody_reads_does_not_end_the_input() -> None:
    assert peak([node("Flatten", "x", "v"), node("MatMul", "x w", "y")]).bytes == 2 * ROW


def test_an_output_in_the_middle_stays_to_the_end() -> None:
    nodes = [node("MatMul", "x w", "m"), node("MatMul", "m w", "a"), node("MatMul", "a w", "y")]
    assert peak(nodes, {"m": [1, 4], "y": [1, 4]}).bytes == 4 * ROW


def test_what_nobody_reads_dies_at_once() -> None:
    nodes = [node("MatMul", "x w", "unread"), node("MatMul", "x w", "a"), node("MatMul", "a w", "y")]
    assert peak(nodes).bytes == 3 * ROW


def test_weights_and_what_is_made_of_them_do_not_count() -> None:
    nodes = [node("Transpose", "w", "wt"), node("MatMul", "x wt", "y")]
    assert peak(nodes) == Peak(2 * ROW, "MatMul MatMul-y", ROW, 0)
    large = np.ones((4, 4096), np.float32)  # so large that the skeleton makes an input of it
    assert peak([node("MatMul", "x w", "y")], {"y": [1, 4096]}, {"w": large}).bytes == ROW + 4 * 4096


def test_open_dimensions_have_the_length_that_is_said() -> None:
    model = model_of([node("Relu", "x", "y")], {"x": ["batch", 4]}, {"y": ["batch", 4]}, {})
    assert peak_activations(skeleton(model)).bytes == 2 * ROW
    assert peak_activations(skeleton(model, {"batch": 8})).bytes == 16 * ROW


def test_an_unknown_operator_makes_it_a_lower_bound() -> None:
    nodes = [helper.make_node("Riddle", ["x"], ["a"], domain="com.microsoft"), node("Relu", "a", "y")]
    found = peak(nodes)
    assert (found.unknown, found.bytes) == (1, 2 * ROW)
    assert human([found])[0].startswith("≥ ")


@pytest.mark.parametrize("level", ["basic", "extended", "all"])
@pytest.mark.parametrize("name", ["convolutions", "attention", "attention-14", "int8"])
def test_what_the_runtime_makes_can_be_measured_too(tmp_path: Path, level: str, name: str) -> None:
    made = {
        "convolutions": lambda: save(tmp_path / "m.onnx", convolution_block(size=16)),
        "attention": lambda: save(tmp_path / "m.onnx", attention_block()),
        "attention-14": lambda: save(tmp_path / "m.onnx", attention_block(opset=14)),
        "int8": lambda: builders.int8_classifier(tmp_path / "m.onnx"),
    }[name]()
    plan = Plan.model_validate({"provider": CPU, "variant": "x", "optimisation": level})
    save_optimised(made, plan, tmp_path / "out.onnx")
    before, after = (peak_activations(skeleton(load_graph(p))) for p in (made, tmp_path / "out.onnx"))
    assert before.unknown == 0
    # A processor's own layout pads channels to its blocks; short of that, nothing needs more at once here.
    assert 0 < after.bytes <= before.bytes * (4 if level == "all" else 1) + 64


def test_bytes_follow_the_type() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])
    y = helper.make_tensor_value_info("y", TensorProto.INT64, [1, 3])
    cast = helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16)
    back = helper.make_node("Cast", ["h"], ["y"], to=TensorProto.INT64)
    model = helper.make_model(helper.make_graph([cast, back], "g", [x], [y]))
    assert tensor_bytes(skeleton(model)) == {"x": 12, "h": 6, "y": 24}


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(["Relu", "MatMul", "Add", "Flatten"]), st.integers(0, 7)), max_size=12)
)
def test_the_peak_lies_between_the_largest_and_all(steps: list[tuple[str, int]]) -> None:
    names, nodes = ["x"], []
    for k, (op, source) in enumerate(steps):
        inputs = [names[source % len(names)]]
        inputs += {"MatMul": ["w"], "Add": [names[-1]]}.get(op, [])
        nodes.append(node(op, " ".join(inputs), f"t{k}"))
        names.append(f"t{k}")
    nodes.append(node("MatMul", f"{names[-1]} w", "y"))
    found = peak(nodes)
    assert found.unknown == 0
    assert 2 * ROW <= found.bytes <= ROW + found.total
