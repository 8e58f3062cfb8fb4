"""What is read of a file: facts counted by hand, refusals that name the remedy, and the sidecar."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgeward_models.graph import MAX_IR_VERSION, OPSETS, embed_external_data, read_facts
from edgeward_models.inspect import facts_table, inspect_model, plain, sidecar_text
from edgeward_wire.errors import Rejected
from runtime import builders

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ZOO = Path(__file__).resolve().parents[2] / "models/zoo"
CONV_MACS = 8 * 3 * 3 * 3 * 32 * 32
DENSE_MACS = 8 * 3


def save(path: Path, nodes: list, inputs: list, outputs: list, weights: dict, **how: object) -> Path:
    """A model of these parts; `opset`, `ir`, `domain` say how it is stamped."""
    initialisers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initialisers)
    imports = [helper.make_opsetid("", int(how.get("opset", 17)))]
    if "domain" in how:
        imports.append(helper.make_opsetid(str(how["domain"]), 1))
    model = helper.make_model(graph, opset_imports=imports)
    model.ir_version = int(how.get("ir", 8))
    path.write_bytes(model.SerializeToString())
    return path


def product(path: Path, **how: object) -> Path:
    """y = x · w, 4 × 8 by 8 × 16."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 16])
    dtype = how.pop("dtype", np.float32)
    node = helper.make_node(
        str(how.get("op", "MatMul")), ["x", "w"], ["y"], domain=str(how.get("domain", ""))
    )
    return save(path, [node], [x], [y], {"w": np.ones((8, 16), dtype)}, **how)


def test_the_facts_of_a_float_classifier_can_be_counted_by_hand(tmp_path: Path) -> None:
    facts = read_facts(builders.classifier(tmp_path / "m.onnx", metadata={"who": "me"}))
    assert (facts.opset, facts.ir_version, facts.precision) == (17, 8, "fp32")
    assert facts.macs == CONV_MACS + DENSE_MACS
    assert facts.quantised_macs == 0
    assert facts.inputs[0].shape == ("batch", 3, 32, 32)
    assert facts.outputs[0].shape == ("batch", 3)
    assert facts.operators == {"Conv": 1, "Relu": 1, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}
    assert facts.parameters == 8 * 27 + 8 + 24 + 3
    assert facts.metadata == {"who": "me"}


def test_an_int8_classifier_is_seen_as_one(tmp_path: Path) -> None:
    facts = read_facts(builders.int8_classifier(tmp_path / "m.onnx"))
    assert facts.precision == "int8"
    assert facts.int8_share == 1.0
    assert facts.macs == CONV_MACS + DENSE_MACS


def test_the_shipped_model_has_the_work_that_its_paper_says() -> None:
    facts = read_facts(ZOO / "efficientnet-lite0.onnx")
    assert 380e6 < facts.macs < 390e6  # 384 M in the EfficientNet-Lite paper
    assert facts.precision == "int8"
    assert facts.int8_share > 0.8


def test_a_product_counts_and_half_precision_is_seen(tmp_path: Path) -> None:
    assert read_facts(product(tmp_path / "a.onnx")).macs == 4 * 8 * 16
    assert read_facts(product(tmp_path / "b.onnx", dtype=np.float16)).precision == "fp16"


def test_dynamically_quantised_products_are_integers_too(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [4, 8])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, [4, 16])
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    facts = read_facts(save(tmp_path / "m.onnx", [node], [x], [y], {"w": np.ones((8, 16), np.uint8)}))
    assert (facts.macs, facts.quantised_macs) == (512, 512)


def test_work_in_a_branch_is_seen(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 16])
    weights = {"w": np.ones((8, 16), np.float32), "flag": np.array(True)}

    def branch(name: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 16])
        return helper.make_graph([helper.make_node("MatMul", ["x", "w"], [name])], name, [], [out])

    node = helper.make_node("If", ["flag"], ["y"], then_branch=branch("a"), else_branch=branch("b"))
    assert read_facts(save(tmp_path / "m.onnx", [node], [x], [y], weights)).macs >= 512


@pytest.mark.parametrize("opset", [OPSETS[0] - 1, OPSETS[1] + 1, 99])
def test_an_unsupported_opset_says_which_are(tmp_path: Path, opset: int) -> None:
    with pytest.raises(Rejected, match=f"opset {opset}.*{OPSETS[0]} to {OPSETS[1]}"):
        read_facts(product(tmp_path / "m.onnx", opset=opset))


def test_too_new_an_ir_version_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Rejected) as caught:
        read_facts(product(tmp_path / "m.onnx", ir=MAX_IR_VERSION + 1))
    assert "ir_version" in caught.value.next_step


def test_foreign_operators_are_named(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match=r"my\.company::Magic"):
        read_facts(product(tmp_path / "m.onnx", op="Magic", domain="my.company"))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "empty"),
        (b"PK\x03\x04 rest", "PyTorch"),
        (b"\x89HDF\r\n", "Keras"),
        (b"\x20\x00\x00\x00TFL3 and so on", "TensorFlow Lite"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"# Readme\nhello\n", "not an ONNX file"),
    ],
)
def test_what_is_not_onnx_is_called_by_its_name(tmp_path: Path, raw: bytes, says: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(raw)
    with pytest.raises(Rejected, match=says) as caught:
        read_facts(path)
    assert caught.value.next_step


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="There is no file"):
        read_facts(tmp_path / "nope.onnx")
    with pytest.raises(Rejected, match="directory"):
        read_facts(tmp_path)


@given(cut=st.integers(min_value=0), flip=st.integers(min_value=0))
def test_damage_is_refused_or_harmless_but_never_a_crash(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int
) -> None:
    directory = tmp_path_factory.getbasetemp() / "damage"
    directory.mkdir(exist_ok=True)
    whole = directory / "whole.onnx"
    raw = bytearray((whole if whole.exists() else builders.classifier(whole)).read_bytes())
    raw[flip % len(raw)] ^= 1 << flip % 8
    path = directory / "m.onnx"
    path.write_bytes(raw[: len(raw) - cut % len(raw)])
    with contextlib.suppress(Rejected):
        assert read_facts(path).bytes > 0


def external(directory: Path) -> Path:
    """A model whose weights lie beside it."""
    directory.mkdir(exist_ok=True)
    model = onnx.load(str(builders.classifier(directory / "inside.onnx")))
    path = directory / "m.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="m.bin", size_threshold=16)
    return path


def test_external_data_counts_and_is_embedded_the_same_each_time(tmp_path: Path) -> None:
    facts = read_facts(external(tmp_path / "a"))
    assert facts.external
    assert facts.macs == CONV_MACS + DENSE_MACS
    copies = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        copies.append(embed_external_data(facts, tmp_path / name).read_bytes())
    assert copies[0] == copies[1]
    whole = tmp_path / "one" / "m.onnx"
    assert not read_facts(whole).external
    assert read_facts(whole).parameters == facts.parameters


def test_missing_external_data_is_named(tmp_path: Path) -> None:
    path = external(tmp_path / "a")
    (tmp_path / "a" / "m.bin").unlink()
    with pytest.raises(Rejected, match=r"m\.bin"):
        read_facts(path)


@pytest.mark.parametrize("told", [True, False])
def test_external_data_that_were_cut_short_are_named(tmp_path: Path, told: bool) -> None:
    path = external(tmp_path / "a")
    if not told:  # the length is optional
        model = onnx.load(str(path), load_external_data=False)
        for tensor in model.graph.initializer:
            kept = [entry for entry in tensor.external_data if entry.key != "length"]
            del tensor.external_data[:]
            tensor.external_data.extend(kept)
        path.write_bytes(model.SerializeToString())
    assert read_facts(path).external
    data = tmp_path / "a" / "m.bin"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(Rejected, match=r"m\.bin is shorter than m\.onnx says") as caught:
        read_facts(path)
    assert "Copy it again" in caught.value.next_step


def test_external_data_elsewhere_is_refused(tmp_path: Path) -> None:
    path = external(tmp_path / "a")
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../outside.bin"
    (tmp_path / "outside.bin").write_bytes(b"x")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(Rejected, match="outside of its own directory"):
        read_facts(path)


Make = Callable[..., Path]


@pytest.mark.parametrize("make", [builders.classifier, builders.int8_classifier])
def test_the_sidecar_that_comes_out_goes_in(tmp_path: Path, make: Make) -> None:
    path = make(tmp_path / "m.onnx")
    labels = builders.labels_file(tmp_path / "labels.txt")
    first = inspect_model(path, flags={"labels": str(labels)}, scratch=tmp_path)
    sidecar = tmp_path / "m.toml"
    sidecar.write_text(sidecar_text(first))
    second = inspect_model(path, scratch=tmp_path)
    assert second.guess.contract == first.guess.contract
    assert second.guess.name == first.guess.name
    assert second.guess.labels == labels
    assert not second.guess.missing


def test_what_is_missing_stands_in_the_sidecar_as_a_comment(tmp_path: Path) -> None:
    text = sidecar_text(inspect_model(builders.classifier(tmp_path / "m.onnx"), scratch=tmp_path))
    assert "# MISSING" in text
    assert '# labels = "labels.txt"' in text
    assert tomllib.loads(text)["task"] == "classification"


def test_facts_are_shown_and_given_as_json(tmp_path: Path) -> None:
    inspection = inspect_model(builders.int8_classifier(tmp_path / "m.onnx"), scratch=tmp_path)
    shown = dict(facts_table(inspection))
    assert shown["precision"].startswith("int8: 100 %")
    assert shown["input image"] == "float32 batch × 3 × 32 × 32"
    assert plain(inspection)["int8_share"] == 1.0


def test_a_model_with_weights_beside_it_finds_its_sidecar(tmp_path: Path) -> None:
    path = external(tmp_path / "a")
    builders.labels_file(tmp_path / "a" / "labels.txt")
    builders.sidecar_file(tmp_path / "a" / "m.toml")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    inspection = inspect_model(path, scratch=scratch)
    assert inspection.guess.labels == tmp_path / "a" / "labels.txt"
    assert inspection.whole.parent == scratch
