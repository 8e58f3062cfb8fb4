"""What is known of a file: from the file, its metadata, the sidecar and flags, in that order of strength."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from edgeward_runtime.contract_guess import guess
from edgeward_runtime.labels import read_labels
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import features
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


# --- sound, state, rows


def listener(path: Path, length: object = 576) -> Path:
    """Like a detector of speech: sound and a rate go in, and state is carried on."""
    f, i = TensorProto.FLOAT, TensorProto.INT64
    inputs = [("input", f, ["batch", length]), ("state", f, [2, "batch", 4]), ("sr", i, [])]
    infos = [helper.make_tensor_value_info(*one) for one in inputs]
    outputs = [
        helper.make_tensor_value_info(*one)
        for one in (("output", f, ["batch", 1]), ("stateN", f, [2, "batch", 4]))
    ]
    nodes = [
        helper.make_node("ReduceMean", ["input"], ["output"], axes=[1]),
        helper.make_node("Cast", ["sr"], ["rate"], to=f),
        helper.make_node("Add", ["state", "rate"], ["stateN"]),
    ]
    graph = helper.make_graph(nodes, "g", infos, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_sound_is_declared_and_state_is_seen(tmp_path: Path) -> None:
    path = listener(tmp_path / "vad.onnx")
    said = {
        "task": "vad",
        "inputs": {"input": {"rate": 16_000, "context": 64}, "sr": {"const": 16_000}},
    }
    known = guess(path, flags=said).complete()
    sound, state, rate = known.contract.inputs
    assert sound.audio is not None
    assert sound.audio.model_dump() == {"rate": 16_000, "window": 512, "hop": 512, "context": 64}
    assert sound.shape == ("batch", 576)
    assert (state.bind, rate.const) == ("state:state", (16_000.0,))
    assert [port.bind for port in known.contract.outputs] == ["result", "state:state"]
    assert any("hop of input is not declared" in note for note in known.notes)
    assert any("taken as state that stateN carries on" in note for note in known.notes)


def test_declared_states_are_all_there_are(tmp_path: Path) -> None:
    path = listener(tmp_path / "vad.onnx", "samples")
    said: dict[str, Any] = {
        "task": "vad",
        "inputs": {
            "input": {"rate": 8000, "window": 256, "hop": 128},
            "state": {"bind": "state:h"},
            "sr": {"const": 8000},
        },
        "outputs": {"stateN": {"bind": "state:h"}},
    }
    contract = guess(path, flags=said).complete().contract
    assert contract.source.shape == ("batch", 256)
    assert contract.stateful
    said["outputs"] = {"output": {"bind": "state:h"}}
    with pytest.raises(
        Rejected, match=r"state:h cannot be carried on: state is float32 \(2, batch, 4\), but output"
    ):
        guess(path, flags=said)


@pytest.mark.parametrize(
    ("declared", "key", "says"),
    [
        ({"window": 512, "context": 64}, "inputs.input", "nothing says its rate"),
        ({}, "inputs.input", "at what rate input input takes sound"),
    ],
)
def test_sound_needs_its_rate(tmp_path: Path, declared: dict[str, int], key: str, says: str) -> None:
    said = {"task": "vad", "inputs": {"input": declared, "sr": {"const": 16_000}}}
    (missing,) = guess(listener(tmp_path / "vad.onnx"), flags=said).missing
    assert missing.key == key
    assert says in missing.what
    assert "[inputs.input]" in missing.next_step


def test_sound_of_any_length_needs_a_window_and_a_fixed_one_must_fit(tmp_path: Path) -> None:
    said = {"task": "vad", "inputs": {"input": {"rate": 16_000}, "sr": {"const": 16_000}}}
    (missing,) = guess(listener(tmp_path / "any.onnx", "samples"), flags=said).missing
    assert "nothing says its window" in missing.what
    said["inputs"]["input"]["window"] = 512  # type: ignore[index]
    with pytest.raises(Rejected, match="576 samples long in the file, but window 512 and context 0"):
        guess(listener(tmp_path / "fixed.onnx"), flags=said)


def classical_file(path: Path, kind: str) -> Path:
    """As skl2onnx writes a linear model: three features, and for a classifier a label and probabilities."""
    x = helper.make_tensor_value_info("X", TensorProto.FLOAT, [None, 3])
    if kind == "LinearClassifier":
        node = helper.make_node(
            kind,
            ["X"],
            ["label", "probabilities"],
            domain="ai.onnx.ml",
            coefficients=[1.0, 0, 0, 0, 1, 0],
            intercepts=[0.0, 0],
            classlabels_ints=[0, 1],
            post_transform="SOFTMAX",
        )
        outputs = [
            helper.make_tensor_value_info("label", TensorProto.INT64, [None]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [None, 2]),
        ]
    else:
        node = helper.make_node(
            kind, ["X"], ["variable"], domain="ai.onnx.ml", coefficients=[1.0, 2, 3], intercepts=[0.0]
        )
        outputs = [helper.make_tensor_value_info("variable", TensorProto.FLOAT, [None, 1])]
    graph = helper.make_graph([node], "g", [x], outputs)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


def test_scikit_learns_kind_is_known(tmp_path: Path) -> None:
    known = guess(classical_file(tmp_path / "c.onnx", "LinearClassifier"))
    assert known.contract.task == "classification"
    assert known.contract.scores is not None
    assert (known.contract.scores.name, known.contract.scores.activation) == ("probabilities", "none")
    (missing,) = known.missing
    assert missing.next_step.startswith("Give --labels FILE: 2 lines")
    assert any("scikit-learn's kind, taken as classification" in note for note in known.notes)
    assert features(known.contract) == ("classification", "tensors")
    known = guess(classical_file(tmp_path / "r.onnx", "LinearRegressor")).complete()
    assert known.contract.task == "tensor"


def test_sequences_of_maps_say_how_to_be_rid_of_them(tmp_path: Path) -> None:
    path = classical_file(tmp_path / "c.onnx", "LinearClassifier")
    model = onnx.load(path)
    model.graph.node.append(
        helper.make_node(
            "ZipMap", ["probabilities"], ["maps"], domain="ai.onnx.ml", classlabels_int64s=[0, 1]
        )
    )
    value = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    maps = helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, value))
    model.graph.output.append(helper.make_value_info("maps", maps))
    onnx.save(model, path)
    with pytest.raises(Rejected, match="does not load") as caught:
        guess(path)
    assert "zipmap" in caught.value.next_step


def test_what_a_contract_asks_of_a_device(tmp_path: Path) -> None:
    assert features(guess(int8_classifier(tmp_path / "m.onnx")).contract) == ("classification",)
    said = {"task": "vad", "inputs": {"input": {"rate": 16_000}, "sr": {"const": 16_000}}}
    contract = guess(listener(tmp_path / "vad.onnx"), flags=said).contract
    assert features(contract) == ("vad", "audio", "state")


def test_limits_targets_annotations_variants_and_the_report_are_read(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "m.toml").write_text(
        'report = "report.json"\n[limits]\np99_ms = 20\n[targets]\narch = ["x86_64"]\n'
        '[annotations]\nlicence = "MIT"\n[variants.arm]\nfile = "m-arm.onnx"\narch = ["aarch64"]\n'
        "[variants.arm.accuracy]\nsqnr_db = 20\n"
    )
    known = guess(path)
    assert known.limits.p99_ms == 20
    assert known.targets.arch == ("x86_64",)
    assert known.annotations == {"licence": "MIT"}
    assert known.report == tmp_path / "report.json"
    assert known.variants["arm"]["file"] == tmp_path / "m-arm.onnx"


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
        ("inputs = 3", "one table for each name"),
        ("limits = 3", "is a table of settings"),
        ("[limits]\np99 = 3", r"\[limits\] has the unknown key 'p99'"),
        ("[limits]\np99_ms = -3", "p99_ms"),
        ("[targets]\narch = 'x86_64'", "arch"),
        ('report = "none.json"', "report .* is not there"),
        ("[inputs.image]\nrate = 16000\nwidth = 32", "a picture or sound, not both"),
    ],
)
def test_a_wrong_declaration_is_named(tmp_path: Path, sidecar: str, says: str) -> None:
    path = classifier(tmp_path / "m.onnx")
    (tmp_path / "m.toml").write_text(sidecar)
    with pytest.raises(Rejected, match=says):
        guess(path)


def test_samples_that_are_gone_are_missing_only_to_what_needs_them(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    labels_file(tmp_path / "labels.txt")
    sidecar_file(tmp_path / "m.toml", samples="none")
    known = guess(path)
    assert known.samples is None
    assert known.complete(without=("samples",)) is known
    with pytest.raises(Rejected, match=r"samples .* are not there"):
        known.complete()


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
