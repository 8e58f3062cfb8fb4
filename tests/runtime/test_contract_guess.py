"""What is known of a file: from the file, its metadata, the sidecar and flags, in that order of strength."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from edgeward_runtime.contract_guess import guess
from edgeward_runtime.labels import read_labels
from edgeward_wire.errors import Rejected, Unavailable
from runtime.builders import classifier, int8_classifier, labels_file, picture_directory, sidecar_file


def test_a_bare_file_says_its_shapes_and_what_it_lacks(tmp_path: Path) -> None:
    known = guess(int8_classifier(tmp_path / "My Model.onnx"))
    image = known.contract.source.image
    assert image is not None
    assert (image.width, image.height, image.layout, image.colour) == (32, 32, "nchw", "rgb")
    assert (known.name, known.precision, known.opset) == ("my-model", "int8", 17)
    assert known.contract.task == "classification"
    assert known.contract.outputs[0].activation == "softmax"
    assert [m.key for m in known.missing] == ["labels"]
    assert any("scale and bias" in note for note in known.notes)
    with pytest.raises(Rejected, match="needs labels") as caught:
        known.complete()
    assert caught.value.next_step.startswith("Give --labels FILE: 3 lines")


def test_the_sidecar_beside_it_completes_it(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    labels_file(tmp_path / "labels.txt")
    picture_directory(tmp_path / "pictures")
    sidecar_file(tmp_path / "m.toml", samples="pictures")
    known = guess(path).complete()
    assert known.labels == tmp_path / "labels.txt"
    assert known.samples == tmp_path / "pictures"
    assert known.notes == ()


def test_flags_win_over_the_sidecar_and_the_sidecar_over_metadata(tmp_path: Path) -> None:
    said = {
        "name": "meta",
        "precision": "fp16",
        "inputs": {"image": {"colour": "bgr", "pad": 3}},
        "accuracy": {"top1": 0.5},
    }
    path = classifier(tmp_path / "m.onnx", metadata={"edgeward": json.dumps(said)})
    (tmp_path / "m.toml").write_text('name = "side"\n[inputs.image]\ncolour = "rgb"\nscale = 0.5\n')
    known = guess(path, flags={"name": "flag"})
    image = known.contract.source.image
    assert image is not None
    assert (known.name, known.precision, known.accuracy) == ("flag", "fp16", {"top1": 0.5})
    assert (image.colour, image.pad, image.scale) == ("rgb", 3, (0.5, 0.5, 0.5))


def test_probabilities_are_not_made_into_probabilities_again(tmp_path: Path) -> None:
    known = guess(classifier(tmp_path / "m.onnx", softmax=True))
    assert known.contract.outputs[0].activation == "none"


def small_graph(path: Path, inputs: dict[str, list], output: list, element: int = TensorProto.FLOAT) -> Path:
    """Inputs of these shapes; the output is the first one, flattened."""
    infos = [helper.make_tensor_value_info(name, element, shape) for name, shape in inputs.items()]
    nodes = [helper.make_node("Flatten", [next(iter(inputs))], ["y"])]
    nodes += [helper.make_node("Identity", [name], [f"y_{name}"]) for name in list(inputs)[1:]]
    outputs = [helper.make_tensor_value_info("y", element, output)]
    outputs += [
        helper.make_tensor_value_info(f"y_{name}", element, inputs[name]) for name in list(inputs)[1:]
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", infos, outputs),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(model, path)
    return path


def test_layouts_and_gray_are_seen(tmp_path: Path) -> None:
    cases = {
        "nhwc": ([1, 20, 30, 3], 30, 20, "rgb", "nhwc"),
        "gray": (["n", 1, 20, 30], 30, 20, "gray", "nchw"),
    }
    for name, (shape, width, height, colour, layout) in cases.items():
        image = guess(small_graph(tmp_path / f"{name}.onnx", {"x": shape}, ["n", "c"])).contract.source.image
        assert image is not None
        assert (image.width, image.height, image.colour, image.layout) == (width, height, colour, layout)


def test_pictures_of_any_size_need_a_size(tmp_path: Path) -> None:
    path = small_graph(tmp_path / "m.onnx", {"x": [1, 3, "h", "w"]}, [1, "c"])
    known = guess(path)
    assert [m.key for m in known.missing] == ["inputs.x", "inputs.x", "labels"]
    sized = guess(path, flags={"inputs": {"x": {"width": 64, "height": 48}}})
    assert [m.key for m in sized.missing] == ["labels"]
    assert sized.contract.source.shape == (1, 3, 48, 64)


def test_a_second_input_must_be_bound(tmp_path: Path) -> None:
    path = small_graph(tmp_path / "m.onnx", {"x": [1, 3, 8, 8], "t": [1, 1]}, [1, 192])
    assert "inputs.t" in [m.key for m in guess(path).missing]
    bound = guess(path, flags={"inputs": {"t": {"const": [0.5]}}}).contract
    assert [(p.name, p.bind, p.const) for p in bound.inputs] == [
        ("x", "source", None),
        ("t", "const", (0.5,)),
    ]


def test_what_is_no_picture_needs_a_task(tmp_path: Path) -> None:
    known = guess(small_graph(tmp_path / "m.onnx", {"x": ["n", 16]}, ["n", 16]))
    assert [m.key for m in known.missing] == ["task"]
    assert known.contract.dimensions["n"].default == 1


def test_bytes_go_in_as_they_are(tmp_path: Path) -> None:
    path = small_graph(tmp_path / "m.onnx", {"x": [1, 3, 8, 8]}, [1, 192], TensorProto.UINT8)
    image = guess(path).contract.source.image
    assert image is not None
    assert image.scale == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("sidecar", "says"),
    [
        ("task = ", "is not TOML"),
        ('colour = "rgb"', "unknown key 'colour'"),
        ("[inputs.image]\ncolor = 1", r"\[inputs.image\] has the unknown key 'color'"),
        ("[inputs.picture]\nwidth = 32", "has no input named 'picture'"),
        ("[inputs.image]\nwidth = 33", "has width 32 in the file, but 33 is declared"),
        ("[inputs.image]\nscale = [1.0]", "scale needs 3 numbers"),
        ('[inputs.image]\nscale = "x"', "not valid"),
        ('task = "poetry"', "task 'poetry' is not known"),
        ('precision = "int4"', "precision 'int4' is not known"),
        ('name = "No Good"', "cannot be a model's name"),
        ('labels = "none.txt"', "labels file .* is not there"),
        ('samples = "none"', "samples .* are not there"),
        ("inputs = 3", "one table for each name"),
    ],
)
def test_a_wrong_declaration_is_named(tmp_path: Path, sidecar: str, says: str) -> None:
    path = classifier(tmp_path / "m.onnx")
    (tmp_path / "m.toml").write_text(sidecar)
    with pytest.raises(Rejected, match=says):
        guess(path)


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="No such file"):
        guess(tmp_path / "none.onnx")
    with pytest.raises(Unavailable, match=r"none\.toml"):
        guess(classifier(tmp_path / "m.onnx"), tmp_path / "none.toml")
    with pytest.raises(Rejected, match="is not JSON"):
        guess(classifier(tmp_path / "j.onnx", metadata={"edgeward": "{"}))
    path = classifier(tmp_path / "new.onnx")
    model = onnx.load(path)
    model.opset_import[0].version = 99
    onnx.save(model, path)
    with pytest.raises(Rejected, match=r"does not load: It uses operator set 99"):
        guess(path)


def test_labels(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes("\ufefffirst\r\n second \n\n".encode())
    assert read_labels(path, 2) == ("first", "second")
    with pytest.raises(Rejected, match="has 2 labels, but the model has 3 classes"):
        read_labels(path, 3)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(Rejected, match="not UTF-8"):
        read_labels(path)
    path.write_text("\n\n")
    with pytest.raises(Rejected, match="holds no labels"):
        read_labels(path)
    with pytest.raises(Unavailable):
        read_labels(tmp_path / "none")
