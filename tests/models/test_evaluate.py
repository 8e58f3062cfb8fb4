"""Evaluation with real models: what it measures, what its gate decides, and what it refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgeward_models.bundle import BundleRequest, make_bundle
from edgeward_models.bundle_files import write_bundle
from edgeward_models.evaluate import EvaluateRequest, evaluate
from edgeward_models.evaluation import Gate, plain
from edgeward_models.metrics import Figure
from edgeward_models.statistics import Interval
from edgeward_wire.errors import Rejected
from runtime import builders

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ZOO = Path(__file__).resolve().parents[2] / "models/zoo"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """int8.onnx and fp32.onnx, with labels and a sidecar beside the INT8 file."""
    builders.int8_classifier(tmp_path / "int8.onnx")
    builders.classifier(tmp_path / "fp32.onnx")
    builders.labels_file(tmp_path / "labels.txt")
    builders.sidecar_file(tmp_path / "int8.toml")
    return tmp_path


def data(root: Path, each: int = 4) -> Path:
    """Pictures in one folder a colour."""
    for colour in builders.COLOURS:
        for k in range(each):
            builders.picture_file(root / colour / f"{k}.png", colour, width=40 + 8 * k)
    return root


def broken(source: Path, out: Path, last: np.ndarray) -> Path:
    """The float classifier with another bias in its last layer."""
    model = onnx.load(str(source))
    for tensor in model.graph.initializer:
        if tensor.name == "dense_bias":
            tensor.CopyFrom(numpy_helper.from_array(last.astype(np.float32), tensor.name))
    out.write_bytes(model.SerializeToString())
    return out


# --- classifiers


def test_the_shipped_model_knows_the_shipped_pictures(tmp_path: Path) -> None:
    expected = tomllib.loads((ZOO / "pictures/expected.toml").read_text())
    rows = "".join(f"{ZOO / 'pictures' / name},{table['classes'][0]}\n" for name, table in expected.items())
    (tmp_path / "set.csv").write_text(rows)
    found = evaluate(EvaluateRequest(ZOO / "efficientnet-lite0.onnx", data=tmp_path / "set.csv"))
    top1, top5 = found.row("top1"), found.row("top5")
    assert top1 is not None
    assert top5 is not None
    assert top1.model.value >= 0.8
    assert top5.model.value == 1
    assert top1.model.count == len(expected)
    assert found.label(found.classes[0].index) in {"tiger cat", "Egyptian cat", "missile", "palace"}
    assert found.gate is None
    assert found.parity is not None
    assert found.parity > 0.99


def test_both_files_are_judged_on_labelled_pictures(home: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    request = EvaluateRequest(home / "int8.onnx", home / "fp32.onnx", data=data(home / "data"), max_drop=0.6)
    found = evaluate(request, lambda *step: steps.append(step))
    assert [row.name for row in found.rows] == ["top1", "macro_f1", "agreement", "sqnr"]
    for row in found.rows[:2]:
        assert row.fp32 is not None
        assert row.drop is not None
        assert (row.model.value, row.fp32.value, row.drop.value) == (1, 1, 0)
    assert found.rows[2].model.value == 1
    assert 20 < found.rows[3].model.value < 60
    assert {row.model.count for row in found.rows} == {12}
    assert found.data == "12 pictures of 3 classes in data"
    assert found.layers is not None
    assert found.layers.rows
    assert found.gate is not None
    assert found.passed
    assert found.gate.decided
    assert ("evaluating", 12, 12) in steps
    assert list(dict.fromkeys(what for what, _, _ in steps)) == [
        "evaluating",
        "comparing layers",
        "computing figures",
    ]
    assert found.accuracy()["top1"] == 1
    assert found.accuracy()["top1_agreement_fp32"] == 1


def test_samples_without_labels_give_agreement_and_noise(home: Path) -> None:
    samples = builders.picture_directory(home / "pictures")
    request = EvaluateRequest(home / "int8.onnx", home / "fp32.onnx", samples=samples, count=20, seed=3)
    found = evaluate(request)
    assert [row.name for row in found.rows] == ["agreement", "sqnr"]
    assert found.samples == "20 from 3 pictures in pictures"
    assert found.evidence == "strong"
    assert any("20 crops of 3 pictures depend on one another" in note for note in found.notes)
    assert plain(evaluate(request))["figures"] == plain(found)["figures"]


def test_samples_that_are_given_stand_for_those_of_the_sidecar(home: Path) -> None:
    builders.sidecar_file(home / "int8.toml", samples="only-where-it-was-made")
    request = EvaluateRequest(home / "int8.onnx", home / "fp32.onnx", count=5)
    with pytest.raises(Rejected, match=r"samples .*only-where-it-was-made are not there"):
        evaluate(request)
    samples = builders.picture_directory(home / "pictures")
    found = evaluate(replace(request, samples=samples))
    assert found.samples == "5 from 3 pictures in pictures"


def test_noise_says_that_it_is_noise(home: Path) -> None:
    found = evaluate(EvaluateRequest(home / "int8.onnx", home / "fp32.onnx", count=5))
    assert found.evidence == "weak"
    assert any("noise" in note for note in found.notes)


def test_labelled_data_and_samples_are_each_used_for_theirs(home: Path) -> None:
    samples = builders.picture_directory(home / "pictures")
    found = evaluate(
        EvaluateRequest(
            home / "int8.onnx", home / "fp32.onnx", data=data(home / "data", 2), samples=samples, count=10
        )
    )
    counts = {row.name: row.model.count for row in found.rows}
    assert counts == {"top1": 6, "macro_f1": 6, "agreement": 10, "sqnr": 10}


def test_a_worse_file_fails_the_gate_and_says_what_it_confuses(home: Path) -> None:
    worse = broken(home / "fp32.onnx", home / "worse.onnx", np.array([0, 0, -1e3]))
    found = evaluate(
        EvaluateRequest(
            worse, home / "fp32.onnx", home / "int8.toml", data=data(home / "data", 30), max_drop=0.1
        )
    )
    assert found.gate is not None
    assert found.gate.drop.value == pytest.approx(1 / 3)
    assert not found.passed
    assert found.gate.decided
    assert found.confused[0].label == 2
    assert found.confused[0].count == 30
    told = plain(found)
    assert told["gate"]["passed"] is False
    assert told["confused"][0]["label"] == "blue"
    f1 = {entry["label"]: entry["f1"] for entry in told["classes"]}
    assert f1["blue"] == 0


def test_too_few_samples_leave_the_gate_undecided(home: Path) -> None:
    found = evaluate(
        EvaluateRequest(home / "int8.onnx", home / "fp32.onnx", data=data(home / "data", 2), max_drop=0.05)
    )
    assert found.gate is not None
    assert found.passed
    assert not found.gate.decided
    assert found.gate.needed is not None
    assert found.gate.needed > 6


def test_the_float_variant_of_the_sidecar_is_the_reference(home: Path) -> None:
    sidecar = home / "int8.toml"
    sidecar.write_text(sidecar.read_text() + '\n[variants.fp32]\nfile = "fp32.onnx"\n')
    found = evaluate(EvaluateRequest(home / "int8.onnx", count=4))
    assert found.against is not None
    assert found.against.file.name == "fp32.onnx"


def test_the_original_s_sidecar_serves_a_file_without_one(home: Path) -> None:
    (home / "int8.toml").rename(home / "fp32.toml")
    found = evaluate(EvaluateRequest(home / "int8.onnx", home / "fp32.onnx", data=data(home / "data", 1)))
    assert found.row("top1") is not None
    assert found.labels[0] == "red"


def test_a_bundle_brings_its_contract_its_labels_and_its_original(home: Path, tmp_path: Path) -> None:
    sidecar = home / "int8.toml"
    sidecar.write_text(sidecar.read_text() + '\n[variants.fp32]\nfile = "fp32.onnx"\n')
    made = make_bundle(BundleRequest(home / "int8.onnx"), tmp_path / "work")
    bundle = write_bundle(made, tmp_path / "m.bundle")
    found = evaluate(EvaluateRequest(bundle, data=data(tmp_path / "data", 2), max_drop=1, per_layer=True))
    assert (found.model.title, found.model.precision) == ("int8 int8", "int8")
    assert found.against is not None
    assert found.against.title == "int8 fp32"
    assert found.labels == ("red", "green", "blue")
    assert found.row("top1") is not None
    float_one = evaluate(EvaluateRequest(bundle, data=tmp_path / "data", variant="fp32"))
    assert (float_one.model.precision, float_one.against) == ("fp32", None)
    with pytest.raises(Rejected, match=r"m\.bundle has no variant 'fp16'") as caught:
        evaluate(EvaluateRequest(bundle, data=tmp_path / "data", variant="fp16"))
    assert caught.value.next_step == "It has: fp32, int8."
    with pytest.raises(Rejected, match="declared about the model is in it"):
        evaluate(EvaluateRequest(bundle, data=tmp_path / "data", flags={"task": "vad"}))


def test_a_variant_of_the_sidecar_is_chosen_by_name(home: Path) -> None:
    sidecar = home / "int8.toml"
    sidecar.write_text(sidecar.read_text() + '\n[variants.other]\nfile = "fp32.onnx"\n')
    found = evaluate(EvaluateRequest(home / "int8.onnx", data=data(home / "data", 1), variant="other"))
    assert found.model.title == "fp32.onnx"


def test_layers_are_compared_unless_told_otherwise(home: Path) -> None:
    files = (home / "int8.onnx", home / "fp32.onnx")
    assert evaluate(EvaluateRequest(*files, count=2)).layers is not None
    assert evaluate(EvaluateRequest(*files, count=2, per_layer=False)).layers is None


def test_layers_that_are_not_found_are_a_note_unless_asked_for(tmp_path: Path) -> None:
    first = numbers(tmp_path / "f.onnx", [helper.make_node("Identity", ["x"], ["y"])])
    request = EvaluateRequest(first, first, count=2, flags={"task": "tensor"})
    found = evaluate(request)
    assert found.layers is None
    assert any("Layers were not compared" in note for note in found.notes)
    with pytest.raises(Rejected, match="has no tensor of the names"):
        evaluate(replace(request, per_layer=True))


def test_exact_runs_are_their_own_proof(home: Path) -> None:
    found = evaluate(EvaluateRequest(home / "int8.onnx", home / "fp32.onnx", count=4, exact=True, threads=1))
    assert found.parity is None
    assert found.plan == "CPU, 1 thread, all optimisation off"


def test_equal_files_are_equal_and_json_knows_no_infinity(home: Path) -> None:
    found = evaluate(
        EvaluateRequest(home / "fp32.onnx", home / "fp32.onnx", home / "int8.toml", count=4, per_layer=True)
    )
    told = json.loads(json.dumps(plain(found), allow_nan=False))
    assert told["figures"]["sqnr"]["model"] == {"value": None, "low": None, "high": None, "samples": 4}
    assert {row["sqnr_db"] for row in told["layers"]["worst_first"]} == {None}
    assert "sqnr_db" not in told["accuracy"]


# --- what is neither


def numbers(path: Path, nodes: list, **weights: np.ndarray) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    path.write_bytes(model.SerializeToString())
    return path


def test_numbers_of_which_nothing_is_known_are_compared_by_cosine(tmp_path: Path) -> None:
    eye = np.eye(4, dtype=np.float32)
    mine = numbers(tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], w=eye * 1.01)
    theirs = numbers(tmp_path / "f.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], w=eye)
    rows = np.random.default_rng(0).normal(0, 1, (40, 4)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=rows)
    found = evaluate(EvaluateRequest(mine, theirs, samples=tmp_path / "rows.npz", max_drop=0.2))
    agreement, sqnr = found.row("agreement"), found.row("sqnr")
    assert agreement is not None
    assert sqnr is not None
    assert (agreement.model.value, agreement.model.count) == (1, 20)  # every second row is for fitting
    assert sqnr.model.value == pytest.approx(40, abs=0.01)
    assert found.passed
    with pytest.raises(Rejected, match=r"is judged for classification, .* not for tensor"):
        evaluate(EvaluateRequest(mine, theirs, flags={"task": "tensor"}, data=tmp_path / "rows.npz"))


# --- detectors

BOX = (16.0, 20.0, 12.0, 8.0)  # centre and size, on an input of 32 x 32
FRAME = {"x": 20.0, "y": 24.0, "w": 24.0, "h": 16.0}  # the same on a frame of 64 x 48, letterboxed


def detector(path: Path, shift: float = 0.0, score: float = 0.9) -> Path:
    """YOLOv8's layout with two classes and three anchors: one box where it belongs, whatever it sees."""
    anchors = np.zeros((1, 6, 3), np.float32)
    anchors[0, :, 0] = [BOX[0] + shift, *BOX[1:], score, 0.0]
    anchors[0, :, 1] = [BOX[0] + shift, *BOX[1:], 0.8, 0.0]
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["image"], ["m"], keepdims=0),
            helper.make_node("Mul", ["m", "nothing"], ["z"]),
            helper.make_node("Add", ["anchors", "z"], ["boxes"]),
        ],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, 6, 3])],
        [numpy_helper.from_array(anchors, "anchors"), numpy_helper.from_array(np.float32(0), "nothing")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """Two pictures with one object each, their COCO file, and two detectors."""
    detector(tmp_path / "good.onnx")
    detector(tmp_path / "off.onnx", shift=1.5)
    (tmp_path / "labels.txt").write_text("thing\nother\n")
    sidecar = 'task = "detection"\nlabels = "labels.txt"\n[inputs.image]\nresize = "letterbox"\n'
    for name in ("good", "off"):
        (tmp_path / f"{name}.toml").write_text(sidecar)
    box = [FRAME["x"], FRAME["y"], FRAME["w"], FRAME["h"]]
    for name in ("a", "b"):
        builders.picture_file(tmp_path / f"{name}.png", "red")
    coco = {
        "images": [{"id": k, "file_name": f"{name}.png"} for k, name in enumerate("ab")],
        "annotations": [{"id": k, "image_id": k, "category_id": 1, "bbox": box} for k in range(2)],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    return tmp_path


def test_boxes_are_held_against_coco_annotations_on_the_frame(scene: Path) -> None:
    pytest.importorskip("pycocotools", reason="mAP needs pycocotools (the extra eval)")
    found = evaluate(EvaluateRequest(scene / "good.onnx", data=scene / "coco.json"))
    assert [row.name for row in found.rows] == ["map50", "map50_95"]
    assert [row.model.value for row in found.rows] == pytest.approx([1, 1])
    assert found.class_ap == {0: pytest.approx(1)}


def test_boxes_that_are_off_fail_the_gate(scene: Path) -> None:
    pytest.importorskip("pycocotools", reason="mAP needs pycocotools (the extra eval)")
    found = evaluate(
        EvaluateRequest(scene / "off.onnx", scene / "good.onnx", data=scene / "coco.json", max_drop=0.1)
    )
    # 3 of 24 pixels aside: IoU 21/27, right at 0.50 ... 0.75
    row = found.row("map50_95")
    assert row is not None
    assert row.drop is not None
    assert (row.model.value, row.drop.value) == pytest.approx((0.6, 0.4))
    assert found.gate is not None
    assert found.gate.what == "mAP50-95"
    assert not found.passed
    agreement = found.row("agreement")
    assert agreement is not None
    assert agreement.model.value == 1  # by half they overlap
    assert found.accuracy()["agreement_fp32"] == 1


def test_a_detector_s_scores_count_beside_its_boxes(scene: Path) -> None:
    detector(scene / "off.onnx", score=0.3)
    found = evaluate(EvaluateRequest(scene / "off.onnx", scene / "good.onnx", samples=scene, count=4))
    row = found.row("sqnr")
    assert row is not None
    assert row.model.value < 10  # the boxes, of tens of pixels, are equal


def test_detectors_agree_without_labels_too(scene: Path) -> None:
    found = evaluate(EvaluateRequest(scene / "off.onnx", scene / "good.onnx", samples=scene, count=4))
    assert [row.name for row in found.rows] == ["agreement", "sqnr"]
    with pytest.raises(Rejected, match="declared yolov5, but that does not fit"):
        evaluate(EvaluateRequest(scene / "off.onnx", scene / "good.onnx", samples=scene, boxes="yolov5"))


# --- refusals


def test_there_must_be_something_to_compare_with(home: Path) -> None:
    with pytest.raises(Rejected, match=r"nothing to hold int8\.onnx against") as caught:
        evaluate(EvaluateRequest(home / "int8.onnx"))
    assert "--against" in caught.value.next_step
    assert "--data" in caught.value.next_step
    for how in ({"max_drop": 0.1}, {"per_layer": True}):
        with pytest.raises(Rejected, match="compares with FP32"):
            evaluate(EvaluateRequest(home / "int8.onnx", data=data(home / "data", 1), **how))  # type: ignore[arg-type]


def test_outputs_that_are_not_finite_are_refused_by_name(home: Path) -> None:
    bad = broken(home / "fp32.onnx", home / "nan.onnx", np.array([0, np.nan, 0]))
    with pytest.raises(Rejected, match=r"Output logits of nan\.onnx is not finite on sample 0"):
        evaluate(EvaluateRequest(bad, home / "fp32.onnx", home / "int8.toml", count=2))
    with pytest.raises(Rejected, match=r"Output logits of nan\.onnx is not finite on blue/0\.png"):
        evaluate(EvaluateRequest(home / "int8.onnx", bad, data=data(home / "data", 1), exact=True))


def test_another_model_is_no_original(home: Path) -> None:
    other = numbers(home / "o.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    with pytest.raises(Rejected, match=r"o\.onnx takes x \(float32\), and int8\.onnx image \(float32\)"):
        evaluate(EvaluateRequest(home / "int8.onnx", other))
    wide = builders.classifier(home / "wide.onnx", 5)
    with pytest.raises(Rejected, match=r"shape \(1, 3\), and \(1, 5\) in the float file"):
        evaluate(EvaluateRequest(home / "int8.onnx", wide))
    larger = builders.classifier(home / "larger.onnx", size=48)
    with pytest.raises(Rejected, match=r"larger\.onnx does not run on sample 0"):
        evaluate(EvaluateRequest(home / "int8.onnx", larger))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"count": 0}, "0 samples"),
        ({"max_drop": 1.5}, "1.5 cannot be a gate"),
        ({"threads": 0}, "0 threads"),
    ],
)
def test_requests_are_bounded(home: Path, how: dict[str, float], why: str) -> None:
    with pytest.raises(Rejected, match=why):
        evaluate(EvaluateRequest(home / "int8.onnx", home / "fp32.onnx", **how))  # type: ignore[arg-type]


def test_more_classes_in_the_data_than_in_the_model(home: Path) -> None:
    (home / "labels.txt").write_text("red\ngreen\nblue\nwhite\n")
    builders.picture_file(home / "data/white/0.png", "red")
    with pytest.raises(Rejected, match="class 3, but the model gives 3 scores"):
        evaluate(EvaluateRequest(home / "int8.onnx", data=home / "data"))


# --- the gate, purely


@given(st.floats(-0.5, 0.5), st.floats(0, 0.4), st.floats(0, 0.4), st.floats(0, 0.5))
def test_a_gate_is_passed_by_the_figure_and_decided_by_the_interval(
    value: float, below: float, above: float, allowed: float
) -> None:
    gate = Gate("top-1", allowed, Figure(value, Interval(value - below, value + above), 100))
    assert gate.passed == (value <= allowed + 1e-9)
    if gate.decided:
        ends = {Gate("", allowed, Figure(v, Interval(v, v), 1)).passed for v in gate.drop.interval}
        assert ends == {gate.passed}
        assert gate.needed is None
    elif gate.needed is not None:
        assert 0 < gate.needed <= 10_000_000
