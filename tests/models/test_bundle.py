"""Bundles: the same inputs give the same content, blobs are what they are named, faults say what to do."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from edgeward_models.bundle import STEPS, Bundle, BundleRequest, make_bundle
from edgeward_runtime.golden import SEQUENCE_STEPS, cuts, read_npz, vectors
from edgeward_runtime.parity import worst_cosine
from edgeward_runtime.sessions import open_exact
from edgeward_wire.document import parse
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import FEATURES, Manifest
from models.test_telling import plain
from runtime import builders
from runtime.test_contract_guess import classical_file, listener
from runtime.test_sounds import wav


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An INT8 classifier with its labels and its sidecar."""
    path = builders.int8_classifier(tmp_path / "colours.onnx")
    builders.labels_file(tmp_path / "labels.txt")
    builders.sidecar_file(tmp_path / "colours.toml")
    return path


def bundle(model: Path, out: Path, **how: object) -> Bundle:
    return make_bundle(BundleRequest(model, **how), out)  # type: ignore[arg-type]


def test_a_bundle_is_whole(model: Path, tmp_path: Path) -> None:
    made = bundle(model, tmp_path / "out")
    refs = made.manifest.blobs()
    assert {ref.sha256 for ref in refs} == set(made.blobs)
    for ref in refs:
        raw = made.blobs[ref.sha256].read_bytes()
        assert (hashlib.sha256(raw).hexdigest(), len(raw)) == (ref.sha256, ref.length)
    assert made.manifest.requires == ("classification",)
    assert made.manifest.name == "colours"
    assert made.manifest.variants["int8"].precision == "int8"
    assert parse(Manifest, made.manifest.to_bytes()) == made.manifest


def test_the_same_inputs_give_the_same_content(model: Path, tmp_path: Path) -> None:
    one = bundle(model, tmp_path / "one", created="2026-01-01T00:00:00Z")
    two = bundle(model, tmp_path / "two", created="2027-01-01T00:00:00Z")
    assert one.content == two.content
    assert set(one.blobs) == set(two.blobs)


def test_other_inputs_give_other_content(model: Path, tmp_path: Path) -> None:
    first = bundle(model, tmp_path / "a").content
    builders.int8_classifier(model, salt=40)
    assert bundle(model, tmp_path / "b").content != first
    samples = builders.picture_directory(tmp_path / "pictures")
    builders.int8_classifier(model)
    assert bundle(model, tmp_path / "c", flags={"samples": str(samples)}).content != first


def test_noise_is_weak_evidence_and_pictures_are_strong(model: Path, tmp_path: Path) -> None:
    weak = bundle(model, tmp_path / "weak")
    assert weak.weak
    assert any("weak" in note for note in weak.notes)
    samples = builders.picture_directory(tmp_path / "pictures")
    strong = bundle(model, tmp_path / "strong", flags={"samples": str(samples)})
    assert not strong.weak


def test_golden_outputs_are_the_right_answers(model: Path, tmp_path: Path) -> None:
    samples = builders.picture_directory(tmp_path / "pictures", ("blue", "red", "green"))
    made = bundle(model, tmp_path / "out", flags={"samples": str(samples)})
    with np.load(made.blobs[made.manifest.variants["int8"].golden.sha256]) as arrays:
        answers = [int(arrays[f"out.{k}.logits"].argmax()) for k in range(8)]
        colours = [int(arrays[f"in.{k}.image"].mean(axis=(0, 2, 3)).argmax()) for k in range(8)]
    assert answers == colours


def test_a_float_model_needs_a_reason(tmp_path: Path) -> None:
    path = builders.classifier(tmp_path / "colours.onnx")
    builders.labels_file(tmp_path / "labels.txt")
    builders.sidecar_file(tmp_path / "colours.toml")
    with pytest.raises(Rejected, match="not INT8") as caught:
        bundle(path, tmp_path / "out")
    assert "--allow-float" in caught.value.next_step
    made = bundle(path, tmp_path / "out", allow_float="a trial")
    assert made.manifest.float_reason == "a trial"
    assert list(made.manifest.variants) == ["fp32"]


def test_an_empty_reason_is_none(tmp_path: Path) -> None:
    path = builders.classifier(tmp_path / "colours.onnx")
    labels = builders.labels_file(tmp_path / "labels.txt")
    with pytest.raises(Rejected, match="not INT8"):
        bundle(path, tmp_path / "out", allow_float="  ", flags={"labels": str(labels)})


def test_an_int8_model_keeps_no_reason(model: Path, tmp_path: Path) -> None:
    assert bundle(model, tmp_path / "out", allow_float="not needed").manifest.float_reason is None


def test_a_model_without_products_needs_no_reason(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph([helper.make_node("Softmax", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    made = bundle(path, tmp_path / "out", flags={"task": "tensor"})
    assert "no convolutions" in (made.manifest.float_reason or "")
    assert made.manifest.preprocess is None


def test_missing_labels_say_how_to_give_them(model: Path, tmp_path: Path) -> None:
    model.with_suffix(".toml").unlink()
    with pytest.raises(Rejected, match="labels") as caught:
        bundle(model, tmp_path / "out")
    assert "--labels" in caught.value.next_step


def test_labels_are_counted(model: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("red\ngreen\n")
    with pytest.raises(Rejected, match="2 labels, but logits has 3 scores"):
        bundle(model, tmp_path / "out")


@pytest.mark.parametrize(
    "raw", [b"red\r\ngreen\r\nblue\r\n", b"\xef\xbb\xbfred\ngreen\nblue", b"red\ngreen \nblue\n\n"]
)
def test_labels_come_out_the_same_however_they_were_saved(model: Path, tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "labels.txt").write_bytes(raw)
    made = bundle(model, tmp_path / "out")
    assert made.manifest.labels is not None
    assert made.blobs[made.manifest.labels.sha256].read_text() == "red\ngreen\nblue\n"


def test_labels_that_are_no_text_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(Rejected, match="UTF-8"):
        bundle(model, tmp_path / "out")


def test_flags_win_over_the_sidecar(model: Path, tmp_path: Path) -> None:
    made = bundle(model, tmp_path / "out", flags={"name": "other", "inputs": {"image": {"colour": "bgr"}}})
    assert made.manifest.name == "other"
    image = made.manifest.contract.source.image
    assert image is not None
    assert image.colour == "bgr"


def test_samples_without_pictures_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(Rejected, match="no pictures"):
        bundle(model, tmp_path / "out", flags={"samples": str(tmp_path / "none")})


def test_a_manifest_that_would_be_too_large_is_refused(tmp_path: Path) -> None:
    ports = [helper.make_tensor_value_info(f"c{k}", TensorProto.FLOAT, [4096]) for k in range(8)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4096])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4096])
    node = helper.make_node("Sum", ["x", *(p.name for p in ports)], ["y"])
    graph = helper.make_graph([node], "g", [x, *ports], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    consts = {p.name: {"const": [0.123456789012345] * 4096} for p in ports}
    with pytest.raises(Rejected, match="manifest would be") as caught:
        bundle(path, tmp_path / "out", flags={"task": "tensor", "inputs": consts})
    assert "initialisers" in caught.value.next_step


def test_progress_goes_from_nothing_to_all(model: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    make_bundle(BundleRequest(model), tmp_path / "out", lambda what, done, total: told.append((done, total)))
    assert {total for _, total in told} == {100}
    done = [one for one, _ in told]
    assert (done[0], done[-1]) == (0, 100)
    assert done == sorted(done)
    assert sum(STEPS.values()) == 100


# --- further variants


def two(tmp_path: Path, table: str) -> Path:
    """A float file whose sidecar adds the INT8 one."""
    path = builders.classifier(tmp_path / "colours.onnx")
    builders.int8_classifier(tmp_path / "colours-int8.onnx")
    builders.labels_file(tmp_path / "labels.txt")
    sidecar = builders.sidecar_file(tmp_path / "colours.toml")
    sidecar.write_text(sidecar.read_text() + table)
    return path


def test_a_sidecar_adds_variants_and_one_int8_is_enough(tmp_path: Path) -> None:
    table = '\n[variants.quick]\nfile = "colours-int8.onnx"\nprecision = "int8"\nproviders = ["CPU"]\n'
    made = bundle(two(tmp_path, table), tmp_path / "out")
    variants = made.manifest.variants
    assert {name: v.precision for name, v in variants.items()} == {"fp32": "fp32", "quick": "int8"}
    assert variants["quick"].targets.providers == ("CPU",)
    assert variants["quick"].golden != variants["fp32"].golden  # each has its own outputs
    assert made.manifest.float_reason is None
    assert {ref.sha256 for ref in made.manifest.blobs()} == set(made.blobs)
    assert bundle(tmp_path / "colours.onnx", tmp_path / "again").content == made.content


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (
            '[variants.x]\nfile = "colours-int8.onnx"\nprecision = "fp16"',
            "declared fp16, but colours-int8.onnx",
        ),
        ('[variants.x]\nfile = "gone.onnx"', "no file"),
        ("[variants.x]\nprecision = 'int8'", "needs file"),
        ('[variants.x]\nfile = "colours-int8.onnx"\ncolour = "red"', "unknown key 'colour'"),
        ('[variants.x]\nfile = "colours-int8.onnx"\narch = 3', "arch"),
        ('[variants.fp32]\nfile = "colours-int8.onnx"', "is colours.onnx itself"),
        ('[variants.x]\nfile = "more.onnx"', "has other outputs"),
    ],
)
def test_a_faulty_variant_is_named(tmp_path: Path, table: str, says: str) -> None:
    path = two(tmp_path, f"\n{table}\n")
    x = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 32, 32])
    y = helper.make_tensor_value_info("other", TensorProto.FLOAT, ["batch", 3, 32, 32])
    graph = helper.make_graph([helper.make_node("Relu", ["image"], ["other"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    (tmp_path / "more.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(Rejected, match=says):
        bundle(path, tmp_path / "out")


# --- what is no picture


def heard(tmp_path: Path, seconds: float) -> dict[str, object]:
    """Flags for the listener, with one sound of so many seconds for samples."""
    (tmp_path / "sounds").mkdir()
    values = np.sin(np.arange(int(seconds * 16_000)) / 20)
    (tmp_path / "sounds" / "a.wav").write_bytes(wav(values))
    return {
        "task": "vad",
        "samples": str(tmp_path / "sounds"),
        "inputs": {"input": {"rate": 16_000, "context": 64}, "sr": {"const": 16_000}},
    }


def test_a_model_that_hears_and_remembers_is_proven_on_a_sequence(tmp_path: Path) -> None:
    path = listener(tmp_path / "vad.onnx")
    made = bundle(path, tmp_path / "out", flags=heard(tmp_path, 3))
    assert not made.weak
    assert made.manifest.requires == ("vad", "audio", "state")
    (variant,) = made.manifest.variants.values()
    pairs = vectors(read_npz(made.blobs[variant.golden.sha256]))
    assert len(pairs) == SEQUENCE_STEPS
    steps = [inputs["input"][0] for inputs, _ in pairs]
    for one, two in pairwise(steps):  # the context of a window is the end of the one before
        np.testing.assert_array_equal(one[-64:], two[:64])
    assert worst_cosine(open_exact(path), pairs, made.manifest.contract) == pytest.approx(1.0)


def test_a_sequence_that_is_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="gives 3 steps; a model with state is proven on 8"):
        bundle(listener(tmp_path / "vad.onnx"), tmp_path / "out", flags=heard(tmp_path, 0.25))


def test_rows_are_strong_evidence(tmp_path: Path) -> None:
    path = classical_file(tmp_path / "c.onnx", "LinearClassifier")
    np.savez(tmp_path / "rows.npz", X=np.eye(3).repeat(9, axis=0))
    (tmp_path / "labels.txt").write_text("no\nyes\n")
    flags = {"samples": str(tmp_path / "rows.npz"), "labels": str(tmp_path / "labels.txt")}
    made = bundle(path, tmp_path / "out", flags=flags)
    assert not made.weak
    assert made.manifest.requires == ("classification", "tensors")
    assert made.float_reason is None
    (tmp_path / "labels.txt").write_text("no\n")
    with pytest.raises(Rejected, match="1 labels, but probabilities has 2 scores"):
        bundle(path, tmp_path / "out", flags=flags)


# --- what some processors would cut off


def plain_bundle(tmp_path: Path, **further: object) -> Bundle:
    """Of one u8 x s8 product with full 8-bit weights."""
    path, _, _ = plain(tmp_path)
    rows = np.random.default_rng(1).uniform(0, 4, (40, 32)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=rows)
    flags = {"task": "tensor", "samples": str(tmp_path / "rows.npz"), **further}
    return bundle(path, tmp_path / "out", flags=flags)


def test_a_file_that_may_saturate_carries_what_would_tell_and_says_so(tmp_path: Path) -> None:
    made = plain_bundle(tmp_path)
    (variant,) = made.manifest.variants.values()
    assert all(set(one) == {"y"} for one in cuts(read_npz(made.blobs[variant.golden.sha256])))
    assert "golden-cut" in made.manifest.requires
    assert set(made.manifest.requires) <= FEATURES
    (note,) = [note for note in made.notes if "saturate" in note]
    assert "sums of 1 of 1 nodes may saturate on x86-64 without VNNI" in note
    assert "sums of 1 of 1 nodes may saturate" in made.card


def test_what_a_device_would_not_unpack_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeward_models.bundle._MOST_GOLDEN_BYTES", 1000)
    made = plain_bundle(tmp_path)
    (variant,) = made.manifest.variants.values()
    assert not any(cuts(read_npz(made.blobs[variant.golden.sha256])))
    assert "golden-cut" not in made.manifest.requires


def test_nothing_is_said_where_no_processor_cuts_sums_off(model: Path, tmp_path: Path) -> None:
    safe = bundle(model, tmp_path / "out")
    assert not any("saturate" in note for note in safe.notes)
    assert "saturate on" not in safe.card
    assert "golden-cut" not in safe.manifest.requires
    for targets in ({"isa": ["avx512_vnni", "avx_vnni"]}, {"arch": ["aarch64"]}):
        hinted = plain_bundle(tmp_path, targets=targets)
        assert not any("saturate" in note for note in hinted.notes)
