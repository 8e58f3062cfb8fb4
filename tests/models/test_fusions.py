"""Fusions are counted by what they leave behind; patterns and constants by hand on graphs made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeward_models.fusions import (
    Fusion,
    Patterns,
    constant_nodes,
    foreign,
    fusions,
    operators,
    patterns,
)
from edgeward_runtime.sessions import CPU, save_optimised
from edgeward_wire.verdict import Plan
from models.graphs import attention_block, convolution_block, model_of, save


def optimised(tmp_path: Path, model: onnx.ModelProto, level: str) -> onnx.ModelProto:
    out = tmp_path / f"{level}.onnx"
    plan = Plan.model_validate({"provider": CPU, "variant": "x", "optimisation": level})
    save_optimised(save(tmp_path / "in.onnx", model), plan, out)
    return onnx.load(str(out))


def test_operators_are_counted_with_their_domains() -> None:
    inner = helper.make_graph([helper.make_node("Relu", ["x"], ["z"])], "inner", [], [])
    nodes = [
        helper.make_node("FusedConv", ["x", "w"], ["a"], domain="com.microsoft"),
        helper.make_node("Relu", ["a"], ["b"], domain="ai.onnx"),
        helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], []))
    assert operators(model) == {"Relu": 3, "If": 1, "com.microsoft::FusedConv": 1}
    assert foreign(model) == ("com.microsoft::FusedConv",)


def test_patterns_of_a_convolutional_block() -> None:
    assert patterns(convolution_block()) == Patterns(conv_bn=1, conv_activation=1)
    assert not patterns(convolution_block()).transformer


@pytest.mark.parametrize("opset", [14, 17])
def test_patterns_of_an_attention_block(opset: int) -> None:
    found = patterns(attention_block(opset=opset))
    assert found == Patterns(attention=1, layer_norm=1, gelu=1)
    assert found.transformer


def test_batch_normalisation_goes_into_the_convolution_at_basic(tmp_path: Path) -> None:
    block = convolution_block()
    assert fusions(block, optimised(tmp_path, block, "basic")) == [Fusion("Conv + BatchNormalization", 1, "")]


def test_the_activation_goes_in_too_at_extended(tmp_path: Path) -> None:
    block = convolution_block()
    after = optimised(tmp_path, block, "extended")
    assert fusions(block, after) == [
        Fusion("Conv + BatchNormalization", 1, ""),
        Fusion("Conv + Relu", 1, "com.microsoft::FusedConv"),
    ]
    assert patterns(after) == Patterns()


def test_layer_norm_and_gelu_are_found_at_extended(tmp_path: Path) -> None:
    block = attention_block(opset=14)
    found = {fusion.name: fusion.count for fusion in fusions(block, optimised(tmp_path, block, "extended"))}
    assert found["Add + LayerNorm (SkipLayerNorm)"] == 1
    assert found.keys() & {"GELU", "Add + GELU (BiasGelu)"}


def test_nothing_between_a_graph_and_itself() -> None:
    block = attention_block()
    assert fusions(block, block) == []


def test_constants_are_followed_through_the_graph() -> None:
    nodes = [
        helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.float32(2))),
        helper.make_node("Mul", ["w", "k"], ["w2"]),
        helper.make_node("Sqrt", ["w2"], ["w3"]),
        helper.make_node("Add", ["x", "w3"], ["y"]),
        helper.make_node("RandomNormal", [], ["r"], shape=[2]),
        helper.make_node("RandomNormalLike", ["w"], ["s"]),
    ]
    model = model_of(nodes, {"x": [2]}, {"y": [2]}, {"w": np.ones(2, np.float32)})
    assert constant_nodes(model) == 2


def test_an_initialiser_that_is_an_input_is_no_constant() -> None:
    nodes = [helper.make_node("Sqrt", ["w"], ["y"])]
    model = model_of(nodes, {"x": [2], "w": [2]}, {"y": [2]}, {"w": np.ones(2, np.float32)})
    assert constant_nodes(model) == 0


def test_convolutions_in_a_processors_layout_say_so() -> None:
    node = helper.make_node(
        "Conv", ["x", "w", "b", "sum"], ["y"], domain="com.microsoft.nchwc", activation="Relu"
    )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 4, 4])
    after = helper.make_model(helper.make_graph([node], "g", [x], []))
    before = helper.make_model(helper.make_graph([], "g", [x], []))
    assert fusions(before, after) == [
        Fusion("Conv + Add + Relu, in this processor's layout", 1, "com.microsoft.nchwc::Conv")
    ]
