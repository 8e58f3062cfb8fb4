"""Which nodes are quantised is told from the graph alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from edgeward_models.regions import CNN, TRANSFORMER, Graph, bypassed, operator_counts
from models import quant_models
from models.quant_models import Net


def graph(path: Path) -> Graph:
    return Graph(onnx.load(str(path)))


def test_all_weights_of_a_resnet_are_quantisable(tmp_path: Path) -> None:
    net = graph(quant_models.resnet(tmp_path / "m.onnx"))
    assert [w.name for w in net.quantisable] == ["stem", "a1", "a2", "b1", "b2", "b.short", "fc"]
    assert net.operators() == CNN
    assert net.tail == {"give.logits"}
    assert {"a.add", "b.add", "gap", "flat", "pool"} < set(net.to_quantise())


def test_the_decoder_of_boxes_stays_in_float_and_the_heads_convolutions_do_not(tmp_path: Path) -> None:
    net = graph(quant_models.yolo(tmp_path / "m.onnx"))
    assert net.operators() == CNN
    decoder = {
        "dfl.view",
        "dfl.turn",
        "dfl.soft",
        "dfl.conv",
        "box.view",
        "box.scale",
        "cls.view",
        "cls.prob",
        "decode",
    }
    assert net.tail == decoder | {"give.boxes"}
    chosen = set(net.to_quantise())
    assert {"head.box", "head.cls", "neck", "up", "cat2", "split", "cat"} < chosen
    assert not chosen & decoder


def test_a_softmax_after_the_last_product_stays_in_float(tmp_path: Path) -> None:
    net = Net()
    soft = net.op("Softmax", net.op("Relu", net.dense("x", 4, 3, name="fc"), name="act"), name="soft")
    found = graph(net.save(tmp_path / "m.onnx", {"x": (1, 4)}, {"y": soft}))
    assert found.tail == {"soft", "give.y"}
    assert found.to_quantise() == ["fc", "act"]  # the ReLU becomes part of the product


def test_a_transformer_quantises_products_with_constants_only(tmp_path: Path) -> None:
    net = graph(quant_models.transformer(tmp_path / "m.onnx"))
    assert net.operators() == TRANSFORMER
    assert net.to_quantise() == ["feature", "q", "k", "v", "o", "up", "down"]
    assert net.to_quantise(operators=("MatMul", "Gemm")) == ["q", "k", "v", "o", "up", "down"]
    assert "scores" not in net.to_quantise(operators=("MatMul", "Add", "Mul", "Softmax"))


def test_a_detector_with_one_attention_block_is_a_cnn(tmp_path: Path) -> None:
    net = Net()
    x = net.conv(net.conv("x", (4, 3, 3, 3)), (4, 4, 3, 3))
    x = net.conv(net.op("MatMul", x, x), (4, 4, 1, 1))
    assert graph(net.save(tmp_path / "m.onnx", {"x": (1, 3, 8, 8)}, {"y": x})).operators() == CNN


def test_what_stands_in_a_float_region_stays_in_float(tmp_path: Path) -> None:
    net = graph(quant_models.yolo(tmp_path / "m.onnx"))
    kept = net.to_quantise(keep_float=("stem",))
    sigmoid, mul = (c.name for c in net.consumers["stem.out"])
    assert sigmoid not in kept
    assert mul not in kept
    assert "m1" in kept
    assert len(kept) < len(net.to_quantise())


def test_constants_a_channel_are_not_cut_to_eight_bits(tmp_path: Path) -> None:
    net = Net()
    x = net.conv("x", (4, 3, 3, 3), name="first")
    x = net.op("Mul", x, net.constant(np.ones((4, 1, 1), np.float32)), name="a.channel")
    x = net.op(
        "Mul", net.conv(x, (4, 4, 3, 3), name="mid"), net.constant(np.array(2.0, np.float32)), name="scalar"
    )
    x = net.conv(x, (4, 4, 3, 3), name="last")
    found = graph(net.save(tmp_path / "m.onnx", {"x": (1, 3, 8, 8)}, {"y": x}))
    assert found.to_quantise() == ["first", "mid", "scalar", "last"]


def test_weights_say_their_axis_and_their_groups(tmp_path: Path) -> None:
    net = Net()
    x = net.conv("x", (6, 1, 3, 3), name="dw", group=6)
    x = net.conv(x, (12, 1, 3, 3), name="multiplied", group=6)
    x = net.op("Flatten", net.op("GlobalAveragePool", net.conv(x, (4, 12, 1, 1), name="pw")))
    x = net.matmul(net.dense(x, 4, 5, name="fc"), 5, 3, name="mm")
    found = {w.name: w for w in graph(net.save(tmp_path / "m.onnx", {"x": (1, 6, 8, 8)}, {"y": x})).weighted}
    assert [name for name, w in found.items() if w.depthwise] == ["dw"]
    assert {name: w.axis for name, w in found.items()} == {
        "dw": 0,
        "multiplied": 0,
        "pw": 0,
        "fc": 0,
        "mm": 1,
    }


def test_only_a_tensor_that_nothing_else_reads_gets_the_codes_of_its_relu(tmp_path: Path) -> None:
    net = Net()
    once = net.conv("x", (4, 3, 3, 3), name="once")
    twice = net.conv(net.op("Relu", once, name="relu1"), (4, 4, 3, 3), name="twice")
    out = net.op("Add", net.op("Relu", twice, name="relu2"), twice)
    found = graph(net.save(tmp_path / "m.onnx", {"x": (1, 3, 8, 8)}, {"y": out}))
    assert list(bypassed(found)) == [("once.out", "relu1.out")]
    assert operator_counts(found) == {"Conv": 2, "Relu": 2, "Add": 1, "Identity": 1}
