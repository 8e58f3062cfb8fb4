"""The small reader of ONNX files."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from edgeward_runtime.onnx_file import read_facts
from edgeward_wire.errors import Rejected, Unavailable
from runtime.builders import classifier, int8_classifier


def test_it_reads_what_the_onnx_package_reads(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx", softmax=True, metadata={"edgeward": "{}", "x": "ü"})
    facts, model = read_facts(path), onnx.load(path)
    assert facts.opset == model.opset_import[0].version
    assert [(n.op, n.inputs, n.outputs) for n in facts.nodes] == [
        (n.op_type, tuple(n.input), tuple(n.output)) for n in model.graph.node
    ]
    assert facts.metadata == {"edgeward": "{}", "x": "ü"}
    assert facts.precision == "fp32"
    assert facts.producer_of("logits") == "Softmax"
    assert facts.producer_of("image") == ""


def test_it_knows_an_int8_file_and_looks_through_its_last_steps(tmp_path: Path) -> None:
    facts = read_facts(int8_classifier(tmp_path / "m.onnx"))
    assert facts.precision == "int8"
    assert facts.producer_of("logits") == "Gemm"


def test_it_knows_a_half_precision_file(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
        )
    onnx.save(model, path)
    assert read_facts(path).precision == "fp16"


def test_weights_in_other_files_are_rejected(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with pytest.raises(Rejected, match="weights in other files"):
        read_facts(path)


def test_a_cut_file_is_rejected(tmp_path: Path) -> None:
    path = int8_classifier(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Rejected, match=r"m\.onnx is not an ONNX file: it is cut short"):
        read_facts(path)


def test_what_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="No such file"):
        read_facts(tmp_path / "m.onnx")
    with pytest.raises(Rejected, match="not a file"):
        read_facts(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return int8_classifier(tmp_path_factory.mktemp("onnx") / "m.onnx").read_bytes()


@given(data=st.data())
def test_any_bytes_are_facts_or_rejected(
    data: st.DataObject, whole: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = data.draw(st.binary(max_size=200) | mutations(whole))
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    path.write_bytes(raw)
    with contextlib.suppress(Rejected):
        assert read_facts(path).opset >= 1


def mutations(whole: bytes) -> st.SearchStrategy[bytes]:
    """The file with a few bytes changed."""

    def change(changes: list[tuple[int, int]]) -> bytes:
        changed = bytearray(whole)
        for at, value in changes:
            changed[at] = value
        return bytes(changed)

    return st.lists(
        st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=8
    ).map(change)
