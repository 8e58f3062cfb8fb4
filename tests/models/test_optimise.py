"""Optimising: what changes, what must not, and what is said about it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeward_models import optimise as models
from edgeward_models.feeding import feed
from edgeward_models.inspect import inspect_model
from edgeward_models.made_names import set_apart
from edgeward_models.optimise import LEVELS, OptimiseReport, OptimiseRequest, compare, optimise, plain
from edgeward_models.optimiser import fuse_transformer
from edgeward_models.race import Timing
from edgeward_runtime.sessions import CPU, open_exact, open_session
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.verdict import Plan
from models.graphs import attention_block, convolution_block, model_of, save
from runtime import builders


def run(model: Path, out: Path, level: str = "basic", **how: object) -> OptimiseReport:
    return optimise(OptimiseRequest(model, out, level, **{"seconds": 0.0, **how}))  # type: ignore[arg-type]


@pytest.fixture
def convolutions(tmp_path: Path) -> Path:
    return save(tmp_path / "conv.onnx", convolution_block())


@pytest.fixture
def attention(tmp_path: Path) -> Path:
    # ONNX Runtime 1.23 finds attention behind a normalisation only.
    return save(tmp_path / "attention.onnx", attention_block(normed=True))


def test_basic_folds_and_stays_onnx(convolutions: Path, tmp_path: Path) -> None:
    report = run(convolutions, tmp_path / "out.onnx")
    assert report.kind == "cnn"
    assert (report.before.nodes, report.after.nodes) == (5, 4)
    assert [fusion.name for fusion in report.fusions] == ["Conv + BatchNormalization"]
    assert any(fusion.name.startswith("Conv + Relu") for fusion in report.at_load)
    assert report.same
    assert report.foreign == report.notes == ()
    assert {entry.domain for entry in onnx.load(str(tmp_path / "out.onnx")).opset_import} == {""}


@pytest.mark.parametrize("level", LEVELS)
def test_the_same_file_gives_the_same_bytes_and_the_same_outputs(
    attention: Path, tmp_path: Path, level: str
) -> None:
    one, two = run(attention, tmp_path / "one.onnx", level), run(attention, tmp_path / "two.onnx", level)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()
    assert one.same
    assert one.differences == two.differences
    assert one.kind == "transformer"


def test_a_transformer_is_fused_by_its_own_rules(attention: Path, tmp_path: Path) -> None:
    report = run(attention, tmp_path / "out.onnx", "extended")
    found = {fusion.name: fusion.count for fusion in report.fusions}
    assert found["attention"] == 1
    assert report.after.operators["com.microsoft::Attention"] == 1
    assert report.after.nodes < report.before.nodes / 3
    assert "com.microsoft::Attention" in report.notes[0]
    assert "basic" in report.notes[0]


def test_as_a_cnn_it_is_left_to_the_runtime(attention: Path, tmp_path: Path) -> None:
    report = run(attention, tmp_path / "out.onnx", "extended", kind="cnn")
    assert "attention" not in {fusion.name for fusion in report.fusions}
    assert report.same


def test_a_layout_for_this_processor_is_not_to_be_deployed(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", convolution_block(channels=16))
    report = run(path, tmp_path / "out.onnx", "all")
    assert len(report.notes) == 1
    if any("nchwc" in name for name in report.foreign):
        assert "do not deploy" in report.notes[0]


def test_the_model_is_not_written_over(convolutions: Path, tmp_path: Path) -> None:
    before = convolutions.read_bytes()
    (tmp_path / "link.onnx").symlink_to(convolutions)
    for out in (convolutions, tmp_path / "link.onnx"):
        with pytest.raises(Rejected, match="is the model itself"):
            run(convolutions, out)
    assert convolutions.read_bytes() == before
    run(convolutions, tmp_path / "other.onnx")
    run(convolutions, tmp_path / "other.onnx")  # an earlier result may be


def test_metadata_stay(tmp_path: Path) -> None:
    path = builders.classifier(tmp_path / "m.onnx", metadata={"who": "me"})
    run(path, tmp_path / "out.onnx")
    assert open_exact(tmp_path / "out.onnx").metadata == {"who": "me"}


def test_an_int8_file_keeps_its_dequantised_weights_at_basic(tmp_path: Path) -> None:
    path = builders.int8_classifier(tmp_path / "m.onnx")
    report = run(path, tmp_path / "out.onnx")
    assert report.folded == 0
    assert report.same
    assert inspect_model(tmp_path / "out.onnx", scratch=tmp_path).facts.precision == "int8"


def test_both_files_race_and_the_one_as_written_beside_them(convolutions: Path, tmp_path: Path) -> None:
    report = run(convolutions, tmp_path / "out.onnx", seconds=0.05)
    assert set(report.timed) == {models.BEFORE, models.AFTER, models.UNOPTIMISED}
    assert all(timing.ratio for timing in report.timings)


def test_everything_is_json(attention: Path, tmp_path: Path) -> None:
    told = json.loads(json.dumps(plain(run(attention, tmp_path / "out.onnx", "extended", seconds=0.05))))
    assert told["schema"] == "edgeward.optimise/1"
    assert told["before"]["peak"]["bytes"] > 0
    assert told["same"] is True
    assert told["machine"]["capability"]
    assert Timing(**told["timings"][0]).name == models.BEFORE


@pytest.mark.parametrize("level", LEVELS)
def test_what_was_optimised_can_be_optimised_again(attention: Path, tmp_path: Path, level: str) -> None:
    """The runtime names some tensors it makes alike each time; a second session would fail on them."""
    once = run(attention, tmp_path / "once.onnx", level)
    assert (once.fault, once.right) == ("", True)
    if level != "all":
        twice = run(tmp_path / "once.onnx", tmp_path / "twice.onnx", "extended")
        assert (twice.fault, twice.right) == ("", True)
    for plan_level in ("none", "basic", "extended", "all"):
        plan = Plan.model_validate({"provider": CPU, "variant": "x", "optimisation": plan_level})
        open_session(tmp_path / "once.onnx", plan).close()


def test_names_that_were_made_up_stay_apart_however_often() -> None:
    add = helper.make_node("Add", ["x", "shape"], ["y"])
    before = model_of([add], {"x": [1]}, {"y": [1]}, {"shape": np.ones(1, np.float32)})
    for expected in ("optimised/made", "optimised/optimised/made"):
        after = onnx.ModelProto()
        after.CopyFrom(before)
        after.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "made"))
        after.graph.node.insert(0, helper.make_node("Add", ["x", "made"], ["between"]))
        set_apart(after, before)
        assert after.graph.initializer[-1].name == after.graph.node[0].input[1] == expected
        assert after.graph.node[0].output[0].endswith("optimised/between")
        assert list(after.graph.node[-1].input) == ["x", "shape"]
        before = after


# --- outputs that differ


def scaled(path: Path, factor: float) -> Path:
    """y = factor * x, so that two of them differ by what is known."""
    node = helper.make_node("Mul", ["x", "k"], ["y"])
    return save(path, model_of([node], {"x": [1, 4]}, {"y": [1, 4]}, {"k": np.float32(factor)}))


def test_the_worst_element_is_reported_with_its_place(tmp_path: Path) -> None:
    one, two = scaled(tmp_path / "one.onnx", 1.0), scaled(tmp_path / "two.onnx", 1.5)
    fed = feed(inspect_model(one, scratch=tmp_path), count=3)
    (difference,) = compare(one, two, fed)
    every = np.stack([feeds["x"] for feeds in fed.feeds])
    assert difference.worst == pytest.approx(0.5 * np.abs(every).max(), rel=1e-6)
    assert difference.largest == pytest.approx(np.abs(every).max())
    assert abs(fed.feeds[np.abs(every).max(axis=(1, 2)).argmax()]["x"][difference.where]) == pytest.approx(
        difference.largest
    )
    assert difference.cosine == pytest.approx(1.0)


def test_what_is_not_finite_is_infinitely_wrong(tmp_path: Path) -> None:
    one, two = scaled(tmp_path / "one.onnx", 1.0), scaled(tmp_path / "two.onnx", float("nan"))
    (difference,) = compare(one, two, feed(inspect_model(one, scratch=tmp_path)))
    assert difference.worst == float("inf")
    assert difference.cosine == -1


def test_files_with_other_outputs_are_not_compared(tmp_path: Path) -> None:
    one = scaled(tmp_path / "one.onnx", 1.0)
    node = helper.make_node("Neg", ["x"], ["z"])
    other = save(tmp_path / "two.onnx", model_of([node], {"x": [1, 4]}, {"z": [1, 4]}, {}))
    with pytest.raises(Rejected, match="other outputs: y, z"):
        compare(one, other, feed(inspect_model(one, scratch=tmp_path)))


# --- bad input


def test_a_file_that_is_no_model_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"hello")
    with pytest.raises(Rejected, match="not an ONNX file"):
        run(tmp_path / "m.onnx", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_place_that_cannot_be_written_is_said(convolutions: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="cannot be written"):
        run(convolutions, tmp_path / "file" / "out.onnx")


def test_the_transformer_rules_say_why_they_do_not_apply() -> None:
    node = helper.make_node("Softmax", [], [])  # without what every Softmax has
    broken = helper.make_model(helper.make_graph([node, *attention_block().graph.node], "g", [], []))
    told = fuse_transformer(broken)
    assert isinstance(told, str)
    assert "Error" in told


def test_the_transformer_rules_stay_quiet_and_leave_the_original_alone(
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = attention_block()
    before = model.SerializeToString(deterministic=True)
    assert isinstance(fuse_transformer(model), onnx.ModelProto)
    assert model.SerializeToString(deterministic=True) == before
    sys.stderr.flush()
    assert capfd.readouterr() == ("", "")


def test_states_start_at_zero_and_constants_are_what_the_sidecar_says(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Add", ["x", "h"], ["s"]),
        helper.make_node("Mul", ["s", "k"], ["y"]),
        helper.make_node("Identity", ["s"], ["hn"]),
    ]
    shapes = {"x": [1, 4], "h": [1, 4], "k": [1]}
    path = save(tmp_path / "m.onnx", model_of(nodes, shapes, {"y": [1, 4], "hn": [1, 4]}, {}))
    path.with_suffix(".toml").write_text(
        'task = "tensor"\n[inputs.h]\nbind = "state:h"\n[inputs.k]\nconst = [2.0]\n'
        '[outputs.hn]\nbind = "state:h"\n'
    )
    fed = feed(inspect_model(path, scratch=tmp_path), count=2)
    assert set(fed.feeds[0]) == {"x", "h", "k"}
    assert not fed.feeds[0]["h"].any()
    assert fed.feeds[0]["k"].tolist() == [2.0]
    assert fed.origin.startswith("noise")


def test_rows_that_are_few_are_taken_as_they_are(tmp_path: Path) -> None:
    path = scaled(tmp_path / "m.onnx", 1.0)
    np.savez(tmp_path / "rows.npz", x=np.ones((4, 4), np.float32))
    fed = feed(inspect_model(path, scratch=tmp_path), tmp_path / "rows.npz", count=8)
    assert len(fed.feeds) == 2
    assert fed.origin == "4 rows in rows.npz"


def test_open_dimensions_are_counted_at_their_length(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    report = run(save(tmp_path / "m.onnx", model), tmp_path / "out.onnx")
    assert report.before.peak.bytes == 32
